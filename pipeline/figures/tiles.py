"""Small pictures side by side as one array: for the figures, and for the live images of a training run."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating | np.integer]


def mosaic(tiles: Array, columns: int, gap: int = 1) -> NDArray[np.float64]:
    """Tiles (count, H, W) or (count, H, W, C) side by side, ``columns`` per row; the gaps between them are NaN."""
    count, height, width, *channels = tiles.shape
    rows = math.ceil(count / columns)
    sides = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    whole = np.full((*sides, *channels), np.nan)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        whole[top : top + height, left : left + width] = tile
    return whole


def filter_tiles(weights: Array) -> Array:
    """One tile per filter, (filters, H, C x W), of weights (filters, C, H, W): the channels side by side."""
    return weights.transpose(0, 2, 1, 3).reshape(len(weights), weights.shape[2], -1)
