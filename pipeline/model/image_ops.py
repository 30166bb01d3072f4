"""Operations on training images (N, H, W, C) uint8, each twice: loops for the CPU, and PyTorch operations for a GPU.

``operations`` chooses. Both are given the same random draws, and a test compares them. All take contiguous images first
and return new ones.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model import image_kernels
from pipeline.model.cpu_kernels import Bytes


class Displacement(NamedTuple):
    """A smooth field of displacements (right, down) in pixels, as a weighted sum of those at knots.

    ``pushes`` are (N, 2, KNOTS, KNOTS), ``down_weights`` (KNOTS, H), ``right_weights`` (KNOTS, W).
    """

    pushes: Tensor
    down_weights: Tensor
    right_weights: Tensor


class ImageOperations(NamedTuple):
    """What the augmentations do with their draws, most of which are (N,), a number for each image."""

    # Up and to the left by these pixels, int64, or down and right below 0. Into view comes the image's reflection,
    # however far it has to be continued, or black.
    move: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    # Mirrored from left to right where the number, bool, is true.
    flip: Callable[[Tensor, Tensor], Tensor]
    # Resampled bilinearly: turned by these degrees, larger by these shares, slanted by these degrees, and displaced.
    # Beyond the edge are the edge's nearest pixels.
    warp: Callable[[Tensor, Tensor, Tensor, Tensor, Displacement | None], Tensor]
    # Pixels times these factors, or only their differences to the image's mean brightness; within 0 ... 255.
    adjust: Callable[[Tensor, Tensor, bool], Tensor]
    # With a square set to the mean of each channel: its first rows and columns, int64, and its side. It may be outside.
    cutout: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    # A share (), float32, of each image, and the rest of the image before it; of the last one for the first.
    mix: Callable[[Tensor, Tensor], Tensor]


def operations(images: Tensor) -> ImageOperations:
    """Those for the device of the images."""
    return LOOPS if images.is_cpu else TORCH


def _in_rows(images: Tensor) -> Bytes:
    """As an array (N, H, W * C)."""
    array: Bytes = images.numpy()
    return array.reshape(*array.shape[:2], -1)


def _move(images: Tensor, ups: Tensor, lefts: Tensor, reflects: bool) -> Tensor:
    moved = torch.empty_like(images)
    loop = image_kernels.move(images.shape[3], reflects)
    loop(_in_rows(images), ups.numpy(), lefts.numpy(), _in_rows(moved))
    return moved


def _flip(images: Tensor, mirrored: Tensor) -> Tensor:
    flipped = torch.empty_like(images)
    image_kernels.flip(images.shape[3])(_in_rows(images), mirrored.numpy(), _in_rows(flipped))
    return flipped


def _warp(
    images: Tensor, rotations: Tensor, scales: Tensor, shears: Tensor, displacement: Displacement | None
) -> Tensor:
    warped, (count, height, width, channels) = torch.empty_like(images), images.shape
    none = Displacement(torch.empty(0, 2, 0, 0), torch.empty(0, height), torch.empty(0, width))
    arrays = (each.numpy() for each in (rotations, scales, shears, *(displacement or none)))
    loop = image_kernels.warp(channels, displacement is not None)
    loop(images.numpy().reshape(count, -1), *arrays, warped.numpy().reshape(count, -1))
    return warped


def _adjust(images: Tensor, factors: Tensor, keeps_mean: bool) -> Tensor:
    adjusted = torch.empty_like(images)
    loop = image_kernels.adjust(images.shape[3], keeps_mean)
    loop(_in_rows(images), factors.numpy(), _in_rows(adjusted))
    return adjusted


def _cutout(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> Tensor:
    cut = torch.empty_like(images)
    loop = image_kernels.cutout(images.shape[3])
    loop(_in_rows(images), tops.numpy(), lefts.numpy(), side, _in_rows(cut))
    return cut


def _mix(images: Tensor, share: Tensor) -> Tensor:
    mixed, count = torch.empty_like(images), len(images)
    loop = image_kernels.mix()
    loop(images.numpy().reshape(count, -1), share.view(1).numpy(), mixed.numpy().reshape(count, -1))
    return mixed


LOOPS = ImageOperations(_move, _flip, _warp, _adjust, _cutout, _mix)


def _move_by_torch(images: Tensor, ups: Tensor, lefts: Tensor, reflects: bool) -> Tensor:
    count, height, width, _ = images.shape
    rows, columns = (
        start[:, None] + torch.arange(length, device=images.device) for start, length in ((ups, height), (lefts, width))
    )
    down, right = _reflected(rows, height), _reflected(columns, width)
    moved = images[torch.arange(count, device=images.device)[:, None, None], down[:, :, None], right[:, None, :]]
    if reflects:
        return moved
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return moved * inside.unsqueeze(3)


def _reflected(lines: Tensor, length: int) -> Tensor:
    """The rows or columns, of ``length``, that a mirror at the first and at the last one shows instead of these."""
    period = max(2 * (length - 1), 1)
    remainder = lines.remainder(period)
    return torch.where(remainder < length, remainder, period - remainder)


def _flip_by_torch(images: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)


def _warp_by_torch(
    images: Tensor, rotations: Tensor, scales: Tensor, shears: Tensor, displacement: Displacement | None
) -> Tensor:
    count, height, width, _ = images.shape
    sides = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    right, down = (numbers - (len(numbers) - 1) / 2 for numbers in sides)
    offsets = torch.stack([right.expand(height, width), down[:, None].expand(height, width)])  # (2, H, W)
    origins = (_origins(rotations, scales, shears) @ offsets.flatten(1)).view(count, 2, height, width)
    if displacement:
        origins = origins + displacement.down_weights.T @ displacement.pushes @ displacement.right_weights
    # grid_sample counts in half sides from the centre.
    grid = torch.stack([origins[:, 0] * 2 / width, origins[:, 1] * 2 / height], dim=3)
    pixels = images.permute(0, 3, 1, 2).float()
    sampled = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return _rounded(sampled).permute(0, 2, 3, 1).contiguous()


def _origins(rotations: Tensor, scales: Tensor, shears: Tensor) -> Tensor:
    """Matrices (N, 2, 2) from a pixel's offset (right, down) from the centre to that of where it comes from."""
    angles, slants = rotations * (math.pi / 180), (shears * (math.pi / 180)).tan()
    cosines, sines = angles.cos() / (1 + scales), angles.sin() / (1 + scales)
    matrices = torch.stack([cosines - slants * sines, sines + slants * cosines, -sines, cosines], dim=1)
    return matrices.view(-1, 2, 2)


def _adjust_by_torch(images: Tensor, factors: Tensor, keeps_mean: bool) -> Tensor:
    factors = factors.view(-1, 1, 1, 1)
    values = images * factors
    if keeps_mean:
        shares = image_kernels.brightness_shares(images.shape[3])
        channels = zip(shares, _means(images).unbind(dim=3), strict=True)
        values = values + (1 - factors) * torch.stack([share * mean for share, mean in channels]).sum(dim=0)[..., None]
    return _rounded(values.clamp(0, 255))


def _means(images: Tensor) -> Tensor:
    """The mean of each channel, (N, 1, 1, C)."""
    return images.float().mean(dim=(1, 2), keepdim=True)


def _cutout_by_torch(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> Tensor:
    covered = []
    for starts, length in zip((tops, lefts), images.shape[1:3], strict=True):
        places = torch.arange(length, device=images.device) - starts[:, None]
        covered.append((places >= 0) & (places < side))
    square = covered[0][:, :, None] & covered[1][:, None, :]
    return torch.where(square.unsqueeze(3), _rounded(_means(images)), images)


def _mix_by_torch(images: Tensor, share: Tensor) -> Tensor:
    return _rounded(share * images + (1 - share) * images.roll(1, dims=0))


def _rounded(values: Tensor) -> Tensor:
    """As the loops round: halves upwards."""
    return (values + 0.5).to(torch.uint8)


TORCH = ImageOperations(
    _move_by_torch, _flip_by_torch, _warp_by_torch, _adjust_by_torch, _cutout_by_torch, _mix_by_torch
)
