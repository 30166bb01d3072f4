"""Images that are the same, or nearly: copies that were resized, compressed again or made lighter.

A model that has seen a copy of a test image knows the answer, and its test scores are too good.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data import mapped_files

DHASH_ROWS, DHASH_COLUMNS = 8, 9  # areas; they give 8 x 8 differences
NOTICEABLE = 4  # of 255: a difference between two areas that compression does not make
SIDE = 16  # pixels of the thumbnails that are compared where the hashes are close
MAX_DIFFERENCE = 0.1  # of two thumbnails, as a share of their contrast
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in grey (ITU-R BT.601), as in Pillow
ROUNDING = 0.001  # of differences between means
CHUNK = 1000  # images
PAIRS = 100_000  # that are compared at a time
MANY = 10  # close hashes of each image in a group: they are not all compared with each other
FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]


def clusters(images: NDArray[np.uint8], max_distance: int | None, digests: Sequence[bytes] | None = None) -> Indices:
    """A number (N,) for each image of (N, H, W, C); equal numbers for copies of each other, and of their copies.

    Images are copies if they are equal. Unless ``max_distance`` is None, they also are if their difference hashes
    differ in at most that many of 64 bits, and their thumbnails hardly do. ``digests`` are those of the images, all of
    the same length; without them they are computed.
    """
    first, numbers = _distinct(list(mapped_files.digests(images)) if digests is None else digests)
    if max_distance is None:
        return numbers
    pairs = [np.empty((0, 2), np.int64), *_copies(Fingerprints.of(images, max_distance, first))]
    return connected(len(first), np.concatenate(pairs))[numbers]


def connected(count: int, pairs: Indices) -> Indices:
    """A number (``count``,) for each item; equal where ``pairs`` (P, 2) connect two, directly or over others."""
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, components = connected_components(edges, directed=False)
    return np.asarray(components, np.int64)


def _distinct(digests: Sequence[bytes]) -> tuple[Indices, Indices]:
    """The indices of one image of each kind, in ascending order, and the kind (N,) of each image."""
    as_array = np.frombuffer(b"".join(digests), f"V{len(digests[0])}")
    _, first, numbers = np.unique(as_array, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the images: those of a file are read faster so
    return first[order], np.argsort(order)[numbers].astype(np.int64)


def _hashes_and_thumbnails(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], FloatArray]:
    levels = images.astype(np.float32)
    return _difference_hashes(levels), _thumbnails(levels)


def _difference_hashes(images: FloatArray) -> NDArray[np.uint64]:
    """A hash (N,) of 64 bits for each image: which of 8 x 9 areas are noticeably brighter than the one on their left.

    Those of copies differ in few bits (Krawetz, 2013, "Kind of Like That").
    """
    areas = _areas(images, DHASH_ROWS, DHASH_COLUMNS)
    grey = areas @ LUMA if images.shape[3] == len(LUMA) else areas.mean(axis=3)
    brighter = np.diff(grey, axis=2) > NOTICEABLE
    return np.packbits(brighter.reshape(len(images), -1), axis=1).view(np.uint64).ravel()


def _thumbnails(images: FloatArray) -> FloatArray:
    """(N, SIDE * SIDE * C): small images, all of the same brightness and contrast. Things may differ in colour only."""
    flat = _areas(images, SIDE, SIDE).reshape(len(images), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.abs(flat).mean(axis=1, keepdims=True), 1)
    return flat


def _areas(images: FloatArray, rows: int, columns: int) -> FloatArray:
    """The mean level of each channel in each of ``rows`` x ``columns`` areas of equal size: (N, rows, columns, C)."""
    count, height, width, channels = images.shape
    down, across = _shares(height, rows), _shares(width, columns)
    halfway = (down @ images.reshape(count, height, -1)).reshape(count, rows, width, channels)
    areas = np.asarray(halfway.transpose(0, 1, 3, 2) @ across.T, np.float32)
    return areas.transpose(0, 1, 3, 2)


def _shares(pixels: int, areas: int) -> FloatArray:
    """(areas, pixels): how much of each area every one of ``pixels`` in a row covers."""
    edges = np.linspace(0, pixels, areas + 1)
    left = np.maximum(edges[:-1, None], np.arange(pixels))
    right = np.minimum(edges[1:, None], np.arange(1, pixels + 1))
    shares: FloatArray = (np.clip(right - left, 0, None) * areas / pixels).astype(np.float32)
    return shares


@dataclass(frozen=True)
class Fingerprints:
    """What tells copies of N images: hashes (N,), thumbnails (N, SIDE * SIDE * C) and, smaller, ``coarse`` (N, 16)."""

    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.float16]  # half the size, since there is one for each picture of a folder
    coarse: FloatArray
    max_distance: int

    @classmethod
    def of(cls, images: NDArray[np.uint8], max_distance: int, rows: Indices | None = None) -> Self:
        """Those of the images (N, H, W, C), or of some of them. There may be more images than memory."""
        count, filled = len(images if rows is None else rows), 0
        hashes = np.empty(count, np.uint64)
        thumbnails = np.empty((count, SIDE * SIDE * images.shape[3]), np.float16)
        for some in mapped_files.on_all_cores(_hashes_and_thumbnails, images, rows):
            place = slice(filled, filled := filled + len(some[0]))
            hashes[place], thumbnails[place] = some
        return cls(hashes, thumbnails, _coarse(thumbnails), max_distance)

    def close_hashes(self, some: Indices, others: Indices) -> tuple[Indices, Indices]:
        """The places in ``some`` and in ``others`` of each pair whose hashes are close."""
        distance = np.bitwise_count(self.hashes[some][:, None] ^ self.hashes[others][None])
        one, other = np.nonzero(distance <= self.max_distance)
        return one, other

    def are_copies(self, one: Indices, other: Indices) -> NDArray[np.bool_]:
        """Whether the thumbnails of pairs, (P,) and (P,), hardly differ.

        Means of areas differ no more than what they are the means of, so these are compared first.
        """
        found = np.zeros(len(one), bool)
        for start in range(0, len(one), PAIRS):
            chunk = slice(start, start + PAIRS)
            found[chunk] = self._difference(self.coarse, one[chunk], other[chunk]) <= MAX_DIFFERENCE + ROUNDING
        for places in np.array_split(np.flatnonzero(found), max(1, found.sum() // CHUNK)):
            found[places] = self._difference(self.thumbnails, one[places], other[places]) <= MAX_DIFFERENCE
        return found

    @staticmethod
    def _difference(values: NDArray[np.floating[Any]], one: Indices, other: Indices) -> FloatArray:
        first, second = (values[each].astype(np.float32) for each in (one, other))
        return np.asarray(np.abs(first - second).mean(axis=1), np.float32)


def _coarse(thumbnails: NDArray[np.float16]) -> FloatArray:
    """The mean of each of 4 x 4 areas of thumbnails: (N, 16)."""
    areas = thumbnails.reshape(len(thumbnails), 4, SIDE // 4, 4, -1)
    means: FloatArray = areas.mean(axis=(2, 4), dtype=np.float32).reshape(len(thumbnails), 16)
    return means


def _copies(fingerprints: Fingerprints) -> Iterator[Indices]:
    """Pairs (P, 2) of copies, which connect all that are copies of each other, directly or over others."""
    for alike in _equal_parts(fingerprints.hashes, fingerprints.max_distance):
        one, other = fingerprints.close_hashes(alike, alike) if len(alike) <= CHUNK else (alike, alike)
        if len(alike) <= CHUNK and len(one) < MANY * len(alike):
            pairs = np.stack([alike[one[one < other]], alike[other[one < other]]], axis=1)
            yield pairs[fingerprints.are_copies(pairs[:, 0], pairs[:, 1])]
        else:
            yield from _connections(alike, fingerprints)


def _connections(alike: Indices, fingerprints: Fingerprints) -> Iterator[Indices]:
    """Pairs that connect the copies among many images.

    An image that is found is compared with those that are not found yet. The frames of a fixed camera are all found by
    the first one: their number of comparisons, not its square.
    """
    rest = _without_singles(alike, fingerprints)
    while len(rest):
        found, rest = rest[:1], rest[1:]
        while len(found) and len(rest):
            count = max(1, PAIRS // len(rest))
            some, found = found[:count], found[count:]
            one, other = fingerprints.close_hashes(some, rest)
            copies = fingerprints.are_copies(some[one], rest[other])
            if copies.any():
                yield np.stack([some[one[copies]], rest[other[copies]]], axis=1)
                new = np.unique(other[copies])
                found, rest = np.concatenate([found, rest[new]]), np.delete(rest, new)
        rest = _without_singles(rest, fingerprints)


def _without_singles(rest: Indices, fingerprints: Fingerprints) -> Indices:
    """The images from the first one on that has a copy among those behind it: more and more are tried together."""
    count = 1
    while len(rest):
        some = rest[:count]
        one, other = fingerprints.close_hashes(some, rest)
        behind = one < other
        one, other = one[behind], other[behind]
        copies = fingerprints.are_copies(some[one], rest[other])
        if copies.any():
            return rest[one[copies].min() :]
        rest, count = rest[count:], min(2 * count, max(1, PAIRS // len(rest)))
    return rest


def _equal_parts(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[Indices]:
    """Groups of images, at least two; any two whose hashes differ in at most ``max_distance`` bits are in one of them.

    The 64 bits are dealt to one part more than may differ: one of the parts is then the same in both hashes. A group
    is of images that have a part in common, and not all of them another that came before.
    """
    bits = np.random.default_rng(0).permutation(64)  # neighbours are often equal, and would make large groups
    parts = list[NDArray[np.uint64]]()
    for own in np.array_split(bits, max_distance + 1):
        part = hashes & np.uint64(sum(1 << int(bit) for bit in own))
        order = np.argsort(part, kind="stable").astype(np.int64)
        starts = np.flatnonzero(np.diff(part[order], prepend=part[order][:1] + np.uint64(1)))
        for alike in np.split(order, starts[1:]):
            if len(alike) > 1 and not any((before[alike] == before[alike[0]]).all() for before in parts):
                yield alike
        parts.append(part)
