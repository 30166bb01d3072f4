"""All pictures of a folder, read on all cores, each content once: what was read before is in the cache."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import files
from pipeline.data import decoder, image_files, mapped_files
from pipeline.data.cache import Cache
from pipeline.data.decoder import Answer, Decoders, Function, Request
from pipeline.data.folder import Entry, Pictures
from pipeline.data.image_files import Facts, Preprocessing
from pipeline.errors import UserError, counted, printable

BATCH = 500  # pictures whose results are written into the cache together
FIRST = 50  # pictures that are searched for colour together
SMALL = 64 * 64  # pixels; pictures of more are known by their files


class PictureFile(NamedTuple):
    """The file of a picture, and what says which content it has: its version (see FileTree) or its SHA-256."""

    entry: Entry
    digest: str


class Inspected(NamedTuple):
    """A picture whose facts could be read. ``digest`` is the SHA-256 of its file's content."""

    entry: Entry
    digest: str
    facts: Facts


class Decoded(NamedTuple):
    """A picture that became an image. ``pixels`` is a digest of the image, ``key`` one that says which picture it is.

    The key of a small picture is of its pixels, the same in any kind of file, and that of a larger one of its file:
    never of what becomes of them, or another size of the images would be another split.
    """

    entry: Entry
    facts: Facts
    pixels: bytes
    key: str


Item = TypeVar("Item")
Known = TypeVar("Known", PictureFile, Inspected)


class PictureReader:
    """Reads pictures, for one thread. ``problems`` says, by their paths, why some cannot be read."""

    def __init__(self, pictures: Pictures, cache: Cache, decoders: Decoders) -> None:
        self.problems = dict[str, str]()
        self._pictures, self._cache, self._decoders = pictures, cache, decoders

    def inspected(self, entries: Sequence[Entry]) -> list[Inspected]:
        """The pictures whose facts can be read."""
        found = list[Inspected]()
        for some, digests in _one_ahead(map(self._hashes, _shown(entries, "looking at"))):
            good_files = self._good(some, [file.entry for file in some], digests())
            hashed = [PictureFile(file.entry, sha256.decode()) for file, sha256 in good_files]
            answers = self._begin("facts", decoder.facts, hashed)()
            good = list(self._good(hashed, [file.entry for file in hashed], answers))
            facts = decoder.facts_from(answer for _, answer in good)
            found += [Inspected(*file, each) for (file, _), each in zip(good, facts, strict=True)]
        return found

    def _hashes(self, entries: Sequence[Entry]) -> tuple[list[PictureFile], Callable[[], list[Answer]]]:
        """Begin to hash the files that have another version than when they were hashed before."""
        found = list[PictureFile]()
        for entry in entries:
            try:
                found.append(PictureFile(entry, self._pictures.version(entry.path)))
            except UserError as error:
                self.problems[entry.path] = str(error)
        return found, self._begin("sha256", decoder.digest, found)

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
        """The images, many at a time; ``decoded`` is filled with their pictures."""
        how = f"image {files.sha256(json.dumps(asdict(preprocessing)).encode())[:16]}"
        batches = _shown(pictures, "decoding", mapped_files.rows_at_once(preprocessing.image_shape, BATCH))
        asked = (
            (some, self._begin(how, decoder.digest_and_image, some, [(preprocessing,)] * len(some))) for some in batches
        )
        for some, results in _one_ahead(asked):
            found = list(self._good(some, [each.entry for each in some], results()))
            digests = {picture: answer[: decoder.DIGEST] for picture, answer in found}
            keys = self._keys(digests, preprocessing)
            decoded += [Decoded(each.entry, each.facts, digests[each], keys[each]) for each in digests]
            yield b"".join(memoryview(answer)[decoder.DIGEST :] for _, answer in found)

    def has_colour(self, pictures: Sequence[Inspected]) -> bool:
        """Whether one of these has a pixel that is not grey. What cannot be read is noticed later."""
        batches = (pictures[start : start + FIRST] for start in range(0, len(pictures), FIRST))
        asked = (self._begin("colour", decoder.has_colour, some) for some in batches)
        return any(decoder.YES in answers() for answers in _one_ahead(asked))

    def _keys(self, digests: Mapping[Inspected, bytes], preprocessing: Preprocessing) -> dict[Inspected, str]:
        """The key of each of these pictures, whose images have these ``digests``: see Decoded."""
        keys, resized = {picture: picture.digest for picture in digests}, list[Inspected]()
        for picture, digest in digests.items():
            if picture.facts.lowest is not None or _pixels(picture.facts) > SMALL:
                continue
            if _own_size(picture.facts, preprocessing) == preprocessing:
                keys[picture] = digest.hex()
            else:
                resized.append(picture)
        sizes = [(_own_size(picture.facts, preprocessing),) for picture in resized]
        found = zip(resized, self._begin("pixels", decoder.pixel_digest, resized, sizes)(), strict=True)
        return keys | {picture: digest.hex() for picture, digest in found if isinstance(digest, bytes)}

    def _request(self, entry: Entry, arguments: tuple[Any, ...] = ()) -> Request:
        return Request(printable(entry.path), self._pictures.source(entry.path), arguments)

    def _good(
        self, items: Sequence[Item], entries: Sequence[Entry], results: Iterable[Answer]
    ) -> Iterator[tuple[Item, bytes]]:
        """The items with results; what is wrong with the others becomes a problem of their entries."""
        for item, entry, result in zip(items, entries, results, strict=True):
            if isinstance(result, UserError):
                self.problems[entry.path] = str(result)
            else:
                yield item, result

    def _begin(
        self, what: str, function: Function, items: Sequence[Known], arguments: Sequence[tuple[Any, ...]] = ()
    ) -> Callable[[], list[Answer]]:
        """Begin to find out what is not known of these files. What is returned waits for it, and keeps it.

        ``arguments`` are those of the function for each file.
        """

        def ask(places: Iterable[int]) -> Iterator[Answer]:
            requests = [self._request(items[place].entry, arguments[place] if arguments else ()) for place in places]
            return self._decoders.ask(function, requests)

        keys = [f"{item.digest} {what} {_version()}" for item in items]
        results: dict[str, Answer] = {**self._cache.get(keys)}
        first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in results}
        asked = ask(first.values())

        def found() -> list[Answer]:
            results.update(zip(first, asked, strict=True))
            self._cache.put({key: answer for key in first if isinstance(answer := results[key], bytes)})
            # An error names its file, and there may be others of the same content.
            wrong = [place for place, key in enumerate(keys) if isinstance(results[key], UserError)]
            others = [place for place in wrong if first[keys[place]] != place]
            own = dict(zip(others, ask(others), strict=True))
            return [own.get(place, results[key]) for place, key in enumerate(keys)]

        return found


def _shown(items: Sequence[Item], what: str, size: int = BATCH) -> Iterator[Sequence[Item]]:
    """The items in batches of ``size``; on a terminal with a bar and the time left, elsewhere with a line first."""
    with tqdm(total=len(items), desc=what, unit=" pictures", disable=None) as bar:
        if bar.disable:
            print(f"{what} {counted(len(items), 'picture')}", flush=True)
        for start in range(0, len(items), size):
            some = items[start : start + size]
            yield some
            bar.update(len(some))


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items. When one is given out, the next has been made: what it has begun goes on meanwhile."""
    before = list[Item]()
    for item in items:
        yield from before
        before = [item]
    yield from before


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
