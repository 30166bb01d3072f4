"""Pictures that are unlike handwritten digits: noise, photographs, words, several digits in one picture.

python -m tests.unlike FOLDER      writes them as PNGs, in a folder for each kind
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tests.drawn import FONTS, PENS, drawn

COUNT = 100  # pictures of each kind
WORDS = "the quick brown fox jumps over a lazy dog file edit view help search cancel save 2024 12:30 3.14 user@host"


def noise(random: np.random.Generator) -> Image.Image:
    """Coloured noise of some size."""
    height, width = random.integers(28, 300, 2)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photograph(random: np.random.Generator) -> Image.Image:
    """A square part of one of the two photographs that come with scikit-learn."""
    picture = Image.fromarray(_photographs()[int(random.integers(2))])
    side = int(random.integers(60, min(picture.size)))
    left, top = int(random.integers(picture.width - side)), int(random.integers(picture.height - side))
    return picture.crop((left, top, left + side, top + side))


@functools.cache
def _photographs() -> Sequence[NDArray[np.uint8]]:
    found: Sequence[NDArray[np.uint8]] = sklearn.datasets.load_sample_images().images
    return found


def word(random: np.random.Generator) -> Image.Image:
    """A printed word."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{random.choice(FONTS)}.ttf"
    picture = Image.new("L", (500, 100), "white")
    font = ImageFont.truetype(str(file), 50)
    ImageDraw.Draw(picture).text((20, 20), str(random.choice(WORDS.split())), font=font, fill="black")
    return picture


def two_digits(random: np.random.Generator) -> Image.Image:
    """Two drawn digits beside each other."""
    return _beside([_digit(random) for _ in range(2)])


def three_digits(random: np.random.Generator) -> Image.Image:
    """Three drawn digits beside each other."""
    return _beside([_digit(random) for _ in range(3)])


def _digit(random: np.random.Generator) -> Image.Image:
    return drawn(int(random.integers(10)), int(random.choice(PENS)))


def _beside(pictures: list[Image.Image]) -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


KINDS = {kind.__name__: kind for kind in (noise, photograph, word, two_digits, three_digits)}


def pictures(kind: str) -> Iterator[Image.Image]:
    """The pictures of one kind; the same ones each time."""
    random = np.random.default_rng(0)
    return (KINDS[kind](random) for _ in range(COUNT))


if __name__ == "__main__":
    for name in KINDS:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures(name)):
            picture.save(folder / f"{number:03}.png")
