"""Fused CPU operations: each computes several layers of a block at once, faster than PyTorch's separate ones.

``run`` uses one only for exactly the layers that it computes. The result is the same: a test compares it with the
layers in float64.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from pipeline.model import cpu_kernels, winograd, winograd_kernels
from pipeline.model.cpu_kernels import Loop, Normalised, Pair
from pipeline.model.cpu_threads import Chunk, current_chunk
from pipeline.model.layers import BatchNorm, Dropout, Pooling, as_float

SIGNS = {"max": 1, "min": -1}
MAX_UNROLLED = 36  # multiply-adds for one filter and one pooling window; above it, the compiler keeps slow loops
MIN_FILTERS = 16  # a vector's length


class FusedLayers(NamedTuple):
    """An operation that computes layers of these ``kinds``, in this order, if ``suits`` returns True for them."""

    kinds: tuple[type[nn.Module], ...]
    suits: Callable[..., bool]
    compute: Callable[..., Tensor]


def run(layers: Iterable[nn.Module], maps: Tensor) -> Tensor:
    """The output of ``layers``, applied in order to maps (N, C, H, W): floats, or bytes where 255 stands for 1.

    A layer without a fused operation is called as usual. So are all layers on another device, in an export, with other
    dtypes, and with a registered hook.
    """
    waiting = list(layers)
    while waiting:
        if fused := _matching(waiting, maps):
            maps = fused.compute(*waiting[: len(fused.kinds)], maps)
            del waiting[: len(fused.kinds)]
        elif maps.dtype == torch.uint8:
            maps = as_float(maps)
        else:
            maps = waiting.pop(0)(maps)
    return maps


def _matching(layers: list[nn.Module], maps: Tensor) -> FusedLayers | None:
    if not _is_computed_here(maps):
        return None
    for fused in FUSED:
        found = layers[: len(fused.kinds)]
        if tuple(map(type, found)) == fused.kinds and not any(map(_has_hooks, found)) and fused.suits(*found, maps):
            return fused
    return None


def _is_computed_here(maps: Tensor) -> bool:
    """Whether the loops can read these numbers: not on a GPU, and not the fake tensors of an export."""
    readable = type(maps) is Tensor and maps.is_cpu and maps.dtype in (torch.uint8, torch.float32, torch.bfloat16)
    return readable and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether this is a convolution with square filters, the same number of zeros on each side, and a bias."""
    (height, width), (down, right) = convolution.kernel_size, convolution.stride
    pads_alike = convolution.padding_mode == "zeros" and convolution.padding in [(side, side) for side in range(height)]
    is_plain = pads_alike and convolution.dilation == (1, 1) and convolution.groups == 1
    return height == width and down == right and is_plain and convolution.bias is not None


def _padded(maps: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Maps (N, C, H, W) with the zeros that the convolution adds on each side."""
    side = int(convolution.padding[0])
    return F.pad(maps.permute(0, 2, 3, 1), (0, 0, *[side] * 4)).permute(0, 3, 1, 2) if side else maps


class _Context(FunctionCtx):
    """What an operation saves for the backward pass."""

    convolution: nn.Conv2d
    pooling: Pooling
    argmax: Tensor
    images: Tensor
    pair: Pair
    shape: torch.Size
    dtype: torch.dtype
    loops: Normalised
    chunk: Chunk | None
    values: int
    drawing: tuple[cpu_kernels.Drawn, int, np.float32]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


Gradients = tuple[Tensor | None, ...]


def _can_read_bytes(convolution: nn.Conv2d, activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> bool:
    """Whether ``_bytes_block`` computes these layers, and is faster."""
    if maps.dtype != torch.uint8 or not _is_plain(convolution) or pooling.kind not in SIGNS:
        return False
    filters = convolution.out_channels
    return filters >= MIN_FILTERS and convolution.weight.numel() // filters * pooling.size**2 <= MAX_UNROLLED


def _bytes_block(convolution: nn.Conv2d, activation: nn.ReLU, pooling: Pooling, pixels: Tensor) -> Tensor:
    padded = _padded(pixels, convolution)
    maps: Tensor = _BytesBlock.apply(convolution.weight, convolution.bias, padded, convolution, pooling)
    return maps


class _BytesBlock(torch.autograd.Function):
    """Convolution, ReLU and pooling of pixels (N, C, H, W) uint8, which have their padding."""

    @staticmethod
    def forward(
        ctx: _Context, weight: Tensor, bias: Tensor, pixels: Tensor, convolution: nn.Conv2d, pooling: Pooling
    ) -> Tensor:
        filters, channels, size, _ = weight.shape
        stride = convolution.stride[0]
        ctx.pair = cpu_kernels.first_block(size, stride, channels, filters, pooling.size, SIGNS[pooling.kind])
        ctx.images, ctx.shape = pixels.permute(0, 2, 3, 1).contiguous(), weight.shape
        height, width = (((side - size) // stride + 1) // pooling.size for side in pixels.shape[2:])
        maps = torch.empty(len(pixels), height, width, filters)
        ctx.argmax = torch.empty(maps.shape, dtype=torch.uint8)
        weights = weight.permute(2, 3, 1, 0).div(255).contiguous()  # the loop takes pixels as 0 ... 255
        ctx.pair.forward(ctx.images.numpy(), weights.numpy(), bias.numpy(), maps.numpy(), ctx.argmax.numpy())
        return maps.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_maps: Tensor) -> Gradients:
        filters, channels, size, _ = ctx.shape
        grad_weight, grad_bias = torch.zeros(size, size, channels, filters), torch.zeros(filters)
        gradients = grad_weight.numpy(), grad_bias.numpy()
        ctx.pair.backward(ctx.images.numpy(), _by_pixel(grad_maps).numpy(), ctx.argmax.numpy(), *gradients)
        return grad_weight.div_(255).permute(3, 2, 0, 1), grad_bias, None, None, None


def _can_follow_argmax(convolution: nn.Conv2d, activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> bool:
    """Whether ``_block`` computes these layers, and is faster."""
    return maps.dtype != torch.uint8 and pooling.size > 1 and pooling.kind in SIGNS and _is_plain(convolution)


def _block(convolution: nn.Conv2d, activation: nn.ReLU, pooling: Pooling, inputs: Tensor) -> Tensor:
    padded = _padded(inputs, convolution)
    maps: Tensor = _Block.apply(padded, convolution.weight, convolution.bias, convolution, pooling)
    return maps


class _Block(torch.autograd.Function):
    """Convolution, ReLU and pooling of inputs (N, C, H, W), which have their padding."""

    @staticmethod
    def forward(
        ctx: _Context, inputs: Tensor, weight: Tensor, bias: Tensor, convolution: nn.Conv2d, pooling: Pooling
    ) -> Tensor:
        if pooling.size == 2 and _suits_winograd(convolution, inputs):
            pooled, ctx.argmax = _pooled_by_winograd(_by_pixel(inputs), weight, bias, SIGNS[pooling.kind])
        else:
            pooled, ctx.argmax = _pooled(pooling, F.conv2d(inputs, weight, bias, convolution.stride))
        ctx.convolution, ctx.pooling = convolution, pooling
        ctx.save_for_backward(inputs, weight)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_pooled: Tensor) -> Gradients:
        inputs, weights = (_by_pixel(each) for each in ctx.saved_tensors)
        filters, size, _, channels = weights.shape
        needs_input_grad = ctx.needs_input_grad[0]  # pixels do not
        grad_inputs = torch.zeros(inputs.shape if needs_input_grad else (0, 0, 0, 0))
        grad_weight, grad_bias = torch.zeros_like(weights), torch.zeros(filters)
        stride, window = ctx.convolution.stride[0], ctx.pooling.size
        loop: Loop = cpu_kernels.conv_backward(size, stride, channels, window, needs_input_grad)
        loop(
            inputs.flatten(2).numpy(),
            weights.flatten(2).numpy(),
            _by_pixel(grad_pooled).numpy(),
            ctx.argmax.numpy(),
            grad_inputs.flatten(2).numpy(),
            grad_weight.flatten(2).numpy(),
            grad_bias.numpy(),
        )
        returned = grad_inputs.permute(0, 3, 1, 2) if needs_input_grad else None
        return returned, grad_weight.permute(0, 3, 1, 2), grad_bias, None, None


def _pooled_by_winograd(inputs: Tensor, weight: Tensor, bias: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """What ``_pooled`` makes of the convolution of inputs (N, H, W, C)."""
    pooled = torch.empty(len(inputs), inputs.shape[1] // 2 - 1, inputs.shape[2] // 2 - 1, len(weight))
    argmax = torch.empty(pooled.shape, dtype=torch.uint8)
    room = winograd.room(inputs.shape[1] - 2, inputs.shape[2] - 2)
    loop = winograd_kernels.pooled_tiles(len(weight), room, sign)

    def use(products: Tensor, images: slice) -> None:
        loop(_flat(products), bias.numpy(), _flat(pooled[images]), argmax[images].view(-1).numpy())

    winograd.products(inputs, weight, use)
    return pooled, argmax


def _pooled(pooling: Pooling, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, filters, H, W) after ReLU and pooling, (N, H', W', filters), and the argmax of each window."""
    by_pixel = _by_pixel(maps)
    count, height, width, filters = by_pixel.shape
    pooled = torch.empty(count, height // pooling.size, width // pooling.size, filters)
    argmax = torch.empty(pooled.shape, dtype=torch.uint8)
    loop = cpu_kernels.pool_relu(pooling.size, SIGNS[pooling.kind]).forward
    loop(by_pixel.numpy(), pooled.numpy(), argmax.numpy())
    return pooled, argmax


def _has_argmax(activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> bool:
    return maps.dtype != torch.uint8 and pooling.kind in SIGNS


def _relu_pooling(activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> Tensor:
    pooled: Tensor = _ReluPooling.apply(maps, pooling)
    return pooled


class _ReluPooling(torch.autograd.Function):
    """ReLU and pooling of maps (N, filters, H, W)."""

    @staticmethod
    def forward(ctx: _Context, maps: Tensor, pooling: Pooling) -> Tensor:
        pooled, ctx.argmax = _pooled(pooling, maps)
        ctx.pooling, ctx.shape, ctx.dtype = pooling, maps.shape, maps.dtype
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_pooled: Tensor) -> Gradients:
        count, filters, height, width = ctx.shape
        grad_maps = torch.zeros(count, height, width, filters)
        loop = cpu_kernels.pool_relu(ctx.pooling.size, SIGNS[ctx.pooling.kind]).backward
        loop(_by_pixel(grad_pooled).numpy(), ctx.argmax.numpy(), grad_maps.numpy())
        return grad_maps.permute(0, 3, 1, 2).to(ctx.dtype), None


def _normalises(normalisation: BatchNorm, maps: Tensor) -> bool:
    """Whether ``_normalised`` computes this layer: in training, with statistics of the whole batch."""
    return maps.dtype != torch.uint8 and normalisation.training and normalisation.affine


def _normalised(normalisation: BatchNorm, maps: Tensor) -> Tensor:
    return _with_statistics(maps, normalisation, Pooling("max", 1), relu=False)


def _normalises_relu(normalisation: BatchNorm, activation: nn.ReLU, maps: Tensor) -> bool:
    return _normalises(normalisation, maps)


def _normalised_relu(normalisation: BatchNorm, activation: nn.ReLU, maps: Tensor) -> Tensor:
    return _with_statistics(maps, normalisation, Pooling("max", 1), relu=True)


def _normalises_pools(normalisation: BatchNorm, activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> bool:
    return _normalises(normalisation, maps) and pooling.kind in SIGNS


def _normalised_pool(normalisation: BatchNorm, activation: nn.ReLU, pooling: Pooling, maps: Tensor) -> Tensor:
    return _with_statistics(maps, normalisation, pooling, relu=True)


def _with_statistics(maps: Tensor, normalisation: BatchNorm, pooling: Pooling, relu: bool) -> Tensor:
    pooled: Tensor = _NormalisedPool.apply(
        maps, normalisation.weight, normalisation.bias, normalisation, pooling, relu, current_chunk()
    )
    return pooled


class _NormalisedPool(torch.autograd.Function):
    """Batch normalisation, ReLU and pooling of a chunk (N, filters, H, W) of a batch, or of a whole one."""

    @staticmethod
    def forward(
        ctx: _Context,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalisation: BatchNorm,
        pooling: Pooling,
        relu: bool,
        chunk: Chunk | None,
    ) -> Tensor:
        by_pixel = _by_pixel(maps)
        count, height, width, filters = by_pixel.shape
        values = count * height * width
        assert normalisation.running_mean is not None
        shift = normalisation.running_mean.clone()  # another chunk may be the first to change it
        sums = torch.zeros(2, filters, dtype=torch.float64)
        cpu_kernels.moments(filters)(_flat(by_pixel), shift.numpy(), sums.numpy())
        totals, counts = _total(sums, chunk), _total(torch.tensor(values), chunk)
        above, squares = totals / counts
        mean, variance = shift + above, squares - above**2
        if chunk is None or chunk.number == 0:
            normalisation.update(mean, variance, int(counts))
        deviation = (variance + normalisation.eps).sqrt()
        scale = (weight / deviation).float()
        offset = (bias - mean * weight / deviation).float()
        pooled = torch.empty(count, height // pooling.size, width // pooling.size, filters)
        chosen, argmax = torch.empty(pooled.shape), torch.empty(pooled.shape, dtype=torch.uint8)
        ctx.loops = cpu_kernels.normalised_pool(height, width, filters, pooling.size, SIGNS[pooling.kind], relu)
        constants = scale.numpy(), offset.numpy()
        ctx.loops.forward(_flat(by_pixel), *constants, _flat(pooled), _flat(chosen), _flat(argmax))
        ctx.argmax, ctx.chunk, ctx.dtype, ctx.values = argmax, chunk, maps.dtype, int(counts)
        ctx.save_for_backward(by_pixel, chosen, mean, deviation, scale)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_pooled: Tensor) -> Gradients:
        maps, chosen, mean, deviation, scale = ctx.saved_tensors
        gradients, argmax = _flat(_by_pixel(grad_pooled)), _flat(ctx.argmax)
        own = torch.zeros(2, len(mean), dtype=torch.float64)
        ctx.loops.sums(gradients, _flat(chosen), argmax, mean.float().numpy(), own.numpy())
        sums, products = _total(own, ctx.chunk) / ctx.values
        slope = scale * products / deviation**2
        constants = ((scale * sums - slope * mean).float().numpy(), slope.float().numpy())
        grad_maps = torch.empty(maps.shape)
        ctx.loops.backward(gradients, _flat(maps), argmax, scale.numpy(), *constants, _flat(grad_maps))
        grad_weight, grad_bias = (own[1] / deviation).float(), own[0].float()
        return grad_maps.permute(0, 3, 1, 2).to(ctx.dtype), grad_weight, grad_bias, None, None, None, None


def _total(values: Tensor, chunk: Chunk | None) -> Tensor:
    """The sum of what the chunks of a batch have; in their order, so that it has the same bits each time."""
    return values if chunk is None else chunk.gather(values).sum(dim=0)


def _suits_winograd(convolution: nn.Conv2d, maps: Tensor) -> bool:
    """Whether ``_winograd`` computes this layer, and is faster."""
    is_float32 = maps.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_float32 and _is_plain(convolution) and winograd.suits(convolution)


def _winograd(convolution: nn.Conv2d, inputs: Tensor) -> Tensor:
    padded = _padded(inputs, convolution)
    height, width = (side - 2 for side in padded.shape[2:])
    maps: Tensor = _Winograd.apply(_padded_to_even(padded), convolution.weight, convolution.bias)
    return maps[:, :, :height, :width]


def _padded_to_even(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) with a row and a column of zeros more where their number is odd: tiles have two of both."""
    rows, columns = (side % 2 for side in maps.shape[2:])
    return F.pad(maps.permute(0, 2, 3, 1), (0, 0, 0, columns, 0, rows)).permute(0, 3, 1, 2) if rows or columns else maps


class _Winograd(torch.autograd.Function):
    """Convolution of inputs (N, C, H, W), which have their padding and even sides."""

    @staticmethod
    def forward(ctx: _Context, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        by_pixel = _by_pixel(inputs)
        count, height, width, _ = by_pixel.shape
        maps = torch.empty(count, height - 2, width - 2, len(weight))
        sizes = height - 2, width - 2, len(weight), winograd.room(height - 2, width - 2)
        loop = winograd_kernels.output_tiles(*sizes).forward

        def use(products: Tensor, images: slice) -> None:
            loop(_flat(products), bias.numpy(), _flat(maps[images]))

        winograd.products(by_pixel, weight, use)
        ctx.save_for_backward(by_pixel, weight)
        return maps.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_maps: Tensor) -> Gradients:
        inputs, weight = ctx.saved_tensors
        gradients = _by_pixel(grad_maps)
        _, height, width, filters = gradients.shape
        loop = winograd_kernels.output_tiles(height, width, filters, winograd.room(height, width)).backward

        def grad_products(products: Tensor, images: slice) -> None:
            loop(_flat(gradients[images]), _flat(products))

        grad_inputs, *rest = winograd.gradients(inputs, weight, grad_products, ctx.needs_input_grad[0])
        return grad_inputs.permute(0, 3, 1, 2) if grad_inputs is not None else None, *rest


# The first operation that matches is taken.
FUSED = (
    FusedLayers((nn.Conv2d, nn.ReLU, Pooling), _can_read_bytes, _bytes_block),
    FusedLayers((nn.Conv2d, nn.ReLU, Pooling), _can_follow_argmax, _block),
    FusedLayers((nn.ReLU, Pooling), _has_argmax, _relu_pooling),
    FusedLayers((BatchNorm, nn.ReLU, Pooling), _normalises_pools, _normalised_pool),
    FusedLayers((BatchNorm, nn.ReLU), _normalises_relu, _normalised_relu),
    FusedLayers((BatchNorm,), _normalises, _normalised),
    FusedLayers((nn.Conv2d,), _suits_winograd, _winograd),
)


def _by_pixel(maps: Tensor) -> Tensor:
    """(N, filters, H, W) as (N, H, W, filters) float32 contiguous in memory; free if it already is."""
    return maps.permute(0, 2, 3, 1).float().contiguous()


def _flat(values: Tensor) -> NDArray[Any]:
    """Contiguous values as an array with one axis."""
    flat: NDArray[Any] = values.view(-1).numpy()
    return flat


def computes_dropout_dense(dropout: nn.Module, dense: nn.Module, features: Tensor) -> bool:
    """Whether ``dropout_dense`` computes these two layers for features (N, features)."""
    is_known = type(dropout) is Dropout and type(dense) is nn.Linear and dense.bias is not None
    return is_known and _is_computed_here(features) and not _has_hooks(dropout) and not _has_hooks(dense)


def dropout_dense(dropout: Dropout, dense: nn.Linear, features: Tensor, generator: torch.Generator | None) -> Tensor:
    """Logits (N, classes) float32 of features (N, features): in float32 under autocast too."""
    logits: Tensor
    if dropout.training and dropout.dropped:
        drawn = dropout.draw(features, generator)
        logits = _DropoutDense.apply(features.float(), dense.weight, dense.bias, dropout, drawn)
    else:
        with torch.autocast("cpu", enabled=False):
            logits = dense(features.float())
    return logits


class _DropoutDense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, features: Tensor, weight: Tensor, bias: Tensor, dropout: Dropout, drawn: Tensor
    ) -> Tensor:
        features = features.contiguous()
        kept, logits = torch.empty(features.shape), torch.empty(len(features), len(weight))
        ctx.drawing = drawn.numpy(), dropout.lowest_kept, np.float32(dropout.scale)
        ctx.save_for_backward(kept, weight)
        cpu_kernels.dropout_dense().forward(
            features.numpy(), *ctx.drawing, weight.numpy(), bias.numpy(), kept.numpy(), logits.numpy()
        )
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_logits: Tensor) -> Gradients:
        kept, weight = ctx.saved_tensors
        grad_features, grad_weight = torch.zeros_like(kept), torch.zeros_like(weight)
        grad_bias = torch.zeros(len(weight))
        cpu_kernels.dropout_dense().backward(
            grad_logits.contiguous().numpy(),
            *ctx.drawing,
            weight.numpy(),
            kept.numpy(),
            grad_features.numpy(),
            grad_weight.numpy(),
            grad_bias.numpy(),
        )
        return grad_features, grad_weight, grad_bias, None, None
