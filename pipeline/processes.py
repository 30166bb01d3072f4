"""Which process something belongs to, and whether that process has ended."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil


def this() -> str:
    """Identifies this process, even if its number is used again, in another container or after a restart."""
    return f"{os.getpid()} since {psutil.Process().create_time():.0f} in {' '.join(_place())}"


def has_ended(process: str, same_machine: bool) -> bool:
    """Whether ``process``, as `this` has given it, has ended for sure.

    ``same_machine``: it cannot have run on another machine of the same name. Containers of one machine cannot see each
    other's processes, so one of another container may be alive.
    """
    identity, _, place = process.partition(" in ")
    if place:  # runs of older versions have none
        start, *container = place.split()
        here, *this_container = _place()
        if start != here:
            return same_machine  # which has been started again since then
        if container != this_container:
            return False
    number, _, since = identity.partition(" since ")
    try:
        found = psutil.Process(int(number))
        # A killed process stays a zombie until its parent asks for it, in a container without an init for ever.
        return bool(abs(found.create_time() - int(since)) > 1 or found.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _place() -> list[str]:
    """Where a number means one process: this machine since it was started and, in Linux, this container."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [start, str(Path("/proc/self/ns/pid").readlink())]
    except OSError:  # not Linux
        return [socket.gethostname()]


def mark(descriptor: int) -> None:
    """Mark an open file or folder as used, for `is_left_over`, until it is closed or its process ends, however."""
    with suppress(OSError):  # a disk without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_left_over(path: Path, number: int) -> bool:
    """Whether the process with this number, which made ``path`` and marked it, has ended.

    The number alone would not do, since another container may have this folder too.
    """
    if psutil.pid_exists(number):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    finally:
        os.close(descriptor)
    return True
