"""The loops around the matrix products of a convolution by Winograd's algorithm, compiled for the CPU by Numba.

Two neighbouring outputs of a filter of three weights take four multiplications instead of six: those of sums of inputs
with sums of weights (Winograd, "Arithmetic complexity of computations", 1980). Along both sides, 2 x 2 outputs of a
3 x 3 filter take 16 instead of 36 (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016). For all
such tiles, channels and filters these are 16 products of matrices, and so are the gradients.

Maps are (N, H, W, channels), tiles (16, T, channels), where a tile stands for 2 x 2 outputs of an image; there may be
fewer images than there is room for. All arrays are flat. Results are written into the last arguments.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.model.cpu_kernels import DEAD, Bytes, Floats, Index, Loop, Pair, cached_build, called_in_loops, compiled

TWO, THREE, FOUR = map(Index, range(2, 5))
Four = tuple[np.float32, np.float32, np.float32, np.float32]
SOURCE = Path(__file__).read_bytes()


class _Steps(NamedTuple):
    """What the loops call for four values along one side of a tile. ``read``, ``write`` and ``add`` are of an array.

    ``sums`` are those of four inputs, ``outputs`` two of four products; the others are the gradients of these.
    """

    read: Callable[[Floats, np.uint64, np.uint64], Four]
    write: Callable[[Floats, np.uint64, np.uint64, Four], None]
    add: Callable[[Floats, np.uint64, np.uint64, Four], None]
    sums: Callable[..., Four]
    outputs: Callable[..., tuple[np.float32, np.float32]]
    grad_inputs: Callable[..., Four]
    grad_products: Callable[..., Four]


@functools.cache
def _steps() -> _Steps:
    def read(values: Floats, start: np.uint64, step: np.uint64) -> Four:
        return values[start], values[start + step], values[start + TWO * step], values[start + THREE * step]

    def write(values: Floats, start: np.uint64, step: np.uint64, given: Four) -> None:
        values[start] = given[0]
        values[start + step] = given[1]
        values[start + TWO * step] = given[2]
        values[start + THREE * step] = given[3]

    def add(values: Floats, start: np.uint64, step: np.uint64, given: Four) -> None:
        values[start] += given[0]
        values[start + step] += given[1]
        values[start + TWO * step] += given[2]
        values[start + THREE * step] += given[3]

    def sums(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> Four:
        return a - c, b + c, c - b, b - d

    def outputs(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> tuple[np.float32, np.float32]:
        return a + b + c, b - c - d

    def grad_inputs(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> Four:
        return a, b - c + d, b + c - a, -d

    def grad_products(a: np.float32, b: np.float32) -> Four:
        return a, a + b, a - b, -b

    return _Steps(
        called_in_loops(read),
        called_in_loops(write),
        called_in_loops(add),
        called_in_loops(sums),
        called_in_loops(outputs),
        called_in_loops(grad_inputs),
        called_in_loops(grad_products),
    )


@cached_build
def input_tiles(height: int, width: int, channels: int, room: int) -> Pair:
    """The sums of inputs (N, height, width, channels) for each of ``room`` tiles, and back their gradients."""
    steps = _steps()
    read, write, add, sums, grad_inputs = steps.read, steps.write, steps.add, steps.sums, steps.grad_inputs
    down, across = height // 2 - 1, width // 2 - 1  # tiles
    row, step, total = Index(width * channels), Index(channels), Index(room * channels)
    four = FOUR * total

    def forward(maps: Floats, tiles: Floats) -> None:
        for n in range(len(maps) // (height * width * channels)):
            for i in range(down):
                for j in range(across):
                    start = Index(((n * height + 2 * i) * width + 2 * j) * channels)
                    to = Index(((n * down + i) * across + j) * channels)
                    for c in range(step):
                        p = sums(*read(maps, start + c, row))
                        q = sums(*read(maps, start + step + c, row))
                        r = sums(*read(maps, start + TWO * step + c, row))
                        s = sums(*read(maps, start + THREE * step + c, row))
                        write(tiles, to + c, total, sums(p[0], q[0], r[0], s[0]))
                        write(tiles, to + four + c, total, sums(p[1], q[1], r[1], s[1]))
                        write(tiles, to + TWO * four + c, total, sums(p[2], q[2], r[2], s[2]))
                        write(tiles, to + THREE * four + c, total, sums(p[3], q[3], r[3], s[3]))

    def backward(grad_tiles: Floats, grad_maps: Floats) -> None:  # adds
        for n in range(len(grad_maps) // (height * width * channels)):
            for i in range(down):
                for j in range(across):
                    to = Index(((n * height + 2 * i) * width + 2 * j) * channels)
                    start = Index(((n * down + i) * across + j) * channels)
                    for c in range(step):
                        p = grad_inputs(*read(grad_tiles, start + c, four))
                        q = grad_inputs(*read(grad_tiles, start + total + c, four))
                        r = grad_inputs(*read(grad_tiles, start + TWO * total + c, four))
                        s = grad_inputs(*read(grad_tiles, start + THREE * total + c, four))
                        add(grad_maps, to + c, step, grad_inputs(p[0], q[0], r[0], s[0]))
                        add(grad_maps, to + row + c, step, grad_inputs(p[1], q[1], r[1], s[1]))
                        add(grad_maps, to + TWO * row + c, step, grad_inputs(p[2], q[2], r[2], s[2]))
                        add(grad_maps, to + THREE * row + c, step, grad_inputs(p[3], q[3], r[3], s[3]))

    return Pair(compiled(forward, source=SOURCE), compiled(backward, source=SOURCE))


@cached_build
def output_tiles(height: int, width: int, filters: int, room: int) -> Pair:
    """The convolution's outputs (N, height, width, filters), even sides, from the products of tiles, and backward."""
    steps = _steps()
    read, write, outputs, grad_products = steps.read, steps.write, steps.outputs, steps.grad_products
    down, across = height // 2, width // 2
    row, step, product = Index(width * filters), Index(filters), Index(room * filters)
    four = FOUR * product

    def forward(products: Floats, biases: Floats, maps: Floats) -> None:
        for n in range(len(maps) // (height * width * filters)):
            for i in range(down):
                for j in range(across):
                    start = Index(((n * down + i) * across + j) * filters)
                    to = Index(((n * height + 2 * i) * width + 2 * j) * filters)
                    for f in range(step):
                        p = outputs(*read(products, start + f, four))
                        q = outputs(*read(products, start + product + f, four))
                        r = outputs(*read(products, start + TWO * product + f, four))
                        s = outputs(*read(products, start + THREE * product + f, four))
                        upper, lower = outputs(p[0], q[0], r[0], s[0]), outputs(p[1], q[1], r[1], s[1])
                        maps[to + f] = upper[0] + biases[f]
                        maps[to + step + f] = upper[1] + biases[f]
                        maps[to + row + f] = lower[0] + biases[f]
                        maps[to + row + step + f] = lower[1] + biases[f]

    def backward(grad_maps: Floats, grad_products_of_tiles: Floats) -> None:
        for n in range(len(grad_maps) // (height * width * filters)):
            for i in range(down):
                for j in range(across):
                    start = Index(((n * height + 2 * i) * width + 2 * j) * filters)
                    to = Index(((n * down + i) * across + j) * filters)
                    for f in range(step):
                        p = grad_products(grad_maps[start + f], grad_maps[start + row + f])
                        q = grad_products(grad_maps[start + step + f], grad_maps[start + row + step + f])
                        write(grad_products_of_tiles, to + f, product, grad_products(p[0], q[0]))
                        write(grad_products_of_tiles, to + four + f, product, grad_products(p[1], q[1]))
                        write(grad_products_of_tiles, to + TWO * four + f, product, grad_products(p[2], q[2]))
                        write(grad_products_of_tiles, to + THREE * four + f, product, grad_products(p[3], q[3]))

    return Pair(compiled(forward, source=SOURCE), compiled(backward, source=SOURCE))


@cached_build
def pooled_tiles(filters: int, room: int, sign: int) -> Loop:
    """ReLU and pooling by 2 x 2 windows, which are the tiles: pooled maps from the products of tiles.

    ``sign`` is 1 for max and -1 for min pooling. Pooled maps and the argmax of each window are (N, H', W', filters).
    """
    steps = _steps()
    read, outputs = steps.read, steps.outputs
    step, product, zero = Index(filters), Index(room * filters), np.float32(0)
    four = FOUR * product

    def forward(products: Floats, biases: Floats, pooled: Floats, argmax: Bytes) -> None:
        for t in range(len(pooled) // filters):
            start = Index(t * filters)
            for f in range(step):
                p = outputs(*read(products, start + f, four))
                q = outputs(*read(products, start + product + f, four))
                r = outputs(*read(products, start + TWO * product + f, four))
                s = outputs(*read(products, start + THREE * product + f, four))
                upper, lower = outputs(p[0], q[0], r[0], s[0]), outputs(p[1], q[1], r[1], s[1])
                best, place = sign * upper[0], 0
                value = sign * upper[1]
                best, place = (value, 1) if value > best or value != value else (best, place)
                value = sign * lower[0]
                best, place = (value, 2) if value > best or value != value else (best, place)
                value = sign * lower[1]
                best, place = (value, 3) if value > best or value != value else (best, place)
                value = sign * best + biases[f]
                pooled[start + f] = zero if value <= 0 else value
                argmax[start + f] = DEAD if value <= 0 else place

    return compiled(forward, source=SOURCE)
