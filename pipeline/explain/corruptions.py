"""Corruptions of images, weak and strong, and the accuracy of the CNN on corrupted images."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.cnn import CNN
from pipeline.model.metrics import accuracy, predict_logits

MAX_CHUNK, MAX_VALUES = 2000, 1 << 24  # images that are corrupted at a time, and values of their pixels


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images (N, H, W, C) moved down and to the right (up and to the left if negative), filled up with black."""
    height, width = images.shape[1:3]
    framed = F.pad(images, (0, 0, *(abs(right),) * 2, *(abs(down),) * 2))
    top, left = abs(down) - down, abs(right) - right
    return framed[:, top : top + height, left : left + width]


def subsampled(images: Tensor, every: int) -> Tensor:
    """Images (N, H, W, C) with only each ``every``-th row and column kept, enlarged to the size they had."""
    height, width = images.shape[1:3]
    kept = images[:, ::every, ::every]
    return kept.repeat_interleave(every, dim=1).repeat_interleave(every, dim=2)[:, :height, :width]


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images (N, H, W, C) uint8 turned around their centre, filled up with black."""
    height, width = images.shape[1:3]
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    # The grid counts in half sides, so an image that is not square needs the ratio of its sides.
    return _resampled(images, [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]])


def scaled(images: Tensor, factor: float) -> Tensor:
    """Images (N, H, W, C) uint8 enlarged or shrunk around their centre, filled up with black."""
    return _resampled(images, [[1 / factor, 0, 0], [0, 1 / factor, 0]])


def _resampled(images: Tensor, affine: list[list[float]]) -> Tensor:
    """Images whose pixel at (x, y) is the one that was at ``affine`` (2, 3) times (x, y, 1)."""
    pixels = images.permute(0, 3, 1, 2).float()
    theta = torch.tensor([affine], device=images.device)
    grid = F.affine_grid(theta, [1, *pixels.shape[1:]], align_corners=False)
    sampled = F.grid_sample(pixels, grid.expand(len(images), -1, -1, -1), align_corners=False)
    return sampled.round().to(torch.uint8).permute(0, 2, 3, 1)


def noisy(images: Tensor, deviation: float, draws: torch.Generator) -> Tensor:
    """Images uint8 with Gaussian noise; ``deviation`` is a share of the whole range. ``draws`` is one of the CPU."""
    noise = torch.randn(images.shape, generator=draws).to(images.device)
    return (images + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Images (N, H, W, C) uint8 blurred by a Gaussian; ``deviation`` is its standard deviation in pixels."""
    if not deviation:
        return images
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * deviation**2)).to(images.device)
    weights /= weights.sum()
    pixels = images.permute(3, 0, 1, 2).flatten(0, 1)[:, None].float()  # each channel an image of its own
    across = F.conv2d(pixels, weights.view(1, 1, 1, -1), padding=(0, reach))
    down = F.conv2d(across, weights.view(1, 1, -1, 1), padding=(reach, 0))
    return down.round().clamp(0, 255).to(torch.uint8).view(images.shape[3], *images.shape[:3]).permute(1, 2, 3, 0)


def with_contrast(images: Tensor, contrast: float) -> Tensor:
    """Images uint8 with their contrast multiplied by ``contrast``, at most 1, around the middle grey."""
    return (127.5 + (images - 127.5) * contrast).round().to(torch.uint8)


class Corruption(NamedTuple):
    """What corrupts images (N, H, W, C) uint8, the strengths to try, ascending, and their unit.

    It is given some of the images at a time, the strength, and a generator that goes on from one time to the next.
    """

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    strengths: tuple[float, ...]
    unit: str


def _fixed(function: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float, torch.Generator], Tensor]:
    """One that draws nothing."""
    return lambda images, strength, draws: function(images, strength)


CORRUPTIONS = {
    "shift": Corruption(
        _fixed(lambda images, by: moved(images, int(by), int(by))), (0, 1, 2, 3, 4, 5, 6), "pixels, right and down"
    ),
    "rotation": Corruption(_fixed(rotated), (0, 10, 20, 30, 40, 50, 60), "degrees"),
    "scale": Corruption(_fixed(scaled), (0.5, 0.65, 0.8, 1, 1.2, 1.35, 1.5), "times its size"),
    "noise": Corruption(noisy, (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "deviation / range"),
    "blur": Corruption(_fixed(blurred), (0, 0.5, 1, 1.5, 2, 2.5, 3), "deviation, pixels"),
    "contrast": Corruption(_fixed(with_contrast), (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1), "times its own"),
}
REPORTED = {  # in metrics.json
    "shifted_2_pixels": ("shift", 2),
    "rotated_15_degrees": ("rotation", 15),
    "noise_20_percent": ("noise", 0.2),
    "half_contrast": ("contrast", 0.5),
}


def accuracies(cnn: CNN, images: Tensor, labels: Tensor) -> dict[str, list[tuple[float, float]]]:
    """For each corruption (strength, accuracy) on corrupted images (N, H, W, C) uint8."""
    return {
        name: [(strength, _accuracy(cnn, images, labels, name, strength)) for strength in corruption.strengths]
        for name, corruption in CORRUPTIONS.items()
    }


def reported_accuracy(cnn: CNN, images: Tensor, labels: Tensor, name: str) -> float:
    """Accuracy on images (N, H, W, C) uint8 after the corruption ``name`` of REPORTED."""
    return _accuracy(cnn, images, labels, *REPORTED[name])


def _accuracy(cnn: CNN, images: Tensor, labels: Tensor, corruption: str, strength: float) -> float:
    apply, draws = CORRUPTIONS[corruption].apply, torch.Generator().manual_seed(0)
    chunks = torch.split(images, _chunk(images[0].numel()))
    return accuracy(torch.cat([predict_logits(cnn, apply(chunk, strength, draws)) for chunk in chunks]), labels)


def _chunk(values: int) -> int:
    """How many images of so many ``values`` are corrupted at a time.

    A multiple of 16: torch then draws the same random numbers as for all images at once.
    """
    return max(16, min(MAX_CHUNK, MAX_VALUES // values // 16 * 16))
