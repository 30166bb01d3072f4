"""Stores of other versions of MLflow: servers that are too old, and databases that have to be migrated."""

import http.server
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from pipeline import train
from pipeline.errors import Fault
from pipeline.tracking import store

OLDER = "0584bdc529eb"  # the last migration of MLflow 2.22


def make_older_database(address: str) -> None:
    """The tables that MLflow 2.22 makes, by its own migrations."""
    engine = sqlalchemy.create_engine(address)
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(address)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    engine.dispose()


def make_older_store(folder: Path) -> None:
    for path in folder.glob("mlflow.db*"):
        path.unlink()
    make_older_database(f"sqlite:///{folder / 'mlflow.db'}")


def revision(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


@contextmanager
def answering(text: str, status: int = 200) -> Iterator[str]:
    """The address of a server that gives this answer to everything."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.faults
def test_fault_36_an_older_server_is_refused_before_the_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering("2.22.0") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        line = rf"^the MLflow server {address} is version 2\.22\.0, and takes models from version 3 on: upgrade it"
        with pytest.raises(Fault, match=line):
            train.main()
    assert not (workspace / "models").exists()


@pytest.mark.parametrize(("text", "status"), [("<html>", 200), ("2.22.0", 404), ("3.17.2", 200), ("3.0.0rc1", 200)])
def test_a_server_that_is_not_known_to_be_older_is_tried(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    with answering(text, status) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(Fault) as failure:  # since it is none
            store.connect()
    assert "takes models from version" not in str(failure.value)


@pytest.mark.faults
def test_fault_36_an_older_database_is_migrated_with_a_copy_and_a_word(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_older_store(workspace)
    capsys.readouterr()
    store.connect()
    said = capsys.readouterr().err
    assert said.startswith("mlflow.db was of an older MLflow, and has been migrated to 3.")
    assert said.endswith("the database as it was is in mlflow.db.before-migration\n")
    assert said.count("\n") == 1
    assert revision(workspace / "mlflow.db.before-migration") == OLDER != revision(workspace / "mlflow.db")
    store.connect()
    assert capsys.readouterr().err == ""


def _no_place(folder: Path) -> None:
    (folder / "mlflow.db.before-migration").mkdir()


def _full_disk(folder: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))


@pytest.mark.faults
@pytest.mark.parametrize(("damage", "reason"), [(_no_place, "Is a directory"), (_full_disk, "disk I/O error")])
def test_fault_36_an_older_database_that_cannot_be_copied_is_not_migrated(
    workspace: Path, damage: Callable[[Path], None], reason: str
) -> None:
    make_older_store(workspace)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    damage(workspace)
    try:
        with pytest.raises(Fault) as fault:
            store.connect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    line = f"{workspace / 'mlflow.db'} is of an older MLflow, and cannot be copied before it is migrated ("
    assert str(fault.value).startswith(line)
    assert str(fault.value).endswith("): make its folder writable, and room on that disk")
    assert reason in str(fault.value)
    assert revision(workspace / "mlflow.db") == OLDER
