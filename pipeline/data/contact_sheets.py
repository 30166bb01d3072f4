"""Contact sheets: training images of one class beside each other, to see what the class holds."""

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pipeline import files
from pipeline.data import mapped_files
from pipeline.data.splits import TRAIN, Prepared
from pipeline.errors import counted

COLUMNS = 10
MOST = 100  # images on a sheet
TOTAL = 4000  # images on all sheets together, if that leaves ten for each class
SIDE = 96  # pixels of the longer side of an image; smaller ones are enlarged by a whole factor
GAP, TEXT = 4, 12  # pixels between images, and for a line of text
NUMBER = 36  # pixels that a number needs
PAPER, INK = "#e1e1e1", "black"  # black and white images both stand out from the paper
LONGEST = 40  # characters of a class name, in a title and in the name of a file


def write(prepared: Prepared, folder: Path = files.CONTACT_SHEETS) -> list[str]:
    """Write one PNG per class and return their names in the order of the classes.

    Sheets of an earlier run that are not written again are removed. The same images give the same bytes.
    """
    names = [_file_name(number, prepared.class_names) for number in range(len(prepared.class_names))]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, content in zip(names, threads.map(partial(_sheet, prepared), range(len(names))), strict=True):
            files.write(folder / name, content)
    for path in files.own_figures(folder):
        if path.name not in names:
            path.unlink()
    return names


def _sheet(prepared: Prepared, number: int) -> bytes:
    """The sheet of a class."""
    chosen, count = _chosen(prepared, number)
    title = f"{_in_latin(prepared.class_names[number])}: {len(chosen):,} of {counted(count, 'training image')}"
    images = prepared.splits[TRAIN].images[chosen].numpy()
    mapped_files.let_go()
    return _as_png(draw(images, chosen.tolist(), title))


def draw(images: NDArray[np.uint8], numbers: Sequence[int], title: str) -> Image.Image:
    """A sheet with images (N, H, W, C), one or three channels, each above its number."""
    height, width = images.shape[1:3]
    scale = SIDE // max(height, width) or SIDE / max(height, width)
    across, down = max(1, round(width * scale)), max(1, round(height * scale))
    step, rows = (max(across, NUMBER) + GAP, down + TEXT + GAP), math.ceil(len(images) / COLUMNS)
    size = GAP + COLUMNS * step[0], TEXT + 2 * GAP + rows * step[1]
    sheet = Image.new("L" if images.shape[3] == 1 else "RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 2)
    pen.text((GAP, GAP), title, INK, font)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for place, (image, number) in enumerate(zip(images, numbers, strict=True)):
        left, top = GAP + place % COLUMNS * step[0], TEXT + 2 * GAP + place // COLUMNS * step[1]
        shown = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        sheet.paste(shown.resize((across, down), resampling), (left, top))
        pen.text((left, top + down), str(number), INK, font)
    return sheet


def _chosen(prepared: Prepared, number: int) -> tuple[torch.Tensor, int]:
    """The indices of evenly spaced training images of a class, and how many it has."""
    indices = (prepared.splits[TRAIN].labels == number).nonzero()[:, 0]
    most = min(most_images(len(prepared.class_names)), len(indices))
    return indices[torch.arange(most) * len(indices) // most], len(indices)


def most_images(classes: int) -> int:
    """How many images a sheet has at most: whole rows, the fewer the more classes there are."""
    return min(MOST, max(COLUMNS, TOTAL // classes // COLUMNS * COLUMNS))


def _file_name(number: int, class_names: Sequence[str]) -> str:
    digits = len(str(len(class_names) - 1))
    plain = files.plain_name(class_names[number], otherwise="class")
    return f"{number:0{max(2, digits)}}-{plain[:LONGEST]}.png"


def _in_latin(name: str) -> str:
    """A class name in the letters that Pillow's own font has, others as escapes."""
    shown = name.encode("latin-1", "backslashreplace").decode("latin-1")
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def _as_png(sheet: Image.Image) -> bytes:
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", files.FIGURE_SOFTWARE)
    content = io.BytesIO()
    sheet.save(content, "PNG", pnginfo=facts)
    return content.getvalue()
