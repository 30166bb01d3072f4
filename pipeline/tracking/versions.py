"""Stores of other versions of MLflow: too old ones are refused, and an SQLite file is migrated with a copy first."""

import sqlite3
import sys

import mlflow
import sqlalchemy
from mlflow import MlflowClient
from mlflow.store.db.utils import _all_tables_exist
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from packaging.version import InvalidVersion, Version

from pipeline.errors import Fault
from pipeline.tracking import sqlite_files
from pipeline.tracking.addresses import address, sqlite_path
from pipeline.tracking.faults import one_line
from pipeline.tracking.locks import exclusive_lock

MIN_SERVER = 3  # before it, a server cannot log models apart from runs
CONNECT_TIMEOUT = 8  # seconds, for a database on a server


def check_server(uri: str) -> None:
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


def check_database_server(uri: str) -> None:
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


def migrate(uri: str) -> None:
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
                    kept = sqlite_files.keep_copy(path, "before-migration")
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
