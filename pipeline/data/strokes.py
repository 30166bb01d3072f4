"""Drawn and written characters as images like those of MNIST."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError

BOX = 20 / 28  # the part of the image's side that a digit of MNIST fills
INK = 0.3  # of the darkest stroke; anything fainter counts as paper


def centred(picture: Image.Image, image_shape: tuple[int, int, int], name: str) -> NDArray[np.uint8]:
    """A drawn or written character as an image (H, W, C) uint8, preprocessed like MNIST.

    Light strokes on black, whichever way round the picture is. The character is scaled, with its proportions kept and
    its edges smoothed, to fit a box of 20 x 20 of 28 x 28 pixels, and its centre of mass is moved to the centre of the
    image (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). Raises UserError for a blank picture.
    """
    height, width, channels = image_shape
    ink = _ink(np.asarray(picture.convert("L"), dtype=np.float32))
    if ink is None:
        raise UserError(f"{name} is blank")
    rows, columns = (np.flatnonzero((ink > 0).any(axis=axis)) for axis in (1, 0))
    character = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX * min(height, width) / max(character.shape)
    size = max(1, round(character.shape[1] * scale)), max(1, round(character.shape[0] * scale))
    small = np.asarray(Image.fromarray(character).resize(size, Image.Resampling.BOX))
    return np.repeat(_placed(small / small.max(), height, width)[..., None], channels, axis=2)


def _ink(grey: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The amount of ink at each pixel (H, W), 0 to 1; None for a blank picture.

    The median of the border is the paper. Ink is what is darker than it, or what is lighter if that is more.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    difference = grey - np.median(border)
    darker, lighter = np.clip(-difference, 0, None), np.clip(difference, 0, None)
    ink = darker if darker.sum() > lighter.sum() else lighter
    darkest = float(np.percentile(ink, 99.9)) or float(ink.max())
    if darkest < 16:  # of 255: noise
        return None
    cleaned: NDArray[np.float32] = np.clip((ink / darkest - INK) / (1 - INK), 0, 1)
    return cleaned


def _placed(small: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """(h, w), 0 to 1, placed in (height, width) uint8 so that its centre of mass is in the middle."""
    total = small.sum()
    row = float((small.sum(axis=1) * np.arange(small.shape[0])).sum() / total)
    column = float((small.sum(axis=0) * np.arange(small.shape[1])).sum() / total)
    top = int(np.clip(round(height / 2 - row), 0, height - small.shape[0]))
    left = int(np.clip(round(width / 2 - column), 0, width - small.shape[1]))
    image = np.zeros((height, width), dtype=np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = np.round(255 * small)
    return image
