"""The tracking store: connect to it, create it if it does not exist, and report its errors in one line."""

import errno
import fcntl
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TextIO

import mlflow
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline import files
from pipeline.errors import Fault, without_password
from pipeline.private_folders import in_temporary_folder, private_folder

EXPERIMENT = "convtrack"
TABLES = "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"  # finds a row in an SQLite file with mlflow's tables
# OSError comes from the disk with the artifacts, and from a server that refuses a file.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
CONNECT_TIMEOUT = 8  # seconds, for a database on a server
LOCK_NOTICE, LOCK_TIMEOUT = 2, 600  # seconds; scoring a champion on many test images takes minutes
NEW_DATABASE_BYTES = 8 << 20  # an empty database, a copy of it and SQLite's own files beside it


@contextmanager
def store_faults() -> Iterator[None]:
    """Turn errors of the tracking store into a Fault of one line. Also a decorator."""
    try:
        yield
    except STORE_ERRORS as error:
        raise Fault(f"the tracking store {address()} failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, without a password."""
    # SQLAlchemy prefixes some errors with the failed operation.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    remedy = ": make room on that disk" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
    return without_password(lines[0] if lines else type(error).__name__) + remedy


def address() -> str:
    """The address of the tracking store, without a password."""
    return without_password(mlflow.get_tracking_uri())


def own_store() -> str:
    """The address of the store in this repository, which is used unless MLFLOW_TRACKING_URI names another."""
    return f"sqlite:///{files.root() / 'mlflow.db'}"


@store_faults()
def connect() -> None:
    """Point mlflow at ``MLFLOW_TRACKING_URI``, else at mlflow.db and mlruns/ in the repository's root.

    `mlflow ui` looks in the same two places when it is started there without a flag. Raises Fault.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or own_store()
    mlflow.set_tracking_uri(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of a few kilobytes
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database logs each of its migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it also raises
    # mlflow lets several processes create the tables of an empty database at once, and then all but one fail.
    with short_timeouts(), exclusive_lock("connect") if _may_lack_tables(uri) else nullcontext():
        _check_database_server(uri)
        _create_database(uri)
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            _create_experiment(None if given else (files.root() / "mlruns").as_uri())
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


def _check_database_server(uri: str) -> None:
    """Give up within seconds on a database server that does not respond; mlflow itself tries for two minutes."""
    if uri.startswith(("postgresql", "mysql")):
        engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": CONNECT_TIMEOUT})
        engine.connect().close()
        engine.dispose()


def _may_lack_tables(uri: str) -> bool:
    """Whether mlflow may still have to create its tables; not on a server, nor in an SQLite file that has them."""
    if uri.startswith("http"):
        return False
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return True
    try:
        return not finds_row(path, TABLES)
    except sqlite3.Error:
        return False  # mlflow then reports what is wrong with it


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for the address of a server."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def finds_row(path: Path, query: str, *values: str) -> bool:
    """Whether a query of an SQLite file, which is only read, has a result. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        return database.execute(query, values).fetchone() is not None


def _create_database(uri: str) -> None:
    """Create an SQLite file atomically if it does not exist.

    mlflow creates the tables one after the other, and cannot continue if it is killed in between.
    """
    path = sqlite_path(uri)
    if path is None or path.exists() or not path.parent.is_dir():
        return
    files.check_room(Path(gettempdir()), NEW_DATABASE_BYTES)
    with TemporaryDirectory(prefix="convtrack-") as folder:
        created, copied = Path(folder) / "created.db", Path(folder) / "copied.db"
        MlflowClient(f"sqlite:///{created}").search_experiments()  # creates the tables
        with closing(sqlite3.connect(created)) as source, closing(sqlite3.connect(copied)) as target:
            source.backup(target)  # including what is still in the write-ahead log
        files.write(path, copied.read_bytes())


def _create_experiment(artifact_location: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location)
    except MlflowException:
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            raise  # otherwise another process has just created it


@contextmanager
def exclusive_lock(what: str) -> Iterator[None]:
    """A lock named ``what``, for the processes on this machine that use the same store.

    Names the process that holds it after LOCK_NOTICE seconds of waiting. Raises Fault after LOCK_TIMEOUT.
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
            if waited > LOCK_TIMEOUT:
                raise Fault(f"{holder} for {waited:.0f} seconds: end that process, then run again") from None
            if waited > LOCK_NOTICE and not is_announced:
                print(f"waiting: {holder}", file=sys.stderr, flush=True)
                is_announced = True
            time.sleep(0.05)
        else:
            lock.seek(0)
            return


def _lock_file(what: str) -> Path:
    """The same file for all who use the same store: in this repository for its own, else named after the address."""
    uri = mlflow.get_tracking_uri()
    if uri == own_store():
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
