"""Pictures from anywhere -> images as the network was trained on them. Knows no data set by name."""

import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import UserError

FORMATS = {"BMP": (".bmp",), "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# What Pillow's readers raise for files that are cut off or changed.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, RuntimeError, OverflowError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MOST_PIXELS = 50_000_000
BOX = 20 / 28  # of the image's side, in which a digit of MNIST lies
INK = 0.3  # of the darkest stroke: what is fainter is paper


def read(file: Path | IO[bytes], name: str) -> Image.Image:
    """A picture upright, in grey or colour; see-through parts are white, as a browser shows them.

    Raises UserError with ``name`` where there is none that can be read.
    """
    try:
        with Image.open(file, formats=list(FORMATS)) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise UserError(f"{name} has {picture.width} x {picture.height} pixels; allowed: {MOST_PIXELS:,}")
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            if upright.mode.startswith("I"):  # 16 bits, which convert() would cut off instead of scaling
                return Image.fromarray((np.asarray(upright, dtype=np.float32) / 257).round().astype(np.uint8))
            return upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no picture that can be read, which are {', '.join(FORMATS)}") from error
    except DAMAGED as error:
        reason = _reason(error)
        raise UserError(f"{name} is no picture that can be read: {reason}") from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such file"
        case IsADirectoryError():
            return f"it is a folder without any; they end in {', '.join(SUFFIXES)}"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return str(error) or "damaged"


def fitted(picture: Image.Image, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """The middle of a picture as an image (H, W, C) uint8: scaled until it fills the frame, the rest cut off."""
    height, width, channels = image_shape
    scaled = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(scaled)).reshape(height, width, channels)


def centred_strokes(picture: Image.Image, image_shape: tuple[int, int, int], name: str) -> torch.Tensor:
    """A drawn or written sign as an image (H, W, 1) uint8, made the way MNIST was.

    Light strokes on black, whatever the picture has; scaled to fit a box of 20 x 20 of 28 x 28 pixels with its
    proportions kept and its edges smoothed, and moved until the centre of mass is the centre of the image (LeCun,
    Cortes and Burges, "The MNIST database of handwritten digits"). Raises UserError where nothing is drawn.
    """
    height, width, _ = image_shape
    ink = _ink(np.asarray(picture.convert("L"), dtype=np.float32))
    if ink is None:
        raise UserError(f"{name} is blank")
    rows, columns = (np.flatnonzero((ink > 0).any(axis=axis)) for axis in (1, 0))
    sign = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX * min(height, width) / max(sign.shape)
    size = max(1, round(sign.shape[1] * scale)), max(1, round(sign.shape[0] * scale))
    small = np.asarray(Image.fromarray(sign).resize(size, Image.Resampling.BOX))
    return torch.from_numpy(_centred(small / small.max(), height, width)).reshape(height, width, 1)


def _ink(grey: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """How much ink there is at each pixel, 0 ... 1; None for a blank picture.

    The paper is what most of the border shows; ink is what differs from it, to the side where more does.
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


def _centred(small: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """(h, w) 0 ... 1 in the middle of (height, width) uint8, by its centre of mass."""
    total = small.sum()
    row = float((small.sum(axis=1) * np.arange(small.shape[0])).sum() / total)
    column = float((small.sum(axis=0) * np.arange(small.shape[1])).sum() / total)
    top = int(np.clip(round(height / 2 - row), 0, height - small.shape[0]))
    left = int(np.clip(round(width / 2 - column), 0, width - small.shape[1]))
    image = np.zeros((height, width), dtype=np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = np.round(255 * small)
    return image
