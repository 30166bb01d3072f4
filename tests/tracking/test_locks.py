"""The locks of a store: who waits is told for whom, and nobody else's file is touched."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.errors import Fault
from pipeline.tracking import addresses, locks, store
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.faults
HOLDS = """
from pipeline.tracking import locks
with locks.exclusive_lock("gate"):
    print("holds", flush=True)
    input()
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder, with a tracking store that is not in the repository."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "http://127.0.0.1:5000")
    return tmp_path


def test_a_link_in_the_place_of_a_lock_is_not_followed(elsewhere: Path) -> None:
    precious = elsewhere / "precious"
    precious.write_text("mine")
    with locks.exclusive_lock("gate"):
        pass
    (lock,) = (elsewhere / f"convtrack-{os.getuid()}").iterdir()
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locks.exclusive_lock("gate"):
        pass
    assert precious.read_text() == "mine"


def test_a_folder_of_somebody_else_is_refused(elsewhere: Path) -> None:
    other = elsewhere / "other"
    other.mkdir()
    (elsewhere / f"convtrack-{os.getuid()}").symlink_to(other)
    with pytest.raises(Fault, match=r"other users can write into it, or it is a link\): remove it, or set TMPDIR"):
        locks._lock_file("gate")
    assert list(other.iterdir()) == []


def test_a_folder_that_others_can_write_into_is_refused(elsewhere: Path) -> None:
    folder = elsewhere / f"convtrack-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)  # whatever the umask
    with pytest.raises(Fault, match=r"other users can write into it, or it is a link\): remove it, or set TMPDIR"):
        locks._lock_file("gate")


def test_only_its_user_may_look_into_the_folder(elsewhere: Path) -> None:
    folder = elsewhere / f"convtrack-{os.getuid()}"
    folder.mkdir(mode=0o755)
    assert locks._lock_file("gate").parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700


def test_whoever_waits_is_told_for_which_process_and_gives_up_in_the_end(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.connect()
    capsys.readouterr()
    monkeypatch.setattr(locks, "TIMEOUT", 3)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": addresses.own_store()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        holder.send_signal(signal.SIGSTOP)
        path = workspace / "mlruns/.gate.lock"
        with pytest.raises(Fault) as error, locks.exclusive_lock("gate"):
            pass
        assert str(error.value) == f"process {holder.pid} holds {path} for 3 seconds: end that process, then run again"
        assert capsys.readouterr().err == f"waiting: process {holder.pid} holds {path}\n"
        holder.kill()
    with locks.exclusive_lock("gate"):  # the kernel has released it
        assert path.read_text() == str(os.getpid())


def test_a_store_with_its_tables_is_connected_to_without_a_lock(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the making of tables needs one: commands that start at the same time do not wait for each other."""
    store.connect()
    monkeypatch.setattr(locks, "TIMEOUT", 0)
    with locks.exclusive_lock("connect"):
        store.connect()
        (workspace / "mlflow.db").unlink()
        with pytest.raises(Fault, match=f"process {os.getpid()} holds"):
            store.connect()
