"""The storage of the study: a journal in a folder, or a database that several machines share."""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import Fault, UserError, printable, without_password

FOLDER = Path("tuning")
JOURNAL = FOLDER / "study.journal"
STORAGE = "OPTUNA_STORAGE"
HEARTBEAT, GRACE = 10, 60  # seconds between heartbeats, and without one until a trial is requeued
LOCK_TIMEOUT = 30  # seconds, for tables
IDLE_TIMEOUT = 40  # seconds, of who has the lock; more, so that what waits for a table is told so
NOTICE = 2  # seconds of waiting for the lock until that is said
WAIT_TIMEOUT = 60  # seconds, for the lock; more, so that a process that stands still with it does not end the others
ADVISORY_LOCK = 0xC0117ACC  # an arbitrary number
HOLDER = f"""
    SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE datname = current_database() AND locktype = 'advisory' AND objid = {ADVISORY_LOCK} AND granted
"""
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)


class NoLock(BaseJournalFileLock):
    """For the journal, which a lock of this project keeps other processes away from.

    One of Optuna's would outlive a killed process, and turns an interrupt while it is released into an OSError.
    """

    def acquire(self) -> bool:
        """Nothing is locked."""
        return True

    def release(self) -> None:
        """Nothing was locked."""


class Journal(JournalFileBackend):
    """Optuna's journal. A killed process, or a full disk, can leave half a line, which would spoil the next one."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """As in Optuna, after removing an incomplete last line. Raises Fault if it cannot be written."""
        try:
            with Path(self._file_path).open("rb+") as file:
                if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)
        except OSError as error:
            raise Fault(f"the study's storage failed: {JOURNAL}: {error.strerror}") from error


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silences Optuna on what it calls experimental (the versions are pinned) and on heartbeats (`Study.heartbeat`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
        yield


@contextmanager
def storage_faults() -> Iterator[None]:
    """Turns errors of the storage into a Fault of one line. Also a decorator."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise Fault(
            without_password(f"the study's storage failed: {_reason(error) or type(error).__name__}")
        ) from error


def _reason(error: BaseException) -> str:
    """The database's first error that says something: later ones only say that an earlier statement failed."""
    earlier = error.__cause__ or error.__context__
    # Only the storage's own: this may have happened while something else was handled, such as an interrupt.
    of_the_storage = isinstance(earlier, STORAGE_ERRORS) or earlier is getattr(error, "orig", None)
    if earlier is not None and of_the_storage and (reason := _reason(earlier)):
        return reason
    text = str(error).partition("\n")[0]
    return text if any(map(str.isalnum, text)) else ""  # psycopg's of a lost connection is "()"


@contextmanager
def database_lock() -> Iterator[None]:
    """A lock in PostgreSQL: two machines might create the same tables and study, or start the same trial.

    It lasts for a transaction, which the server ends if it hears nothing more of it. Raises Fault if it has.
    """
    url = os.environ.get(STORAGE, "")
    if not url.startswith("postgresql"):
        yield
        return
    with ExitStack() as stack:
        with storage_faults(), _driver_needed():
            engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **_options(url))
            connection = stack.enter_context(engine.connect())
            connection.execute(sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}s'"))
            connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = '{WAIT_TIMEOUT}s'"))
            _take_lock(connection)
        yield
        with storage_faults():
            connection.commit()


def _take_lock(connection: sqlalchemy.Connection) -> None:
    """Wait for the lock, and after NOTICE seconds say who has it."""
    started = time.monotonic()
    while not connection.scalar(sqlalchemy.text(f"SELECT pg_try_advisory_xact_lock({ADVISORY_LOCK})")):
        if time.monotonic() - started > NOTICE:
            holder = connection.scalar(sqlalchemy.text(HOLDER)) or "another program"
            print(f"waiting: {printable(holder)} holds the lock of the study", file=sys.stderr, flush=True)
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            break
        time.sleep(0.05)


def open_storage() -> BaseStorage:
    """The one in ``OPTUNA_STORAGE``, else a journal in tuning/. Raises Fault, and UserError for a missing driver."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs warnings for errors that it also raises
    url = os.environ.get(STORAGE)
    if url is None:
        FOLDER.mkdir(exist_ok=True)
        _check_journal()
        return JournalStorage(Journal(str(JOURNAL), NoLock()))
    with storage_faults(), expected_warnings(), _driver_needed():
        return RDBStorage(
            url,
            engine_kwargs={"pool_pre_ping": True, **_options(url)},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


def _check_journal() -> None:
    """Raises Fault if a line of the journal is damaged. An incomplete last line is removed before the next is added."""
    if not JOURNAL.exists():
        return
    content = JOURNAL.read_bytes()
    if not content:
        print(f"{JOURNAL} is empty: the study begins anew")
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise Fault(
                f"{JOURNAL}: line {number} is damaged ({error}): restore a copy of the file, or delete it to begin anew"
            ) from error


def _options(url: str) -> dict[str, Any]:
    """By default PostgreSQL waits forever for a table that another connection has locked."""
    if not url.startswith("postgresql"):
        return {}
    name = f"process {os.getpid()} on {platform.node()}"  # for who waits for its lock
    return {"connect_args": {"options": f"-c lock_timeout={LOCK_TIMEOUT}s", "application_name": name}}


@contextmanager
def _driver_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        driver = getattr(error.__cause__ or error, "name", None) or "of that database"
        raise UserError(
            f"{STORAGE} needs the package {driver}, which is not installed; "
            "for PostgreSQL: pip install 'psycopg[binary]', and a URL that begins with postgresql+psycopg://"
        ) from error
