"""What is read and written in an SQLite file with MLflow's tables, without MLflow."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline import files

OF_EXPERIMENTS = "/.dvc/tmp/exps/"  # where DVC makes the folders for `--temp` and `--queue`
TABLES = "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"  # finds a row in an SQLite file with mlflow's tables
LOCATIONS = (  # the columns of mlflow's tables with absolute paths
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def finds_row(path: Path, query: str, *values: str) -> bool:
    """Whether a query of an SQLite file, which is only read, has a result. Raises sqlite3.Error."""
    return _first_row(path, query, *values) is not None


def _first_row(path: Path, query: str, *values: str) -> tuple[str | None, ...] | None:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        row: tuple[str | None, ...] | None = database.execute(query, values).fetchone()
        return row


def damage(path: Path) -> str | None:
    """What SQLite finds wrong with the file itself; None if it is whole."""
    try:
        row = _first_row(path, "PRAGMA integrity_check(1)")
    except sqlite3.Error as error:
        return str(error)
    return " ".join(str(row[0]).split()) if row and row[0] != "ok" else None


def copy(path: Path, target: Path) -> None:
    """Copy a database that others may be writing. Raises sqlite3.Error."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)  # including what is still in the write-ahead log


def keep_copy(path: Path, suffix: str) -> Path:
    """Copy an SQLite file that is in use; where the copy is. Raises OSError and sqlite3.Error."""
    kept = path.with_name(f"{path.name}.{suffix}")
    unfinished = kept.with_name(f"{kept.name}{files.UNFINISHED}")
    unfinished.unlink(missing_ok=True)
    copy(path, unfinished)
    unfinished.replace(kept)
    return kept


def other_folder(path: Path, experiment: str, folder: Path) -> Path | None:
    """The folder whose mlruns/ a store's artifacts are in, if it is not ``folder``."""
    try:
        found = _first_row(path, "SELECT artifact_location FROM experiments WHERE name = ?", experiment)
    except sqlite3.Error:
        return None  # mlflow then reports what is wrong with it
    location = local_path(found[0]) if found else None
    if location is None or location.is_relative_to(folder / "mlruns"):
        return None
    return _folder_of_mlruns(location)


def has_moved(path: Path, before: Path, now: Path) -> bool:
    """Whether a store's artifacts are not in the folder ``before`` any more, and those of some run are in ``now``."""
    if (before / "mlruns").exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            folders = [local_path(location) for (location,) in database.execute("SELECT artifact_uri FROM runs")]
    except sqlite3.Error:
        return False  # mlflow then reports what is wrong with it
    moved = [folder.relative_to(before) for folder in folders if folder and folder.is_relative_to(before)]
    return any((now / each).exists() for each in moved)


def _folder_of_mlruns(folder: Path) -> Path | None:
    return next((each.parent for each in (folder, *folder.parents) if each.name == "mlruns"), None)


def lost_folder(path: Path, experiment: str) -> tuple[str, str] | None:
    """Where an experiment with runs would lose the files of new ones, and why; None where it would not."""
    runs = "experiment_id IN (SELECT experiment_id FROM runs)"
    try:
        found = _first_row(path, f"SELECT artifact_location FROM experiments WHERE name = ? AND {runs}", experiment)
    except sqlite3.Error:
        return None
    location = found[0] if found else None
    if not location:
        return None
    folder = local_path(location)
    if folder is None:
        url = urlsplit(location)
        is_relative = url.scheme in ("", "file") and not url.netloc
        return (location, "which depends on where a command is started") if is_relative else None
    if folder.is_relative_to(path.parent.resolve() / "mlruns"):
        return None
    if OF_EXPERIMENTS in folder.as_posix():
        return location, "which DVC deletes"
    if not folder.parent.exists():
        return location, "which does not exist any more"
    if (clone := _folder_of_mlruns(folder)) and (clone / "dvc.yaml").exists():
        return location, "which belongs to one of its clones"
    return None


def set_location(path: Path, experiment: str, location: str) -> None:
    """Set where the files of an experiment's new runs will be. Raises sqlite3.Error."""
    with closing(sqlite3.connect(path, timeout=20)) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", (location, experiment))


def local_path(location: str | None) -> Path | None:
    """The absolute path of a location on this machine, else None."""
    if location and location.startswith("/"):
        return Path(location)
    return Path(url2pathname(urlsplit(location).path)) if location and location.startswith("file:///") else None


def move_locations(path: Path, before: Path, now: Path) -> None:
    """Move the locations below the folder ``before`` to ``now``: all or none."""
    with closing(sqlite3.connect(path, timeout=20)) as database, database:
        database.execute("BEGIN IMMEDIATE")
        for table, column in LOCATIONS:
            for row, location in database.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                folder = local_path(location)
                if folder and folder.is_relative_to(before):
                    moved = (now / folder.relative_to(before)).as_uri()
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))
