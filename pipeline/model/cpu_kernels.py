"""Loops for which PyTorch has no single operation, compiled for the CPU by Numba.

A small CNN is limited by memory bandwidth: as separate operations, the first convolution, its ReLU and its
pooling move 80 MB for a batch of 128 digits. Here they are one loop that reads bytes and writes pooled maps; the
convolution's own output is never stored. Other convolutions are computed pooling window by pooling window where that
takes less than half the multiplications. The backward pass follows only the argmax of each pooling window.

The loops are compiled once for each set of sizes: the innermost loop over a known size becomes vector instructions. The
machine code is cached by kernel_cache.py. All arrays are contiguous; results are written into the last arguments.
"""

import functools
import threading
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.model import kernel_cache

Loop = Callable[..., None]
Transform = Callable[..., tuple[np.float32, ...]]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Drawn = NDArray[np.int8] | NDArray[np.int16]

DEAD = 255  # instead of the argmax if ReLU set the output to zero
SOURCE = Path(__file__).read_bytes()  # of what runs here: the file may change before a loop is compiled


Factory = TypeVar("Factory", bound=Callable[..., object])
_build_lock = threading.Lock()


def cached_build(factory: Factory) -> Factory:
    """Each set of sizes is built once, also when several threads ask for it at the same time."""
    cached = functools.cache(factory)

    @functools.wraps(factory)
    def build(*sizes: object) -> object:
        with _build_lock:
            return cached(*sizes)

    return cast(Factory, build)


def compiled(function: Loop, fastmath: Set[str] = frozenset({"contract"}), source: bytes = SOURCE) -> Loop:
    """The loop as machine code; ``source`` is the text of the file that it and all that it calls are defined in.

    It runs without the interpreter's lock, so that threads can run it at the same time. A multiplication and the
    addition after it may become one instruction; other reorderings need ``fastmath``. The same inputs give the same
    bits.
    """
    kernel_cache.target_context()
    loop = njit(nogil=True, fastmath=set(fastmath), error_model="numpy")(function)
    loop._cache = kernel_cache.KernelCache(function, source)
    return cast(Loop, loop)


def called_in_loops(function: Factory) -> Factory:
    """A function that compiled loops may call."""
    kernel_cache.target_context()
    return cast(Factory, njit(function))


class Pair(NamedTuple):
    """The forward and the backward pass of an operation."""

    forward: Loop
    backward: Loop


@cached_build
def first_block(size: int, stride: int, channels: int, filters: int, window: int, sign: int) -> Pair:
    """Convolution without padding, pooling and ReLU of images (N, H, W, channels) of bytes.

    ``size`` is that of a filter, ``window`` that of the pooling, ``sign`` 1 for max and -1 for min pooling. Weights are
    (size, size, channels, filters); maps, their gradients and the argmax of each window are (N, H', W', filters). The
    loops over one filter and one window are unrolled.
    """
    zero, lowest = np.float32(0), np.float32(-np.inf)
    span = (window - 1) * stride + size  # pixels that one pooling window sees, along each side

    def forward(images: Bytes, weights: Floats, biases: Floats, maps: Floats, argmax: Bytes) -> None:
        for n in range(maps.shape[0]):
            for i in range(maps.shape[1]):
                for j in range(maps.shape[2]):
                    for f in range(filters):
                        best = lowest
                        best_place = 0
                        for place in range(window * window):
                            y, x = (i * window + place // window) * stride, (j * window + place % window) * stride
                            total = biases[f]
                            for a in range(size):
                                for b in range(size):
                                    for c in range(channels):
                                        total += np.float32(images[n, y + a, x + b, c]) * weights[a, b, c, f]
                            if sign * total > best or total != total:  # NaN propagates, as in PyTorch
                                best = sign * total
                                best_place = place
                        best *= sign
                        maps[n, i, j, f] = zero if best <= 0 else best
                        argmax[n, i, j, f] = DEAD if best <= 0 else best_place

    def backward(
        images: Bytes, grad_maps: Floats, argmax: Bytes, grad_weights: Floats, grad_biases: Floats
    ) -> None:  # adds to the last two
        for n in range(grad_maps.shape[0]):
            for i in range(grad_maps.shape[1]):
                for j in range(grad_maps.shape[2]):
                    y, x = i * window * stride, j * window * stride
                    for f in range(filters):
                        grad_biases[f] += grad_maps[n, i, j, f] if argmax[n, i, j, f] != DEAD else zero
                    ink = np.uint8(0)
                    for a in range(span):
                        for b in range(span):
                            for c in range(channels):
                                ink |= images[n, y + a, x + b, c]
                    if ink == 0:  # all would be multiplied by 0, as for half of the windows of a digit
                        continue
                    for a in range(size):
                        for b in range(size):
                            for c in range(channels):
                                for f in range(filters):
                                    gradient, best_place = grad_maps[n, i, j, f], argmax[n, i, j, f]
                                    total = grad_weights[a, b, c, f]
                                    for place in range(window * window):
                                        down, right = place // window * stride + a, place % window * stride + b
                                        pixel = np.float32(images[n, y + down, x + right, c])
                                        total += pixel * (gradient if best_place == place else zero)
                                    grad_weights[a, b, c, f] = total

    return Pair(compiled(forward), compiled(backward))


@cached_build
def pool_relu(window: int, sign: int) -> Pair:
    """Pooling and ReLU of maps (N, H, W, filters); rows and columns that do not fill a window are dropped."""
    zero, lowest = np.float32(0), np.float32(-np.inf)

    def forward(maps: Floats, pooled: Floats, argmax: Bytes) -> None:
        for n in range(pooled.shape[0]):
            for i in range(pooled.shape[1]):
                for j in range(pooled.shape[2]):
                    for f in range(pooled.shape[3]):
                        best = lowest
                        best_place = 0
                        for place in range(window * window):
                            value = sign * maps[n, i * window + place // window, j * window + place % window, f]
                            if value > best or value != value:
                                best = value
                                best_place = place
                        best *= sign
                        pooled[n, i, j, f] = zero if best <= 0 else best
                        argmax[n, i, j, f] = DEAD if best <= 0 else best_place

    def backward(grad_pooled: Floats, argmax: Bytes, grad_maps: Floats) -> None:
        for n in range(grad_pooled.shape[0]):
            for i in range(grad_pooled.shape[1]):
                for j in range(grad_pooled.shape[2]):
                    for place in range(window * window):
                        for f in range(grad_pooled.shape[3]):
                            grad_maps[n, i * window + place // window, j * window + place % window, f] = (
                                grad_pooled[n, i, j, f] if argmax[n, i, j, f] == place else zero
                            )

    return Pair(compiled(forward), compiled(backward))


@_cached_build
def moments() -> Loop:
    """For each filter of maps (N, H, W, filters): the sums of what they are above ``shift``, and of its squares.

    ``shift`` (filters,) should be near the means, so that the variance is not a small difference of large numbers.
    """

    def forward(maps: Floats, shift: Floats, sums: Doubles) -> None:  # adds to (2, filters)
        filters = maps.shape[3]
        for n in range(maps.shape[0]):
            for i in range(maps.shape[1]):
                of_row = np.zeros((2, filters), np.float32)
                for j in range(maps.shape[2]):
                    for f in range(filters):
                        above = maps[n, i, j, f] - shift[f]
                        of_row[0, f] += above
                        of_row[1, f] += above * above
                for f in range(filters):
                    sums[0, f] += of_row[0, f]
                    sums[1, f] += of_row[1, f]

    return _compiled(forward)


class Normalised(NamedTuple):
    """The loops of a normalisation: forward, then the sums that its gradients need, then its gradients."""

    forward: Loop
    sums: Loop
    backward: Loop


@_cached_build
def normalised_pool(window: int, sign: int, relu: bool) -> Normalised:
    """Batch normalisation of maps (N, H, W, filters), ReLU if ``relu``, and pooling.

    The normalised maps are ``scale`` (filters,) times the maps plus ``offset``. ``chosen`` has what the maps were at
    the argmax of each window. The gradient of a map is ``scale`` times that of the normalised one, minus ``constant``
    and minus ``slope`` times what the map is above the mean: changing one value changes the mean and the deviation.
    """
    zero, lowest = np.float32(0), np.float32(-np.inf)

    def forward(maps: Floats, scale: Floats, offset: Floats, pooled: Floats, chosen: Floats, argmax: Bytes) -> None:
        for n in range(pooled.shape[0]):
            for i in range(pooled.shape[1]):
                for j in range(pooled.shape[2]):
                    for f in range(pooled.shape[3]):
                        best, raw = lowest, zero
                        best_place = 0
                        for place in range(window * window):
                            given = maps[n, i * window + place // window, j * window + place % window, f]
                            value = sign * (given * scale[f] + offset[f])
                            if value > best or value != value:
                                best, raw = value, given
                                best_place = place
                        best *= sign
                        dead = relu and best <= 0
                        pooled[n, i, j, f] = zero if dead else best
                        chosen[n, i, j, f] = raw
                        argmax[n, i, j, f] = DEAD if dead else best_place

    def sums(grad_pooled: Floats, chosen: Floats, argmax: Bytes, mean: Floats, sums: Doubles) -> None:  # adds
        filters = chosen.shape[3]
        for n in range(chosen.shape[0]):
            for i in range(chosen.shape[1]):
                of_row = np.zeros((2, filters), np.float32)
                for j in range(chosen.shape[2]):
                    for f in range(filters):
                        gradient = grad_pooled[n, i, j, f] if argmax[n, i, j, f] != DEAD else zero
                        of_row[0, f] += gradient
                        of_row[1, f] += gradient * (chosen[n, i, j, f] - mean[f])
                for f in range(filters):
                    sums[0, f] += of_row[0, f]
                    sums[1, f] += of_row[1, f]

    def backward(
        grad_pooled: Floats,
        maps: Floats,
        argmax: Bytes,
        mean: Floats,
        scale: Floats,
        constant: Floats,
        slope: Floats,
        grad_maps: Floats,
    ) -> None:
        count, height, width, filters = maps.shape
        rows, columns = argmax.shape[1] * window, argmax.shape[2] * window
        for n in range(count):
            for i in range(height):
                for j in range(width):
                    if i < rows and j < columns:
                        here = i % window * window + j % window
                        for f in range(filters):
                            is_argmax = argmax[n, i // window, j // window, f] == here
                            gradient = grad_pooled[n, i // window, j // window, f] if is_argmax else zero
                            rest = constant[f] + slope[f] * (maps[n, i, j, f] - mean[f])
                            grad_maps[n, i, j, f] = scale[f] * gradient - rest
                    else:  # in no window
                        for f in range(filters):
                            grad_maps[n, i, j, f] = -(constant[f] + slope[f] * (maps[n, i, j, f] - mean[f]))

    return Normalised(_compiled(forward), _compiled(sums), _compiled(backward))


DEPTH = 8  # products that are summed up at once; more would not fit into the registers
IMAGES = 2  # images at a time, so that the data stays in the core's cache


@functools.cache
def _winograd_transforms() -> tuple[Transform, Transform, Transform, Transform]:
    """Winograd's transforms along one dimension, of four inputs and of four products; and both of columns."""

    def input_transform(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> tuple[np.float32, ...]:
        return a - c, b + c, c - b, b - d

    def output_transform(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> tuple[np.float32, ...]:
        return a + b + c, b - c - d

    inwards, outwards = called_in_loops(input_transform), called_in_loops(output_transform)

    def input_column(inputs: Floats, n: int, y: int, x: int, c: int) -> tuple[np.float32, ...]:
        return inwards(inputs[n, y, x, c], inputs[n, y + 1, x, c], inputs[n, y + 2, x, c], inputs[n, y + 3, x, c])

    def output_column(products: Floats, b: int, window: int, f: int) -> tuple[np.float32, ...]:
        return outwards(
            products[b, window, f], products[b + 4, window, f], products[b + 8, window, f], products[b + 12, window, f]
        )

    return inwards, outwards, called_in_loops(input_column), called_in_loops(output_column)


@cached_build
def winograd(channels: int, filters: int, sign: int) -> Loop:
    """Convolution by 3 x 3 filters without padding, pooling by 2 x 2 windows and ReLU, in 16 products instead of 36.

    Two neighbouring outputs of a filter of three weights take four multiplications instead of six: those of sums of
    inputs with sums of weights (Winograd, "Arithmetic complexity of computations", 1980). Along both sides, four
    outputs take 16 instead of 36 (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016); here they
    are the four that a pooling window chooses from. Inputs are (N, H, W, channels), the weights' sums (16, depth,
    filters), with zeros from ``channels`` up to a multiple of DEPTH; pooled maps and the argmax of each window are
    (N, H', W', filters).
    """
    zero, lowest = np.float32(0), np.float32(-np.inf)
    depth = -(-channels // DEPTH) * DEPTH
    input_transform, output_transform, input_column, output_column = _winograd_transforms()

    def forward(inputs: Floats, factors: Floats, biases: Floats, pooled: Floats, argmax: Bytes) -> None:
        count, height, width, _ = pooled.shape
        most = IMAGES * height * width
        sums = np.zeros((16, most + 1, depth), np.float32)  # windows are computed in pairs, so there may be one extra
        products = np.empty((16, most + 1, filters), np.float32)
        for start in range(0, count, IMAGES):
            images = min(IMAGES, count - start)
            for n in range(images):
                for i in range(height):
                    for j in range(width):
                        y, x, window = 2 * i, 2 * j, (n * height + i) * width + j
                        for c in range(channels):
                            p = input_column(inputs, start + n, y, x, c)
                            q = input_column(inputs, start + n, y, x + 1, c)
                            r = input_column(inputs, start + n, y, x + 2, c)
                            s = input_column(inputs, start + n, y, x + 3, c)
                            for a in range(4):
                                values = input_transform(p[a], q[a], r[a], s[a])
                                for b in range(4):
                                    sums[4 * a + b, window, c] = values[b]
            for g in range(16):
                for i in range(0, images * height * width, 2):
                    for f in range(filters):
                        products[g, i, f] = zero
                        products[g, i + 1, f] = zero
                    for k in range(0, depth, DEPTH):
                        a0, a1, a2, a3 = sums[g, i, k], sums[g, i, k + 1], sums[g, i, k + 2], sums[g, i, k + 3]
                        a4, a5, a6, a7 = sums[g, i, k + 4], sums[g, i, k + 5], sums[g, i, k + 6], sums[g, i, k + 7]
                        j = i + 1
                        b0, b1, b2, b3 = sums[g, j, k], sums[g, j, k + 1], sums[g, j, k + 2], sums[g, j, k + 3]
                        b4, b5, b6, b7 = sums[g, j, k + 4], sums[g, j, k + 5], sums[g, j, k + 6], sums[g, j, k + 7]
                        for f in range(filters):
                            w0, w1, w2 = factors[g, k, f], factors[g, k + 1, f], factors[g, k + 2, f]
                            w3, w4, w5 = factors[g, k + 3, f], factors[g, k + 4, f], factors[g, k + 5, f]
                            w6, w7 = factors[g, k + 6, f], factors[g, k + 7, f]
                            products[g, i, f] += (
                                a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3 + a4 * w4 + a5 * w5 + a6 * w6 + a7 * w7
                            )
                            products[g, j, f] += (
                                b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3 + b4 * w4 + b5 * w5 + b6 * w6 + b7 * w7
                            )
            for n in range(images):
                for i in range(height):
                    for j in range(width):
                        window = (n * height + i) * width + j
                        for f in range(filters):
                            p = output_column(products, 0, window, f)
                            q = output_column(products, 1, window, f)
                            r = output_column(products, 2, window, f)
                            s = output_column(products, 3, window, f)
                            best = lowest
                            best_place = 0
                            for place in range(4):
                                a = place // 2
                                value = sign * (output_transform(p[a], q[a], r[a], s[a])[place % 2] + biases[f])
                                if value > best or value != value:
                                    best = value
                                    best_place = place
                            best *= sign
                            pooled[start + n, i, j, f] = zero if best <= 0 else best
                            argmax[start + n, i, j, f] = DEAD if best <= 0 else best_place

    return compiled(forward)


@cached_build
def conv_backward(size: int, stride: int, channels: int, window: int, needs_input_grad: bool) -> Loop:
    """The gradients of a convolution from those of the pooled maps, skipping what pooling discarded.

    In each window only the argmax has a gradient, and none if ReLU or dropout set it to zero. The others, a sixteenth
    of the convolution's outputs in the default network, are processed one by one: each adds a multiple of the filter to
    the gradients of the inputs, and a multiple of the inputs to the gradient of the filter. Inputs are
    (N, H, W * channels), weights (filters, size, size * channels).
    """
    row = size * channels

    def backward(
        inputs: Floats,
        weights: Floats,
        grad_pooled: Floats,
        argmax: Bytes,
        grad_inputs: Floats,
        grad_weights: Floats,
        grad_biases: Floats,
    ) -> None:  # adds to the last three
        count, height, width, filters = grad_pooled.shape
        rows, columns = np.empty(height * width + 1, np.int64), np.empty(height * width + 1, np.int64)
        gradients = np.empty(height * width + 1, np.float32)
        for n in range(count):
            for f in range(filters):
                length = 0
                for i in range(height):
                    for j in range(width):  # listed first: branches that cannot be foreseen are slow
                        gradient, best_place = grad_pooled[n, i, j, f], argmax[n, i, j, f]
                        rows[length] = (i * window + best_place // window) * stride
                        columns[length] = (j * window + best_place % window) * stride * channels
                        gradients[length] = gradient
                        length += (gradient != 0) & (best_place != DEAD)
                for k in range(length):
                    y, x, gradient = rows[k], columns[k], gradients[k]
                    grad_biases[f] += gradient
                    for a in range(size):
                        if needs_input_grad:
                            sums, values = grad_inputs[n, y + a, x : x + row], weights[f, a]
                            for t in range(row):
                                sums[t] += gradient * values[t]
                        sums, values = grad_weights[f, a], inputs[n, y + a, x : x + row]
                        for t in range(row):
                            sums[t] += gradient * values[t]

    return compiled(backward)


@cached_build
def dropout_dense() -> Pair:
    """Dropout and the dense layer after it: features (N, F), a random number for each, weights (C, F), logits (N, C).

    A feature is kept and multiplied by ``scale`` if its random number is at least ``lowest_kept``.
    """

    def forward(
        features: Floats,
        drawn: Drawn,
        lowest_kept: int,
        scale: np.float32,
        weights: Floats,
        biases: Floats,
        kept: Floats,
        logits: Floats,
    ) -> None:
        for n in range(features.shape[0]):
            for f in range(features.shape[1]):
                kept[n, f] = features[n, f] * scale if drawn[n, f] >= lowest_kept else np.float32(0)
            for c in range(weights.shape[0]):
                total = np.float32(0)
                for f in range(features.shape[1]):
                    total += kept[n, f] * weights[c, f]
                logits[n, c] = biases[c] + total

    def backward(
        grad_logits: Floats,
        drawn: Drawn,
        lowest_kept: int,
        scale: np.float32,
        weights: Floats,
        kept: Floats,
        grad_features: Floats,
        grad_weights: Floats,
        grad_biases: Floats,
    ) -> None:  # adds to the last three
        for n in range(kept.shape[0]):
            for c in range(weights.shape[0]):
                gradient = grad_logits[n, c]
                grad_biases[c] += gradient
                for f in range(kept.shape[1]):
                    grad_weights[c, f] += gradient * kept[n, f]
                for f in range(kept.shape[1]):
                    grad_features[n, f] += gradient * weights[c, f]
            for f in range(kept.shape[1]):
                grad_features[n, f] = grad_features[n, f] * scale if drawn[n, f] >= lowest_kept else np.float32(0)

    # With "reassoc" a sum over the features is computed as sixteen partial sums.
    return Pair(compiled(forward, {"contract", "reassoc"}), compiled(backward))
