"""The tracking store: connect to it, create it if need be, and report its errors in one line."""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException

from pipeline import files
from pipeline.errors import Fault
from pipeline.private_folders import temporary_folder
from pipeline.tracking import locations, sqlite_files, versions
from pipeline.tracking.addresses import address, artifact_location, configured, sqlite_address, sqlite_path
from pipeline.tracking.faults import STORE_ERRORS, one_line
from pipeline.tracking.locks import exclusive_lock

EXPERIMENT = "convtrack"
NEW_DATABASE_BYTES = 8 << 20  # an empty database, a copy of it and SQLite's own files beside it


@contextmanager
def store_faults() -> Iterator[None]:
    """Turn errors of the tracking store into a Fault of one line. Also a decorator."""
    try:
        yield
    except STORE_ERRORS as error:
        raise Fault(f"the tracking store {address()} failed: {one_line(error)}") from error


def equals(key: str, value: str) -> str:
    """The clause of an MLflow search that finds ``value``, whatever quotes are in it.

    MLflow cannot escape a quote: of a text with both kinds, "'" stands for any character.
    """
    if "'" not in value:
        return f"{key} = '{value}'"
    if '"' not in value:
        return f'{key} = "{value}"'
    pattern = value.replace("'", "_")
    return f"{key} LIKE '{pattern}'"


@store_faults()
def connect() -> None:
    """Point mlflow at ``MLFLOW_TRACKING_URI``, else at mlflow.db and mlruns/ in the repository's root.

    `mlflow ui` looks in the same two places when it is started there without a flag. See locations.update
    and versions.migrate for what is changed in a store that is there. Raises Fault.
    """
    uri = configured()
    mlflow.set_tracking_uri(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of a few kilobytes
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database logs each of its migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it also raises
    # mlflow lets several processes create the tables of an empty database at once, and then all but one fail.
    with short_timeouts(), exclusive_lock("connect") if _may_lack_tables(uri) else nullcontext():
        versions.check_server(uri)
        versions.check_database_server(uri)
        _create_database(uri)
        versions.migrate(uri)
        locations.update(uri, EXPERIMENT)
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            _create_experiment(artifact_location(uri))
        elif experiment.lifecycle_stage == LifecycleStage.DELETED:
            command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise Fault(f"the experiment {EXPERIMENT} was deleted in {address()}: `{command}`, then run again")
        mlflow.set_experiment(EXPERIMENT)


def experiment_id() -> str:
    """The id of this project's experiment, which ``connect`` creates."""
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return str(experiment.experiment_id)


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Give up within seconds on a server that does not respond; mlflow itself tries for four minutes."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    added = {name: value for name, value in short.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _may_lack_tables(uri: str) -> bool:
    """Whether mlflow may still have to create its tables; not on a server, nor in an SQLite file that has them."""
    if uri.startswith("http"):
        return False
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return True
    try:
        return not sqlite_files.finds_row(path, sqlite_files.TABLES)
    except sqlite3.Error:
        return False  # mlflow then reports what is wrong with it


def _create_database(uri: str) -> None:
    """Create an SQLite file atomically if it does not exist.

    mlflow creates the tables one after the other, and cannot continue if it is killed in between.
    """
    path = sqlite_path(uri)
    if path is None or path.exists() or not path.parent.is_dir():
        return
    files.check_room(temporary_folder(), NEW_DATABASE_BYTES)
    with TemporaryDirectory(prefix="convtrack-") as folder:
        created, copied = Path(folder) / "created.db", Path(folder) / "copied.db"
        MlflowClient(sqlite_address(created)).search_experiments()  # creates the tables
        sqlite_files.copy(created, copied)
        with closing(sqlite3.connect(copied)) as database, database:  # mlflow's own experiment would be in this folder
            database.execute("UPDATE experiments SET artifact_location = ?", (f"{artifact_location(uri)}/0",))
        files.write(path, copied.read_bytes())


def _create_experiment(artifact_location: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location)
    except MlflowException:
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            raise  # otherwise another process has just created it
