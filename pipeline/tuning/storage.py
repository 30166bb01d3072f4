"""Where the study is kept: a journal in a folder, or a database that several machines share."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import Fault, without_password

FOLDER = Path("tuning")
JOURNAL = FOLDER / "study.journal"
STORAGE = "OPTUNA_STORAGE"
HEARTBEAT, GRACE = 10, 60  # seconds between signs of life, and after which a trial without one is given up
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)


class Journal(JournalFileBackend):
    """Optuna's journal. A killed process, or a full disk, can leave half a line, which would spoil the next one."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """As Optuna's, after what is left of an unfinished line is cut off."""
        with Path(self._file_path).open("rb+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        super().append_logs(logs)


@contextmanager
def as_it_is() -> Iterator[None]:
    """What Optuna calls experimental and is needed here. The versions are pinned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def storage_faults() -> Iterator[None]:
    """Errors of the storage leave as a Fault of one line. Also a decorator."""
    try:
        yield
    except STORAGE_ERRORS as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise Fault(without_password(f"the study's storage failed: {reason}")) from error


def open_storage() -> BaseStorage:
    """Where ``OPTUNA_STORAGE`` says, else a journal in tuning/. Raises Fault."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = os.environ.get(STORAGE)
    if url is None:
        FOLDER.mkdir(exist_ok=True)
        # No other process writes here, so a lock that is there was left by one that was killed. Optuna would wait half
        # a minute for it, and for ever where the journal's path is a relative one.
        JOURNAL.with_name(JOURNAL.name + LOCK_FILE_SUFFIX).unlink(missing_ok=True)
        return JournalStorage(Journal(str(JOURNAL.resolve())))
    with storage_faults(), as_it_is():
        return RDBStorage(
            url,
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
