"""A person's pictures as prepared images: listed, decoded, searched for copies, and split.

The folder is only read. What comes out depends on the pictures' contents and labels, not on their names or order.
"""

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import files
from pipeline.data import duplicates, image_files, mapped_files, splitting
from pipeline.data.cache import Cache
from pipeline.data.decoder import Decoders
from pipeline.data.folder import Entry, Pictures
from pipeline.data.image_files import Preprocessing
from pipeline.data.picture_reader import Decoded, Inspected, PictureReader
from pipeline.data.sources import DATASETS
from pipeline.data.splits import SPLITS, LabelledImages, Prepared
from pipeline.data.splitting import Assignment
from pipeline.errors import UserError, counted, printable
from pipeline.params import Data

CACHE = Path("data/decoded/pictures.db")  # in the repository
AUTO_SIDE = 64  # pixels; the CNN is slow on larger images
MOVED = "published in {}, with copies or pictures of its subject elsewhere"
MAX_NAME = 100  # characters of the data set's name: MLflow takes 250 of a model's
COPIES = 5  # of the images: decoded, twice while they are split, prepared, and in DVC's cache
FEW, IMBALANCE = 10, 20  # pictures in a class, and times the smallest class: worth a warning


@dataclass(frozen=True)
class Row:
    """A picture in reports/images.csv. ``index`` is its place in its split, as in reports/predictions.csv.

    ``split`` is empty for a picture that is not used, and ``reason`` says why.
    """

    path: str
    label: str
    split: str = ""
    index: int | str = ""
    group: str = ""
    width: int | str = ""
    height: int | str = ""
    format: str = ""
    mode: str = ""
    reason: str = ""


@dataclass(frozen=True)
class OwnPictures:
    """What became of a folder: its images, a row for each picture, and what to tell a person.

    ``left_out`` are lines about files that are no pictures, ``warnings`` those about what may be wrong. Those of them
    that depend on the pictures that are used, and on no other file, are ``data_warnings`` too.
    """

    prepared: Prepared
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    data_warnings: tuple[str, ...]


def prepare(params: Data) -> OwnPictures:
    """The pictures that ``data`` in params.yaml names. Raises UserError where it asks for what cannot be had."""
    path, scratch = Path(params.path), (files.root() / CACHE).parent
    with Pictures(path) as pictures, Cache(files.root() / CACHE) as cache, Decoders() as decoders:
        reader = PictureReader(pictures, cache, decoders)
        listing = pictures.listing(params.labels, params.label_pattern, params.group)
        inspected = reader.inspected(listing.entries)
        _check_problems(reader.problems, len(listing.entries), params)
        preprocessing = _preprocessing(inspected, reader, params)
        _check_room(scratch, len(inspected), preprocessing.image_shape)
        read, images = reader.images(inspected, preprocessing, scratch)
        _check_problems(reader.problems, len(listing.entries), params)
    class_names = _classes(read, listing.class_names)
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers[each.entry.label] for each in read], np.int64)
    keys = [each.key for each in read]
    copies = duplicates.clusters(images, params.near_duplicates, [each.pixels for each in read])
    assignment = splitting.assign(
        splitting.Pictures(
            keys=keys,
            labels=labels,
            class_names=class_names,
            groups=[each.entry.group for each in read],
            copies=copies,
            published=[each.entry.split for each in read],
        ),
        validation_fraction=params.validation_fraction,
        test_fraction=params.test_fraction,
        seed=params.split_seed,
    )
    order = {split: splitting.in_order(keys, labels, assignment, split) for split in SPLITS}
    data_warnings = tuple(_split_warnings(read, labels, copies, class_names, assignment))
    name = _name(path)
    return OwnPictures(
        Prepared(
            splits={
                split: LabelledImages(mapped_files.selected(images, rows, scratch), torch.from_numpy(labels[rows]))
                for split, rows in order.items()
            },
            name=name,
            requested=name,
            source=f"own pictures, {listing.form}",
            class_names=class_names,
            preprocessing=preprocessing,
        ),
        rows=_rows(read, reader.problems, listing.entries, assignment, order),
        left_out=tuple(
            f"left out, {reason}: {counted(len(paths), 'file')}, such as {paths[0]}"
            for reason, paths in listing.skipped.items()
        ),
        warnings=(
            *listing.warnings,
            *(f"{path} is not used: {reason}" for path, reason in sorted(reader.problems.items())),
            *data_warnings,
        ),
        data_warnings=data_warnings,
    )


def _check_problems(problems: dict[str, str], count: int, params: Data) -> None:
    """Raises UserError where more pictures cannot be read than params.yaml allows, or none can."""
    if len(problems) == count or len(problems) > params.max_bad_fraction * count:
        examples = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems):,} of {counted(count, 'picture')} cannot be read, such as: {examples}: remove or replace "
            "them, or raise data.max_bad_fraction in params.yaml"
        )


def _preprocessing(pictures: Sequence[Inspected], reader: PictureReader, params: Data) -> Preprocessing:
    """How these pictures become images, with a value for whatever is "auto" in params.yaml."""
    channels = params.channels
    if channels == "auto":
        in_colour = [each for each in pictures if each.facts.mode not in image_files.GREY_MODES]
        channels = 3 if reader.has_colour(in_colour) else 1
    facts = [each.facts for each in pictures]
    height, width = _image_size([each.size for each in facts], params)
    deep = [(each.lowest, each.highest) for each in facts if each.lowest is not None and each.highest is not None]
    values = (min(lowest for lowest, _ in deep), max(highest for _, highest in deep)) if deep else None
    return Preprocessing(params.resize, (height, width, channels), params.background, values)


def _check_room(folder: Path, count: int, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where ``folder``, which holds the images while they are split, is on too small a disk."""
    needed, there = COPIES * count * math.prod(image_shape), shutil.disk_usage(folder).free
    if needed > there:
        size = " x ".join(map(str, image_shape))
        raise UserError(
            f"{count:,} images of {size} need {needed / 1e9:,.1f} GB on the disk of {folder}, which has "
            f"{there / 1e9:,.1f} GB free: give data.image_size in params.yaml a smaller value, or make room"
        )


def _image_size(sizes: Sequence[tuple[int, int]], params: Data) -> tuple[int, int]:
    """Height and width of the images. "auto": of the pictures, if they are all alike and small; else a square."""
    if params.image_size != "auto":
        return params.image_size if isinstance(params.image_size, tuple) else (params.image_size, params.image_size)
    if len(set(sizes)) == 1 and max(sizes[0]) <= AUTO_SIDE:
        return sizes[0][1], sizes[0][0]
    side = min(AUTO_SIDE, round(median(min(size) for size in sizes)))
    return side, side


def _classes(read: Iterable[Decoded], listed: Sequence[str]) -> tuple[str, ...]:
    present = {each.entry.label for each in read}
    if missing := [name for name in listed if name not in present]:
        raise UserError(f"none of the pictures of class {printable(missing[0])} can be read")
    return tuple(sorted(present))


def _name(path: Path) -> str:
    """The name of the data set, under which its models are registered: that of the folder, in plain letters."""
    name = files.plain_name(path.resolve().stem if path.is_file() else path.resolve().name, otherwise="pictures")
    return f"own-{name}" if name in DATASETS else name[:MAX_NAME]


def _rows(
    read: Sequence[Decoded],
    problems: Mapping[str, str],
    entries: Sequence[Entry],
    assignment: Assignment,
    order: Mapping[str, Sequence[int]],
) -> tuple[Row, ...]:
    moved = set(assignment.moved)
    index_of = {row: index for rows in order.values() for index, row in enumerate(rows)}
    used = [
        Row(
            path=each.entry.path,
            label=each.entry.label,
            split=assignment.splits[row],
            index=index_of[row],
            group=each.entry.group or "",
            width=each.facts.size[0],
            height=each.facts.size[1],
            format=each.facts.format,
            mode=each.facts.mode,
            reason=MOVED.format(each.entry.split) if row in moved else "",
        )
        for row, each in enumerate(read)
    ]
    unused = [
        Row(entry.path, entry.label, group=entry.group or "", reason=problems[entry.path])
        for entry in entries
        if entry.path in problems
    ]
    return tuple(sorted([*used, *unused], key=lambda row: row.path))


def _split_warnings(
    read: Sequence[Decoded],
    labels: NDArray[np.int64],
    copies: NDArray[np.int64],
    class_names: Sequence[str],
    assignment: Assignment,
) -> Iterator[str]:
    if several := [each for each in read if each.facts.frames > 1]:
        example = f"{printable(several[0].entry.path)} ({several[0].facts.frames:,})"
        pictures = counted(len(several), "picture")
        yield f"only the first frame or page is used of {pictures} with several, such as {example}"
    counts = Counter(copies.tolist())
    if repeated := sum(count for count in counts.values() if count > 1):
        yield f"{repeated:,} pictures have copies, which are all in one split"
    kinds = defaultdict[int, set[int]](set)
    for copy, label in zip(copies.tolist(), labels.tolist(), strict=True):
        kinds[copy].add(label)
    two = [copy for copy, found in kinds.items() if len(found) > 1]
    if two:
        first = [each.entry.path for each, copy in zip(read, copies.tolist(), strict=True) if copy == two[0]]
        examples = " and ".join(map(printable, first[:2]))
        yield f"copies of {counted(len(two), 'picture')} have different classes, such as {examples}"
    if assignment.leaks:
        yield (
            f"a random split would have put {counted(assignment.leaks, 'picture')} into validation or test of which a "
            "copy, or one of the same subject, is in train; here none is"
        )
    if assignment.moved:
        examples = ", ".join(printable(read[row].entry.path) for row in assignment.moved[:3])
        yield f"moved out of the published split: {counted(len(assignment.moved), 'picture')}, such as {examples}"
    for split in SPLITS:
        if names := [name for name, completed in assignment.completed if completed == split]:
            what = f"class {_some(names)}" if len(names) == 1 else f"{len(names):,} classes ({_some(names)})"
            yield f"the {split} split had no picture of {what} by chance, and got one{' of each' if names[1:] else ''}"
    per_class = Counter(labels.tolist())
    few = [class_names[label] for label, count in sorted(per_class.items()) if count < FEW]
    if few:
        yield f"classes with fewer than {FEW} pictures: {_some(few)}"
    if max(per_class.values()) >= IMBALANCE * min(per_class.values()):
        rare, common = (pick(per_class, key=lambda label: per_class[label]) for pick in (min, max))
        yield (
            f"the class {printable(class_names[common])} has {per_class[common]:,} pictures and "
            f"{printable(class_names[rare])} {per_class[rare]:,}"
        )


def _some(names: Sequence[str]) -> str:
    """The first ten of these, and how many more there are."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(map(printable, names[:10])) + more
