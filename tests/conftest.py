"""Shared by the tests: prepared digits, workspaces that look like a clone, and a migrated tracking database."""

import copy
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from bench import recipes
from pipeline import evaluate, files, prepare, train, visualize
from pipeline.data import splits
from pipeline.model import model_file, training
from pipeline.model.cnn import CNN
from pipeline.tracking import store
from tests import forked

REPOSITORY = Path(__file__).parents[1]
QUICK = {
    "data.dataset": "mnist-5k",
    "train.epochs": 2,
    "visualize.maximisation.steps": 3,
    "visualize.occlusion_side": 24,
}
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="runs the network on a CUDA GPU: its results, its bytes and its waiting; PyTorch finds none on this machine",
)
needs_bfloat16 = pytest.mark.skipif(
    not training.has_bfloat16(torch.device("cpu")),
    reason="trains in bfloat16, which params.yaml may not ask for here: this processor has no instructions for it",
)


OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")  # before a command: it may mount, and nobody else sees it


CONTAINER = (*OWN_MOUNTS, "--pid", "--fork", "--mount-proc")  # the same, and it is number 1 and sees no other process


def _has_namespaces() -> bool:
    small = [*CONTAINER, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(small, capture_output=True, check=False).returncode == 0


# A disk cannot be full or read-only on demand without mounting one, and processes that do not see each other are in two
# containers. Some systems (macOS, containers without these rights) have neither for a single process. The limits,
# permissions and rules that every system has are tested everywhere beside it. CI is not let through without (.ci/run).
needs_namespaces = pytest.mark.skipif(
    not _has_namespaces(),
    reason="sets off a full or a read-only disk, or a second container, for the test's own process alone; this system "
    "has no namespaces of mounts and processes, or does not let this user make one: on Linux, run the tests as root",
)


def write_params(folder: Path, changes: Mapping[str, object]) -> None:
    """A params.yaml with the defaults, except for some values by their dotted paths."""
    (folder / "params.yaml").write_text(recipes.as_yaml(changes))


def change_dataset_json(**facts: Any) -> None:
    """Change facts in the current folder's dataset.json."""
    splits.write_dataset(replace(splits.read_dataset(), **facts))


def change_training_images() -> None:
    """Change the digest of the training images in dataset.json."""
    of_each = splits.read_dataset().splits
    change_dataset_json(splits=of_each | {splits.TRAIN: replace(of_each[splits.TRAIN], sha256="0" * 64)})


# A shell starts what is to run in the background with SIGINT ignored, and `nohup` with SIGHUP; what that starts
# inherits it. The tests send both to commands that were not started so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all processes of a test run read; the first that needs it makes it, and others wait for that."""
    shared = factory.getbasetemp()
    if shared.name.startswith("popen-"):  # the folder of one of several processes, in that of the test run
        shared = shared.parent
    made = shared / f"{name}.made"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            (shared / name).mkdir()
            make(shared / name)
            made.touch()
    return shared / name


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db with all its tables: they take 2.5 s to make, so they are made once and copied."""
    # At the top of this file it would be sorted before pipeline.tracking, which sets what mlflow reads at import.
    from mlflow import MlflowClient

    def make(folder: Path) -> None:
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return _made_once(tmp_path_factory, "database", make) / "mlflow.db"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml for two epochs on mnist-5k, and the prepared splits."""

    def make(folder: Path) -> None:
        write_params(folder, QUICK)
        with chdir(folder):
            prepare.main()

    return _made_once(tmp_path_factory, "prepared", make)


@pytest.fixture
def workspace(prepared: Path, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as after `dvc repro prepare`, the current one, with a tracking store of its own."""
    return _enter(tmp_path / "workspace", prepared, migrated_database, monkeypatch)


@pytest.fixture(scope="session")
def _all_stages(prepared: Path, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            _enter(folder, prepared, migrated_database, patch)
            for stage in (train, evaluate, visualize):
                stage.main()

    _forget_settings()
    folder = _made_once(tmp_path_factory, "all", make)
    _forget_settings()
    return folder


@pytest.fixture
def finished(_all_stages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which all four stages have run, the current one. For reading only: all tests share it."""
    monkeypatch.setenv("DVC_ROOT", str(_all_stages))
    monkeypatch.chdir(_all_stages)
    store.connect()
    return _all_stages


@pytest.fixture(scope="session")
def good(prepared: Path, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registered model that has seen 3,644 digits twelve times. For reading only."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            _enter(folder, prepared, migrated_database, patch)
            write_params(folder, QUICK | {"train.epochs": 12})
            for stage in (train, evaluate):
                stage.main()

    _forget_settings()
    folder = _made_once(tmp_path_factory, "good", make)
    _forget_settings()
    return folder


@pytest.fixture(scope="session")
def _learned(good: Path) -> CNN:
    return model_file.from_bytes((good / files.MODEL).read_bytes()).cnn.eval()


@pytest.fixture
def learned(_learned: CNN) -> CNN:
    """A network of its own that has seen 3,644 digits twelve times."""
    return copy.deepcopy(_learned)


@pytest.fixture
def finished_copy(_all_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, migrated_database: Path) -> Path:
    """The outputs of all four stages in a folder of its own, with an empty tracking store: a restored checkout."""
    folder = tmp_path / "copy"
    shutil.copytree(_all_stages, folder, ignore=shutil.ignore_patterns("mlruns", "mlflow.db*"))
    shutil.copy(migrated_database, folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)
    store.connect()
    return folder


@pytest.fixture(scope="session")
def digits(prepared: Path) -> dict[str, splits.LabelledImages]:
    """The three splits of mnist-5k: 3,644 / 411 / 945 digits."""
    dataset = splits.read_dataset(prepared / "data/prepared")
    return {name: splits.read_split(dataset, name, prepared / "data/prepared") for name in splits.SPLITS}


def _enter(folder: Path, prepared: Path, database: Path, patch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    shutil.copy(database, folder)
    patch.setenv("DVC_ROOT", str(folder))
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # of a store that was connected to before this one
    patch.chdir(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def tracking_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """MLflow's own, with a database of its own, at a free port: its address and its process."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    command = ["server", "--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command],
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # else it starts seven more processes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def make_ui(folder: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """`make ui` over the store of ``folder``, as the README has it: the port at which MLflow's page answers."""
    port = free_port()
    # This environment is installed already, whatever its lock file's date.
    makefile = ["--file", str(REPOSITORY / "Makefile"), "--old-file", f"{sys.prefix}/.installed"]
    command = ["make", *makefile, "ui", f"VENV={sys.prefix}", f"ARGS=--port {port}"]
    with tempfile.TemporaryFile() as said:
        page = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                with suppress(requests.RequestException):
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                        break
                time.sleep(0.1)
            else:
                said.seek(0)
                pytest.fail(f"`make ui` does not answer: {said.read().decode()}")
            yield port
        finally:
            os.killpg(page.pid, signal.SIGTERM)
            page.wait(timeout=60)


@pytest.fixture(params=["file", pytest.param("server", marks=pytest.mark.slow)])
def either_store(
    request: pytest.FixtureRequest, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The workspace's own tracking database, and once more a server that has one."""
    if request.param == "file":
        yield
        return
    with tracking_server(tmp_path / "server") as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield


def run_command(
    name: str, *arguments: str, folder: Path, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`python -m pipeline.<name>` in ``folder`` as a process of its own."""
    return forked.run(name, arguments, folder, stdin, os.environ | {"DVC_ROOT": str(folder)} | environment, seconds=300)


def run_stage(stage: str, folder: Path, **environment: str) -> tuple[int, str]:
    """A stage as a process of its own: exit code and standard error."""
    done = run_command(stage, folder=folder, stdin=b"", **environment)
    return done.returncode, done.stderr.decode()
