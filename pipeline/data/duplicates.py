"""Images that are the same, or nearly: copies that were resized, recompressed or made lighter.

A copy of a training image among the test images makes a model look better than it is.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
SIDE = 16  # pixels of the thumbnails that are compared where hashes are close
MAX_DIFFERENCE = 0.04  # mean difference of two thumbnails, of their contrast
CHUNK = 10_000  # images
UINT8 = NDArray[np.uint8]


def clusters(images: UINT8, distance: int | None) -> NDArray[np.int64]:
    """A number (N,) for each of the images (N, H, W, C): equal ones for copies of each other, and of their copies.

    Images are copies if they are equal or, unless ``distance`` is None, if their difference hashes differ in at most
    that many of 64 bits and their thumbnails are nearly the same.
    """
    _, numbers = np.unique(_rows(images), return_inverse=True)
    if distance is None:
        return numbers.astype(np.int64)
    first = np.unique(numbers, return_index=True)[1]  # one image of each kind
    grey = _grey(images[first])
    pairs = _close_pairs(difference_hashes(grey), _thumbnails(grey), distance)
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(first), len(first)))
    return connected_components(edges, directed=False)[1].astype(np.int64)[numbers]


def _rows(images: UINT8) -> NDArray[np.void]:
    """Each image as one value, which can be compared."""
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    return flat.view(np.dtype((np.void, flat.shape[1]))).ravel()


def _grey(images: UINT8) -> NDArray[np.float32]:
    return images.mean(axis=3, dtype=np.float32)


def _resized(grey: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Images (N, H, W) as (N, height, width): means of areas."""
    down, across = _areas(grey.shape[1], height), _areas(grey.shape[2], width)
    chunks = (grey[start : start + CHUNK] for start in range(0, len(grey), CHUNK))
    return np.concatenate([down @ chunk @ across.T for chunk in chunks])


def _areas(pixels: int, cells: int) -> NDArray[np.float32]:
    """(cells, pixels): the share that each of ``pixels`` in a row has in each of as many cells of equal size."""
    edges = np.linspace(0, pixels, cells + 1)
    left, right = np.maximum(edges[:-1, None], np.arange(pixels)), np.minimum(edges[1:, None], np.arange(1, pixels + 1))
    return (np.clip(right - left, 0, None) * cells / pixels).astype(np.float32)


def difference_hashes(grey: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A hash (N,) of each image (N, H, W): which of 8 x 9 areas are brighter than the one on their left.

    Copies have hashes that differ in few bits (Krawetz, 2013, "Kind of Like That").
    """
    brighter = np.diff(_resized(grey, 8, 9), axis=2) > 8
    return np.packbits(brighter.reshape(len(grey), BITS), axis=1).view(np.uint64).ravel()


def _thumbnails(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, SIDE * SIDE), without brightness and contrast."""
    flat = _resized(grey, SIDE, SIDE).reshape(len(grey), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.abs(flat).mean(axis=1, keepdims=True), 1)


def _close_pairs(hashes: NDArray[np.uint64], thumbnails: NDArray[np.float32], distance: int) -> NDArray[np.int64]:
    """Pairs (P, 2) of images that are nearly the same."""
    found = [np.empty((0, 2), np.int64)]
    for one, other in _candidates(hashes, distance):
        difference = np.abs(thumbnails[one] - thumbnails[other]).mean(axis=1)
        close = difference <= MAX_DIFFERENCE
        found.append(np.stack([one[close], other[close]], axis=1))
    return np.concatenate(found)


def _candidates(hashes: NDArray[np.uint64], distance: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs whose hashes differ in at most ``distance`` bits."""
    order = np.argsort(hashes, kind="stable")
    for start in range(0, len(hashes), 256):
        rows = order[start : start + 256]
        bits = np.bitwise_count(hashes[rows][:, None] ^ hashes[order[start:]][None])
        one, other = np.nonzero(bits <= distance)
        later = other > one
        yield rows[one[later]], order[start:][other[later]]
