"""Folders outside the repository that only this user can open."""

import errno
import os
import stat
from pathlib import Path
from tempfile import gettempdir


def private_folder(path: Path) -> Path:
    """Make ``path`` if it does not exist, and close it to other users; returns it.

    Raises OSError if it cannot be written, is a link, or belongs to another user.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to another user, or is a link", str(path))
    path.chmod(0o700)  # fails on a disk that is mounted read-only
    return path


def in_temporary_folder() -> Path:
    """Where this user's private folder in the temporary directory is, or will be. Raises OSError without such one."""
    return Path(gettempdir()) / f"convtrack-{os.getuid()}"
