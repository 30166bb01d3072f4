"""The tracking store: connect to it, create or migrate it if need be, and report its errors in one line."""

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
from tempfile import TemporaryDirectory
from typing import TextIO

import mlflow
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _all_tables_exist
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from packaging.version import InvalidVersion, Version
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from pipeline import files
from pipeline.errors import Fault, without_password
from pipeline.private_folders import in_temporary_folder, private_folder, temporary_folder
from pipeline.tracking import sqlite_files

EXPERIMENT = "convtrack"
# OSError comes from the disk with the artifacts, and from a server that refuses a file.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
MIN_SERVER = 3  # before it, a server cannot log models apart from runs
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


def _is_own(uri: str) -> bool:
    path = sqlite_path(uri)
    return path is not None and path.resolve() == (files.root() / "mlflow.db").resolve()


def _artifact_location(uri: str) -> str | None:
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

    `mlflow ui` looks in the same two places when it is started there without a flag. A store that was moved or copied
    with its repository gets the locations of its artifacts here. Raises Fault.
    """
    uri = configured()
    mlflow.set_tracking_uri(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of a few kilobytes
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database logs each of its migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it also raises
    # mlflow lets several processes create the tables of an empty database at once, and then all but one fail.
    with short_timeouts(), exclusive_lock("connect") if _may_lack_tables(uri) else nullcontext():
        _check_server(uri)
        _check_database_server(uri)
        _create_database(uri)
        _migrate(uri)
        _update_locations()
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            _create_experiment(_artifact_location(uri))
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


def _check_server(uri: str) -> None:
    """Raises Fault for an MLflow server that is too old: it would fail after the training. Not if it does not say."""
    if not uri.startswith(("http://", "https://")):
        return
    answer = http_request(get_default_host_creds(uri), "/version", "GET")
    try:
        found = Version(answer.text.strip()) if answer.ok else None
    except InvalidVersion:
        return
    if found is not None and found.major < MIN_SERVER:
        raise Fault(
            f"the MLflow server {address()} is version {found}, and takes models from version {MIN_SERVER} on: "
            "upgrade it, or use another store"
        )


def _check_database_server(uri: str) -> None:
    """Give up within seconds on a database server that does not respond; mlflow itself tries for two minutes.

    Raises Fault for a database of an older MLflow, which mlflow would migrate without asking.
    """
    if not uri.startswith(("postgresql", "mysql")):
        return
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": CONNECT_TIMEOUT})
    try:
        if _is_older(engine):
            raise Fault(
                f"{address()} is a database of an older MLflow, which cannot read it after a migration: if all who use "
                f"it have MLflow {mlflow.__version__}, `mlflow db upgrade` with its address migrates it"
            )
    finally:
        engine.dispose()


def _is_older(engine: sqlalchemy.Engine) -> bool:
    """Whether the database has MLflow's tables, but not all that this version of it has: then mlflow migrates it."""
    return sqlalchemy.inspect(engine).has_table("experiments") and not _all_tables_exist(engine)


def _migrate(uri: str) -> None:
    """Let mlflow migrate an SQLite file of an older version, which it does anyway, with a copy and a word first."""
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return
    engine = sqlalchemy.create_engine(uri)
    try:
        if not _is_older(engine):
            return
        with exclusive_lock("migration"):
            if _is_older(engine):
                try:
                    kept = _keep_copy(path, "before-migration")
                except (OSError, sqlite3.Error) as error:
                    reason = f"{path} is of an older MLflow, and cannot be copied before it is migrated"
                    raise Fault(
                        f"{reason} ({one_line(error)}): make its folder writable, and room on that disk"
                    ) from error
                MlflowClient().search_experiments(max_results=1)
                print(
                    f"{path.name} was of an older MLflow, and has been migrated to {mlflow.__version__}; older "
                    f"versions cannot read it any more: the database as it was is in {kept.name}",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        engine.dispose()


def _keep_copy(path: Path, suffix: str) -> Path:
    """Copy an SQLite file that is in use; where the copy is. Raises OSError and sqlite3.Error."""
    kept = path.with_name(f"{path.name}.{suffix}")
    unfinished = kept.with_name(f"{kept.name}{files.UNFINISHED}")
    unfinished.unlink(missing_ok=True)
    sqlite_files.copy(path, unfinished)
    unfinished.replace(kept)
    return kept


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


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for the address of a server."""
    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return sqlite_files.local_path(url.database) or Path(url.database)


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
            database.execute("UPDATE experiments SET artifact_location = ?", (f"{_artifact_location(uri)}/0",))
        files.write(path, copied.read_bytes())


def _update_locations() -> None:
    """If this repository was moved or copied, point its store, which has absolute paths, at the artifacts here."""
    uri, path = mlflow.get_tracking_uri(), files.root() / "mlflow.db"
    if not _is_own(uri) or (before := sqlite_files.other_repository(path, EXPERIMENT)) is None:
        return
    try:
        with exclusive_lock("locations"):
            if sqlite_files.other_repository(path, EXPERIMENT) is None:
                return  # another process has updated them
            kept = _keep_copy(path, "before-move")
            sqlite_files.move_locations(path, before, files.root())
    except (OSError, sqlite3.Error) as error:
        reason = f"the locations in {path} are those of {before}, and cannot be updated ({one_line(error)})"
        raise Fault(f"{reason}: make its folder writable, and room on that disk, then run again") from error
    how = "copied from {}, which keeps its own" if (before / path.name).exists() else "moved from {}"
    print(
        f"this repository was {how.format(before)}: the locations in {path.name} are now those of {files.root()}; "
        f"the database as it was is in {kept.name}",
        file=sys.stderr,
        flush=True,
    )


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
    if _is_own(uri):
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
