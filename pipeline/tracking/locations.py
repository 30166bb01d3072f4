"""Where an SQLite store has the files of its runs: updated after a move, and where new files would get lost."""

import sqlite3
import sys
from pathlib import Path

from pipeline import files
from pipeline.errors import Fault
from pipeline.tracking import sqlite_files
from pipeline.tracking.addresses import artifact_location, is_own, sqlite_path
from pipeline.tracking.faults import one_line
from pipeline.tracking.locks import exclusive_lock


def update(uri: str, experiment: str) -> None:
    """Update the locations in an SQLite store, with a copy of it and a line about it. Raises Fault."""
    path = sqlite_path(uri)
    if path is None:
        return
    _follow_move(path, experiment, is_own(uri))
    _leave_lost_folder(path, experiment, str(artifact_location(uri)))


def _follow_move(path: Path, experiment: str, own: bool) -> None:
    """If a store was moved with its artifacts, point it, which has absolute paths, at them.

    That of this repository also if it was copied. The files of others may be where somebody wants them, or elsewhere.
    """
    now = files.root() if own else path.parent.resolve()
    before = sqlite_files.other_folder(path, experiment, now)
    if before is None or not (own or sqlite_files.has_moved(path, before, now)):
        return
    try:
        with exclusive_lock("locations"):
            if sqlite_files.other_folder(path, experiment, now) is None:
                return  # another process has updated them
            kept = sqlite_files.keep_copy(path, "before-move")
            sqlite_files.move_locations(path, before, now)
    except (OSError, sqlite3.Error) as error:
        reason = f"the locations in {path} are those of {before}, and cannot be updated ({one_line(error)})"
        raise Fault(f"{reason}: make its folder writable, and room on that disk, then run again") from error
    how = "copied from {}, which keeps its own" if (before / path.name).exists() else "moved from {}"
    _say(
        f"{'this repository' if own else path} was {how.format(before)}: the locations in {path.name} are now those "
        f"of {now}; the database as it was is in {kept.name}"
    )


def _leave_lost_folder(path: Path, experiment: str, beside: str) -> None:
    """Where an experiment with runs would lose the files of new ones, keep these ``beside`` the database.

    The locations of the runs that are there stay: another machine may have their files.
    """
    if (lost := sqlite_files.lost_folder(path, experiment)) is None:
        return
    location, reason = lost
    told = f"{path} has the files of the experiment {experiment} in {location}, {reason}"
    try:
        with exclusive_lock("locations"):
            if sqlite_files.lost_folder(path, experiment) is None:
                return
            kept = sqlite_files.keep_copy(path, "before-move")
            sqlite_files.set_location(path, experiment, beside)
    except (OSError, sqlite3.Error) as error:  # what is in it can be read all the same
        _say(f"warning: {told}, and that cannot be changed ({one_line(error)}): make its folder writable")
    else:
        _say(f"{told}: those of new runs will be in {beside}; the database as it was is in {kept.name}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
