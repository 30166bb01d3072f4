"""All pictures of a folder, read on all cores, each content once: what was read before is in the cache."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import files
from pipeline.data import image_files, mapped_files
from pipeline.data.cache import Cache
from pipeline.data.folder import Entry, Pictures
from pipeline.data.image_files import Facts, Preprocessing
from pipeline.errors import UserError, printable

BATCH = 500  # pictures whose results are written into the cache together
TASK = 10  # pictures that a thread reads before it asks for more
FIRST = 50  # pictures that are searched for colour together
SMALL = 64 * 64  # pixels; pictures of more are known by their files
YES, NO = b"yes", b"no"
Result = bytes | UserError


class HashedFile(NamedTuple):
    """The file of a picture, and the SHA-256 of its content."""

    entry: Entry
    digest: str


class Inspected(NamedTuple):
    """A picture whose facts could be read. ``digest`` is the SHA-256 of its file's content."""

    entry: Entry
    digest: str
    facts: Facts


class Decoded(NamedTuple):
    """A picture that became an image. ``key`` is a digest that says which picture it is.

    That of a small picture is of its pixels, the same in any kind of file, and that of a larger one of its file: never
    of what becomes of them, or another size of the images would be another split.
    """

    entry: Entry
    facts: Facts
    key: str


Item = TypeVar("Item")
Hashed = TypeVar("Hashed", HashedFile, Inspected)


class PictureReader:
    """Reads pictures, for one thread. ``problems`` says, by their paths, why some cannot be read."""

    def __init__(self, pictures: Pictures, cache: Cache) -> None:
        self.problems = dict[str, str]()
        self._pictures, self._cache = pictures, cache

    def inspected(self, entries: Sequence[Entry]) -> list[Inspected]:
        """The pictures whose facts can be read."""

        def digest(entry: Entry) -> Result:
            return self._read(entry, lambda content, name: _sha256_of(content))

        def inspect(file: HashedFile) -> Result:
            return self._read(file.entry, lambda content, name: _to_json(image_files.inspect(content, name)))

        found = list[Inspected]()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for some in _shown(entries, "looking at"):
                hashed = [
                    HashedFile(entry, sha256.decode())
                    for entry, sha256 in self._good(some, some, _mapped(pool, digest, some))
                ]
                results = self._results(pool, hashed, "facts", inspect)
                facts = self._good(hashed, [file.entry for file in hashed], results)
                found += [Inspected(*file, _from_json(content)) for file, content in facts]
        return found

    def images(
        self, pictures: Sequence[Inspected], preprocessing: Preprocessing, folder: Path
    ) -> tuple[list[Decoded], NDArray[np.uint8]]:
        """The pictures that can be decoded, and their images (N, H, W, C), which are in a file in ``folder``."""
        decoded = list[Decoded]()
        images = mapped_files.spooled(
            self._decoded(pictures, preprocessing, decoded), preprocessing.image_shape, folder
        )
        return decoded, images

    def _decoded(
        self, pictures: Sequence[Inspected], preprocessing: Preprocessing, decoded: list[Decoded]
    ) -> Iterator[bytes]:
        """The images one after the other; ``decoded`` is filled with their pictures."""
        how = files.sha256(json.dumps(asdict(preprocessing)).encode())[:16]

        def decode(picture: Inspected) -> Result:
            return self._decode(picture, preprocessing)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for some in _shown(pictures, "decoding", mapped_files.rows_at_once(preprocessing.image_shape, BATCH)):
                results = self._results(pool, some, how, decode)
                found = list(self._good(some, [each.entry for each in some], results))
                keys = self._keys(pool, found, preprocessing)
                for picture, content in found:
                    decoded.append(Decoded(picture.entry, picture.facts, keys[picture]))
                    yield content

    def has_colour(self, pictures: Sequence[Inspected]) -> bool:
        """Whether one of these has a pixel that is not grey. What cannot be read is noticed later."""

        def colour(picture: Inspected) -> Result:
            return self._read(picture.entry, lambda file, name: YES if image_files.has_colour(file, name) else NO)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            batches = (pictures[start : start + FIRST] for start in range(0, len(pictures), FIRST))
            return any(YES in self._results(pool, some, "colour", colour) for some in batches)

    def _keys(
        self, pool: ThreadPoolExecutor, images: Sequence[tuple[Inspected, bytes]], preprocessing: Preprocessing
    ) -> dict[Inspected, str]:
        """The key of each of these pictures: see Decoded."""
        keys, resized = {picture: picture.digest for picture, _ in images}, list[Inspected]()
        for picture, image in images:
            if picture.facts.lowest is not None or _pixels(picture.facts) > SMALL:
                continue
            if _own_size(picture.facts, preprocessing) == preprocessing:
                keys[picture] = files.sha256(image)
            else:
                resized.append(picture)

        def digest(picture: Inspected) -> Result:
            image = self._decode(picture, _own_size(picture.facts, preprocessing))
            return image if isinstance(image, UserError) else files.sha256(image).encode()

        digests = zip(resized, self._results(pool, resized, "pixels", digest), strict=True)
        return keys | {each: found.decode() for each, found in digests if isinstance(found, bytes)}

    def _decode(self, picture: Inspected, preprocessing: Preprocessing) -> Result:
        return self._read(picture.entry, lambda file, name: image_files.read(file, name, preprocessing).image.tobytes())

    def _read(self, entry: Entry, use: Callable[[IO[bytes], str], bytes]) -> Result:
        try:
            with self._pictures.open(entry.path) as file:
                return use(file, printable(entry.path))
        except OSError as error:
            return UserError(f"{printable(entry.path)} cannot be read: {error.strerror or error}")
        except UserError as error:
            return error

    def _good(
        self, items: Sequence[Item], entries: Sequence[Entry], results: Iterable[Result]
    ) -> Iterator[tuple[Item, bytes]]:
        """The items with results; what is wrong with the others becomes a problem of their entries."""
        for item, entry, result in zip(items, entries, results, strict=True):
            if isinstance(result, UserError):
                self.problems[entry.path] = str(result)
            else:
                yield item, result

    def _results(
        self, pool: ThreadPoolExecutor, items: Sequence[Hashed], what: str, compute: Callable[[Hashed], Result]
    ) -> list[Result]:
        """What is known of these files, or else computed now and kept."""
        keys = [f"{item.digest} {what} {_version()}" for item in items]
        known = self._cache.get(keys)
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        computed = dict(zip(new, _mapped(pool, compute, list(new.values())), strict=True))
        self._cache.put({key: result for key, result in computed.items() if isinstance(result, bytes)})

        def result(key: str, item: Hashed) -> Result:
            found = known[key] if key in known else computed[key]
            # An error names its file, and this may be another one of the same content.
            return found if isinstance(found, bytes) or new[key] is item else compute(item)

        return [result(key, item) for key, item in zip(keys, items, strict=True)]


def _shown(items: Sequence[Item], what: str, size: int = BATCH) -> Iterator[Sequence[Item]]:
    """The items in batches of ``size``; on a terminal with a bar and the time left, elsewhere with a line first."""
    with tqdm(total=len(items), desc=what, unit=" pictures", disable=None) as bar:
        if bar.disable:
            print(f"{what} {len(items):,} pictures", flush=True)
        for start in range(0, len(items), size):
            some = items[start : start + size]
            yield some
            bar.update(len(some))


def _mapped(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The function's results. A task of the pool is for several items: with small pictures it costs as much as one."""
    tasks = (items[start : start + TASK] for start in range(0, len(items), TASK))
    return itertools.chain.from_iterable(pool.map(lambda some: [function(item) for item in some], tasks))


def _sha256_of(file: IO[bytes]) -> bytes:
    """The SHA-256 of a file's content, which is not read as a whole."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest().encode()


@functools.cache
def _version() -> str:
    """Of what turns a file into an image: other code, or another library, may give other pixels."""
    return files.sha256(image_files.version().encode())[:16]


def _pixels(facts: Facts) -> int:
    return facts.size[0] * facts.size[1]


def _own_size(facts: Facts, preprocessing: Preprocessing) -> Preprocessing:
    """What leaves the pixels of a picture of 8 bits as they are; transparent parts become white."""
    width, height = facts.size
    resize = "fit" if preprocessing.resize == "strokes" else preprocessing.resize  # all others keep an image's size
    return Preprocessing(resize, (height, width, 1 if facts.mode in image_files.GREY_MODES else 3))


def _to_json(facts: Facts) -> bytes:
    return json.dumps(facts._asdict()).encode()


def _from_json(content: bytes) -> Facts:
    facts: dict[str, Any] = json.loads(content)
    width, height = facts.pop("size")
    return Facts(size=(width, height), **facts)
