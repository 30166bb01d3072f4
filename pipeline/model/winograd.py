"""Convolutions by 3 x 3 filters on the CPU by Winograd's algorithm, with their gradients: see winograd_kernels.

Tiles, products and their gradients are computed for a few images at a time, so that they stay in the core's cache.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.model import winograd_kernels
from pipeline.model.cpu_kernels import Floats, Pair

MIN_CHANNELS = 32  # and filters; with fewer, the transforms cost more than they save
TOGETHER = 128  # tiles; the products of so many are the fastest
OF_SIDE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
TRANSFORM = torch.kron(OF_SIDE, OF_SIDE)  # of the weights of a filter
BIAS = 5  # the product whose gradient is the sum of those of a tile's outputs


def suits(convolution: nn.Conv2d) -> bool:
    """Whether this is such a convolution, and is faster so. It has no dilation and no groups."""
    sizes = convolution.kernel_size[0], convolution.stride[0]
    return sizes == (3, 1) and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS


class Tiles(NamedTuple):
    """The memory for some images at a time: ``tiles`` (16, room, channels), and ``products`` (16, room, filters)."""

    images: int
    tiles: Tensor
    products: Tensor


def products(inputs: Tensor, weight: Tensor, use: Callable[[Tensor, slice], None]) -> None:
    """Compute the products (16, T, filters) of some images at a time, and give them to ``use`` with these images.

    Inputs are (N, H, W, channels), contiguous, weights (filters, channels, 3, 3).
    """
    factors, (together, tiles, made) = _factors(weight), _tiles(inputs, len(weight))
    loop = _loops(inputs, tiles).forward
    for images in _groups(len(inputs), together):
        loop(_flat(inputs[images]), _flat(tiles))
        torch.bmm(tiles, factors, out=made)
        use(made, images)


def gradients(
    inputs: Tensor, weight: Tensor, grad_products: Callable[[Tensor, slice], None], needs_input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of the inputs (None unless ``needs_input_grad``), of the weights and of the biases.

    ``grad_products`` writes the gradients of the products (16, T, filters) of some images.
    """
    filters, channels, *_ = weight.shape
    together, tiles, made = _tiles(inputs, filters)
    loops, factors = _loops(inputs, tiles), _factors(weight).transpose(1, 2)
    grad_inputs = torch.zeros_like(inputs) if needs_input_grad else None
    grad_factors, grad_bias = torch.zeros(16, channels, filters), torch.zeros(filters)
    for images in _groups(len(inputs), together):
        if images.stop - images.start < together:  # what is left of the images before
            tiles.zero_()
            made.zero_()
        loops.forward(_flat(inputs[images]), _flat(tiles))
        grad_products(made, images)
        grad_bias += made[BIAS].sum(dim=0)
        grad_factors.baddbmm_(tiles.transpose(1, 2), made)
        if grad_inputs is not None:
            torch.bmm(made, factors, out=tiles)
            loops.backward(_flat(tiles), _flat(grad_inputs[images]))
    grad_weight = (TRANSFORM.T @ grad_factors.view(16, -1)).view(3, 3, channels, filters).permute(3, 2, 0, 1)
    return grad_inputs, grad_weight, grad_bias


def room(height: int, width: int) -> int:
    """How many tiles are computed together for outputs of this size: those of whole images, about TOGETHER."""
    of_image = (height // 2) * (width // 2)
    return of_image * max(1, TOGETHER // of_image)


def _factors(weight: Tensor) -> Tensor:
    """The sums of the weights (filters, channels, 3, 3) that the sums of the inputs are multiplied with: (16, C, F)."""
    filters, channels, *_ = weight.shape
    weights = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (TRANSFORM @ weights).view(16, channels, filters)


def _tiles(inputs: Tensor, filters: int) -> Tiles:
    _, height, width, channels = inputs.shape
    count = room(height - 2, width - 2)
    images = count // ((height // 2 - 1) * (width // 2 - 1))
    return Tiles(images, torch.zeros(16, count, channels), torch.empty(16, count, filters))


def _groups(count: int, together: int) -> Iterator[slice]:
    for start in range(0, count, together):
        yield slice(start, min(count, start + together))


def _loops(inputs: Tensor, tiles: Tensor) -> Pair:
    _, height, width, channels = inputs.shape
    return winograd_kernels.input_tiles(height, width, channels, tiles.shape[1])


def _flat(values: Tensor) -> Floats:
    flat: Floats = values.view(-1).numpy()
    return flat
