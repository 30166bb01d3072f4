"""Picture files from anywhere -> images (H, W, C) uint8 like those that the network was trained on."""

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
# What Pillow raises for truncated or corrupted files.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, RuntimeError, OverflowError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MAX_PIXELS = 50_000_000
BOX = 20 / 28  # the part of the image's side that a digit of MNIST fills
INK = 0.3  # of the darkest stroke; anything fainter counts as paper


def pictures(folder: Path) -> list[Path]:
    """The picture files in a folder and in the folders inside it, by their suffixes, in alphabetical order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def read(file: Path | IO[bytes], name: str) -> Image.Image:
    """A picture, turned upright, in grey or colour. Transparent parts are white, as a browser shows them.

    Raises UserError with ``name`` where it cannot be read.
    """
    try:
        if isinstance(file, Path) and file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{name} is not a regular file")  # a named pipe, for instance, would be waited for
        with Image.open(file, formats=list(FORMATS)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{name} has {picture.width} x {picture.height} pixels; allowed: {MAX_PIXELS:,}")
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip instead of scaling
                return Image.fromarray((np.asarray(upright, dtype=np.float32) / 257).round().astype(np.uint8))
            return upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture; allowed: {', '.join(FORMATS)}") from error
    except DAMAGED as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return f"it is a folder without pictures ({', '.join(SUFFIXES)})"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return str(error) or "damaged"


def fitted(picture: Image.Image, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """The middle of a picture as an image (H, W, C) uint8: scaled to fill the frame, then cropped."""
    height, width, channels = image_shape
    scaled = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(scaled)).reshape(height, width, channels)


def centred_strokes(picture: Image.Image, image_shape: tuple[int, int, int], name: str) -> torch.Tensor:
    """A drawn or written character as an image (H, W, 1) uint8, preprocessed like MNIST.

    Light strokes on black, whichever way round the picture is. The character is scaled, with its proportions kept and
    its edges smoothed, to fit a box of 20 x 20 of 28 x 28 pixels, and its centre of mass is moved to the centre of the
    image (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). Raises UserError for a blank picture.
    """
    height, width, _ = image_shape
    ink = _ink(np.asarray(picture.convert("L"), dtype=np.float32))
    if ink is None:
        raise UserError(f"{name} is blank")
    rows, columns = (np.flatnonzero((ink > 0).any(axis=axis)) for axis in (1, 0))
    strokes = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX * min(height, width) / max(strokes.shape)
    size = max(1, round(strokes.shape[1] * scale)), max(1, round(strokes.shape[0] * scale))
    small = np.asarray(Image.fromarray(strokes).resize(size, Image.Resampling.BOX))
    return torch.from_numpy(_centred(small / small.max(), height, width)).reshape(height, width, 1)


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


def _centred(small: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """(h, w), 0 to 1, placed in (height, width) uint8 so that its centre of mass is in the middle."""
    total = small.sum()
    row = float((small.sum(axis=1) * np.arange(small.shape[0])).sum() / total)
    column = float((small.sum(axis=0) * np.arange(small.shape[1])).sum() / total)
    top = int(np.clip(round(height / 2 - row), 0, height - small.shape[0]))
    left = int(np.clip(round(width / 2 - column), 0, width - small.shape[1]))
    image = np.zeros((height, width), dtype=np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = np.round(255 * small)
    return image
