"""Which split each picture belongs to, so that the scores can be trusted.

Copies of a picture, and pictures of one subject, are in one split. The split of a picture depends on its content (or
its subject) and the seed alone: adding pictures later moves none of the others, except as `assign` says.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import files
from pipeline.data import duplicates
from pipeline.data.splits import SPLITS, TEST, TRAIN, VALIDATION, LabelledImages
from pipeline.errors import UserError, printable

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """N pictures that are to be split.

    ``keys`` are digests of their contents and ``labels`` (N,) their classes, indices of ``class_names``. ``groups`` are
    names of subjects, None for a picture of no known one. ``copies`` (N,) are equal for copies of each other.
    ``published`` are splits, which all pictures have, or none.
    """

    keys: Sequence[str]
    labels: Indices
    class_names: tuple[str, ...]
    groups: Sequence[str | None]
    copies: Indices
    published: Sequence[str | None]

    def units(self) -> Indices:
        """A number (N,) for each picture, equal for those that must be in one split."""
        names = sorted({group for group in self.groups if group is not None})
        number = {name: index for index, name in enumerate(names, int(self.copies.max(initial=-1)) + 1)}
        pairs = [(int(copy), number[g]) for copy, g in zip(self.copies, self.groups, strict=True) if g is not None]
        count = int(self.copies.max(initial=-1)) + 1 + len(names)
        connected = duplicates.connected(count, np.array(pairs, np.int64).reshape(-1, 2))
        return np.unique(connected[self.copies], return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Assignment:
    """The split of each picture, and what a person should know about it.

    ``moved`` are the pictures that are not in their published split, since a copy or a picture of the same subject is
    in another. ``completed`` are pairs of a class and a split that had none of its pictures by their contents alone.
    ``leaks`` is the number of pictures of validation and test that a random split would have parted from a copy, or
    from a picture of the same subject, in the training split.
    """

    splits: tuple[str, ...]
    moved: tuple[int, ...]
    completed: tuple[tuple[str, str], ...]
    leaks: int


def split(
    images: LabelledImages,
    class_names: tuple[str, ...],
    *,
    near_duplicates: int | None,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, LabelledImages]:
    """Images without published splits in the splits, and the order, that picture files of the same pixels get.

    Raises UserError as `assign` does.
    """
    pixels, labels, count = images.images.numpy(), images.labels.numpy(), len(images)
    keys = [files.sha256(image.tobytes()) for image in pixels]
    copies = duplicates.clusters(pixels, near_duplicates)
    assignment = assign(
        Pictures(keys, labels, class_names, groups=[None] * count, copies=copies, published=[None] * count),
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    return {name: images[torch.tensor(in_order(keys, labels, assignment, name))] for name in SPLITS}


def in_order(keys: Sequence[str], labels: Indices, assignment: Assignment, split: str) -> list[int]:
    """The pictures of a split in the order of their digests, which their names and places do not change."""
    rows = [row for row, found in enumerate(assignment.splits) if found == split]
    return sorted(rows, key=lambda row: (keys[row], labels[row]))


def assign(pictures: Pictures, *, validation_fraction: float, test_fraction: float, seed: int) -> Assignment:
    """Every class is in every split, in about the proportions of the fractions; ``published`` splits are kept.

    ``test_fraction`` is the share of all pictures, ``validation_fraction`` that of the others. A class of which a split
    would have nothing gets one there, of its own: the one case in which a picture that is added later can move one.

    Raises UserError for a class with too few pictures that are not copies of each other, or of one subject.
    """
    units = pictures.units()
    members = _grouped(units)
    chances = [_chance(pictures, rows, seed) for rows in members]
    published = any(pictures.published)
    if published:
        split_of = [_most_common([str(pictures.published[row]) for row in rows]) for rows in members]
        missing = [split for split in (VALIDATION, TEST) if split not in pictures.published]
    else:
        split_of, missing = [TRAIN] * len(members), [VALIDATION, TEST]
    for unit, chance in enumerate(chances):
        if split_of[unit] == TRAIN:
            split_of[unit] = _by_chance(chance, missing, validation_fraction, test_fraction)
    completed = _complete(pictures, members, chances, split_of, missing)
    splits = tuple(split_of[unit] for unit in units.tolist())
    moved = tuple(
        row
        for row, (found, given) in enumerate(zip(splits, pictures.published, strict=True))
        if given and found != given and not (given == TRAIN and found in missing)
    )
    return Assignment(splits, moved, tuple(completed), _leaks(units, pictures.keys, splits, seed))


def folds(units: Indices, labels: Indices, count: int, seed: int) -> Indices:
    """A fold (N,) of 0 to ``count`` - 1 for each picture. Each class is spread over all of them, by ``seed``.

    Pictures with equal ``units`` (N,), as Pictures.units gives them, are in one fold.
    """
    members = _grouped(units)
    shuffled = np.random.default_rng(seed).permutation(len(members))
    by_class = sorted(shuffled.tolist(), key=lambda unit: int(labels[members[unit][0]]))
    fold_of = np.empty(len(members), np.int64)
    fold_of[by_class] = np.arange(len(members)) % count
    return fold_of[units]


def _grouped(units: Indices) -> list[list[int]]:
    """The pictures of each unit."""
    found: list[list[int]] = [[] for _ in range(int(units.max(initial=-1)) + 1)]
    for row, unit in enumerate(units.tolist()):
        found[unit].append(row)
    return found


def _chance(pictures: Pictures, rows: list[int], seed: int) -> float:
    """A number in [0, 1) that looks random, from the seed and the contents, or the subject's name."""
    name = min((pictures.groups[row] or "", pictures.keys[row]) for row in rows)
    text = name[0] or name[1]
    return int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=7).digest(), "big") / 2**56


def _by_chance(chance: float, missing: Sequence[str], validation_fraction: float, test_fraction: float) -> str:
    for split, fraction in ((TEST, test_fraction), (VALIDATION, validation_fraction)):
        if split in missing:
            if chance < fraction:
                return split
            chance = (chance - fraction) / (1 - fraction)
    return TRAIN


def _most_common(splits: Sequence[str]) -> str:
    """The split of most; of equally many, the one that comes first in SPLITS: the test split gains nothing from it."""
    counts = Counter(splits)
    return max(SPLITS, key=lambda split: (counts[split], -SPLITS.index(split)))


def _complete(
    pictures: Pictures,
    members: Sequence[list[int]],
    chances: Sequence[float],
    split_of: list[str],
    missing: Sequence[str],
) -> list[tuple[str, str]]:
    """Move units so that every class is in each split that is ``missing`` as published, and in train."""
    labels = pictures.labels.tolist()
    classes = [sorted({labels[row] for row in rows}) for rows in members]
    units_of = defaultdict[int, list[int]](list)
    for unit, found in enumerate(classes):
        for label in found:
            units_of[label].append(unit)
    completed = []
    for label, name in enumerate(pictures.class_names):
        own = sorted(units_of[label], key=lambda unit: chances[unit])
        for split in (*missing, TRAIN):
            if any(split_of[unit] == split for unit in own):
                continue
            spare = next((unit for unit in own if _can_leave(unit, split_of, classes, units_of, missing)), None)
            if spare is None:
                raise _too_few(name, len(own), len(missing) + 1)
            split_of[spare] = split
            completed.append((name, split))
    return completed


def _can_leave(
    unit: int,
    split_of: Sequence[str],
    classes: Sequence[Sequence[int]],
    units_of: dict[int, list[int]],
    missing: Sequence[str],
) -> bool:
    """Whether the split of a unit has another one of each of its classes. Published test pictures stay."""
    split = split_of[unit]
    if split not in (*missing, TRAIN):
        return False
    return all(any(split_of[other] == split for other in units_of[label] if other != unit) for label in classes[unit])


def _too_few(name: str, count: int, splits: int) -> UserError:
    return UserError(
        f"the class {printable(name)} has too few pictures or subjects that are not copies of each other ({count:,}); "
        f"each of {splits} splits needs one: add pictures, leave the class out, or, where they only look alike, set "
        "data.near_duplicates: null"
    )


def _leaks(units: Indices, keys: Sequence[str], splits: Sequence[str], seed: int) -> int:
    """How many pictures a random split with the same counts would part from one of their unit in train.

    It does not depend on the pictures' names: it is drawn for the pictures in the order of their contents.
    """
    in_order = np.array(sorted(range(len(keys)), key=lambda row: keys[row]), np.int64)
    shuffled = np.empty(len(splits), object)
    shuffled[in_order] = np.array(sorted(splits), object)[np.random.default_rng(seed).permutation(len(splits))]
    in_train = set(units[shuffled == TRAIN].tolist())
    return sum(unit in in_train for unit in units[shuffled != TRAIN].tolist())
