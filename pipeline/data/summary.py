"""The summary of the prepared images: how many each class has and of which sizes, and what may be wrong with them.

It depends on the pictures and their labels, and not on other files in the folder.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import mapped_files
from pipeline.data.own_pictures import Row
from pipeline.data.splits import SPLITS, LabelledImages, Prepared
from pipeline.errors import counted, printable

SIZES = ("smallest", "median", "largest")
SHOWN = 3  # pictures that a warning names
SPARSE = 8  # every so many rows and columns are looked at first
Box = tuple[int, int, int, int]


def summary(
    prepared: Prepared, rows: Sequence[Row], contact_sheets: Sequence[str], warnings: Sequence[str]
) -> dict[str, Any]:
    """The content of data_summary.json. ``rows`` are those of images.csv, none for a published data set.

    For each class: its images in each split, its unreadable pictures, the smallest, the middle and the largest size
    [width, height], and its contact sheet.
    """
    counts = {
        split: torch.bincount(images.labels, minlength=len(prepared.class_names)).tolist()
        for split, images in prepared.splits.items()
    }
    unreadable = Counter(row.label for row in rows if not row.split)
    sizes = _sizes(rows)
    height, width, _ = prepared.preprocessing.image_shape
    classes = [
        {
            "class": name,
            **{split: counts[split][number] for split in SPLITS},
            "unreadable": unreadable[name],
            **sizes.get(name, {key: [width, height] for key in SIZES}),
            "contact_sheet": contact_sheets[number],
        }
        for number, name in enumerate(prepared.class_names)
    ]
    return {"classes": classes, "warnings": list(warnings)}


def image_warnings(prepared: Prepared, rows: Sequence[Row]) -> Iterator[str]:
    """What is wrong with single pictures, a line for each kind."""
    if unused := [row for row in rows if not row.split]:
        yield f"{counted(len(unused), 'picture')} cannot be read, such as {_some([row.path for row in unused])}"
    if blank := list(_blank(prepared, rows)):
        yield f"blank, one value everywhere: {counted(len(blank), 'picture')}, such as {_some(blank)}"


def _sizes(rows: Sequence[Row]) -> Mapping[str, dict[str, list[int]]]:
    """The smallest, the middle and the largest size of the pictures of each class, by their areas."""
    found = defaultdict[str, list[tuple[int, int, int]]](list)
    for row in rows:
        if row.split:
            width, height = int(row.width), int(row.height)
            found[row.label].append((width * height, width, height))
    return {
        label: {name: list(sorted(each)[place][1:]) for name, place in zip(SIZES, (0, len(each) // 2, -1), strict=True)}
        for label, each in found.items()
    }


def _blank(prepared: Prepared, rows: Sequence[Row]) -> Iterator[str]:
    """The paths of pictures with one value everywhere; without paths, the split and the index."""
    paths = {(row.split, row.index): row.path for row in rows}
    for split, images in prepared.splits.items():
        filled = _filled(prepared, [row for row in rows if row.split == split], len(images))
        found = [index for box, indices in filled.items() for index in _of_one_value(images, box, indices)]
        for index in sorted(found):
            yield paths.get((split, index), f"{split} {index}")


def _filled(prepared: Prepared, rows: Sequence[Row], count: int) -> Mapping[Box, list[int]]:
    """The images by the part of them that their picture fills."""
    height, width, _ = prepared.preprocessing.image_shape
    if not rows:
        return {(0, 0, width, height): list(range(count))}
    found = defaultdict[Box, list[int]](list)
    for row in rows:
        found[prepared.preprocessing.filled((int(row.width), int(row.height)))].append(int(row.index))
    return found


def _of_one_value(images: LabelledImages, box: Box, indices: Sequence[int]) -> Iterator[int]:
    left, top, right, bottom = box

    def are_blank(some: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return _are_blank(some[:, top:bottom, left:right])

    found = mapped_files.on_all_cores(are_blank, images.images.numpy(), indices)
    yield from itertools.compress(indices, itertools.chain.from_iterable(found))


def _are_blank(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each of (N, H, W, C) has the same pixel everywhere."""
    blank = _are_equal(pixels[:, ::SPARSE, ::SPARSE])
    blank[blank] = _are_equal(pixels[blank])  # few: that takes no time
    return blank


def _are_equal(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (pixels == pixels[:, :1, :1]).all(axis=(1, 2, 3))
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN]))
