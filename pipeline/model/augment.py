"""Augmentations: how training images may be changed at random, so that the network sees each in many forms."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Of images (N, H, W, C) uint8, a strength and a generator; returns images of the same shape and type.
Augmentation = Callable[[Tensor, float, torch.Generator], Tensor]


def shift(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image (N, H, W, C) shifted by up to ``strength`` pixels in both directions; new pixels are 0."""
    limit = int(strength)
    count, height, width, _ = images.shape
    wide = F.pad(images, (0, 0, limit, limit, limit, limit))
    down, right = torch.randint(2 * limit + 1, (2, count, 1), generator=generator, device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    return wide[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


# By the parameter of `train.augmentation` that is its strength; 0 switches it off. They are applied in this order.
AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": shift,
}


def augment(images: Tensor, strengths: dict[str, float], generator: torch.Generator) -> Tensor:
    """Images (N, H, W, C) uint8 after each augmentation whose strength is not 0, on the images' device."""
    for name, strength in strengths.items():
        if strength:
            images = AUGMENTATIONS[name](images, strength, generator)
    return images
