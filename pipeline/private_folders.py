"""Folders outside the repository that only this user can open."""

import errno
import os
import re
import stat
from pathlib import Path
from tempfile import gettempdir

OF_A_COMMAND = re.compile(r"convtrack-\d+-\w+")  # the temporary folder of a command, with the number of its process


def private_folder(path: Path) -> Path:
    """Make ``path`` if it does not exist, and close it to other users; returns it.

    Raises OSError if it cannot be written, is a link, or belongs to another user, and if others could write into it:
    what they have put there cannot be told from one's own.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    is_open = facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(facts.st_mode) or is_open:
        raise PermissionError(errno.EPERM, "other users can write into it, or it is a link", str(path))
    path.chmod(0o700)  # fails on a disk that is mounted read-only
    return path


def in_temporary_folder() -> Path:
    """Where this user's private folder in the temporary directory is, or will be. Raises OSError without such one."""
    return temporary_folder() / f"convtrack-{os.getuid()}"


def temporary_folder() -> Path:
    """The temporary folder of all commands, in which each has its own (`files.use_own_temporary_folder`)."""
    folder = Path(gettempdir())
    return folder.parent if OF_A_COMMAND.fullmatch(folder.name) else folder
