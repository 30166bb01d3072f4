"""Images made harder, a little or a lot, and how well the CNN still knows them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.cnn import CNN
from pipeline.model.metrics import accuracy, predict_logits


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images (N, H, W, C) moved down and to the right, or the other way below 0; black where nothing was."""
    height, width = images.shape[1:3]
    framed = F.pad(images, (0, 0, *(abs(right),) * 2, *(abs(down),) * 2))
    top, left = abs(down) - down, abs(right) - right
    return framed[:, top : top + height, left : left + width]


def subsampled(images: Tensor, every: int) -> Tensor:
    """Images (N, H, W, C) of which each ``every``-th row and column is left, as large as before."""
    height, width = images.shape[1:3]
    kept = images[:, ::every, ::every]
    return kept.repeat_interleave(every, dim=1).repeat_interleave(every, dim=2)[:, :height, :width]


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images (N, H, W, C) uint8 turned around their middle, black where nothing was."""
    height, width = images.shape[1:3]
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    # The grid is in half sides, so that an image that is no square needs its two sides' ratio.
    return _resampled(images, [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]])


def scaled(images: Tensor, factor: float) -> Tensor:
    """Images (N, H, W, C) uint8 enlarged around their middle, or made smaller, black where nothing was."""
    return _resampled(images, [[1 / factor, 0, 0], [0, 1 / factor, 0]])


def _resampled(images: Tensor, grid_from: list[list[float]]) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float()
    turn = torch.tensor([grid_from], device=images.device)
    grid = F.affine_grid(turn, [1, *pixels.shape[1:]], align_corners=False)
    found = F.grid_sample(pixels, grid.expand(len(images), -1, -1, -1), align_corners=False)
    return found.round().to(torch.uint8).permute(0, 2, 3, 1)


def noisy(images: Tensor, deviation: float) -> Tensor:
    """Images uint8 with Gaussian noise of so many times the whole range, the same noise at each call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (images + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Images (N, H, W, C) uint8, each pixel a mean of those around it, with Gaussian weights of so many pixels."""
    if not deviation:
        return images
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * deviation**2)).to(images.device)
    weights /= weights.sum()
    pixels = images.permute(3, 0, 1, 2).flatten(0, 1)[:, None].float()  # each channel an image of its own
    across = F.conv2d(pixels, weights.view(1, 1, 1, -1), padding=(0, reach))
    down = F.conv2d(across, weights.view(1, 1, -1, 1), padding=(reach, 0))
    return down.round().clamp(0, 255).to(torch.uint8).view(images.shape[3], *images.shape[:3]).permute(1, 2, 3, 0)


def paler(images: Tensor, contrast: float) -> Tensor:
    """Images uint8 with less contrast, around the grey in the middle of the range."""
    return (127.5 + (images - 127.5) * contrast).round().to(torch.uint8)


class Change(NamedTuple):
    """A kind of change, its unit, how strong it is made, and what makes it."""

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float], Tensor]


CHANGES = (
    Change(
        "shift", "pixels, right and down", (0, 1, 2, 3, 4, 5, 6), lambda images, by: moved(images, int(by), int(by))
    ),
    Change("rotation", "degrees", (0, 10, 20, 30, 40, 50, 60), rotated),
    Change("scale", "times its size", (0.5, 0.65, 0.8, 1, 1.2, 1.35, 1.5), scaled),
    Change("noise", "deviation / range", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), noisy),
    Change("blur", "deviation, pixels", (0, 0.5, 1, 1.5, 2, 2.5, 3), blurred),
    Change("contrast", "times its own", (1, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1), paler),
)


def accuracies(cnn: CNN, images: Tensor, labels: Tensor) -> dict[str, list[tuple[float, float]]]:
    """For each kind of change its strengths, ascending, and the accuracy on images (N, H, W, C) uint8 changed so."""
    return {
        change.name: [
            (by, accuracy(predict_logits(cnn, change.apply(images, by)), labels)) for by in sorted(change.strengths)
        ]
        for change in CHANGES
    }


REPORTED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted_2_pixels": lambda images: moved(images, 2, 2),
    "rotated_15_degrees": lambda images: rotated(images, 15),
    "noise_20_percent": lambda images: noisy(images, 0.2),
    "half_contrast": lambda images: paler(images, 0.5),
}


def robustness(cnn: CNN, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on the same images (N, H, W, C) uint8 after each change that the metrics report."""
    return {name: accuracy(predict_logits(cnn, change(images)), labels) for name, change in REPORTED.items()}
