"""What all figures share: their width, their colours, how an image is shown, and how they become PNG bytes.

Every figure has a white background, so that it can be read on light and on dark pages.
"""

import functools
import io
import textwrap

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from pipeline import files
from pipeline.figures.tiles import Array

WIDTH = 8.5  # inches
DOTS_PER_INCH = 110
LABEL_WIDTH = 12  # characters
# Distinguishable with every kind of colour vision (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000")


def as_png(figure: Figure, tight: bool = False) -> bytes:
    """The figure as PNG; the same figure gives the same bytes, since no time and no version is written into it.

    files.own_figures finds it again by the name of this project, which is.

    ``tight`` makes room for what would be cut off, in figures that were not laid out here.
    """
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=DOTS_PER_INCH,
        facecolor="white",
        metadata={"Software": files.FIGURE_SOFTWARE},
        bbox_inches="tight" if tight else None,
    )
    return buffer.getvalue()


def image_as_png(image: Array) -> bytes:
    """An image (H, W, C) in [0, 255], grey or in colour, as PNG, a pixel each."""
    buffer = io.BytesIO()
    pixels = image.astype(np.uint8)
    imsave(buffer, pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, format="png", cmap="gray", vmin=0, vmax=255)
    return buffer.getvalue()


def of_height(height: float) -> Figure:
    """An empty figure as wide as the README, ``height`` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def bare(axes: Axes) -> None:
    """Remove the ticks, for axes that hold a picture."""
    axes.set(xticks=[], yticks=[])


def show_image(axes: Axes, image: Array) -> None:
    """An image (H, W, C) in [0, 255], grey or in colour, every pixel a square."""
    bare(axes)
    if image.shape[2] == 1:
        axes.imshow(image[:, :, 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(image.astype(np.uint8), interpolation="nearest")


def mark_zero(axes: Axes, values: Array, colour: str) -> None:
    """Label a picture whose values are all zero, which would look like a fault."""
    if not np.nan_to_num(values).any():
        text = "0 every-\nwhere"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, color=colour, fontsize=8, ha="center", va="center")


def sides(stack: Array) -> str:
    """The height and width of maps (..., H, W), as text."""
    return f"{stack.shape[-2]} x {stack.shape[-1]}"


def label_row(axes: Axes, text: str) -> None:
    """Wrapped text at the left of a row of pictures."""
    lines = wrapped(text, LABEL_WIDTH).splitlines()
    axes.set_ylabel("\n".join(f"{line} " for line in lines), rotation=0, ha="right", va="center", fontsize=8)


def legible(name: str, number: int) -> str:
    """A class name, if the font of the figures has all its characters; else the class's number, and escapes for them.

    Fonts of the system are not used: the same figure would have other bytes elsewhere.
    """
    known = _characters()
    shown = "".join(each if ord(each) in known else each.encode("unicode_escape").decode() for each in name)
    return name if shown == name else f"{number}: {shown}"


@functools.cache
def _characters() -> frozenset[int]:
    """The code points that the font of the figures has."""
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def literal(text: str) -> str:
    """``text`` for matplotlib, which takes what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: int) -> str:
    """``text`` for matplotlib, in lines of at most ``width`` characters."""
    return literal(textwrap.fill(text, width))


def shortened(name: str, length: int) -> str:
    """A class name truncated to at most ``length`` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
