"""Digits from no data set: printed in the fonts that come with matplotlib, and drawn with pens.

python -m tests.drawn FOLDER      writes one PNG per digit, named after what it shows
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique",
         "STIXGeneral", "cmr10", "cmss10", "cmtt10")  # fmt: skip
PENS = (4, 8, 14, 24, 40, 60)  # pixels of 400
PAPER, INK = (245, 240, 230), (20, 20, 60)
Colour = tuple[int, int, int]
Point = tuple[float, float]


def arc(x: float, y: float, across: float, down: float, start: float, end: float) -> list[Point]:
    """Points of an ellipse in the unit square, angles in degrees from the right, clockwise."""
    angles = np.radians(np.linspace(start, end, 40))
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


STROKES: dict[int, list[list[Point]]] = {
    0: [arc(0.5, 0.5, 0.32, 0.48, 0, 360)],
    1: [[(0.35, 0.2), (0.55, 0), (0.55, 1)]],
    2: [[*arc(0.5, 0.27, 0.33, 0.27, 180, 370), (0.15, 1), (0.85, 1)]],
    3: [[*arc(0.45, 0.26, 0.33, 0.26, 200, 450), *arc(0.45, 0.75, 0.36, 0.25, 270, 520)]],
    4: [[(0.6, 0), (0.1, 0.65), (0.9, 0.65)], [(0.68, 0.35), (0.68, 1)]],
    5: [[(0.8, 0), (0.25, 0), (0.2, 0.42), *arc(0.45, 0.68, 0.36, 0.31, 230, 500)]],
    6: [[(0.7, 0.02), *arc(0.55, 0.6, 0.42, 0.6, 250, 180), *arc(0.5, 0.72, 0.34, 0.28, 180, 540)]],
    7: [[(0.1, 0.02), (0.88, 0.02), (0.4, 1)]],
    8: [arc(0.5, 0.25, 0.27, 0.25, 90, 450), arc(0.5, 0.75, 0.33, 0.25, 270, 630)],
    9: [arc(0.5, 0.28, 0.33, 0.28, 0, 360), [(0.8, 0.5), (0.72, 1)]],
}


def printed(digit: int, font: str) -> Image.Image:
    """Black on white, off centre."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf"
    picture = Image.new("L", (300, 260), "white")
    ImageDraw.Draw(picture).text((40, 20), str(digit), font=ImageFont.truetype(str(file), 150), fill="black")
    return picture


def drawn(
    digit: int,
    pen: int,
    *,
    size: int = 400,
    paper: Colour = PAPER,
    ink: Colour = INK,
    slant: float = 0,
    noise: float = 0,
    blur: float = 0,
) -> Image.Image:
    """Strokes ``pen`` pixels wide in a picture of ``size`` x ``size`` pixels."""
    picture = Image.new("RGB", (size, size), paper)
    canvas = ImageDraw.Draw(picture)
    for stroke in STROKES[digit]:
        points = [(size * (0.25 + 0.5 * x + slant * (0.5 - y)), size * (0.2 + 0.6 * y)) for x, y in stroke]
        canvas.line(points, fill=ink, width=pen, joint="curve")
    picture = picture.filter(ImageFilter.GaussianBlur(blur))
    speckles = np.random.default_rng(0).normal(0, noise, (size, size, 1))
    return Image.fromarray((np.asarray(picture) + speckles).clip(0, 255).astype(np.uint8))


def all_of_them() -> Iterator[tuple[str, int, Image.Image]]:
    """(name, digit, picture) of each."""
    for digit in range(10):
        yield from ((font, digit, printed(digit, font)) for font in FONTS)
        yield from ((f"pen of {pen}", digit, drawn(digit, pen)) for pen in PENS)
        yield "chalk", digit, drawn(digit, 16, paper=(30, 60, 40), ink=(240, 240, 240))
        yield "pencil", digit, drawn(digit, 10, paper=(220, 220, 220), ink=(150, 150, 150), noise=5)
        yield "slanted left", digit, drawn(digit, 16, slant=-0.25)
        yield "slanted right", digit, drawn(digit, 16, slant=0.25)
        yield "noisy", digit, drawn(digit, 16, noise=12)
        yield "blurred", digit, drawn(digit, 16, blur=6)
        yield "small", digit, drawn(digit, 3, size=40)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, digit, picture in all_of_them():
        picture.save(folder / f"{name}-{digit}.png")
