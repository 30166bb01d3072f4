"""A person's pictures as prepared images: listed, decoded, searched for copies, and split.

The folder is only read. What comes out depends on the pictures' contents and labels, not on their names or order.
"""

import functools
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import files
from pipeline.data import duplicates, image_files, splitting
from pipeline.data.cache import Cache
from pipeline.data.folder import Entry, Pictures
from pipeline.data.image_files import Facts, Preprocessing
from pipeline.data.sources import DATASETS
from pipeline.data.splits import SPLITS, LabelledImages, Prepared
from pipeline.data.splitting import Assignment
from pipeline.errors import UserError, printable
from pipeline.params import Data

CACHE = Path("data/decoded/pictures.db")  # in the repository
FIRST = 50  # pictures that are searched for colour together
BATCH = 500  # pictures whose results are written into the cache together
LARGE = 25_000_000  # pixels; larger pictures are decoded one at a time, since each takes much memory
AUTO_SIDE = 64  # pixels; the CNN is slow on larger images
FEW, IMBALANCE = 10, 20  # pictures in a class, and times the smallest class: worth a warning
Value = TypeVar("Value")


@dataclass(frozen=True)
class Row:
    """A picture in reports/images.csv. ``index`` is its place in its split, as in reports/predictions.csv.

    ``split`` is empty for a picture that is not used, and ``reason`` says why.
    """

    path: str
    label: str
    split: str
    index: int | str
    group: str
    width: int | str
    height: int | str
    format: str
    mode: str
    reason: str


@dataclass(frozen=True)
class OwnPictures:
    """What became of a folder: its images, a row for each picture, and what to tell a person."""

    prepared: Prepared
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


class _Read(NamedTuple):
    """A picture that was read: which entry it is, and its digest."""

    entry: Entry
    facts: Facts
    key: str


def prepare(params: Data) -> OwnPictures:
    """The pictures that ``data`` in params.yaml names. Raises UserError where it asks for what cannot be had."""
    path = Path(params.path)
    with Pictures(path) as pictures, Cache(files.root() / CACHE) as cache:
        listing = pictures.listing(params.labels, params.label_pattern, params.group)
        reader = _Reader(pictures, cache)
        digests, facts = reader.facts(listing.entries)
        problems = {
            entry.path: each for entry, each in zip(listing.entries, facts, strict=True) if isinstance(each, str)
        }
        readable = [(e, f, d) for e, f, d in zip(listing.entries, facts, digests, strict=True) if isinstance(f, Facts)]
        _check_problems(problems, len(listing.entries), params)
        preprocessing = _preprocessing(readable, reader, params)
        read, images = reader.images(readable, preprocessing, problems)
        _check_problems(problems, len(listing.entries), params)
    class_names = _classes(read, listing.class_names)
    labels = np.array([class_names.index(each.entry.label) for each in read], np.int64)
    copies = duplicates.clusters(images, params.near_duplicates)
    assignment = splitting.assign(
        splitting.Pictures(
            keys=[each.key for each in read],
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
    order = {split: _in_order(read, labels, assignment, split) for split in SPLITS}
    name = _name(path)
    return OwnPictures(
        Prepared(
            splits={
                split: LabelledImages(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))
                for split, rows in order.items()
            },
            name=name,
            requested=name,
            source=f"own pictures, {listing.form}",
            class_names=class_names,
            preprocessing=preprocessing,
        ),
        rows=_rows(read, problems, listing.entries, assignment, order),
        warnings=(
            *listing.warnings,
            *_skipped(listing.skipped),
            *(f"{path} is not used: {reason}" for path, reason in sorted(problems.items())),
            *_split_warnings(read, labels, copies, class_names, assignment),
        ),
    )


class _Reader:
    """Reads pictures on all cores, each content once: what was read before is in the cache."""

    def __init__(self, pictures: Pictures, cache: Cache) -> None:
        self._pictures, self._cache = pictures, cache
        self._large = threading.Lock()

    def facts(self, entries: Sequence[Entry]) -> tuple[list[str], list[Facts | str]]:
        """The SHA-256 of each file, and its facts, or why it cannot be read."""

        def digest(entry: Entry) -> str | UserError:
            found = self._read(entry, lambda file, name: _digest(file))
            return found if isinstance(found, UserError) else found.decode()

        def inspect(entry: Entry) -> bytes | UserError:
            return self._read(entry, lambda file, name: _to_json(image_files.inspect(file, name)))

        digests, found = list[str](), list[Facts | str]()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for some in _shown(entries, "looking at"):
                keys = list(pool.map(digest, some))
                results = self._results(pool, some, keys, "facts", inspect)
                for key, result in zip(keys, results, strict=True):
                    digests.append(str(key))
                    found.append(str(key) if isinstance(key, UserError) else _facts_or_reason(result))
        return digests, found

    def images(
        self, readable: Sequence[tuple[Entry, Facts, str]], preprocessing: Preprocessing, problems: dict[str, str]
    ) -> tuple[list[_Read], NDArray[np.uint8]]:
        """The images (N, H, W, C) of the pictures that can be read; for the others a line in ``problems``."""
        how = files.sha256(json.dumps(asdict(preprocessing)).encode())[:16]
        images = np.empty((len(readable), *preprocessing.image_shape), np.uint8)
        read = list[_Read]()

        def decode(each: tuple[Entry, Facts, str]) -> bytes | UserError:
            entry, facts, _ = each
            if facts.size[0] * facts.size[1] > LARGE:
                with self._large:
                    return self._read(entry, image_of)
            return self._read(entry, image_of)

        def image_of(file: IO[bytes], name: str) -> bytes:
            return image_files.read(file, name, preprocessing).image.tobytes()

        def pixels(each: tuple[Entry, Facts, str]) -> bytes | UserError:
            entry, facts, _ = each
            own = Preprocessing("stretch", (facts.size[1], facts.size[0], 3))
            return self._read(entry, lambda file, name: _sha256(image_files.read(file, name, own).image.tobytes()))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for some in _shown(readable, "decoding"):
                results = self._results(pool, some, [digest for *_, digest in some], how, decode)
                small = [each for each in some if _is_small(each[1])]
                digests = [digest for *_, digest in small]
                own_pixels = zip(digests, self._results(pool, small, digests, "pixels", pixels), strict=True)
                keys = {digest: key.decode() for digest, key in own_pixels if isinstance(key, bytes)}
                for (entry, facts, digest), result in zip(some, results, strict=True):
                    if isinstance(result, UserError):
                        problems[entry.path] = str(result)
                        continue
                    images[len(read)] = np.frombuffer(result, np.uint8).reshape(preprocessing.image_shape)
                    read.append(_Read(entry, facts, keys.get(digest, digest)))
        return read, images[: len(read)]

    def has_colour(self, pictures: Sequence[tuple[Entry, Facts, str]]) -> bool:
        """Whether one of these has a pixel that is not grey. What cannot be read is noticed later."""

        def colour(each: tuple[Entry, Facts, str]) -> bytes | UserError:
            return self._read(each[0], lambda file, name: b"yes" if image_files.has_colour(file, name) else b"no")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(pictures), FIRST):
                some = pictures[start : start + FIRST]
                if b"yes" in self._results(pool, some, [digest for *_, digest in some], "colour", colour):
                    return True
        return False

    def _read(self, entry: Entry, use: Callable[[IO[bytes], str], bytes]) -> bytes | UserError:
        try:
            with self._pictures.open(entry.path) as file:
                return use(file, printable(entry.path))
        except OSError as error:
            return UserError(f"{printable(entry.path)} cannot be read: {error.strerror or error}")
        except UserError as error:
            return error

    def _results(
        self,
        pool: ThreadPoolExecutor,
        items: Sequence[Value],
        digests: Sequence[object],
        what: str,
        compute: Callable[[Value], bytes | UserError],
    ) -> list[bytes | UserError]:
        """What is known of the files with these digests, or else computed now and kept."""
        keys = [f"{digest} {what} {_version()}" for digest in digests]
        known = self._cache.get(keys)
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        computed = dict(zip(new, pool.map(compute, new.values()), strict=True))
        self._cache.put({key: result for key, result in computed.items() if isinstance(result, bytes)})
        return [known[key] if key in known else computed[key] for key in keys]


def _shown(items: Sequence[Value], what: str) -> Iterator[Sequence[Value]]:
    """The items in batches; on a terminal with a bar and the time left, elsewhere with a line at the beginning."""
    with tqdm(total=len(items), desc=what, unit=" pictures", disable=None) as bar:
        if bar.disable:
            print(f"{what} {len(items):,} pictures", flush=True)
        for start in range(0, len(items), BATCH):
            some = items[start : start + BATCH]
            yield some
            bar.update(len(some))


def _sha256(content: bytes) -> bytes:
    return files.sha256(content).encode()


def _digest(file: IO[bytes]) -> bytes:
    """The SHA-256 of a file's content, which is not read as a whole."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest().encode()


@functools.cache
def _version() -> str:
    """Of what turns a file into an image: other code, or another library, may give other pixels."""
    return files.sha256(image_files.version().encode())[:16]


def _is_small(facts: Facts) -> bool:
    """Whether a picture is known by its pixels, the same in any kind of file, and not by its file.

    Not by what becomes of them: then another data.image_size would be another split.
    """
    return facts.lowest is None and facts.size[0] * facts.size[1] <= AUTO_SIDE**2


def _to_json(facts: Facts) -> bytes:
    return json.dumps(facts._asdict()).encode()


def _facts_or_reason(result: bytes | UserError) -> Facts | str:
    if isinstance(result, UserError):
        return str(result)
    content: dict[str, Any] = json.loads(result)
    width, height = content.pop("size")
    return Facts(size=(width, height), **content)


def _check_problems(problems: dict[str, str], count: int, params: Data) -> None:
    """Raises UserError where more pictures cannot be read than params.yaml allows, or none can."""
    if len(problems) == count or len(problems) > params.max_bad_fraction * count:
        examples = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems):,} of {count:,} pictures cannot be read, such as: {examples}: remove or replace them, or "
            "raise data.max_bad_fraction in params.yaml"
        )


def _preprocessing(readable: Sequence[tuple[Entry, Facts, str]], reader: _Reader, params: Data) -> Preprocessing:
    """How these pictures become images, with a value for whatever is "auto" in params.yaml."""
    channels = params.channels
    if channels == "auto":
        in_colour = [each for each in readable if each[1].mode not in image_files.GREY_MODES]
        channels = 3 if reader.has_colour(in_colour) else 1
    height, width = _image_size([facts.size for _, facts, _ in readable], params)
    deep = [(f.lowest, f.highest) for _, f, _ in readable if f.lowest is not None and f.highest is not None]
    values = (min(lowest for lowest, _ in deep), max(highest for _, highest in deep)) if deep else None
    return Preprocessing(params.resize, (height, width, channels), params.background, values)


def _image_size(sizes: Sequence[tuple[int, int]], params: Data) -> tuple[int, int]:
    """Height and width of the images. "auto": of the pictures, if they are all alike and small; else a square."""
    if params.image_size != "auto":
        return params.image_size if isinstance(params.image_size, tuple) else (params.image_size, params.image_size)
    if len(set(sizes)) == 1 and max(sizes[0]) <= AUTO_SIDE:
        return sizes[0][1], sizes[0][0]
    side = min(AUTO_SIDE, round(median(min(size) for size in sizes)))
    return side, side


def _classes(read: Iterable[_Read], listed: Sequence[str]) -> tuple[str, ...]:
    present = {each.entry.label for each in read}
    if missing := [name for name in listed if name not in present]:
        raise UserError(f"none of the pictures of class {printable(missing[0])} can be read")
    return tuple(sorted(present))


def _name(path: Path) -> str:
    """The name of the data set, under which its models are registered: that of the folder, in plain letters."""
    plain = unicodedata.normalize("NFKD", path.resolve().stem if path.is_file() else path.resolve().name)
    name = re.sub(r"[^a-z0-9]+", "-", plain.encode("ascii", "ignore").decode().lower()).strip("-") or "pictures"
    return f"own-{name}" if name in DATASETS else name


def _in_order(read: Sequence[_Read], labels: NDArray[np.int64], assignment: Assignment, split: str) -> list[int]:
    """The pictures of a split in the order of their digests, which their names and places do not change."""
    rows = [row for row, found in enumerate(assignment.splits) if found == split]
    return sorted(rows, key=lambda row: (read[row].key, labels[row]))


def _rows(
    read: Sequence[_Read],
    problems: Mapping[str, str],
    entries: Sequence[Entry],
    assignment: Assignment,
    order: Mapping[str, Sequence[int]],
) -> tuple[Row, ...]:
    moved = set(assignment.moved)
    index_of = {row: index for rows in order.values() for index, row in enumerate(rows)}
    used = [
        Row(
            *(each.entry.path, each.entry.label, assignment.splits[row], index_of[row], each.entry.group or ""),
            *(*each.facts.size, each.facts.format, each.facts.mode),
            f"published in {each.entry.split}, with copies or pictures of its subject elsewhere"
            if row in moved
            else "",
        )
        for row, each in enumerate(read)
    ]
    unused = [
        Row(entry.path, entry.label, "", "", entry.group or "", "", "", "", "", problems[entry.path])
        for entry in entries
        if entry.path in problems
    ]
    return tuple(sorted([*used, *unused], key=lambda row: row.path))


def _skipped(skipped: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for reason, found in skipped.items():
        paths = [path for path in found if path != "README.md"]  # of data/own
        if paths:
            yield f"left out, {reason}: {len(paths):,} files, such as {paths[0]}"


def _split_warnings(
    read: Sequence[_Read],
    labels: NDArray[np.int64],
    copies: NDArray[np.int64],
    class_names: Sequence[str],
    assignment: Assignment,
) -> Iterator[str]:
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
        yield f"{len(two):,} pictures have copies of another class, such as {examples}"
    if assignment.leaks:
        yield (
            f"a random split would have put {assignment.leaks:,} pictures into validation or test of which a copy, or "
            "one of the same subject, is in train; here none is"
        )
    if assignment.moved:
        examples = ", ".join(printable(read[row].entry.path) for row in assignment.moved[:3])
        yield f"{len(assignment.moved):,} pictures are not in their published split, such as {examples}"
    for name, split in assignment.completed:
        yield f"the {split} split had no picture of class {printable(name)} by chance, and got one"
    per_class = Counter(labels.tolist())
    few = [class_names[label] for label, count in sorted(per_class.items()) if count < FEW]
    if few:
        yield f"classes with fewer than {FEW} pictures: {', '.join(map(printable, few))}"
    if max(per_class.values()) >= IMBALANCE * min(per_class.values()):
        rare, common = (pick(per_class, key=lambda label: per_class[label]) for pick in (min, max))
        yield (
            f"the class {printable(class_names[common])} has {per_class[common]:,} pictures and "
            f"{printable(class_names[rare])} {per_class[rare]:,}"
        )
