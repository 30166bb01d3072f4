"""Trainings that are killed and continued: real processes, real signals, the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import numba
import pytest
import torch
from mlflow.entities import Run

from pipeline import checkpoints, files, train
from pipeline.data.splits import read_dataset
from pipeline.model.training import Epoch
from pipeline.params import read_params
from pipeline.tracking import runs, store
from tests import forked
from tests.conftest import OWN_MOUNTS, QUICK, REPOSITORY, needs_namespaces, run_command, write_params

EPOCHS = 12
LONG = QUICK | {"model.filters": [16, 32], "train.epochs": EPOCHS}


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The stage `train`, as DVC starts it."""
    return forked.Popen(
        [sys.executable, "-m", "pipeline.train"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder), "DVC_STAGE": "train"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def after_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"epoch {epoch:>2}/"):
            return
    raise AssertionError(process.communicate())


def every_run() -> list[Run]:
    store.connect()
    return list(mlflow.search_runs(output_format="list", order_by=["attributes.start_time"]))


def outputs() -> tuple[bytes, bytes]:
    return files.MODEL.read_bytes(), files.HISTORY.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What a training gives that nobody disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_params(folder, LONG)
    (folder / "data").symlink_to(prepared / "data")
    done = run_command("train", folder=folder)
    assert done.returncode == 0, done.stderr
    return (folder / files.MODEL).read_bytes(), (folder / files.HISTORY).read_bytes()


@pytest.mark.usefixtures("either_store")
@pytest.mark.faults
@pytest.mark.parametrize(
    ("by", "status", "code"),
    [
        ("SIGKILL", "FAILED", -9),
        pytest.param("SIGINT", "KILLED", 130, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "KILLED", 143, marks=pytest.mark.slow),
    ],
)
def test_fault_1_and_2_a_resumed_training_gives_the_same_bytes(
    workspace: Path, uninterrupted: tuple[bytes, bytes], by: str, status: str, code: int
) -> None:
    write_params(workspace, LONG)
    with start(workspace) as process:
        after_epoch(process, 5)
        process.send_signal(getattr(signal, by))
        _, errors = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not files.MODEL.exists()
    with start(workspace) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "resuming an interrupted training after epoch" in out
    assert "epoch  3/12" not in out
    assert outputs() == uninterrupted
    first, second = every_run()
    assert (first.info.status, second.info.status) == (status, "FINISHED")
    assert first.data.tags["continued.by"] == second.info.run_id
    assert second.data.tags["continues"] == first.info.run_id
    if by == "SIGKILL":
        assert first.data.tags["failure"] == "its process was killed, or its machine went down"
    points = mlflow.MlflowClient().get_metric_history(second.info.run_id, "train_loss")
    assert [point.step for point in points] == list(range(1, EPOCHS + 1))
    assert not list(files.checkpoints_folder().iterdir())


@pytest.mark.slow
@pytest.mark.faults
def test_fault_1_whenever_it_is_killed(workspace: Path, uninterrupted: tuple[bytes, bytes]) -> None:
    """Twenty times, at any moment, and each time a little after it has resumed."""
    write_params(workspace, LONG | {"train.checkpoint_seconds": 0.05})
    generator = random.Random(0)
    kills = 0
    while kills < 20:
        with start(workspace) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if line.startswith("total"))  # the libraries are there
            time.sleep(generator.uniform(0, 1.5))
            process.kill()
            process.communicate()
        if process.returncode == 0:  # it has come to its end: from the beginning
            assert outputs() == uninterrupted
            files.MODEL.unlink()
        kills += process.returncode == -signal.SIGKILL
    with start(workspace) as process:
        process.communicate()
    assert outputs() == uninterrupted
    assert "RUNNING" not in {run.info.status for run in every_run()}


def _stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the training off in this process."""
    taken: list[Epoch] = []
    whole = runs.TrainingRun.log_epoch

    def log_epoch(run: runs.TrainingRun, epoch: Epoch) -> None:
        taken.append(epoch)
        if len(taken) > epochs:
            raise KeyboardInterrupt
        whole(run, epoch)

    monkeypatch.setattr(runs.TrainingRun, "log_epoch", log_epoch)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    monkeypatch.setattr(runs.TrainingRun, "log_epoch", whole)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        pytest.param(lambda path: path.write_bytes(b""), marks=pytest.mark.slow),
        pytest.param(lambda path: path.write_bytes(b"x" * 999), marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_training_starts_from_the_beginning(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
) -> None:
    write_params(workspace, QUICK | {"train.epochs": 3})
    _stop_after(2, monkeypatch)
    (path,) = files.checkpoints_folder().iterdir()
    damage(path)
    train.main()
    printed = capsys.readouterr()
    assert f"warning: {path} is damaged (" in printed.err
    assert "interrupted training after epoch" not in printed.out
    assert every_run()[-1].info.status == "FINISHED"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"model.dropout": 0.4}, {"train.epochs": 4})),
        pytest.param({"train.threads": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_training_with_other_parameters_never_continues_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, object]
) -> None:
    values = QUICK | {"train.epochs": 3, "train.threads": 2}
    write_params(workspace, values)
    _stop_after(2, monkeypatch)
    capsys.readouterr()
    write_params(workspace, values | changed)
    train.main()
    assert "interrupted training after epoch" not in capsys.readouterr().out
    write_params(workspace, values)
    train.main()
    assert "interrupted training after epoch 2 of 3" in capsys.readouterr().out


def test_a_parameter_that_does_not_change_the_model_continues_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = QUICK | {"train.epochs": 3}
    write_params(workspace, values)
    _stop_after(2, monkeypatch)
    write_params(workspace, values | {"train.checkpoint_seconds": None, "evaluate.calibration_bins": 5})
    train.main()
    assert "interrupted training after epoch 2 of 3" in capsys.readouterr().out


@pytest.mark.faults
def test_fault_41_other_machine_code_does_not_continue_a_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint() -> str:
        return checkpoints.fingerprint(read_params(), read_dataset(), torch.device("cpu"))

    before = fingerprint()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("changed", "is_of_training"),
    [("pipeline/model/cnn.py", True), ("pipeline/explain/report.py", False), ("pipeline/tracking/runs.py", False)],
)
def test_a_checkpoint_and_a_run_belong_to_the_code_that_dvc_trains_with(
    workspace: Path, tmp_path: Path, changed: str, is_of_training: bool
) -> None:
    """In a copy of the code: what a command there says after a file has changed."""
    code = tmp_path / "code"
    shutil.copytree(REPOSITORY / "pipeline", code / "pipeline")
    shutil.copy(REPOSITORY / "dvc.yaml", code)

    def says() -> tuple[str, dict[str, str]]:
        done = subprocess.run(
            [sys.executable, "-c", SAY_THE_CODE],
            cwd=workspace,
            env=os.environ | {"PYTHONPATH": str(code)},
            capture_output=True,
            text=True,
            check=True,
        )
        fingerprint, tag = done.stdout.splitlines()
        return fingerprint, json.loads(tag)

    before, tag_before = says()
    with (code / changed).open("a") as file:
        file.write("# a comment\n")
    after, tag = says()
    assert (after != before) == is_of_training
    assert {path for path in tag if tag[path] != tag_before[path]} == ({changed} if is_of_training else set())


SAY_THE_CODE = """
import torch
from pipeline import checkpoints
from pipeline.data.splits import read_dataset
from pipeline.params import read_params
from pipeline.tracking import lineage
print(checkpoints.fingerprint(read_params(), read_dataset(), torch.device("cpu")))
print(lineage.code())
"""


@pytest.mark.usefixtures("either_store")
def test_a_training_that_dvc_did_not_record_is_not_repeated(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    train.main()
    first = outputs()
    train.main()  # DVC was killed, and has no dvc.lock with this model
    assert "was trained by the MLflow run" in capsys.readouterr().out
    assert len(every_run()) == 1
    assert outputs() == first
    write_params(workspace, QUICK | {"seed": 1})
    train.main()  # of other values
    assert len(every_run()) == 2
    write_params(workspace, QUICK)
    files.write(files.MODEL, first[0])
    noted = {"outs": [{"path": str(files.MODEL), "md5": _md5(first[0])}]}
    (workspace / "dvc.lock").write_text(json.dumps({"stages": {"train": noted}}))
    train.main()  # DVC knows this model, so somebody wants it trained again: `dvc repro --force`
    assert [run.info.status for run in every_run()] == ["FINISHED"] * 3


def _md5(content: bytes) -> str:
    done = subprocess.run(["md5sum"], input=content, capture_output=True, check=True)
    return done.stdout.split()[0].decode()


def test_checkpoints_that_nobody_continues_are_removed_after_a_month(workspace: Path) -> None:
    folder = files.checkpoints_folder()
    folder.mkdir()
    for name, days in (("old", 31), ("young", 29)):
        path = folder / f"{name}.checkpoint"
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
    train.main()
    assert [path.name for path in folder.iterdir()] == ["young.checkpoint"]


@pytest.mark.faults
@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["models", "reports", "checkpoints"])
def test_fault_4_unwritable_outputs_are_reported_before_training(workspace: Path, folder: str) -> None:
    """A read-only disk in the folder's place, in a mount of the process's own."""
    (workspace / folder).mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o ro tmpfs {folder} && exec {sys.executable} -m pipeline.train"
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", mount],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert folder in done.stderr
    assert done.stderr.endswith("cannot be written (Read-only file system): make the folder writable, then run again\n")
    assert "epoch 1" not in done.stdout
    assert every_run() == []
