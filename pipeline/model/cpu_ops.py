"""The CNN's logits and gradients on the CPU by the shortest way; on a GPU PyTorch's.

Where a block allows it, convolution, pooling and ReLU are one operation. What that takes of a block, a module of
``cnn.py``, is its weights and sizes; the function is the same, and a test holds it to it.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from pipeline.model import cpu_kernels
from pipeline.model.cnn import CNN, Block, Dropout, as_input, flattened, pooled, seen_sides
from pipeline.model.cpu_kernels import Loop, Pair

Precision = Literal["float32", "bfloat16"]
SIGNS = {"max": 1, "min": -1}
MOST_UNROLLED = 36  # multiply-adds for one filter and one pooling window; beyond, the compiler keeps loops, and is slow
FEWEST_FILTERS = 16  # a vector's length
FEWEST_FACTORS = 32  # channels and filters; with fewer the sums cost more than the multiplications that they save
SUMS_OF_THREE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
SUMS_OF_NINE = torch.kron(SUMS_OF_THREE, SUMS_OF_THREE)  # of a filter's weights, for ``cpu_kernels.winograd``


def logits(
    cnn: CNN, images: Tensor, generator: torch.Generator | None = None, precision: Precision = "float32"
) -> Tensor:
    """Logits (N, classes) float32 of images (N, H, W, C) uint8, on their device.

    The function and the gradients of ``cnn(as_input(images), generator)``. With bfloat16 the convolutions take and give
    numbers of 8 significant bits, but not one that reads bytes; all sums are float32. On a GPU PyTorch's autocast
    decides: there the dense layer takes such numbers too. Raises ValueError for images of another shape or type than
    the network's: the loops would read beyond them.
    """
    if images.shape[1:] != cnn.architecture.image_shape or images.dtype != torch.uint8:
        expected = " x ".join(map(str, cnn.architecture.image_shape))
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; the network takes N x {expected} torch.uint8"
        )
    sides = seen_sides(cnn.architecture)
    seen = images[:, : sides[0][0], : sides[0][1]]
    if images.device.type != "cpu":
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            scores: Tensor = cnn(as_input(seen), generator)
        return scores.float()
    first, *others = cnn.block_list()
    if _can_read_bytes(first):
        maps = _first_block(first, images, sides[1])
    else:
        maps, others = as_input(seen), [first, *others]
    for block in others:
        maps = _block(block, maps, precision)
    return _dropout_dense(flattened(maps), cnn.dropout, cnn.dense, generator)


class _Context(FunctionCtx):
    """What an operation leaves for the backward pass."""

    block: Block
    argmax: Tensor
    images: Tensor
    pair: Pair
    shape: torch.Size
    dtype: torch.dtype
    drawing: tuple[cpu_kernels.Drawn, int, np.float32]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


Gradients = tuple[Tensor | None, ...]


def _can_read_bytes(block: Block) -> bool:
    """Whether ``_first_block`` can stand in for this block, and is faster."""
    convolution = block.convolution
    taps = convolution.kernel_size[0] ** 2 * convolution.in_channels
    return _is_bare(block) and taps * block.pool_size**2 <= MOST_UNROLLED and convolution.out_channels >= FEWEST_FILTERS


def _is_bare(block: Block) -> bool:
    """Whether this block is convolution, pooling that one value wins, and ReLU: no padding, no normalisation."""
    return block.pool in SIGNS and isinstance(block.normalisation, nn.Identity) and block.convolution.padding == (0, 0)


def _first_block(block: Block, images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Of images (N, H, W, C) uint8 the maps (N, filters, H', W'), ``sides`` high and wide."""
    maps: Tensor = _FirstBlock.apply(block.convolution.weight, block.convolution.bias, images, block, sides)
    return maps


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, weight: Tensor, bias: Tensor, images: Tensor, block: Block, sides: tuple[int, int]
    ) -> Tensor:
        filters, channels, size, _ = weight.shape
        stride, sign = block.convolution.stride[0], SIGNS[block.pool]
        ctx.pair = cpu_kernels.first_block(size, stride, channels, filters, block.pool_size, sign)
        ctx.images, ctx.shape = images, weight.shape
        maps = torch.empty(len(images), *sides, filters)
        ctx.argmax = torch.empty(maps.shape, dtype=torch.uint8)
        weights = weight.permute(2, 3, 1, 0).div(255).contiguous()  # the loop takes pixels as 0 ... 255
        ctx.pair.forward(images.numpy(), weights.numpy(), bias.numpy(), maps.numpy(), ctx.argmax.numpy())
        return maps.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_maps: Tensor) -> Gradients:
        filters, channels, size, _ = ctx.shape
        grad_weights, grad_biases = torch.zeros(size, size, channels, filters), torch.zeros(filters)
        ctx.pair.backward(
            ctx.images.numpy(),
            _by_pixel(grad_maps).numpy(),
            ctx.argmax.numpy(),
            grad_weights.numpy(),
            grad_biases.numpy(),
        )
        return grad_weights.div_(255).permute(3, 2, 0, 1), grad_biases, None, None, None


def _block(block: Block, inputs: Tensor, precision: Precision) -> Tensor:
    """Of inputs (N, C, H, W) float32 the maps (N, filters, H', W') float32."""
    maps: Tensor
    if block.pool == "mean":
        maps = F.relu(block.normalisation(_convolved(block, inputs, precision)).float())
        return pooled(maps, block.pool, block.pool_size)
    if _is_bare(block) and block.pool_size > 1:
        maps = _BareBlock.apply(inputs, block.convolution.weight, block.convolution.bias, block, precision)
    else:
        maps = _PoolRelu.apply(block.normalisation(_convolved(block, inputs, precision)), block)
    return maps


def _convolved(block: Block, inputs: Tensor, precision: Precision) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        maps: Tensor = block.convolution(inputs)
    return maps


def _suits_winograd(block: Block) -> bool:
    """Whether ``_by_winograd`` can stand in for this bare block, and is faster."""
    convolution = block.convolution
    sizes = convolution.kernel_size[0], convolution.stride[0], block.pool_size
    return sizes == (3, 1, 2) and min(convolution.in_channels, convolution.out_channels) >= FEWEST_FACTORS


def _by_winograd(inputs: Tensor, weight: Tensor, bias: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Of inputs (N, C, H, W) what ``_pooled`` gives of their convolution."""
    filters, channels, *_ = weight.shape
    factors = (SUMS_OF_NINE @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(16, channels, filters)
    factors = F.pad(factors, (0, 0, 0, -channels % cpu_kernels.DEPTH))
    left = torch.empty(len(inputs), inputs.shape[2] // 2 - 1, inputs.shape[3] // 2 - 1, filters)
    argmax = torch.empty(left.shape, dtype=torch.uint8)
    loop = cpu_kernels.winograd(channels, filters, sign)
    loop(_by_pixel(inputs).numpy(), factors.numpy(), bias.numpy(), left.numpy(), argmax.numpy())
    return left, argmax


def _pooled(block: Block, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Of maps (N, filters, H, W) what pooling and ReLU leave, (N, H', W', filters), and the numbers of the argmax."""
    by_pixel = _by_pixel(maps)
    count, height, width, filters = by_pixel.shape
    left = torch.empty(count, height // block.pool_size, width // block.pool_size, filters)
    argmax = torch.empty(left.shape, dtype=torch.uint8)
    cpu_kernels.pool_relu(block.pool_size, SIGNS[block.pool]).forward(by_pixel.numpy(), left.numpy(), argmax.numpy())
    return left, argmax


class _PoolRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, maps: Tensor, block: Block) -> Tensor:
        left, ctx.argmax = _pooled(block, maps)
        ctx.block, ctx.shape, ctx.dtype = block, maps.shape, maps.dtype
        return left.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_left: Tensor) -> Gradients:
        count, filters, height, width = ctx.shape
        grad_maps = torch.zeros(count, height, width, filters)
        pair = cpu_kernels.pool_relu(ctx.block.pool_size, SIGNS[ctx.block.pool])
        pair.backward(_by_pixel(grad_left).numpy(), ctx.argmax.numpy(), grad_maps.numpy())
        return grad_maps.permute(0, 3, 1, 2).to(ctx.dtype), None


class _BareBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, inputs: Tensor, weight: Tensor, bias: Tensor, block: Block, precision: Precision
    ) -> Tensor:
        if precision == "float32" and _suits_winograd(block):
            left, ctx.argmax = _by_winograd(inputs, weight, bias, SIGNS[block.pool])
        else:
            left, ctx.argmax = _pooled(block, _convolved(block, inputs, precision))
        ctx.block = block
        ctx.save_for_backward(inputs, weight)
        return left.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_left: Tensor) -> Gradients:
        inputs, weights = (_by_pixel(each) for each in ctx.saved_tensors)
        filters, size, _, channels = weights.shape
        inputs_learn = ctx.needs_input_grad[0]  # not those of the first block, the images
        grad_inputs = torch.zeros(inputs.shape if inputs_learn else (0, 0, 0, 0))
        grad_weights, grad_biases = torch.zeros_like(weights), torch.zeros(filters)
        stride, window = ctx.block.convolution.stride[0], ctx.block.pool_size
        loop: Loop = cpu_kernels.conv_backward(size, stride, channels, window, inputs_learn)
        loop(
            inputs.flatten(2).numpy(),
            weights.flatten(2).numpy(),
            _by_pixel(grad_left).numpy(),
            ctx.argmax.numpy(),
            grad_inputs.flatten(2).numpy(),
            grad_weights.flatten(2).numpy(),
            grad_biases.numpy(),
        )
        return (
            grad_inputs.permute(0, 3, 1, 2) if inputs_learn else None,
            grad_weights.permute(0, 3, 1, 2),
            grad_biases,
            None,
            None,
        )


def _by_pixel(maps: Tensor) -> Tensor:
    """(N, filters, H, W) as (N, H, W, filters) float32 in this order of memory, which costs nothing if it has it."""
    return maps.permute(0, 2, 3, 1).float().contiguous()


def _dropout_dense(features: Tensor, dropout: Dropout, dense: nn.Linear, generator: torch.Generator | None) -> Tensor:
    """Of features (N, features) float32 the logits (N, classes)."""
    if not dropout.training or not dropout.dropped:
        return F.linear(features, dense.weight, dense.bias)
    drawn = dropout.draw(features, generator)
    scores: Tensor = _DropoutDense.apply(features, dense.weight, dense.bias, dropout, drawn)
    return scores


class _DropoutDense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, features: Tensor, weight: Tensor, bias: Tensor, dropout: Dropout, drawn: Tensor
    ) -> Tensor:
        features = features.contiguous()
        kept, scores = torch.empty(features.shape), torch.empty(len(features), len(weight))
        ctx.drawing = drawn.numpy(), dropout.lowest_kept, np.float32(dropout.scale)
        ctx.save_for_backward(kept, weight)
        cpu_kernels.dropout_dense().forward(
            features.numpy(), *ctx.drawing, weight.numpy(), bias.numpy(), kept.numpy(), scores.numpy()
        )
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_scores: Tensor) -> Gradients:
        kept, weight = ctx.saved_tensors
        grad_features, grad_weight, grad_bias = (
            torch.zeros_like(kept),
            torch.zeros_like(weight),
            torch.zeros(len(weight)),
        )
        cpu_kernels.dropout_dense().backward(
            grad_scores.contiguous().numpy(),
            *ctx.drawing,
            weight.numpy(),
            kept.numpy(),
            grad_features.numpy(),
            grad_weight.numpy(),
            grad_bias.numpy(),
        )
        return grad_features, grad_weight, grad_bias, None, None
