"""Augmentations: how training images may be changed at random, so that the network sees each in many forms.

The random draws are here; image_ops.py has what is done with them, on the CPU and on a GPU.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.model.image_kernels import KNOTS
from pipeline.model.image_ops import Displacement, operations

# Of contiguous images (N, H, W, C) uint8, a strength and a generator; returns new images of the same shape and type.
Augmentation = Callable[[Tensor, float, torch.Generator], Tensor]

CELLS = KNOTS - 3  # of the grid of displacements, along each side of an image: a cubic spline reaches beyond the ends


def flip(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images (N, H, W, C), each mirrored from left to right with probability ``strength``."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < strength
    return operations(images).flip(images, mirrored)


def crop(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image (N, H, W, C) cut out at random of itself with ``strength`` pixels more on each side, its reflection.

    As in the training on CIFAR (He et al., 2016, section 4.2, where the padding is black).
    """
    return operations(images).move(images, *_offsets(images, int(strength), generator), True)


def shift(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image (N, H, W, C) shifted by up to ``strength`` pixels in both directions; new pixels are 0."""
    return operations(images).move(images, *_offsets(images, int(strength), generator), False)


def _offsets(images: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each image two numbers between -limit and limit, (N,) each."""
    drawn = torch.randint(2 * limit + 1, (2, len(images), 1), generator=generator, device=images.device)
    ups, lefts = drawn.squeeze(2) - limit
    return ups, lefts


def brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image multiplied by a factor of up to ``strength`` above or below 1."""
    return operations(images).adjust(images, _uniform(1, strength, (len(images),), generator), False)


def contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image's differences to its mean brightness times a factor of up to ``strength`` above or below 1."""
    return operations(images).adjust(images, _uniform(1, strength, (len(images),), generator), True)


def cutout(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image with a square of ``strength`` pixels a side set to the mean of each channel.

    Its centre is any pixel, so it may reach beyond the edge (DeVries and Taylor, 2017, section 3.2).
    """
    side = int(strength)
    tops, lefts = (
        torch.randint(length, (len(images),), generator=generator, device=images.device) - side // 2
        for length in images.shape[1:3]
    )
    return operations(images).cutout(images, tops, lefts, side)


# By the parameter of `train.augmentation` that is its strength; 0 switches it off. They are applied in this order.
AUGMENTATIONS: dict[str, Augmentation] = {
    "horizontal_flip": flip,
    "crop_padding": crop,
    "shift": shift,
    "brightness": brightness,
    "contrast": contrast,
    "cutout": cutout,
}
# Those of these parameters that are on are one resampling, before the others.
AFFINE = ("rotation", "scale", "shear")
GEOMETRY = (*AFFINE, "elastic")


def augment(images: Tensor, strengths: Mapping[str, float], generator: torch.Generator) -> Tensor:
    """Images (N, H, W, C) uint8 after each augmentation whose strength is not 0, on the images' device.

    Only these draw random numbers. `mixup` is left to the function of this name, since it changes the labels too.
    """
    on = {name: strength for name, strength in strengths.items() if strength}
    if on.keys() & set(GEOMETRY):
        images = _resampled(images.contiguous(), on, generator)
    for name, augmentation in AUGMENTATIONS.items():
        if name in on:
            images = augmentation(images.contiguous(), on[name], generator)
    return images


def _resampled(images: Tensor, on: Mapping[str, float], generator: torch.Generator) -> Tensor:
    count, height, width, _ = images.shape
    off = torch.zeros(count, device=images.device)
    rotations, scales, shears = (_uniform(0, on[name], (count,), generator) if name in on else off for name in AFFINE)
    field = None
    if "elastic" in on:
        pushes = _uniform(0, on["elastic"], (count, 2, KNOTS, KNOTS), generator)
        field = Displacement(pushes, _spline(height, images.device), _spline(width, images.device))
    return operations(images).warp(images, rotations, scales, shears, field)


@functools.cache
def _spline(side: int, device: torch.device) -> Tensor:
    """The weight of each knot in each pixel of a side, (KNOTS, side): a cubic B-spline. They sum up to 1 in a pixel.

    Random numbers at the knots thus become a smooth field that nowhere exceeds them. That is a random field convolved
    with a Gaussian (Simard et al., 2003, section 2) with few numbers to draw: the spline is close to a Gaussian whose
    deviation is a seventh of the side, as their 4 of 28 pixels.
    """
    places = (torch.arange(side, device=device) + 0.5) * (CELLS / side)
    distances = (places - torch.arange(-1, KNOTS - 1, device=device)[:, None]).abs()
    far = (2 - distances).clamp(min=0) ** 3 / 6
    return torch.where(distances < 1, 2 / 3 - distances**2 + distances**3 / 2, far)


def _uniform(middle: float, limit: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers between ``middle`` minus ``limit`` and ``middle`` plus ``limit``, on the generator's device."""
    numbers = torch.empty(shape, device=generator.device)
    return numbers.uniform_(middle - limit, middle + limit, generator=generator)


def mixup(images: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image (N, H, W, C) uint8 mixed with the one before it, and the share () of its own in the result.

    The share is drawn from Beta(alpha, alpha) for all images (Zhang et al., 2018), and at least a half: with less, the
    image before it would be called its own.
    """
    # The share is a / (a + b) of two draws from Gamma(alpha), each one from Gamma(alpha + 1) times u ** (1 / alpha).
    # As logarithms, since with a small alpha both would often be 0.
    gammas = torch._standard_gamma(torch.full((2,), alpha + 1, device=images.device), generator)
    uniform = 1 - torch.rand(2, generator=generator, device=images.device)  # above 0
    logarithms = gammas.log() + uniform.log() / alpha
    share = (logarithms[0] - logarithms[1]).abs().sigmoid()
    return operations(images).mix(images.contiguous(), share), share
