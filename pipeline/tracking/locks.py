"""Locks for the processes on this machine that use the same store."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import mlflow

from pipeline import files
from pipeline.errors import Fault
from pipeline.private_folders import in_temporary_folder, private_folder
from pipeline.tracking.addresses import is_own

NOTICE, TIMEOUT = 2, 600  # seconds; scoring a champion on many test images takes minutes


@contextmanager
def exclusive_lock(what: str) -> Iterator[None]:
    """A lock named ``what``, for the processes on this machine that use the same store.

    Names the process that holds it after NOTICE seconds of waiting. Raises Fault after TIMEOUT.
    """
    path = _lock_file(what)
    # Nobody else may write into the folder; a link that was there before would be followed to another file.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+") as lock:
        _take(lock, path)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(lock: TextIO, path: Path) -> None:
    started, is_announced = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however this process ends
        except BlockingIOError:
            waited = time.monotonic() - started
            lock.seek(0)
            holder = f"process {lock.read() or 'unknown'} holds {path}"
            if waited > TIMEOUT:
                raise Fault(f"{holder} for {waited:.0f} seconds: end that process, then run again") from None
            if waited > NOTICE and not is_announced:
                print(f"waiting: {holder}", file=sys.stderr, flush=True)
                is_announced = True
            time.sleep(0.05)
        else:
            lock.seek(0)
            return


def _lock_file(what: str) -> Path:
    """The same file for all who use the same store: in this repository for its own, else named after the address."""
    uri = mlflow.get_tracking_uri()
    if is_own(uri):
        folder = files.root() / "mlruns"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".{what}.lock"
    folder = in_temporary_folder()
    try:
        private_folder(folder)
    except OSError as error:
        remedy = "remove it, or set TMPDIR to a folder of your own"
        raise Fault(f"{folder} cannot be used ({error.strerror}): {remedy}") from error
    return folder / f"{files.sha256(uri.encode())[:16]}.{what}.lock"
