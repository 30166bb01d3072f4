"""Loops for which PyTorch has no single operation, compiled for the CPU by Numba.

A small CNN is limited by memory bandwidth: as separate operations, the first convolution, its ReLU and its
pooling move 80 MB for a batch of 128 digits. Here they are one loop that reads bytes and writes pooled maps; the
convolution's own output is never stored. The backward pass follows only the argmax of each pooling window.

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
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Drawn = NDArray[np.int8] | NDArray[np.int16]

ADDED = 64  # pixels whose values are added up in float32; the sums of these in float64
# Numba counts a negative index from the end, and the test for it in the innermost loop keeps that from becoming vector
# instructions. Unsigned indices cannot be negative. Distances that are known when a loop is compiled help as well: the
# compiler must see that what is written is not read again.
Index = np.uint64
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


@cached_build
def moments(filters: int) -> Loop:
    """For each filter of maps (P, filters): the sums of what they are above ``shift``, and of its squares.

    ``shift`` (filters,) should be near the means, so that the variance is not a small difference of large numbers.
    """
    step = Index(filters)

    def forward(maps: Floats, shift: Floats, sums: Doubles) -> None:  # adds to (2, filters)
        pixels = len(maps) // filters
        above, squares = np.empty(filters, np.float32), np.empty(filters, np.float32)
        for first in range(0, pixels, ADDED):
            above[:], squares[:] = 0, 0
            for pixel in range(first, min(first + ADDED, pixels)):
                start = Index(pixel * filters)
                for f in range(step):
                    value = maps[start + f] - shift[f]
                    above[f] += value
                    squares[f] += value * value
            for f in range(step):
                sums[0, f] += above[f]
                sums[1, f] += squares[f]

    return compiled(forward)


class Normalised(NamedTuple):
    """The loops of a normalisation: forward, then the sums that its gradients need, then its gradients."""

    forward: Loop
    sums: Loop
    backward: Loop


@cached_build
def normalised_pool(height: int, width: int, filters: int, window: int, sign: int, relu: bool) -> Normalised:
    """Batch normalisation of maps (N, height, width, filters), ReLU if ``relu``, and pooling.

    The normalised maps are ``scale`` (filters,) times the maps plus ``offset``. ``chosen`` has what the maps were at
    the argmax of each window. The gradient of a map is ``scale`` times that of the normalised one, less ``constant``
    and ``slope`` times the map: changing one value changes the mean and the deviation of all.
    """
    zero, lowest, step = np.float32(0), np.float32(-np.inf), Index(filters)
    down, across = height // window, width // window

    def forward(maps: Floats, scale: Floats, offset: Floats, pooled: Floats, chosen: Floats, argmax: Bytes) -> None:
        for n in range(len(maps) // (height * width * filters)):
            for i in range(down):
                for j in range(across):
                    start = Index(((n * height + i * window) * width + j * window) * filters)
                    to = Index(((n * down + i) * across + j) * filters)
                    for f in range(step):
                        best, raw = lowest, zero
                        best_place = 0
                        for place in range(window * window):
                            given = maps[start + Index(place // window * width + place % window) * step + f]
                            value = sign * (given * scale[f] + offset[f])
                            if value > best or value != value:
                                best, raw = value, given
                                best_place = place
                        best *= sign
                        dead = relu and best <= 0
                        pooled[to + f] = zero if dead else best
                        chosen[to + f] = raw
                        argmax[to + f] = DEAD if dead else best_place

    def sums(grad_pooled: Floats, chosen: Floats, argmax: Bytes, mean: Floats, sums: Doubles) -> None:  # adds
        pixels = len(chosen) // filters
        gradients, products = np.empty(filters, np.float32), np.empty(filters, np.float32)
        for first in range(0, pixels, ADDED):
            gradients[:], products[:] = 0, 0
            for pixel in range(first, min(first + ADDED, pixels)):
                start = Index(pixel * filters)
                for f in range(step):
                    gradient = grad_pooled[start + f] if argmax[start + f] != DEAD else zero
                    gradients[f] += gradient
                    products[f] += gradient * (chosen[start + f] - mean[f])
            for f in range(step):
                sums[0, f] += gradients[f]
                sums[1, f] += products[f]

    def backward(
        grad_pooled: Floats,
        maps: Floats,
        argmax: Bytes,
        scale: Floats,
        constant: Floats,
        slope: Floats,
        grad_maps: Floats,
    ) -> None:
        for n in range(len(maps) // (height * width * filters)):
            for i in range(down):
                for j in range(across):
                    to = Index(((n * height + i * window) * width + j * window) * filters)
                    start = Index(((n * down + i) * across + j) * filters)
                    for f in range(step):
                        for place in range(window * window):
                            at = to + Index(place // window * width + place % window) * step + f
                            gradient = grad_pooled[start + f] if argmax[start + f] == place else zero
                            grad_maps[at] = scale[f] * gradient - constant[f] - slope[f] * maps[at]
            for i in range(height):  # what is in no window
                for j in range(across * window if i < down * window else 0, width):
                    to = Index(((n * height + i) * width + j) * filters)
                    for f in range(step):
                        grad_maps[to + f] = -constant[f] - slope[f] * maps[to + f]

    return Normalised(compiled(forward), compiled(sums), compiled(backward))


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
