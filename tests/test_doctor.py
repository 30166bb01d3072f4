"""`python -m pipeline.doctor`: no problems, or each problem with its remedy."""

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path

import numba
import pytest
from mlflow import MlflowClient

from pipeline import doctor, evaluate, files, train
from pipeline.errors import run_command
from pipeline.model import model_file
from pipeline.model.training import Epoch
from pipeline.tracking import delivery, runs, store
from tests.conftest import REPOSITORY, change_dataset_json, change_training_images
from tests.test_clone import environment, fast, succeed
from tests.tracking.evaluating import change_model

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
DEAD = {"process.host": os.uname().nodename, "process": "999999999 since 1"}  # tags of a run whose process is


@pytest.fixture
def repository(finished_copy: Path) -> Path:
    """As after `dvc repro`, with a cache and a lock of DVC's."""
    evaluate.main()
    run_id = runs.run_of_model(files.sha256(files.MODEL.read_bytes()))
    assert run_id is not None
    runs.log_files(run_id, sorted(files.FIGURES.iterdir()), "figures")
    shutil.copy(REPOSITORY / "requirements.lock", finished_copy)
    md5s = {str(path): _cache_copy(path.read_bytes()) for path in (files.MODEL, files.PREDICTIONS)}
    figures = [
        {"md5": _cache_copy(path.read_bytes()), "relpath": path.name} for path in sorted(files.FIGURES.iterdir())
    ]
    md5s[str(files.FIGURES)] = _cache_copy(json.dumps(figures).encode(), ".dir")
    outs = "".join(f"    - path: {path}\n      md5: {md5}\n" for path, md5 in md5s.items())
    (finished_copy / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  train:\n    outs:\n{outs}")
    return finished_copy


def _cache_copy(content: bytes, suffix: str = "") -> str:
    """Put it into DVC's cache; returns its name there, an MD5."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    files.write(doctor.CACHE / md5[:2] / md5[2:], content)
    return md5


def diagnosis(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Its exit code for the current folder, and the lines that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(doctor.main)
    printed = capsys.readouterr()
    assert printed.err == ""
    return int(str(end.value.code)), printed.out.splitlines()


def test_where_all_is_well_it_says_so(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = diagnosis(capsys)
    assert code == 0, lines
    assert [line[:22].split("  ")[0] for line in lines] == ["ok"] * len(LINES)
    assert [line[7:22].strip() for line in lines] == list(LINES)
    assert "mnist-5k, 5,000 images" in lines[3]
    assert "20 cached files checked" in lines[6]  # 18 of them in a folder
    assert lines[9].endswith("mnist-5k-cnn version 1 is the champion")


def test_before_anything_was_run_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("requirements.lock", "params.yaml", "dvc.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    code, lines = diagnosis(capsys)
    assert code == 0, lines
    assert sum("`dvc repro`" in line for line in lines) >= 4
    assert not (tmp_path / "mlflow.db").exists()  # it only looks


def test_a_cache_of_compiled_loops_that_cannot_be_used_is_a_problem(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(repository / "params.yaml"))
    code, lines = diagnosis(capsys)
    assert code == 1
    (wrong,) = [line for line in lines if line.startswith("WRONG")]
    assert "environment    compiled loops cannot be cached" in wrong
    assert wrong.endswith("set NUMBA_CACHE_DIR to a folder that you can write")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_database_is_neither_made_nor_filled(
    repository: Path,
    tmp_path: Path,
    migrated_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_there: bool,
) -> None:
    database = tmp_path / "elsewhere" / "mlflow.db"
    database.parent.mkdir()
    if is_there:
        shutil.copy(migrated_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    code, lines = diagnosis(capsys)
    assert code == 1, lines
    assert "none yet: `dvc repro`, or `dvc repro -f -s evaluate` if that has nothing to do" in lines[8]
    line = "the store lacks any version of models/model.safetensors, which DVC finds up to date: `dvc repro -f -s"
    assert line in lines[9]
    assert list(database.parent.iterdir()) == [database] * is_there
    assert not is_there or database.read_bytes() == migrated_database.read_bytes()


def _params(folder: Path) -> None:
    (folder / "params.yaml").write_text("seed: one\n")


def _split(folder: Path) -> None:
    _flip(folder / "data/prepared/train.safetensors")


def _model(folder: Path) -> None:
    _flip(folder / files.MODEL)


def _lock(folder: Path) -> None:
    (folder / "dvc.lock").write_text("stages: {train: [")


def _other_params_noted(folder: Path) -> None:
    with (folder / "dvc.lock").open("a") as lock:
        lock.write("    params: {params.yaml: {model: {dropout: 0.1, pool: max}, seed: 0}}\n")


def _other_data_noted(folder: Path) -> None:
    change_training_images()
    md5 = hashlib.md5((files.PREPARED / "dataset.json").read_bytes()).hexdigest()
    with (folder / "dvc.lock").open("a") as lock:
        lock.write(f"    deps: [{{path: data/prepared/dataset.json, md5: {md5}}}]\n")


def _rwlock(folder: Path) -> None:
    (folder / ".dvc/tmp").mkdir()
    (folder / ".dvc/tmp/rwlock").write_text('{"read')


def _cache(folder: Path) -> None:
    _flip(_copy_of(files.MODEL))


def _copy_of(path: Path) -> Path:
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return doctor.CACHE / md5[:2] / md5[2:]


def _checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/a.checkpoint").write_bytes(b"half")


def _undelivered(folder: Path) -> None:
    run_id = MlflowClient().create_run(store.experiment_id(), tags=DEAD).info.run_id
    updates = delivery.PendingUpdates(run_id, {1: {"loss": 0.5}}, {1: 1}, status="FINISHED", ended=2)
    files.write_json(folder / f"checkpoints/{run_id}.undelivered.json", asdict(updates))


def _damaged_updates(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/abc.undelivered.json").write_text("{}")


def _folder_for_a_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def _no_model_but_a_folder(folder: Path) -> None:
    _folder_for_a_file(folder / files.MODEL)


def _no_split_but_a_folder(folder: Path) -> None:
    _folder_for_a_file(folder / "data/prepared/train.safetensors")


def _no_updates_but_a_folder(folder: Path) -> None:
    _folder_for_a_file(folder / "checkpoints/abc.undelivered.json")


def _no_checkpoint_but_a_folder(folder: Path) -> None:
    _folder_for_a_file(folder / "checkpoints/a.checkpoint")


def _cached_figure(folder: Path) -> None:
    _flip(_copy_of(files.FIGURES / "reliability.png"))


def _cached_listing(folder: Path) -> None:
    _flip(next(doctor.CACHE.rglob("*.dir")))


def _download(folder: Path) -> None:
    path = folder / "data/raw/mnist/train-labels-idx1-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>")


def _run(folder: Path) -> None:
    MlflowClient().create_run(store.experiment_id(), tags=DEAD)


def _store(folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(b"no database" * 1000)


def _page_of_the_store(folder: Path) -> None:
    """One that no query of this project reads, so that only SQLite's own check finds it."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        of_metrics = "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'latest_metrics'"
        (page,) = database.execute(of_metrics).fetchone()
    with (folder / "mlflow.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))


def _champion(folder: Path) -> None:
    shutil.rmtree(folder / "mlruns")


def _changed_champion(folder: Path) -> None:
    (kept,) = (folder / "mlruns/models").glob("*/artifacts/extra_files/model.safetensors")
    _flip(kept)


def _no_version(folder: Path) -> None:
    """As in a new store, where `dvc repro -f` was killed before it had registered the model."""
    MlflowClient().delete_registered_model("mnist-5k-cnn")


def _some_figures(folder: Path) -> None:
    for path in sorted((folder / "mlruns").rglob("figures/*.png"))[3:]:
        path.unlink()


def _no_champion(folder: Path) -> None:
    MlflowClient().delete_registered_model_alias("mnist-5k-cnn", "champion")


def _another_model_here(folder: Path) -> None:
    """Its evaluation would not repair the champion, and there is another version."""
    change_model(model_file.from_bytes(files.MODEL.read_bytes()), seed=3, noise=3)
    evaluate.main()
    content = (folder / "mlruns/models").glob("*/artifacts/extra_files/model.safetensors")
    for kept in content:
        if kept.read_bytes() != files.MODEL.read_bytes():
            _flip(kept)


def _stand_in(folder: Path) -> None:
    with chdir(folder):
        change_dataset_json(requested="mnist")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "line", "remedy"),
    [
        (_params, "params.yaml", "seed is 'one': input should be a valid integer"),
        (_download, "downloads", "data/raw/mnist/train-labels-idx1-ubyte.gz is not the published file: delete it"),
        (_split, "images", "data/prepared/train.safetensors is damaged"),
        (_stand_in, "images", "mnist-5k, standing in for mnist: set PIPELINE_DATA_MIRROR or fix the connection"),
        (_model, "model", "run `dvc repro -f train`"),
        (_lock, "dvc.lock", "`python -m pipeline.recover`, then `dvc repro`"),
        (_other_params_noted, "dvc.lock", "than that file (model.dropout was 0.5, here it is 0.1): `dvc repro -f"),
        (_other_data_noted, "dvc.lock", "than that file (data/prepared has changed): `dvc repro -f train`, then"),
        (_rwlock, "dvc.lock", ".dvc/tmp/rwlock is damaged: delete it"),
        (_cache, "DVC's cache", "is damaged: `rm -rf .dvc/cache/files/md5/"),
        (
            _cached_figure,
            "DVC's cache",
            ", the copy of reports/figures/reliability.png, is damaged: `rm -rf .dvc/cache",
        ),
        (_cached_listing, "DVC's cache", ".dir, the copy of reports/figures, is damaged: `rm -rf .dvc/cache"),
        (_checkpoint, "checkpoints", "a.checkpoint is damaged"),
        (
            _damaged_updates,
            "tracking store",
            "abc.undelivered.json is damaged",
        ),
        (
            _undelivered,
            "tracking store",
            ".undelivered.json has updates that MLflow has not received: `dvc repro`",
        ),
        (_run, "tracking store", "1 run left open by processes that have died; to close: `dvc repro`"),
        (_store, "tracking store", "mlflow.db failed: "),
        (_page_of_the_store, "tracking store", "mlflow.db is damaged ("),
        (_champion, "registry", "cannot be read"),
        (_changed_champion, "registry", "(another SHA-256): `dvc repro -f -s evaluate`"),
        (_another_model_here, "registry", "(another SHA-256): `python -m pipeline.models 2 --rollback`"),
        (
            _no_version,
            "registry",
            "the store lacks any version of models/model.safetensors, which DVC finds up to date",
        ),
        (_some_figures, "registry", "the store lacks 15 of 18 figures of models/model.safetensors, which DVC finds up"),
        (_no_champion, "registry", "no version champion; it has: 1: `python -m pipeline.models 1 --rollback`"),
        (_no_model_but_a_folder, "model", "models/model.safetensors cannot be read (Is a directory): check the file"),
        (_no_split_but_a_folder, "images", "data/prepared/train.safetensors cannot be read (Is a directory)"),
        (_no_updates_but_a_folder, "tracking store", "abc.undelivered.json cannot be read (Is a directory)"),
        (_no_checkpoint_but_a_folder, "checkpoints", "a.checkpoint cannot be read (Is a directory)"),
    ],
)
def test_each_problem_is_reported_with_its_remedy(
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    line: str,
    remedy: str,
) -> None:
    damage(repository)
    code, lines = diagnosis(capsys)
    assert code == 1
    wrong = [each for each in lines if each.startswith("WRONG")]
    assert any(each[7:22].strip() == line and remedy in each for each in wrong), lines
    assert {each[7:22].strip() for each in lines} == set(LINES)  # the others are looked at all the same


@pytest.fixture
def under_dvc(repository: Path) -> Path:
    """In a repository of DVC's own, which finds all up to date."""
    (repository / "data/own").mkdir(exist_ok=True)
    shutil.copytree(REPOSITORY / "pipeline", repository / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvc/config"):
        shutil.copy(REPOSITORY / name, repository / name)
    (repository / "dvc.lock").unlink()
    succeed("git", "init", "-q", folder=repository)
    succeed("dvc", "commit", "-f", folder=repository)
    assert "Data and pipelines are up to date." in succeed("dvc", "repro", folder=repository)
    return repository


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_cached_figure, "DVC's cache"),
        (_cached_listing, "DVC's cache"),
        (_undelivered, "tracking store"),
        (_run, "tracking store"),
        (_champion, "registry"),
        (_changed_champion, "registry"),
        (_another_model_here, "registry"),
        (_no_champion, "registry"),
        (_no_version, "registry"),
    ],
)
def test_the_suggested_commands_fix_the_problem(
    under_dvc: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], line: str
) -> None:
    """The commands that it prints, as a person would type them, and then it finds nothing."""
    damage(under_dvc)
    code, lines = diagnosis(capsys)
    wrong = [each for each in lines if each.startswith("WRONG")]
    assert code == 1
    assert line in {each[7:22].strip() for each in wrong}
    for command in [each for problem in wrong for each in re.findall("`([^`]+)`", problem)]:
        if command != "dvc pull":  # the other way, for who has a remote storage
            succeed("bash", "-c", command, folder=under_dvc, more=fast())
    code, lines = diagnosis(capsys)
    assert code == 0, lines


def _killed_in_a_new_store(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    shutil.rmtree(folder / "mlruns")
    with subprocess.Popen(
        ["dvc", "repro", "-f", "-s", "evaluate"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as evaluating:
        assert evaluating.stdout is not None
        assert any(line.startswith("logging the model") for line in evaluating.stdout)
        os.killpg(evaluating.pid, signal.SIGKILL)


def make_repro(folder: Path) -> str:
    """What it prints, in this environment, whatever the date of its lock file."""
    makefile = ["--file", str(REPOSITORY / "Makefile"), "--old-file", f"{sys.prefix}/.installed"]
    return succeed("make", *makefile, "repro", f"VENV={sys.prefix}", folder=folder)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("damage", [_killed_in_a_new_store, _some_figures])
def test_fault_47_make_repro_logs_what_the_store_lacks_though_dvc_finds_it_up_to_date(
    under_dvc: Path, damage: Callable[[Path], None]
) -> None:
    lock = (under_dvc / "dvc.lock").read_bytes()
    damage(under_dvc)
    printed = make_repro(under_dvc)
    assert printed.index("Data and pipelines are up to date.") < printed.index("Running stage 'evaluate'")
    assert "Running stage 'visualize'" in printed
    assert printed.count("\ntest loss  ") == 2
    assert (under_dvc / "dvc.lock").read_bytes() == lock
    assert "Running stage" not in make_repro(under_dvc)
    succeed(sys.executable, "-m", "pipeline.doctor", folder=under_dvc)  # this process has the first store open


def test_an_interrupted_training_is_reported(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(run: object, epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.TrainingRun, "log_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    code, lines = diagnosis(capsys)
    assert code == 0
    assert lines[7].endswith("1 interrupted, the last 0 days ago: `dvc repro` with the same parameters continues it")
