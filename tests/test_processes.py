"""Which process something belongs to, also across containers: real processes in PID namespaces of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import files, processes
from tests.conftest import CONTAINER, REPOSITORY, needs_namespaces


def in_container(code: str, folder: Path, **environment: str) -> str:
    """What ``code`` prints in a container that shares the disk and the host name."""
    done = subprocess.run(
        [*CONTAINER, sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.faults
def test_a_killed_process_that_nobody_reaps_has_ended() -> None:
    place = processes.this().partition(" in ")[2]
    with subprocess.Popen(["sleep", "60"]) as process:
        identity = f"{process.pid} since {psutil.Process(process.pid).create_time():.0f} in {place}"
        assert not processes.has_ended(identity, same_machine=True)
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert processes.has_ended(identity, same_machine=True)


@needs_namespaces
@pytest.mark.faults
def test_fault_35_a_process_of_another_container_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    code = "from pipeline import processes; print(processes.has_ended({!r}, same_machine=True))"
    assert in_container(code.format(processes.this()), tmp_path) == "False"
    ended = in_container("from pipeline import processes; print(processes.this())", tmp_path)
    assert not processes.has_ended(ended, same_machine=True)  # nobody outside can know


@needs_namespaces
@pytest.mark.faults
def test_fault_35_two_containers_with_one_temporary_folder_leave_each_other_theirs(tmp_path: Path) -> None:
    holds = """
import sys
from pipeline import files
files.use_own_temporary_folder()
print("has one", flush=True)
sys.stdin.read()
"""
    other = "from pipeline import files; files.use_own_temporary_folder()"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(tmp_path), "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", holds], env=environment, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"has one\n"
        (folder,) = tmp_path.iterdir()
        in_container(other, tmp_path, TMPDIR=str(tmp_path))
        assert list(tmp_path.iterdir()) == [folder]
        process.kill()
        process.wait()
        in_container(other, tmp_path, TMPDIR=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_fault_35_what_another_container_is_writing_is_not_left_over(tmp_path: Path) -> None:
    """There its process has a number that no process has here."""
    unfinished = tmp_path / ".model.999999999.tmp"
    with unfinished.open("wb") as file:
        processes.mark(file.fileno())
        files.write(tmp_path / "other", b"")
        assert unfinished.exists()
    files.write(tmp_path / "other", b"")
    assert not unfinished.exists()


def test_a_file_is_marked_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_over: list[bool] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        found = list(tmp_path.glob(".*.tmp"))  # none any more once the folder is synced
        left_over.extend(processes.is_left_over(path, 999_999_999) for path in found)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    files.write(tmp_path / "model", b"whole")
    assert left_over == [False]
