"""Images that are the same, or nearly: copies that were resized, compressed again or made lighter.

A model that has seen a copy of a test image knows the answer, and its test scores are too good.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DHASH_ROWS, DHASH_COLUMNS = 8, 9  # areas; they give 8 x 8 differences
NOTICEABLE = 4  # of 255: a difference between two areas that compression does not make
SIDE = 16  # pixels of the thumbnails that are compared where the hashes are close
MAX_DIFFERENCE = 0.1  # of two thumbnails, as a share of their contrast
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in grey (ITU-R BT.601), as in Pillow
CHUNK = 1000  # images
FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]


def clusters(images: NDArray[np.uint8], max_distance: int | None) -> Indices:
    """A number (N,) for each image of (N, H, W, C); equal numbers for copies of each other, and of their copies.

    Images are copies if they are equal. Unless ``max_distance`` is None, they also are if their difference hashes
    differ in at most that many of 64 bits, and their thumbnails hardly do.
    """
    first, numbers = _distinct(images)
    if max_distance is None:
        return numbers
    hashes, thumbnails = difference_hashes(images[first]), _thumbnails(images[first])
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_copies(hashes, thumbnails, max_distance)])
    return connected(len(first), pairs)[numbers]


def connected(count: int, pairs: Indices) -> Indices:
    """A number (``count``,) for each item; equal where ``pairs`` (P, 2) connect two, directly or over others."""
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, components = connected_components(edges, directed=False)
    return np.asarray(components, np.int64)


def _distinct(images: NDArray[np.uint8]) -> tuple[Indices, Indices]:
    """The indices of one image of each kind, and the kind (N,) of each image."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    _, first, numbers = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return first, numbers.astype(np.int64)


def difference_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A hash (N,) of 64 bits for each image: which of 8 x 9 areas are noticeably brighter than the one on their left.

    Those of copies differ in few bits (Krawetz, 2013, "Kind of Like That").
    """
    areas = _areas(images, DHASH_ROWS, DHASH_COLUMNS)
    brighter = np.diff(areas, axis=2) > NOTICEABLE
    return np.packbits(brighter.reshape(len(images), -1), axis=1).view(np.uint64).ravel()


def _thumbnails(images: NDArray[np.uint8]) -> FloatArray:
    """(N, SIDE * SIDE * C): small images, all of the same brightness and contrast. Things may differ in colour only."""
    channels = [_areas(images[..., [channel]], SIDE, SIDE) for channel in range(images.shape[3])]
    flat = np.stack(channels, axis=3).reshape(len(images), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.abs(flat).mean(axis=1, keepdims=True), 1)
    return flat


def _areas(images: NDArray[np.uint8], rows: int, columns: int) -> FloatArray:
    """The mean grey level of each of ``rows`` x ``columns`` areas of equal size: (N, rows, columns)."""
    down, across = _shares(images.shape[1], rows), _shares(images.shape[2], columns)
    found = np.empty((len(images), rows, columns), np.float32)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        grey = chunk @ LUMA if chunk.shape[3] == len(LUMA) else chunk.mean(axis=3, dtype=np.float32)
        found[start : start + CHUNK] = down @ grey @ across.T
    return found


def _shares(pixels: int, areas: int) -> FloatArray:
    """(areas, pixels): how much of each area every one of ``pixels`` in a row covers."""
    edges = np.linspace(0, pixels, areas + 1)
    left = np.maximum(edges[:-1, None], np.arange(pixels))
    right = np.minimum(edges[1:, None], np.arange(1, pixels + 1))
    shares: FloatArray = (np.clip(right - left, 0, None) * areas / pixels).astype(np.float32)
    return shares


def _copies(hashes: NDArray[np.uint64], thumbnails: FloatArray, max_distance: int) -> Iterator[Indices]:
    """Pairs (P, 2) of copies."""
    for one, other in _close_hashes(hashes, max_distance):
        for start in range(0, len(one), CHUNK):
            pair = one[start : start + CHUNK], other[start : start + CHUNK]
            difference = np.abs(thumbnails[pair[0]] - thumbnails[pair[1]]).mean(axis=1)
            yield np.stack(pair, axis=1)[difference <= MAX_DIFFERENCE]


def _close_hashes(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of images whose hashes differ in at most ``max_distance`` bits.

    The 64 bits are cut into one part more than may differ: one of the parts is then the same in both hashes, so only
    images with an equal part are compared.
    """
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        part = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable").astype(np.int64)
        starts = np.flatnonzero(np.diff(part[order], prepend=part[order][:1] + np.uint64(1)))
        for alike in np.split(order, starts[1:]):
            for row in range(0, len(alike) - 1, CHUNK):
                some = alike[row : row + CHUNK]
                distance = np.bitwise_count(hashes[some][:, None] ^ hashes[alike[row:]][None])
                one, other = np.nonzero(np.triu(distance <= max_distance, 1))
                yield some[one], alike[row:][other]
