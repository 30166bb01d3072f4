"""Loops over the pixels of training images, compiled for the CPU by Numba, as those of cpu_kernels.py.

Separate PyTorch operations would write each intermediate result to memory, as floats and indices of eight bytes: an
augmentation would take ten times as long. Images are uint8, everything is contiguous, and results are written into the
last argument.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.model.cpu_kernels import Bytes, Floats, Loop, cached_build, called_in_loops, compiled

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
SOURCE = Path(__file__).read_bytes()  # of what runs here: the file may change before a loop is compiled


@cached_build
def move(channels: int, reflects: bool) -> Loop:
    """Each image (N, H, W * channels) moved up by its ``ups`` (N,) and to the left by its ``lefts``; below 0, back.

    What comes into view is the image's reflection, or black.
    """
    black = np.uint8(0)

    def reflected(index: int, length: int) -> int:
        period = max(2 * (length - 1), 1)
        remainder = index % period
        return remainder if remainder < length else period - remainder

    mirror = called_in_loops(reflected)

    def loop(images: Bytes, ups: Integers, lefts: Integers, moved: Bytes) -> None:
        count, height, length = images.shape
        width = length // channels
        for n in range(count):
            left = lefts[n]
            first, last = min(max(-left, 0), width), max(min(width - left, width), 0)
            for i in range(height):
                row, results = images[n, mirror(i + ups[n], height)], moved[n, i]
                if not reflects and not 0 <= i + ups[n] < height:
                    for k in range(length):
                        results[k] = black
                    continue
                to, at = np.uint64(first * channels), np.uint64((first + left) * channels)
                for k in range((last - first) * channels):
                    results[to + np.uint64(k)] = row[at + np.uint64(k)]
                for start, stop in ((0, min(first, width)), (max(first, last), width)):
                    for j in range(start, stop):
                        origin = mirror(j + left, width)
                        for c in range(channels):
                            results[j * channels + c] = row[origin * channels + c] if reflects else black

    return compiled(loop, source=SOURCE)


@cached_build
def flip(channels: int) -> Loop:
    """Each image (N, H, W * channels) as it is, or mirrored from left to right where ``mirrored`` (N,) says so."""
    step = np.uint64(channels)

    def loop(images: Bytes, mirrored: Booleans, flipped: Bytes) -> None:
        count, height, length = images.shape
        for n in range(count):
            for i in range(height):
                row, results = images[n, i], flipped[n, i]
                if not mirrored[n]:
                    for k in range(length):
                        results[k] = row[k]
                    continue
                at, to = np.uint64(length - channels), np.uint64(0)
                for _ in range(length // channels):
                    for c in range(channels):
                        results[to + np.uint64(c)] = row[at + np.uint64(c)]
                    at -= step
                    to += step

    return compiled(loop, source=SOURCE)


KNOTS = 7  # along each side of an image, for smooth displacements
BITS = 12  # of a weight; with them, rounding the weights changes a value by less than a sixth
LANE = BITS + 8  # bits of a channel's value times a weight
WHOLE = 1 << BITS  # the sum of the weights of four pixels


@cached_build
def warp(channels: int, is_elastic: bool) -> Loop:
    """Each image of at most three channels resampled bilinearly, once; beyond its edge are the edge's nearest pixels.

    Images (N, H * W * channels) are slanted by ``shears`` (N,) in degrees, then times the size of 1 plus ``scales``,
    then turned by ``rotations`` in degrees. Each pixel's origin, in the result, is displaced by ``pushes`` (N, 2,
    KNOTS, KNOTS), to the right and down: a sum over the knots, weighted by ``down_weights`` (KNOTS, H) and
    ``right_weights`` (KNOTS, W).

    All channels of a pixel are in one integer, a lane each, so that one multiplication weights them all. In functions
    of their own, the loops over a row are four times slower.
    """
    zero, one, half, whole = np.float32(0), np.float32(1), np.float32(0.5), np.float32(WHOLE)
    unit = np.uint64(1)
    rounding = sum(WHOLE // 2 << LANE * lane for lane in range(channels))

    def loop(
        images: Bytes,
        rotations: Floats,
        scales: Floats,
        shears: Floats,
        pushes: Floats,
        down_weights: Floats,
        right_weights: Floats,
        warped: Bytes,
    ) -> None:
        height, width = down_weights.shape[1], right_weights.shape[1]
        middle, centre = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
        lowest, rightmost = np.float32(height - 1), np.float32(width - 1)
        last_row, last_column = np.int32(max(height - 2, 0)), np.int32(max(width - 2, 0))
        to_right, to_below = np.uint64(width > 1), np.uint64(width if height > 1 else 0)
        x, y, starts = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int32)
        second, third, fourth = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
        packed = np.empty(height * width, np.int64)
        push = np.empty((2, KNOTS), np.float32)  # of a row
        u, v = push
        for n in range(images.shape[0]):
            pixels, results = images[n], warped[n]
            for k in range(height * width):
                value = np.int64(0)
                for lane in range(channels):
                    value |= np.int64(pixels[k * channels + lane]) << (LANE * lane)
                packed[k] = value
            angle, slant = np.float32(math.radians(rotations[n])), np.float32(math.tan(math.radians(shears[n])))
            cosine, sine = np.cos(angle) / (one + scales[n]), np.sin(angle) / (one + scales[n])
            a, b, c, d = cosine - slant * sine, sine + slant * cosine, -sine, cosine  # the inverse of all three
            to = np.uint64(0)
            for i in range(height):
                down = np.float32(i) - middle
                for j in range(width):
                    right = np.float32(j) - centre
                    x[j] = a * right + b * down + centre
                    y[j] = c * right + d * down + middle
                if is_elastic:
                    for axis in range(2):
                        for k in range(KNOTS):
                            total = zero
                            for m in range(KNOTS):
                                total += down_weights[m, i] * pushes[n, axis, m, k]
                            push[axis, k] = total
                    u0, u1, u2, u3, u4, u5, u6 = u[0], u[1], u[2], u[3], u[4], u[5], u[6]
                    v0, v1, v2, v3, v4, v5, v6 = v[0], v[1], v[2], v[3], v[4], v[5], v[6]
                    for j in range(width):
                        w0, w1, w2 = right_weights[0, j], right_weights[1, j], right_weights[2, j]
                        w3, w4, w5 = right_weights[3, j], right_weights[4, j], right_weights[5, j]
                        w6 = right_weights[6, j]
                        x[j] += u0 * w0 + u1 * w1 + u2 * w2 + u3 * w3 + u4 * w4 + u5 * w5 + u6 * w6
                        y[j] += v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3 + v4 * w4 + v5 * w5 + v6 * w6
                for j in range(width):
                    inside_x = min(x[j] if x[j] > zero else zero, rightmost)  # also if it is not a number
                    inside_y = min(y[j] if y[j] > zero else zero, lowest)
                    column, row = min(np.int32(inside_x), last_column), min(np.int32(inside_y), last_row)
                    starts[j] = row * np.int32(width) + column
                    right, down = inside_x - np.float32(column), inside_y - np.float32(row)
                    second[j] = np.int32(whole * right * (one - down) + half)
                    third[j] = np.int32(whole * (one - right) * down + half)
                    fourth[j] = np.int32(whole * right * down + half)
                for j in range(width):
                    at = np.uint64(starts[j])
                    q, r, s = np.int64(second[j]), np.int64(third[j]), np.int64(fourth[j])
                    weighted = packed[at] * (WHOLE - q - r - s) + packed[at + to_right] * q + rounding
                    weighted += packed[at + to_below] * r + packed[at + to_below + to_right] * s
                    for lane in range(channels):
                        results[to] = np.uint8(weighted >> (LANE * lane + BITS))
                        to += unit

    return compiled(loop, source=SOURCE)


@cached_build
def adjust(channels: int, keeps_mean: bool) -> Loop:
    """Each image (N, H, W * channels) times its ``factors`` (N,), or only its differences to its mean brightness."""
    zero, most, half = np.float32(0), np.float32(255), np.float32(0.5)
    mean_of, shares = _means(channels), np.array(brightness_shares(channels), np.float32)

    def loop(images: Bytes, factors: Floats, adjusted: Bytes) -> None:
        count, height, length = images.shape
        means, sums = np.empty(channels, np.float32), np.empty(length, np.int32)
        for n in range(count):
            factor, offset = factors[n], zero
            if keeps_mean:
                mean_of(images[n], sums, means)
                brightness = zero
                for c in range(channels):
                    brightness += means[c] * shares[c]
                offset = (np.float32(1) - factor) * brightness
            for i in range(height):
                for k in range(length):
                    value = min(max(np.float32(images[n, i, k]) * factor + offset, zero), most)
                    adjusted[n, i, k] = np.uint8(np.int32(value + half))

    return compiled(loop, source=SOURCE)


def _means(channels: int) -> Loop:
    """The mean of each channel (channels,) of an image (H, W * channels); ``sums`` (W * channels) is for its use."""

    def means_of(image: Bytes, sums: NDArray[np.int32], means: Floats) -> None:
        height, length = image.shape
        sums[:] = 0
        for i in range(height):
            for k in range(length):  # vector instructions, as sums of columns
                sums[k] += np.int32(image[i, k])
        for c in range(channels):
            total = np.int64(0)
            for k in range(c, length, channels):
                total += np.int64(sums[k])
            means[c] = total * channels / (height * length)

    return called_in_loops(means_of)


def brightness_shares(channels: int) -> tuple[float, ...]:
    """The share of each channel in the brightness that an eye sees, for red, green and blue (ITU-R BT.601)."""
    return (0.2989, 0.587, 0.114) if channels == 3 else (1 / channels,) * channels


@cached_build
def cutout(channels: int) -> Loop:
    """Each image (N, H, W * channels) with a square set to the mean of each channel.

    It is ``side`` pixels wide, and its first row and column are its ``tops`` (N,) and ``lefts``. What of it is outside
    of the image is left out.
    """
    half, mean_of = np.float32(0.5), _means(channels)

    def loop(images: Bytes, tops: Integers, lefts: Integers, side: int, cut: Bytes) -> None:
        count, height, length = images.shape
        means, sums = np.empty(channels, np.float32), np.empty(length, np.int32)
        for n in range(count):
            mean_of(images[n], sums, means)
            for i in range(height):
                for k in range(length):
                    cut[n, i, k] = images[n, i, k]
            for i in range(max(tops[n], 0), min(tops[n] + side, height)):
                for j in range(max(lefts[n], 0), min(lefts[n] + side, length // channels)):
                    for c in range(channels):
                        cut[n, i, j * channels + c] = np.uint8(np.int32(means[c] + half))

    return compiled(loop, source=SOURCE)


@cached_build
def mix() -> Loop:
    """A ``share`` (1,) of each image and the rest of the image before it; of the last one for the first.

    Images are (N, H * W * channels).
    """
    half = np.float32(0.5)

    def loop(images: Bytes, share: Floats, mixed: Bytes) -> None:
        own = share[0]
        for n in range(images.shape[0]):
            for k in range(images.shape[1]):
                other = np.float32(images[n - 1, k])
                value = other + own * (np.float32(images[n, k]) - other)
                mixed[n, k] = np.uint8(np.int32(value + half))

    return compiled(loop, source=SOURCE)
