"""The files in a folder or in a .zip: found, named and opened for reading, never written or unpacked."""

import errno
import heapq
import io
import os
import re
import stat
import struct
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from pipeline.errors import UserError, printable

# An uncompressed picture of 300 megapixels in colour has 0.9 GB. What a zip holds is read into memory.
MAX_BYTES = 1 << 30
CLOCK_TICK = 2_000_000_000  # nanoseconds; the longest that file systems have, that of FAT
SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini",
})  # fmt: skip
HIDDEN = "hidden, or a system's own"
NOT_UTF8 = "the name is not UTF-8"
NOT_REGULAR = "not a regular file"
BROKEN_LINK = "a link that cannot be followed"
LINK_TO_SEEN = "a link to a folder that is read anyway, or that holds the link"
UNSAFE = "a path that leads out of the zip"
REPEATED = "the zip has a later file of the same path"
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # zipfile does not limit what it unpacks by the others
ENCRYPTED, UTF8_NAME = 0x1, 0x800  # flags of a file in a zip
DRIVE = re.compile("[A-Za-z]:(/|$)")
# What zipfile lets through for damaged archives besides OSError: its own errors; those of what it unpacks with, for
# wrong sizes and offsets (zlib, struct, EOFError, ValueError, IndexError, OverflowError, MemoryError); and RuntimeError
# for encrypted files and for ways of compression that it does not know. Any of them is the archive's fault.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, IndexError, OverflowError, MemoryError,
    RuntimeError,
)  # fmt: skip


@dataclass
class Contents:
    """Paths relative to the top, with forward slashes: files, folders, and what is left out by its reason.

    ``name`` is that of the folder or .zip, for messages.
    """

    name: str
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def skip(self, reason: str, path: str) -> None:
        """Count ``path`` as left out."""
        self.skipped[reason].add(path)


class FileTree(Protocol):
    """A folder or a .zip."""

    def contents(self) -> Contents:
        """All files and folders. Raises UserError where they cannot be known."""

    def open(self, path: str) -> IO[bytes]:
        """A file, seekable. Raises UserError where it cannot be read, or has more than MAX_BYTES."""

    def file(self, path: str) -> str | None:
        """Where a file is on the disk; None inside a .zip."""

    def version(self, path: str) -> str:
        """Of a file: the same text only as long as its content is the same. Raises UserError as `open` does."""

    def close(self) -> None:
        """Close what is open."""


class Folder:
    """A folder and all folders inside it. Links are followed, but no folder is read twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def contents(self) -> Contents:
        """See FileTree. Folders that are really there come before those that links lead to, and keep their paths."""
        found, seen = Contents(printable(str(self._folder))), set[tuple[int, int]]()
        waiting, links = [""], list[str]()
        while waiting or links:
            relative = waiting.pop() if waiting else heapq.heappop(links)
            identity, entries = _scan(self._folder / relative)
            if identity in seen:
                found.skip(LINK_TO_SEEN, relative)
                continue
            seen.add(identity)
            if relative:
                found.folders.append(relative)
            for name, kind in entries:
                path = f"{relative}/{name}" if relative else name
                match kind:
                    case "file":
                        found.files.append(path)
                    case "folder":
                        waiting.append(path)
                    case "link":
                        heapq.heappush(links, path)
                    case reason:
                        found.skip(reason, path)
        return found

    def open(self, path: str) -> IO[bytes]:
        """See FileTree."""
        name = printable(path)
        try:
            return open_regular(self.file(path), name)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error

    def file(self, path: str) -> str:
        """See FileTree."""
        return f"{self._folder}/{path}"

    def version(self, path: str) -> str:
        """See FileTree."""
        try:
            return _version(Path(self.file(path)).stat())
        except OSError as error:
            raise UserError(f"{printable(path)} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Nothing stays open."""


def _scan(folder: Path) -> tuple[tuple[int, int], list[tuple[str, str]]]:
    """What tells the folder from all others, and the name and kind of each entry. Raises UserError."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            return (status.st_dev, status.st_ino), [(entry.name, _kind(entry)) for entry in entries]
    except OSError as error:
        raise UserError(
            f"the folder {printable(str(folder))} cannot be read ({error.strerror}): make it readable, or move it "
            "elsewhere"
        ) from error


def _kind(entry: os.DirEntry[str]) -> str:
    """`file`, `folder`, `link` to a folder that may be followed, or the reason for leaving the entry out."""
    if is_system(entry.name):
        return HIDDEN
    if not _is_utf8(entry.name):
        return NOT_UTF8
    if entry.is_file(follow_symlinks=False):
        return "file"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if not entry.is_symlink():
        return NOT_REGULAR
    link = Path(entry.path)
    try:
        mode = link.stat().st_mode
    except OSError:
        return BROKEN_LINK
    if stat.S_ISDIR(mode):
        return LINK_TO_SEEN if link.parent.resolve().is_relative_to(link.resolve()) else "link"
    return "file" if stat.S_ISREG(mode) else NOT_REGULAR


def _version(status: os.stat_result) -> str:
    """Of a file: see FileTree.version. Unlike the time of the last change, that of its inode cannot be set back.

    A file that has changed just now may change again before the clock ticks: the text is then one that does not return.
    """
    told = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    now = time.time_ns()
    return told if now - max(status.st_mtime_ns, status.st_ctime_ns) > CLOCK_TICK else f"{told} {now}"


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or was made by an operating system or a network drive for itself."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def _is_utf8(name: str) -> bool:
    """Python has surrogates in the place of bytes that are not."""
    return name.isascii() or not any("\ud800" <= each <= "\udfff" for each in name)


def open_regular(path: str | Path, name: str) -> IO[bytes]:
    """A file for reading. Raises OSError, or UserError where it is not a regular file, or has more than MAX_BYTES."""
    file = Path(path)
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):  # a named pipe, for instance, would be waited for
        raise UserError(f"{name} is not a regular file")
    _check_size(name, status.st_size)
    return file.open("rb")


def _check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{name} has {size:,} bytes; allowed: {MAX_BYTES:,}")


class Zip:
    """A .zip, read in place. Threads may share it; each process opens its own."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for what is no zip."""
        self._name = printable(str(path))
        try:
            self._zip = zipfile.ZipFile(path)
            self._version = _version(path.stat())
        except OSError as error:
            raise UserError(f"{self._name} cannot be read: {error.strerror or error}") from error
        except DAMAGED as error:
            raise UserError(
                f"{self._name} is not a zip archive, or is damaged ({printable(str(error))}); "
                "allowed: a folder or a .zip of one"
            ) from error
        self._members: dict[str, zipfile.ZipInfo] = {}

    def contents(self) -> Contents:
        """See FileTree. Encrypted files and rare methods of compression are a UserError."""
        found, folders = Contents(self._name), set[str]()
        members: dict[str, zipfile.ZipInfo] = {}
        for path, member in self._safe_members(found):
            folder = path.rpartition("/")[0]
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
            if not path.endswith("/"):
                self._check(member, path)
                if path in members:
                    found.skip(REPEATED, path)
                members[path] = member
        self._members = members
        found.files, found.folders = list(members), list(folders)
        return found

    def _safe_members(self, found: Contents) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        """The files and folders with their paths, which end in a slash for folders. ``found`` gets what is left out."""
        for member in self._zip.infolist():
            name = _decoded(member).replace("\\", "/")
            parts = [part for part in name.split("/") if part not in ("", ".")]
            system = next((number for number, part in enumerate(parts, 1) if is_system(part)), None)
            if name.startswith("/") or ".." in parts or not parts or DRIVE.match(name):
                found.skip(UNSAFE, name)
            elif system is not None:
                found.skip(HIDDEN, "/".join(parts[:system]))
            elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                found.skip(NOT_REGULAR, name)
            else:
                yield "/".join(parts) + ("/" if name.endswith("/") else ""), member

    def _check(self, member: zipfile.ZipInfo, path: str) -> None:
        if member.flag_bits & ENCRYPTED:
            raise UserError(f"{printable(path)} in {self._name} is encrypted: make a zip without a password")
        if member.compress_type not in METHODS:
            raise UserError(
                f"{printable(path)} in {self._name} is compressed by method {member.compress_type}; allowed: 0 and 8, "
                "stored and deflate: make the zip again with one of them"
            )

    def open(self, path: str) -> IO[bytes]:
        """See FileTree. ``contents`` comes first."""
        name = f"{printable(path)} in {self._name}"
        try:
            member = self._members[path]
            _check_size(name, member.file_size)
            with self._zip.open(member) as file:
                return io.BytesIO(file.read(MAX_BYTES))  # never more than the size that was checked
        except KeyError as error:
            raise UserError(f"{name} does not exist") from error
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
        except DAMAGED as error:
            raise UserError(f"{name} is damaged ({printable(str(error))}): make the zip again") from error

    def file(self, path: str) -> None:
        """See FileTree."""

    def version(self, path: str) -> str:
        """See FileTree. ``contents`` comes first."""
        return f"{self._version} {self._members[path].header_offset}"

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()


def _decoded(member: zipfile.ZipInfo) -> str:
    """The name. Some programs write UTF-8 without a word about it, where the format's own encoding is cp437."""
    if member.flag_bits & UTF8_NAME or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename
