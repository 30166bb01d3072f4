"""What goes wrong in real use, set off for real. The numbers are those of the list of faults that the project keeps."""

import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline import evaluate, files, train
from pipeline.errors import Fault
from pipeline.tracking import delivery, runs
from tests.conftest import QUICK, REPOSITORY, run_stage, write_params

pytestmark = pytest.mark.faults
EPOCHS = 8


def every_run() -> list[Run]:
    runs.connect()
    return list(mlflow.search_runs(output_format="list", order_by=["attributes.start_time"]))


def start(folder: Path, code: str = "", **environment: str) -> subprocess.Popen[str]:
    """The stage `train`, after ``code``, as a process of its own."""
    program = f"{code}\nfrom pipeline import train\nfrom pipeline.errors import run_command\nrun_command(train.main)"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def after_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    assert any(line.startswith(f"epoch {epoch}/") for line in process.stdout), process.communicate()


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """MLflow's own, with a database of its own, at a free port: its address and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    command = ["server", "--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command],
        cwd=folder,
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


@pytest.mark.slow
def test_fault_3_a_full_disk_leaves_the_older_model_and_the_next_training_goes_on(workspace: Path) -> None:
    write_params(workspace, QUICK)
    train.main()
    older = files.MODEL.read_bytes()
    write_params(workspace, QUICK | {"train.epochs": EPOCHS, "seed": 1})
    limit = (
        "import resource, signal; from pipeline import files; whole = files.write\n"
        "def write(path, content):\n"
        "    if path == files.MODEL: signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    whole(path, content)\n"
        "files.write = write"
    )
    with start(workspace, limit) as process:
        _, told = process.communicate()
    assert process.returncode == 1
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: models/model.safetensors cannot be written (File too large): make room on that disk, then run again"
    ]
    assert files.MODEL.read_bytes() == older
    assert [path.name for path in files.MODEL.parent.iterdir()] == ["model.safetensors"]
    with start(workspace) as process:
        out, told = process.communicate()
    assert process.returncode == 0, told
    assert f"goes on after epoch {EPOCHS} of {EPOCHS}" in out
    assert "RUNNING" not in {run.info.status for run in every_run()}


def test_fault_5_out_of_memory_is_a_failed_run_and_one_line(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.batch_size": 3600, "model.filters": [1024, 1024], "train.threads": 1})
    limit = (
        "import resource, psutil; from pipeline import recipe; whole = recipe.fit\n"
        "def fit(*arguments):\n"
        "    most = psutil.Process().memory_info().vms + 20_000_000\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "    return whole(*arguments)\n"
        "recipe.fit = fit"
    )
    with start(workspace, limit) as process:
        _, told = process.communicate(timeout=200)
    assert process.returncode == 1, told
    assert told.splitlines()[-1].startswith("error: there is not enough memory")
    assert "Traceback" not in told
    assert [run.info.status for run in every_run()] == ["FAILED"]


@pytest.mark.slow
def test_fault_7_a_bit_that_flips_in_a_file_is_noticed_by_whoever_reads_it(finished_copy: Path) -> None:
    for path, remedy in (
        (files.PREPARED / "test.safetensors", "dvc repro -f prepare"),
        (files.MODEL, "dvc repro -f train"),
    ):
        content = bytearray(path.read_bytes())
        content[-100] ^= 16
        path.chmod(0o644)
        path.write_bytes(content)
        path.chmod(0o444)
        code, line = run_stage("evaluate", finished_copy)
        assert code == 1
        assert line.startswith(f"error: {path} is damaged (")
        assert remedy in line
        assert line.count("\n") == 1
        content[-100] ^= 16
        path.chmod(0o644)
        path.write_bytes(content)
    assert run_stage("evaluate", finished_copy)[0] == 0


@pytest.mark.slow
def test_fault_8_odd_paths_and_surroundings(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner ü\u6f22"
    shutil.copytree(workspace, folder)
    (tmp_path / "link").symlink_to(folder)
    code = "import os; os.umask(0o077)"
    with start(tmp_path / "link", code, LC_ALL="C") as process:
        out, told = process.communicate()
    assert process.returncode == 0, told
    assert "epoch 2/2" in out
    assert run_stage("evaluate", tmp_path / "link", LC_ALL="C") == (0, "")


LOGGING = """
import sys
from pipeline.tracking import runs
import mlflow
from mlflow import MlflowClient
runs.connect()
client = MlflowClient()
for number in range(5):
    run = client.create_run(runs._experiment_id())
    for step in range(20):
        client.log_metric(run.info.run_id, "value", step, step=step)
    client.set_terminated(run.info.run_id)
"""


@pytest.mark.slow
def test_fault_9_and_10_eight_processes_begin_at_once_in_an_empty_store_and_the_page_asks(workspace: Path) -> None:
    for path in workspace.glob("mlflow.db*"):
        path.unlink()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)}
    command = [sys.executable, "-c", LOGGING]
    workers = [
        subprocess.Popen(command, cwd=workspace, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(8)
    ]
    while any(worker.poll() is None for worker in workers):
        if (workspace / "mlflow.db").exists():
            with sqlite3.connect(f"file:{workspace / 'mlflow.db'}?mode=ro", uri=True, timeout=20) as store:
                store.execute("select name from sqlite_master").fetchall()
        time.sleep(0.2)
    for worker in workers:
        _, told = worker.communicate()
        assert worker.returncode == 0, told
        assert "locked" not in told
    found = every_run()
    assert len(found) == 40
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(workspace / "mlflow.db") as store:
        assert store.execute("select count(*) from metrics where key = 'value'").fetchone() == (800,)


@pytest.mark.slow
def test_fault_11_a_store_that_is_locked_for_half_a_minute_costs_no_training(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": EPOCHS})
    with start(workspace) as process:
        after_epoch(process, 2)
        with sqlite3.connect(workspace / "mlflow.db", isolation_level=None) as store:
            store.execute("begin exclusive")
            started = time.monotonic()
            _, told = process.communicate()
            store.execute("rollback")
    assert process.returncode == 0, told
    assert time.monotonic() - started < 30
    warning = told.splitlines()[-1]
    assert warning.startswith("warning: the tracking store failed (")
    assert files.MODEL.exists()
    assert len(delivery.undelivered()) == 1
    evaluate.main()
    (run,) = every_run()
    assert run.info.status == "FINISHED"
    points = MlflowClient().get_metric_history(run.info.run_id, "seconds")
    assert [point.step for point in points] == list(range(1, EPOCHS + 1))


@pytest.mark.slow
def test_fault_11_a_damaged_store_is_one_line_and_is_not_made_anew(finished_copy: Path) -> None:
    damaged = b"no database at all " * 1000
    (finished_copy / "mlflow.db").write_bytes(damaged)
    for stage in ("train", "evaluate", "visualize"):
        code, line = run_stage(stage, finished_copy)
        assert (code, line.count("\n")) == (1, 1), line
        assert "mlflow.db failed: " in line
        assert "not a database" in line
    assert (finished_copy / "mlflow.db").read_bytes() == damaged


def _stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGSTOP)


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [_stop, _kill])
def test_fault_13_a_server_that_goes_away_in_mid_training_is_told_the_rest_later(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[subprocess.Popen[bytes]], None],
) -> None:
    write_params(workspace, QUICK | {"train.epochs": EPOCHS})
    with server(tmp_path / "server") as (address, process):
        with start(workspace, MLFLOW_TRACKING_URI=address) as training:
            after_epoch(training, 2)
            harm(process)
            started = time.monotonic()
            _, told = training.communicate()
        assert training.returncode == 0, told
        assert time.monotonic() - started < 40
        assert told.splitlines()[-1].startswith("warning: the tracking store failed (")
        assert files.MODEL.exists()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        if harm is _kill:
            with pytest.raises(Fault, match=f"the tracking store {address} failed: "):
                evaluate.main()  # and that is still not the end of it
    with server(tmp_path / "server") as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        evaluate.main()
        (run,) = every_run()
        assert run.info.status == "FINISHED"
        assert run.data.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
        points = MlflowClient().get_metric_history(run.info.run_id, "train_loss")
        assert [point.step for point in points] == list(range(1, EPOCHS + 1))
        assert "test_accuracy" in run.data.metrics
    assert delivery.undelivered() == []


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "visualize"])
def test_fault_30_a_password_is_in_no_line(finished_copy: Path, stage: str) -> None:
    code, line = run_stage(stage, finished_copy, MLFLOW_TRACKING_URI="http://mary:hush@127.0.0.1:9")
    assert "hush" not in line
    assert code == (0 if stage == "prepare" else 1)
    assert stage == "prepare" or re.search(r"http://\*\*\*@127\.0\.0\.1:9 failed: ", line)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
