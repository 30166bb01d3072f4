"""`python -m pipeline.recover`: after a kill DVC's files are whole again, with what was noted before."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline import dvc_files
from tests.conftest import REPOSITORY
from tests.test_clone import run, succeed

pytestmark = pytest.mark.faults
STAGES = """
stages:
  one: {cmd: cat given > one, deps: [given], outs: [one]}
  two: {cmd: cat one > two, deps: [one], outs: [two]}
"""


@pytest.fixture(scope="module")
def _one_stage_noted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noted")
    (folder / "given").write_text("1")
    (folder / "dvc.yaml").write_text(STAGES)
    succeed("git", "init", "-q", folder=folder)
    succeed("dvc", "init", "-q", folder=folder)
    succeed("dvc", "repro", "-q", "one", folder=folder)
    succeed("git", "add", "-A", folder=folder)
    return folder


@pytest.fixture
def folder(_one_stage_noted: Path, tmp_path: Path) -> Path:
    """A repository of DVC's whose dvc.lock, which is in git's index, has the first of two stages."""
    folder = shutil.copytree(_one_stage_noted, tmp_path / "folder")
    with (folder / ".dvc/config").open("a") as config:
        config.write(f"[core]\n    site_cache_dir = {tmp_path / 'site'}\n")
    return folder


def recover(folder: Path) -> str:
    done = run(sys.executable, "-m", "pipeline.recover", folder=folder, more={"PYTHONPATH": str(REPOSITORY)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# DVC itself, killed where it writes dvc.lock: it has emptied the file, and written the beginning.
KILLED = """
import os, signal, sys
import dvc.utils.serialize._yaml as yaml
from dvc.cli import main

whole = yaml._dump

def dump(data, stream):
    if stream.name.endswith("dvc.lock"):
        stream.write({beginning!r})
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(data, stream)

yaml._dump = dump
main(["repro"])
"""


@pytest.mark.parametrize("share", [0, 0.5])
def test_fault_45_a_lock_that_dvc_was_killed_while_writing_is_as_before_the_stage(folder: Path, share: float) -> None:
    content = (folder / "dvc.lock").read_text()
    with chdir(folder):
        dvc_files.keep_lock()  # what a stage does when it begins
    succeed("git", "rm", "-q", "--cached", "dvc.lock", folder=folder)
    beginning = content[: int(share * len(content))]
    assert run(sys.executable, "-c", KILLED.format(beginning=beginning), folder=folder).returncode == -signal.SIGKILL
    assert (folder / "dvc.lock").read_text() == beginning
    assert beginning or "validation failed" in run("dvc", "repro", folder=folder).stderr
    printed = recover(folder)
    assert printed == "dvc.lock was damaged, and is again as before the last stage: `dvc repro` makes what it lacks\n"
    assert (folder / "dvc.lock").read_text() == content
    printed = succeed("dvc", "repro", folder=folder)
    assert "Stage 'one' didn't change" in printed
    assert "Stage 'two' is cached" in printed  # restored from its run cache, which this project's stages do without


def test_fault_45_without_a_copy_the_lock_is_that_of_git_or_made_again(folder: Path) -> None:
    content = (folder / "dvc.lock").read_bytes()
    (folder / "dvc.lock").write_bytes(b"")
    assert "again as in git's index" in recover(folder)
    assert (folder / "dvc.lock").read_bytes() == content
    succeed("git", "rm", "-q", "--cached", "dvc.lock", folder=folder)
    (folder / "dvc.lock").write_bytes(b"")
    assert recover(folder) == "dvc.lock was damaged, and is removed: `dvc repro` makes it again\n"
    succeed("dvc", "repro", folder=folder)


def test_fault_45_a_lock_with_an_unfinished_merge_is_left_to_its_user(folder: Path) -> None:
    content = "<<<<<<< HEAD\n" + (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(content)
    done = run(sys.executable, "-m", "pipeline.recover", folder=folder, more={"PYTHONPATH": str(REPOSITORY)})
    line = "error: dvc.lock has an unfinished merge: `git checkout --ours dvc.lock`, then `dvc repro`\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert (folder / "dvc.lock").read_text() == content


def test_fault_45_locks_and_databases_that_stop_dvc_are_removed(folder: Path) -> None:
    rwlock = folder / ".dvc/tmp/rwlock"
    rwlock.write_text('{"read": ')
    assert "RWLock-file" in run("dvc", "repro", folder=folder).stderr
    databases = list((folder.parent / "site").rglob("cache.db"))
    assert databases
    for path in databases:
        for log in path.parent.glob("cache.db-*"):
            log.unlink()
        path.write_bytes(path.read_bytes()[:3000])
    assert "malformed" in run("dvc", "repro", folder=folder).stderr
    assert len(recover(folder).splitlines()) == 1 + len(databases)
    succeed("dvc", "repro", folder=folder)


def test_fault_45_entries_of_dead_processes_are_removed_and_those_of_living_ones_kept(folder: Path) -> None:
    rwlock = folder / ".dvc/tmp/rwlock"

    def locked_by(number: int) -> None:
        rwlock.write_text(json.dumps({"write": {str(folder / "one"): {"pid": number, "cmd": "dvc repro"}}, "read": {}}))

    with subprocess.Popen(["sleep", "600"]) as zombie:
        locked_by(zombie.pid)
        (folder / "dvc.lock").write_bytes(b"")
        recover(folder)
        assert rwlock.exists()
        assert (folder / "dvc.lock").read_bytes() == b""  # it may be about to write it
        os.kill(zombie.pid, signal.SIGKILL)
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code
        assert "again as in git's index" in recover(folder)
        assert not rwlock.exists()
    locked_by(os.getppid())
    os.utime(rwlock, (0, 0))  # written before that process began
    recover(folder)
    assert not rwlock.exists()
