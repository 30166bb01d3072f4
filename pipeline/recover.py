"""Repair DVC's own files after a process was killed while it wrote them: `make repro` runs it first.

    python -m pipeline.recover

Without a problem it prints nothing, and while DVC is at work here it does nothing.
"""

import fcntl
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from dvc.dirs import site_cache_dir
from dvc.env import DVC_SITE_CACHE_DIR
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline import files
from pipeline.dvc_files import KEPT_LOCK, LOCK, is_whole
from pipeline.errors import UserError, run_command

DVC, OWN_PICTURES = Path(".dvc"), Path("data/own")
GUARD, RWLOCK = DVC / "tmp/lock", DVC / "tmp/rwlock"


def main() -> None:
    """Repair what is damaged, and print a line for each file."""
    if not DVC.is_dir():
        return  # a downloaded archive, in which DVC has not run yet
    OWN_PICTURES.mkdir(parents=True, exist_ok=True)  # somebody may have removed all of data/, to begin anew
    GUARD.parent.mkdir(exist_ok=True)
    with GUARD.open("a") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)  # DVC's own way to lock a repository
        except BlockingIOError:
            return
        if not _dvc_runs():
            RWLOCK.unlink(missing_ok=True)  # all its entries are those of dead processes
            _repair_lock()
            with suppress(DvcException):  # of a damaged configuration, which the next command of DVC's reports
                _remove_damaged_databases()


def _dvc_runs() -> bool:
    """Whether a process that has locked files is alive. DVC gives up GUARD while a stage runs, and keeps RWLOCK."""
    try:
        written, content = RWLOCK.stat().st_mtime, json.loads(RWLOCK.read_bytes())
        readers = [each for some in content.get("read", {}).values() for each in some]
        return any(_is_alive(int(each["pid"]), written) for each in [*readers, *content.get("write", {}).values()])
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, KeyError, AttributeError):
        print(f"{RWLOCK} was damaged, and is removed")
        return False


def _is_alive(number: int, written: float) -> bool:
    """Whether it is the process that wrote RWLOCK at ``written``, and not a later one with the same number."""
    try:
        process = psutil.Process(number)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < written + 2)
    except psutil.NoSuchProcess:
        return False


def _repair_lock() -> None:
    """Replace a dvc.lock that is empty or cut off by the last whole one; DVC then runs the stages that it lacks."""
    if not LOCK.is_file() or is_whole(content := LOCK.read_bytes()):
        return
    if b"<<<<<<<" in content:
        raise UserError(f"{LOCK} has an unfinished merge: `git checkout --ours {LOCK}`, then `dvc repro`")
    for origin, kept in _earlier_locks():
        if is_whole(kept):
            files.write(LOCK, kept)
            print(f"{LOCK} was damaged, and is again as {origin}: `dvc repro` makes what it lacks")
            return
    LOCK.unlink()
    print(f"{LOCK} was damaged, and is removed: `dvc repro` makes it again")


def _earlier_locks() -> Iterator[tuple[str, bytes]]:
    """Where there is another dvc.lock, and its content; the newest first. It is empty where there is none."""
    yield "before the last stage", KEPT_LOCK.read_bytes() if KEPT_LOCK.exists() else b""
    for origin, name in (("in git's index", f":./{LOCK}"), ("in the last commit", f"HEAD:./{LOCK}")):
        with suppress(FileNotFoundError):  # git is not installed
            yield origin, subprocess.run(["git", "show", name], capture_output=True, check=False).stdout


def _remove_damaged_databases() -> None:
    """DVC has the hashes of files in databases outside the repository. It makes missing ones, and fails on damaged."""
    for path in _databases_folder().rglob("cache.db"):
        if not _is_database(path):
            for each in path.parent.glob(f"{path.name}*"):
                each.unlink()
            print(f"{path}, which only saves DVC time, was damaged, and is removed")


def _databases_folder() -> Path:
    """DVC's folder for this repository. DVC opens the databases in it before it says where it is."""
    before = os.environ.get(DVC_SITE_CACHE_DIR)
    with TemporaryDirectory() as empty:
        os.environ[DVC_SITE_CACHE_DIR] = empty
        with Repo() as repo:
            name, configured = Path(repo.site_cache_dir).name, repo.config["core"].get("site_cache_dir")
    del os.environ[DVC_SITE_CACHE_DIR]
    if before:
        os.environ[DVC_SITE_CACHE_DIR] = before
    return Path(site_cache_dir(configured)) / "repo" / name


def _is_database(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            answer: Any = database.execute("PRAGMA quick_check").fetchone()
            return bool(answer == ("ok",))
    except sqlite3.OperationalError:  # in use
        return True
    except sqlite3.DatabaseError:
        return False


if __name__ == "__main__":
    run_command(main)
