"""Shared by the tests: prepared digits, workspaces that look like a clone, and a migrated tracking database."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from pipeline import evaluate, prepare, train, visualize
from pipeline.images import splits
from pipeline.network import training
from pipeline.params import with_values
from pipeline.tracking import runs

REPOSITORY = Path(__file__).parents[1]
PARAMS = REPOSITORY / "tests" / "params.yaml"
QUICK = {"data.dataset": "mnist-5k", "train.epochs": 2}
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="runs the network on a CUDA GPU: its results, its bytes and its waiting; PyTorch finds none on this machine",
)
needs_bfloat16 = pytest.mark.skipif(
    not training.has_bfloat16(torch.device("cpu")),
    reason="trains in bfloat16, which params.yaml may not ask for here: this processor has no instructions for it",
)


OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")  # before a command: it may mount, and nobody else sees it


def _can_mount() -> bool:
    small = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(small, capture_output=True, check=False).returncode == 0


needs_own_mounts = pytest.mark.skipif(
    not _can_mount(),
    reason="mounts a small or read-only disk that nobody else sees; this system has no namespaces for that, or lets "
    "nobody but root make them",
)


def write_params(folder: Path, changes: Mapping[str, object]) -> None:
    """The published recipe as ``folder``'s params.yaml, with other values at some dotted paths."""
    (folder / "params.yaml").write_text(with_values(PARAMS.read_text(), changes))


def _forget_settings() -> None:
    """Those from outside, and the one that mlflow.set_tracking_uri leaves in the environment."""
    for name in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE", "DVC_ROOT", "DVC_EXP_NAME", "DVC_STAGE"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    _forget_settings()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _forget_settings()


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db with all its tables: they take 2.5 s to make, so they are made once and copied."""
    # At the top of this file it would be sorted before pipeline.tracking, which sets what mlflow reads at import.
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("database")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml for two epochs on mnist-5k, and the prepared splits."""
    folder = tmp_path_factory.mktemp("prepared")
    write_params(folder, QUICK)
    with chdir(folder):
        prepare.main()
    return folder


@pytest.fixture
def workspace(prepared: Path, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as after `dvc repro prepare`, the current one, with a tracking store of its own."""
    return _enter(tmp_path / "workspace", prepared, migrated_database, monkeypatch)


@pytest.fixture(scope="session")
def _all_stages(prepared: Path, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _forget_settings()
    with pytest.MonkeyPatch.context() as patch:
        folder = _enter(tmp_path_factory.mktemp("all") / "workspace", prepared, migrated_database, patch)
        for stage in (train, evaluate, visualize):
            stage.main()
    _forget_settings()
    return folder


@pytest.fixture
def finished(_all_stages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which all four stages have run, the current one. For reading only: all tests share it."""
    monkeypatch.setenv("DVC_ROOT", str(_all_stages))
    monkeypatch.chdir(_all_stages)
    runs.connect()
    return _all_stages


@pytest.fixture(scope="session")
def good(prepared: Path, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registered model that has seen 3,600 digits twelve times. For reading only."""
    _forget_settings()
    with pytest.MonkeyPatch.context() as patch:
        folder = _enter(tmp_path_factory.mktemp("good") / "workspace", prepared, migrated_database, patch)
        write_params(folder, QUICK | {"train.epochs": 12})
        for stage in (train, evaluate):
            stage.main()
    _forget_settings()
    return folder


@pytest.fixture
def finished_copy(_all_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, migrated_database: Path) -> Path:
    """The outputs of all four stages in a folder of its own, with an empty tracking store: a restored checkout."""
    folder = tmp_path / "copy"
    shutil.copytree(_all_stages, folder, ignore=shutil.ignore_patterns("mlruns", "mlflow.db*"))
    shutil.copy(migrated_database, folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)
    runs.connect()
    return folder


@pytest.fixture(scope="session")
def digits(prepared: Path) -> dict[str, splits.LabelledImages]:
    """The three splits of mnist-5k: 3,600 / 400 / 1,000 digits."""
    dataset = splits.read_dataset(prepared / "data/prepared")
    return {name: splits.read_split(dataset, name, prepared / "data/prepared") for name in splits.SPLITS}


def _enter(folder: Path, prepared: Path, database: Path, patch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, folder)
    shutil.copy(database, folder)
    patch.setenv("DVC_ROOT", str(folder))
    patch.chdir(folder)
    return folder


def run_command(
    name: str, *arguments: str, folder: Path, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`python -m pipeline.<name>` in ``folder`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)} | environment,
        capture_output=True,
        input=stdin,
        timeout=300,
        check=False,
    )


def run_stage(stage: str, folder: Path, **environment: str) -> tuple[int, str]:
    """A stage as a process of its own: exit code and standard error."""
    done = run_command(stage, folder=folder, stdin=b"", **environment)
    return done.returncode, done.stderr.decode()
