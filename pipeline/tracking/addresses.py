"""The addresses of tracking stores: the one in use, the files of SQLite stores, and where a store keeps its files."""

import os
from pathlib import Path

import mlflow
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from pipeline import files
from pipeline.errors import without_password
from pipeline.tracking import sqlite_files


def address() -> str:
    """The address of the tracking store, without a password."""
    return without_password(mlflow.get_tracking_uri())


def own_store() -> str:
    """The address of the store in this repository, which is used unless MLFLOW_TRACKING_URI names another."""
    return sqlite_address(files.root() / "mlflow.db")


def configured() -> str:
    """The address of the store: a relative path in MLFLOW_TRACKING_URI begins at the repository's root.

    DVC runs a stage of `--temp` and `--queue` in a folder that it deletes afterwards.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    path = sqlite_path(given) if given else None
    if not given or path is None or path.is_absolute():
        return given or own_store()
    _, mark, query = given.partition("?")
    return sqlite_address(files.root() / path) + mark + query


def is_own(uri: str) -> bool:
    """Whether this is the address of the store in this repository."""
    path = sqlite_path(uri)
    return path is not None and path.resolve() == (files.root() / "mlflow.db").resolve()


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside an SQLite file, so that all who use it find them."""
    if uri.startswith("http"):
        return None  # the server decides
    path = sqlite_path(uri)
    return ((path.parent.resolve() if path else files.root()) / "mlruns").as_uri()


def sqlite_address(path: Path) -> str:
    """The address of an SQLite store, by the absolute path of its file. Not the reverse: see sqlite_path."""
    escaped = str(path).replace("%", "%25").replace("?", "%3F")
    # mlflow creates the folder that stands in a `sqlite:` address, escaped as it is.
    return f"{'sqlite' if escaped == str(path) else 'sqlite+pysqlite'}:///{escaped}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for the address of a server."""
    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return sqlite_files.local_path(url.database) or Path(url.database)
