"""Published files: downloaded from the first mirror that has them, and checked before they are used."""

import gzip
import hashlib
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from io import BufferedIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from pipeline import files
from pipeline.errors import Fault, UserError

MIRROR_VARIABLE = "PIPELINE_DATA_MIRROR"
NETWORK_REMEDY = f"set {MIRROR_VARIABLE} or fix the connection"
MIRROR_TIMEOUT_SECONDS = 30  # for an answer, and for each read; a silent mirror must not hang the stage
MIN_SPEED = 20_000  # bytes per second, on average: one that sends a byte now and then must not hang it either
CHUNK = 1 << 18  # bytes


class NoMirrorError(Fault):
    """No mirror gave the published file."""


@dataclass(frozen=True)
class PublishedFile:
    """A file by its name, and its SHA-256; ``content_sha256`` is that of what a .gz file holds, if it is known.

    The same content can be compressed in many ways, and another one who hands out the file may have done that: the file
    is the published one if either digest is right, and where that of the content is known it need not be compressed.
    Neither the file nor its content has more than ``max_bytes``.
    """

    name: str
    sha256: str
    max_bytes: int
    content_sha256: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that it may have: its own, and that of its uncompressed content."""
        return (self.name, self.name.removesuffix(".gz")) if self.content_sha256 else (self.name,)

    def is_at(self, path: Path) -> bool:
        """Whether this file, or its content, is at ``path``. Reads no more than ``max_bytes``."""
        with path.open("rb") as file:
            if self._digest(file) == self.sha256:
                return True
        try:
            with open_content(path) as content:
                return self._digest(content) == self.content_sha256
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return False

    def _digest(self, file: BufferedIOBase) -> str:
        """The SHA-256; no digest at all of one that is too large."""
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if size > self.max_bytes:
                return ""
            digest.update(chunk)
        return digest.hexdigest()


def open_content(path: Path) -> BufferedIOBase:
    """The content of a .gz file, and any other file as it is."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def find(folder: Path, file: PublishedFile) -> Path | None:
    """Where ``file`` is in ``folder``, published or not; None if it is not there."""
    return next((folder / name for name in file.names if (folder / name).exists()), None)


def fetch(folder: Path, file: PublishedFile, mirrors: Iterable[str]) -> Path:
    """The path of ``file`` in ``folder``, downloaded if it is not there. The download is atomic.

    Raises UserError if another file is there, and NoMirrorError, which lists what each mirror answered.
    """
    target = find(folder, file)
    if target is None:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".download-") as unfinished:
            downloaded = _download(mirrors, Path(unfinished), file)
            return downloaded.replace(folder / downloaded.name)
    if not file.is_at(target):
        with target.open("rb") as other:
            found = hashlib.file_digest(other, "sha256").hexdigest()
        raise UserError(
            f"{target} is not the published file (SHA-256 {found[:12]}..., expected {file.sha256[:12]}...): "
            "delete it and run again to download it"
        )
    return target


def own_mirror() -> Iterator[str]:
    """The URL or folder in PIPELINE_DATA_MIRROR, if there is one. Raises UserError if it cannot be one."""
    if own := os.environ.get(MIRROR_VARIABLE):
        if "://" not in own and not (files.root() / own).is_dir():
            raise UserError(f"{MIRROR_VARIABLE} is {own}, which is neither a URL nor a folder")
        yield own.rstrip("/") + "/"


def _download(mirrors: Iterable[str], folder: Path, file: PublishedFile) -> Path:
    """The file in ``folder``, from the first mirror that has it."""
    answers = []
    for mirror in mirrors:
        try:
            target = _get(mirror, folder, file)
        except (OSError, HTTPException, ValueError) as error:
            answers.append(f"{mirror}: {error or type(error).__name__}")
            continue
        if file.is_at(target):
            return target
        answers.append(f"{mirror}: not the published file, its SHA-256 differs")
        target.unlink()
    raise NoMirrorError(
        f"{file.name} could not be downloaded ({'; '.join(answers)}): check the network, or set {MIRROR_VARIABLE} "
        "to a URL or a folder that holds the files"
    )


def _get(mirror: str, folder: Path, file: PublishedFile) -> Path:
    """What the mirror has under a name of the file, in ``folder``."""
    missing: OSError | None = None
    for name in file.names:
        try:
            if "://" in mirror:
                _get_url(mirror + name, folder / name, file.max_bytes)
            else:
                shutil.copyfile(files.root() / mirror / name, folder / name)
            return folder / name
        except (FileNotFoundError, HTTPError) as error:
            if isinstance(error, HTTPError) and error.code != 404:
                raise
            missing = missing or error
    assert missing is not None
    raise missing


def _get_url(url: str, target: Path, max_bytes: int) -> None:
    """Raises OSError also where it is too large, or comes too slowly."""
    started, received = time.monotonic(), 0
    request = Request(url, headers={"User-Agent": "convtrack"})
    with _deadline(MIRROR_TIMEOUT_SECONDS):  # of its own, since each byte of an answer starts a socket's timeout anew
        response = urlopen(request, timeout=MIRROR_TIMEOUT_SECONDS)
    size = response.length if "Content-Length" in response.headers else None
    bar = tqdm(total=size, desc=target.name, unit="B", unit_scale=True, disable=None)
    with response, target.open("wb") as file, bar:
        while chunk := response.read1(CHUNK):
            received += file.write(chunk)
            bar.update(len(chunk))
            if received > max_bytes:
                raise OSError(f"it sends more than the {max_bytes:,} bytes that the file may have")
            if time.monotonic() - started > MIRROR_TIMEOUT_SECONDS + received / MIN_SPEED:
                raise TimeoutError(f"it sends less than {MIN_SPEED:,} bytes per second")
    if size is not None and received < size:
        raise OSError(f"it sent {received:,} of {size:,} bytes")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds. Outside the main thread, which gets the signals, there is none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
