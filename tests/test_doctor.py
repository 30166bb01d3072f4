"""`python -m pipeline.doctor`: all is well, or what is wrong and what mends it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import doctor, evaluate, files, train
from pipeline.errors import run_command
from pipeline.network.training import Epoch
from pipeline.tracking import runs
from tests.conftest import REPOSITORY

LINES = (
    "environment",
    "params.yaml",
    "downloads",
    "images",
    "model",
    "dvc.lock",
    "DVC's cache",
    "checkpoints",
    "tracking store",
    "registry",
)


@pytest.fixture
def repository(finished_copy: Path) -> Path:
    """As after `dvc repro`, with a cache and a lock of DVC's."""
    evaluate.main()
    shutil.copy(REPOSITORY / "requirements.lock", finished_copy)
    outs = []
    for path in (files.MODEL, files.PREDICTIONS):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        cached = finished_copy / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        cached.parent.mkdir(parents=True)
        shutil.copy(path, cached)
        outs.append(f"    - path: {path}\n      md5: {md5}\n")
    (finished_copy / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  train:\n    outs:\n{''.join(outs)}")
    return finished_copy


def told(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """What it says of the current folder, and its exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(doctor.main)
    printed = capsys.readouterr()
    assert printed.err == ""
    return int(str(end.value.code)), printed.out.splitlines()


def test_where_all_is_well_it_says_so(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = told(capsys)
    assert code == 0, lines
    assert [line[:22].split("  ")[0] for line in lines] == ["ok"] * len(LINES)
    assert [line[7:22].strip() for line in lines] == list(LINES)
    assert "mnist-5k, 5,000 images" in lines[3]
    assert "2 files of these outputs" in lines[6]
    assert lines[9].endswith("mnist-5k-cnn version 1 is the champion")


def test_before_anything_was_run_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("requirements.lock", "params.yaml", "dvc.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    code, lines = told(capsys)
    assert code == 0, lines
    assert sum("`dvc repro`" in line for line in lines) >= 4
    assert not (tmp_path / "mlflow.db").exists()  # it only looks


def _params(folder: Path) -> None:
    (folder / "params.yaml").write_text("seed: one\n")


def _split(folder: Path) -> None:
    _flip(folder / "data/prepared/train.safetensors")


def _model(folder: Path) -> None:
    _flip(folder / files.MODEL)


def _lock(folder: Path) -> None:
    (folder / "dvc.lock").write_text("stages: {train: [")


def _rwlock(folder: Path) -> None:
    (folder / ".dvc/tmp").mkdir()
    (folder / ".dvc/tmp/rwlock").write_text('{"read')


def _cache(folder: Path) -> None:
    _flip(next((folder / ".dvc/cache/files/md5").rglob("*/*")))


def _checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/a.checkpoint").write_bytes(b"half")


def _undelivered(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/abc.undelivered.json").write_text("{}")


def _download(folder: Path) -> None:
    path = folder / "data/raw/mnist/train-labels-idx1-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>")


def _run(folder: Path) -> None:
    dead = {"process.host": os.uname().nodename, "process": "999999999 since 1"}
    MlflowClient().create_run(runs._experiment_id(), tags=dead)


def _store(folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(b"no database" * 1000)


def _champion(folder: Path) -> None:
    shutil.rmtree(folder / "mlruns")


def _stand_in(folder: Path) -> None:
    path = folder / "data/prepared/dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"requested": "mnist"}))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "line", "remedy"),
    [
        (_params, "params.yaml", "seed is 'one'; allowed: an integer"),
        (_download, "downloads", "data/raw/mnist/train-labels-idx1-ubyte.gz is not the published file: delete it"),
        (_split, "images", "data/prepared/train.safetensors is damaged"),
        (_stand_in, "images", "mnist-5k stands in for mnist: set PIPELINE_DATA_MIRROR or mend the network"),
        (_model, "model", "run `dvc repro -f train`"),
        (_lock, "dvc.lock", "`git checkout dvc.lock`, then `dvc repro`"),
        (_rwlock, "dvc.lock", ".dvc/tmp/rwlock is damaged: delete it"),
        (_cache, "DVC's cache", "is damaged: `rm -f .dvc/cache/files/md5/"),
        (_checkpoint, "checkpoints", "a.checkpoint is damaged"),
        (_undelivered, "tracking store", "abc.undelivered.json is what a run is still to be told: `dvc repro`"),
        (_run, "tracking store", "1 runs are open whose processes have died: `dvc repro` closes them"),
        (_store, "tracking store", "mlflow.db failed: "),
        (_champion, "registry", "cannot be had"),
    ],
)
def test_what_is_wrong_is_named_with_what_mends_it(
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    line: str,
    remedy: str,
) -> None:
    damage(repository)
    code, lines = told(capsys)
    assert code == 1
    wrong = [each for each in lines if each.startswith("WRONG")]
    assert any(each[7:22].strip() == line and remedy in each for each in wrong), lines
    assert all(each[7:22].strip() in LINES for each in lines)


def test_an_interrupted_training_is_told_of(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(run: object, epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.TrainingRun, "log_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    code, lines = told(capsys)
    assert code == 0
    assert lines[7].endswith("1; the last after epoch 1, 0 days ago: `dvc repro` with its knobs goes on")
