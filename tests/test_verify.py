"""`python -m pipeline.verify`: two builds beside the committed dvc.lock; one that is interrupted leaves nothing.

tests/test_clone.py has two whole builds.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import verify
from pipeline.data import downloads, sources
from pipeline.errors import Fault, run_command
from pipeline.machine import copy_repository
from pipeline.model import kernel_cache
from tests.conftest import change_dataset_json, write_params
from tests.data.test_sources import TRAIN_IMAGES, is_small_mnist, publish, put, small_mnist
from tests.test_clone import ONE_EPOCH, commit, environment, succeed

COMMITTED = {"models/model.safetensors": "a" * 32, "reports/figures": "b" * 32 + ".dir"}
REBUILT = COMMITTED | {"models/model.safetensors": "c" * 32}


def write_lock(folder: Path, outputs: dict[str, str]) -> None:
    outs = "".join(f"    - path: {path}\n      md5: {md5}\n" for path, md5 in outputs.items())
    (folder / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  train:\n    outs:\n{outs}")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of git's with a made-up dvc.lock in its last commit, the current folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    succeed("git", "init", "-q", folder=folder)
    write_lock(folder, COMMITTED)
    write_params(folder, {})
    (folder / "requirements.lock").write_text(f"numpy==0.0.1 \\\ntorch=={torch.__version__.split('+')[0]} \\\n")
    commit(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setenv("LC_ALL", "C")  # what git says, in English
    monkeypatch.chdir(folder)
    return folder


def test_builds_are_compared_with_the_committed_lock(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lock(repository, REBUILT)
    committed = verify.committed_outputs()
    assert committed == COMMITTED
    verify.compare(REBUILT, REBUILT, committed)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["models/model.safetensors", "c" * 12, "same", "different"]
    assert "They differ from the committed dvc.lock." in printed


def test_the_repository_may_be_a_folder_of_a_larger_one(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = repository / "inner"
    inner.mkdir()
    write_lock(inner, REBUILT)
    commit(repository)
    monkeypatch.setenv("DVC_ROOT", str(inner))
    assert verify.committed_outputs() == REBUILT


@pytest.mark.parametrize(
    ("lacking", "why"),
    [
        ("the command", "git cannot be run: [Errno 2] No such file or directory: 'git'"),
        ("the repository", "git show: fatal: not a git repository"),
        ("a commit", "git show: fatal: invalid object name 'HEAD'"),
        ("the lock", "git show: fatal: path 'dvc.lock' exists on disk, but not in 'HEAD'"),
    ],
)
def test_where_no_lock_is_committed_one_line_says_so_before_anything_is_built(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lacking: str, why: str
) -> None:
    if lacking == "the lock":
        succeed("git", "rm", "-q", "--cached", "dvc.lock", folder=repository)
        succeed("git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "none", folder=repository)
    elif lacking == "the command":
        monkeypatch.setenv("PATH", str(repository))
    else:
        shutil.rmtree(repository / ".git")
        if lacking == "a commit":
            succeed("git", "init", "-q", folder=repository)
    with pytest.raises(SystemExit) as end:
        run_command(verify.main)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: there is no committed dvc.lock to compare with ({why}")
    assert printed.err.endswith("): run `dvc repro` and commit it\n")
    assert printed.err.count("\n") == 1


def test_the_same_bytes_as_committed_need_no_reasons(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.compare(COMMITTED, COMMITTED, verify.committed_outputs())
    head, *rows, empty, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["output", "MD5", "second", "run", "dvc.lock"]
    assert [row.split() for row in rows] == [
        ["models/model.safetensors", "a" * 12, "same", "same"],
        ["reports/figures", "b" * 12, "same", "same"],
    ]
    assert (empty, last) == ("", "Both builds gave the same bytes.")


def test_a_build_with_the_fallback_says_so(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.warn_of_fallback(workspace)
    assert capsys.readouterr().out == ""
    change_dataset_json(requested="mnist")
    verify.warn_of_fallback(workspace)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "mnist-5k, standing in for mnist: set PIPELINE_DATA_MIRROR" in line


def test_a_difference_from_the_committed_lock_is_explained(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(repository, {"train.threads": 1, "train.device": "cpu"})
    verify.compare(REBUILT, REBUILT, verify.committed_outputs())
    printed = capsys.readouterr().out
    _, _, reasons = printed.partition("Both builds gave the same bytes.\nThey differ from the committed dvc.lock. ")
    elsewhere = "; it may differ on the machine that wrote dvc.lock"
    first, *lines = reasons.splitlines()[1:]
    assert "`git diff HEAD`" in first
    assert re.fullmatch(r"  numpy is \d+\.\d+\.\d+, requirements\.lock has 0\.0\.1", lines[0])
    assert lines[1:] == [
        f"  torch is {torch.__version__.split('+')[0]}",
        f"  numba.target is {kernel_cache.target()}{elsewhere}",
        f"  device is cpu{elsewhere}",
        f"  cpu.capability is {torch.backends.cpu.get_cpu_capability()}{elsewhere}",
        f"  cpu.threads is 1{elsewhere}",
    ]


def test_two_builds_that_differ_are_a_fault_that_names_the_output(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Fault, match="two runs of this code on this machine do not give the same bytes"):
        verify.compare(COMMITTED, REBUILT, verify.committed_outputs())
    model, figures = capsys.readouterr().out.splitlines()[1:3]
    assert model.split() == ["models/model.safetensors", "a" * 12, "DIFFERENT", "same"]
    assert "DIFFERENT" not in figures


def test_whole_downloads_are_used_again_and_the_others_come_from_the_users_mirror(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, damaged = TRAIN_IMAGES, "t10k-labels-idx1-ubyte.gz"
    whole = small_mnist()
    publish(monkeypatch, whole)
    put(repository / "data/raw/mnist", whole | {damaged: b"half a fi"})
    (repository / "data/raw/mnist" / missing).unlink()
    put(tmp_path / "mirror", {name: whole[name] for name in (missing, damaged)})
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, "../mirror")  # from the root of the repository, not of its copy
    copy = tmp_path / "a folder" / "copy"
    verify._link_downloads(copy)
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, verify._environment()[downloads.MIRROR_VARIABLE])
    monkeypatch.setenv("DVC_ROOT", str(copy))
    assert is_small_mnist(sources.load("mnist")[1])
    assert (repository / "data/raw/mnist" / damaged).read_bytes() == b"half a fi"
    assert not (repository / "data/raw/mnist" / missing).exists()


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["exec sleep 60", "trap '' TERM; sleep 60"])
def test_fault_2_what_is_interrupted_ends_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The second ignores SIGTERM."""
    monkeypatch.setattr(verify, "GRACE_SECONDS", 1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            verify._run_as_group(["sh", "-c", f"({stage}) & echo $! > stage; wait"], tmp_path, os.environ)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ends(int((tmp_path / "stage").read_text()))


def ends(process: int) -> bool:
    """Whether it ends within a second; its parent may not have waited for it yet."""
    with suppress(psutil.NoSuchProcess):
        for _ in range(100):
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.01)
        return False
    return True


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git knows or would add, committed in a new repository, with a recipe of seconds."""
    folder = tmp_path / "clone"
    copy_repository(folder)
    write_params(folder, ONE_EPOCH)
    commit(folder)
    return folder


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_fault_2_an_interrupted_build_leaves_no_stage_at_work_and_no_folder(
    clone: Path, tmp_path: Path, sent: str, code: int
) -> None:
    write_params(clone, ONE_EPOCH | {"train.epochs": 500})
    builds = tmp_path / "builds"
    builds.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.verify"],
        cwd=clone,
        env=environment() | {"TMPDIR": str(builds)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(builds.glob("convtrack-*/convtrack-*/first/checkpoints/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert any("pipeline.train" in command for command in commands_in(builds))
    process.send_signal(getattr(signal, sent))
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "interrupted\n" if sent == "SIGINT" else "")
    assert commands_in(builds) == []
    assert list(builds.glob("convtrack-*")) == []


def commands_in(folder: Path) -> list[str]:
    """The processes that are at work in ``folder`` or below it, or that it is named to, by their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            where, command = process.cwd(), " ".join(process.cmdline())
        except psutil.Error:
            continue  # it has ended, or is someone else's
        if Path(where).is_relative_to(folder) or str(folder) in command:
            found.append(command)
    return found
