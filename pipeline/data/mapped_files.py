"""Files as arrays of bytes, also those that are larger than the memory.

Such a file is mapped: the system reads the parts that are used, and drops them again where memory is short.
"""

import hashlib
import itertools
import math
import mmap
import os
import tempfile
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import Fault

CHUNK, CHUNK_BYTES = 1000, 1 << 26  # the most rows, which are images, at a time, and the most bytes of them
SCATTERED = 100  # rows at a time that may be anywhere in a file: the system may map 2 MB of it for each of them
Bytes = NDArray[np.uint8]
Rows = Sequence[int] | NDArray[np.int64]
Result = TypeVar("Result")
_mappings = weakref.WeakSet[mmap.mmap]()


def content(file: BufferedReader | BufferedRandom, memory_limit: float) -> Bytes:
    """The bytes of an open file: read, or only mapped where there are more than ``memory_limit``."""
    size = os.fstat(file.fileno()).st_size
    if size > memory_limit:
        return mapped(file)
    file.seek(0)
    found = np.empty(size, np.uint8)
    file.readinto(found.data)
    return found


def mapped(file: BufferedReader | BufferedRandom) -> Bytes:
    """The bytes of an open file, which stays on the disk. They cannot be changed.

    Only for reading: a mapping that could be written to would count as memory in use, and be refused where it is large.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return np.empty(0, np.uint8)  # cannot be mapped
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mappings.add(mapping)
    return np.frombuffer(mapping, np.uint8)


def tensor(array: NDArray[np.generic]) -> torch.Tensor:
    """A tensor of the same memory. Writing to that of a mapped array would end the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def chunks(array: Bytes, rows: Rows | None = None) -> Iterator[Bytes]:
    """The rows of an array, or some of them, many at a time; what was read of mapped files for them is let go."""
    for part in _parts(array, rows):
        yield array[part]
        let_go()


def on_all_cores(function: Callable[[Bytes], Result], array: Bytes, rows: Rows | None = None) -> Iterator[Result]:
    """What ``function`` makes of the `chunks` of an array, in order.

    It is called in threads, and should spend its time in NumPy or another library that runs beside Python.
    """
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as threads:
        begun = deque[Future[Result]]()
        for part in _parts(array, rows, cores):
            begun.append(threads.submit(lambda part: function(array[part]), part))
            if len(begun) > cores:  # not all at once, or all of the array would be in memory
                yield begun.popleft().result()
                let_go()
        for each in begun:
            yield each.result()
    let_go()


def _parts(array: Bytes, rows: Rows | None, at_once: int = 1) -> Iterator[slice | Rows]:
    """Rows that are handled together, where ``at_once`` such parts are in memory."""
    step = max(1, rows_at_once(array.shape[1:], CHUNK if rows is None else SCATTERED) // at_once)
    for start in range(0, len(array if rows is None else rows), step):
        some = slice(start, start + step)
        yield some if rows is None else rows[some]


def let_go() -> None:
    """Give back the memory of what was read of mapped files. What is used of them later is read again."""
    for mapping in list(_mappings):
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system, and only memory that looks used would grow
            mapping.madvise(mmap.MADV_DONTNEED)


def digests(array: Bytes) -> Iterator[bytes]:
    """A digest of 16 bytes for each row, which is an image."""

    def of(some: Bytes) -> list[bytes]:
        return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in some]

    return itertools.chain.from_iterable(on_all_cores(of, array))


def rows_at_once(shape: tuple[int, ...], most: int = CHUNK) -> int:
    """How many rows of ``shape``, bytes each, are handled together: at most ``most``, and at most CHUNK_BYTES."""
    return max(1, min(most, CHUNK_BYTES // max(1, math.prod(shape))))


def selected(array: Bytes, rows: Rows, folder: Path) -> torch.Tensor:
    """These rows of an array, in a file as ``spooled`` has it: there may be more of them than memory."""
    return tensor(
        spooled((some.data for some in on_all_cores(np.ascontiguousarray, array, rows)), array.shape[1:], folder)
    )


def spooled(rows: Iterable[bytes | memoryview], shape: tuple[int, ...], folder: Path) -> Bytes:
    """All ``rows``, one or more arrays of ``shape`` each, one after the other: (N, *shape).

    They are in a file in ``folder`` without a name. The system removes it once the array is gone, and also when this
    process is killed. Raises Fault where the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for some in rows:
                file.write(some)
            file.flush()
            return mapped(file).reshape(-1, *shape)
    except OSError as error:
        raise Fault(f"{folder} cannot be written ({error.strerror}): make room on that disk, then run again") from error
