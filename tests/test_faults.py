"""What goes wrong in real use, set off for real. The numbers are those of the list of faults that the project keeps."""

import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline import evaluate, files, train
from pipeline.data.splits import TEST, read_dataset, read_split
from pipeline.errors import Fault
from pipeline.tracking import delivery, store
from tests import forked
from tests.conftest import (
    OWN_MOUNTS,
    QUICK,
    REPOSITORY,
    make_ui,
    needs_namespaces,
    run_command,
    run_stage,
    tracking_server,
    write_params,
)

pytestmark = pytest.mark.faults
EPOCHS = 8


def every_run() -> list[Run]:
    store.connect()
    return list(mlflow.search_runs(output_format="list", order_by=["attributes.start_time"]))


def start(
    folder: Path, code: str = "", kind: type[subprocess.Popen[Any]] = forked.Popen, **environment: str
) -> subprocess.Popen[str]:
    """The stage `train`, after ``code``, as a process of its own."""
    program = f"{code}\nfrom pipeline import train\nfrom pipeline.errors import run_command\nrun_command(train.main)"
    return kind(
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
        _, errors = process.communicate()
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: models/model.safetensors cannot be written (File too large): make room on that disk, then run again"
    ]
    assert files.MODEL.read_bytes() == older
    assert [path.name for path in files.MODEL.parent.iterdir()] == ["model.safetensors"]
    with start(workspace) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"interrupted training after epoch {EPOCHS} of {EPOCHS}" in out
    assert "RUNNING" not in {run.info.status for run in every_run()}


# The disk has what the folder held, and no room for one more byte; what it holds in the end outlives it in "$2".
ON_A_FULL_DISK = """
cp -a "$1" "$2" && mount -t tmpfs -o size=8m tmpfs "$1" && cp -a "$2/." "$1" && rm -r "$2" || exit 3
cat /dev/zero 2>&1 > "$1/filler" | grep -q "No space left" || exit 3
"$3" -m "pipeline.$4"
code=$?
rm "$1/filler"
cp -a "$1" "$2"
exit $code
"""


def on_full_disk(folder: str, stage: str, workspace: Path, left: Path) -> tuple[int, str]:
    """Exit code and standard error of a stage to which ``folder`` is a full disk; ``left`` is what that holds then."""
    (workspace / folder).mkdir(exist_ok=True)
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", ON_A_FULL_DISK, "sh", folder, str(left), sys.executable, stage],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize(
    ("stage", "folder", "file"),
    [
        ("prepare", "data/prepared", "train.safetensors"),
        ("train", "checkpoints", r"[0-9a-f]{16}\.checkpoint"),
        ("train", "models", "model.safetensors"),
        ("train", "reports", "history.csv"),
        ("evaluate", "reports", "metrics.json"),
        ("visualize", "reports", "figures/learning_curves.png"),
    ],
)
def test_fault_3_a_full_folder_is_one_line_and_keeps_what_it_held(
    finished_copy: Path, tmp_path: Path, stage: str, folder: str, file: str
) -> None:
    if stage == "train":
        write_params(finished_copy, QUICK | {"seed": 1})  # so that its outputs would be others
    held, older = contents(finished_copy / folder), files.MODEL.read_bytes()
    code, errors = on_full_disk(folder, stage, finished_copy, tmp_path / "left")
    assert code == 1, errors
    line = rf"error: \S*{folder}/{file} cannot be written \(No space left on device\): make room on that disk, then run"
    assert re.fullmatch(rf"{line} again\n", errors)
    assert contents(tmp_path / "left") == held
    assert {run.info.status for run in every_run()} == ({"FAILED"} if stage == "train" else set())
    # The model is written before the history, and then goes with the one that the next training writes.
    assert (files.MODEL.read_bytes() == older) == ((stage, folder) != ("train", "reports"))
    assert run_stage(stage, finished_copy) == (0, "")
    assert (files.MODEL.read_bytes() == older) == (stage != "train")


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_fault_3_a_full_temporary_folder_is_passed_over(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Python looks for one where it can write; `train` makes the tracking store there, `evaluate` exports the model."""
    if stage == "train":
        (finished_copy / "mlflow.db").unlink()
    monkeypatch.setenv("TMPDIR", str(finished_copy / "temporary"))
    assert on_full_disk("temporary", stage, finished_copy, tmp_path / "left") == (0, "")
    assert contents(tmp_path / "left") == {}
    # This process may have the file open that is gone.
    with closing(sqlite3.connect(finished_copy / "mlflow.db")) as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_fault_3_a_temporary_folder_with_little_room_is_one_line_that_names_it(finished_copy: Path, stage: str) -> None:
    """`train` makes the tracking store there; the library that exports the model would abort `evaluate`."""
    (finished_copy / "mlflow.db").unlink()
    if stage == "evaluate":
        store.connect()
    folder = finished_copy / "temporary"
    folder.mkdir()
    small = f"mount -t tmpfs -o size=64k tmpfs temporary && exec {sys.executable} -m pipeline.{stage}"
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", small],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(finished_copy), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    line = rf"error: {folder} has less than [\d,]+ bytes free: make room on that disk, then run again\n"
    assert re.fullmatch(line, done.stderr), done.stderr
    assert done.returncode == 1
    assert run_stage("evaluate", finished_copy) == (0, "")


@pytest.mark.usefixtures("either_store")
def test_fault_5_out_of_memory_is_a_failed_run_and_one_line(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.batch_size": 3600, "model.filters": [1024, 1024], "train.threads": 1})
    limit = (
        "import resource, psutil; from pipeline import recipe; whole = recipe.fit\n"
        "def fit(*arguments, **more):\n"
        "    most = psutil.Process().memory_info().vms + 20_000_000\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "    return whole(*arguments, **more)\n"
        "recipe.fit = fit"
    )
    with start(workspace, limit) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1].startswith("error: out of memory")
    assert "Traceback" not in errors
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
def test_fault_8_unusual_paths_and_environments(workspace: Path, tmp_path: Path) -> None:
    parts = ("ein Ordner ü\u6f22", "q'u\"o", "100%20", "100 ", "what?", "#1")  # unescaped, "100%20" would be "100 "
    outer = tmp_path / "outer"
    folder = outer.joinpath(*parts)
    shutil.copytree(workspace, folder)
    (tmp_path / "link").symlink_to(folder)
    code = "import os; os.umask(0o077)"
    # Python asks for LC_ALL when it starts, so these two are not forked.
    with start(tmp_path / "link", code, subprocess.Popen, LC_ALL="C") as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "epoch 2/2" in out
    environment_tags = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(tmp_path / "link"), "LC_ALL": "C"}
    command = [sys.executable, "-m", "pipeline.evaluate"]
    evaluated = subprocess.run(command, cwd=tmp_path / "link", env=environment_tags, capture_output=True, check=True)
    assert evaluated.stderr == b""
    digit = read_split(read_dataset(workspace / files.PREPARED), TEST, workspace / files.PREPARED).images[0, ..., 0]
    Image.fromarray(digit.numpy()).save(folder / "digit.png")
    predicted = run_command("predict", "digit.png", folder=folder)
    assert predicted.returncode == 0, predicted.stderr
    assert (folder / "mlruns").is_dir()
    for part in parts:  # nothing was written beside the repository
        assert [path.name for path in outer.iterdir()] == [part]
        outer /= part


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "visualize", "tune"])
def test_fault_8_from_another_folder_the_line_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Started so, it would write its outputs, and the tracking store, where nobody looks for them."""
    monkeypatch.chdir(tmp_path)
    code, line = run_stage(stage, tmp_path)
    assert (code, line) == (2, "error: params.yaml does not exist: run this in the repository's root\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fault_8_dvc_started_from_a_subfolder_works_in_the_root_or_says_that_it_cannot(workspace: Path) -> None:
    shutil.copytree(REPOSITORY / "pipeline", workspace / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", workspace)
    shutil.rmtree(workspace / "data")
    (workspace / "data/own").mkdir(parents=True)
    below, outside = workspace / "below", workspace.parent / "outside"
    for folder in (below, outside):
        folder.mkdir()

    def dvc(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        plain = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | tools
        command = ["dvc", *arguments]
        return subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)

    assert dvc("init", "--quiet", "--no-scm", folder=workspace).returncode == 0
    for folder, reason in ((below, "dvc.yaml' does not exist"), (outside, "not inside of a DVC repository")):
        refused = dvc("repro", folder=folder)
        assert refused.returncode != 0
        assert reason in refused.stderr
    done = dvc("repro", "../dvc.yaml:prepare", folder=below)
    assert done.returncode == 0, done.stderr
    assert (workspace / files.PREPARED / "train.safetensors").exists()
    assert [*below.iterdir(), *outside.iterdir()] == []


LOGGING = """
from pipeline.tracking import store
from mlflow import MlflowClient
store.connect()
print("connected", flush=True)
input()
client = MlflowClient()
for number in range(5):
    run = client.create_run(store.experiment_id())
    for step in range(20):
        client.log_metric(run.info.run_id, "value", step, step=step)
    client.set_terminated(run.info.run_id)
"""


def count_of_runs(port: int) -> int:
    """As MLflow's page asks for them."""
    api = f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow"
    found = requests.get(f"{api}/experiments/get-by-name?experiment_name={store.EXPERIMENT}", timeout=60)
    assert found.ok, found.text
    of_it: dict[str, Any] = {"experiment_ids": [found.json()["experiment"]["experiment_id"]], "max_results": 100}
    answer = requests.post(f"{api}/runs/search", json=of_it, timeout=60)
    assert answer.ok, answer.text
    return len(answer.json().get("runs", []))


@pytest.mark.slow
def test_fault_9_and_10_eight_processes_begin_at_once_in_an_empty_store_and_the_page_asks(workspace: Path) -> None:
    for path in workspace.glob("mlflow.db*"):
        path.unlink()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)}
    command = [sys.executable, "-c", LOGGING]
    pipe = subprocess.PIPE
    workers: list[Any] = [
        forked.Popen(command, cwd=workspace, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(8)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "connected\n", worker.communicate()
    seen = []
    with make_ui(workspace, environment) as port:
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        while any(worker.poll() is None for worker in workers):
            seen.append(count_of_runs(port))
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors
        assert "locked" not in errors
    assert seen == sorted(seen)
    assert set(seen) - {0, 40}, "the page was asked before and after, but never in the middle of it"
    found = every_run()
    assert len(found) == 40
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(workspace / "mlflow.db") as store:
        assert store.execute("select count(*) from metrics where key = 'value'").fetchone() == (800,)


@pytest.mark.slow
def test_fault_10_a_store_is_made_whole_or_not_at_all(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at ten moments of its making, in which mlflow itself leaves tables that it cannot continue with."""
    program = "from pipeline.tracking import store; print('begins', flush=True); store.connect()"
    left = set[bool]()
    for moment in range(10):
        # Each has a folder of its own: this process keeps a store open under its name, also one that is gone.
        folder = workspace / f"moment {moment}"
        folder.mkdir()
        monkeypatch.setenv("DVC_ROOT", str(folder))
        with forked.Popen(
            [sys.executable, "-c", program],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            time.sleep(0.15 + moment * 0.25)
            process.kill()
        left.add((folder / "mlflow.db").exists())
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # of the moment before
        assert every_run() == []
        assert (folder / "mlflow.db").exists()
        assert unfinished(folder) == []
    assert False in left  # it was in its making


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(files.UNFINISHED)]


@pytest.mark.slow
def test_fault_10_what_a_process_killed_while_it_writes_the_store_leaves_goes_with_the_next(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()
    killed = "import os, signal; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", f"{killed}; from pipeline.tracking import store; store.connect()"],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(unfinished(workspace)) == 1
    assert not (workspace / "mlflow.db").exists()
    assert every_run() == []
    assert unfinished(workspace) == []


@pytest.mark.slow
def test_fault_11_a_store_that_is_locked_for_half_a_minute_costs_no_training(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": EPOCHS})
    with start(workspace) as process:
        after_epoch(process, 2)
        with sqlite3.connect(workspace / "mlflow.db", isolation_level=None) as store:
            store.execute("begin exclusive")
            started = time.monotonic()
            _, errors = process.communicate()
            store.execute("rollback")
    assert process.returncode == 0, errors
    assert time.monotonic() - started < 30
    warning = errors.splitlines()[-1]
    assert warning.startswith("warning: the tracking store failed (")
    assert files.MODEL.exists()
    assert len(delivery.undelivered()) == 1
    evaluate.main()
    (run,) = every_run()
    assert run.info.status == "FINISHED"
    points = MlflowClient().get_metric_history(run.info.run_id, "seconds")
    assert [point.step for point in points] == list(range(1, EPOCHS + 1))


@pytest.mark.slow
def test_fault_11_a_damaged_store_is_reported_and_not_recreated(finished_copy: Path) -> None:
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
def test_fault_13_a_server_lost_during_training_receives_the_rest_later(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[subprocess.Popen[bytes]], None],
) -> None:
    write_params(workspace, QUICK | {"train.epochs": EPOCHS})
    with tracking_server(tmp_path / "server") as (address, process):
        with start(workspace, MLFLOW_TRACKING_URI=address) as training:
            after_epoch(training, 2)
            harm(process)
            started = time.monotonic()
            _, errors = training.communicate()
        assert training.returncode == 0, errors
        assert time.monotonic() - started < 40
        assert errors.splitlines()[-1].startswith("warning: the tracking store failed (")
        assert files.MODEL.exists()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        if harm is _kill:
            with pytest.raises(Fault, match=f"the tracking store {address} failed: "):
                evaluate.main()  # and that is still not the end of it
    with tracking_server(tmp_path / "server") as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        evaluate.main()
        (run,) = every_run()
        assert run.info.status == "FINISHED"
        assert run.data.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
        points = MlflowClient().get_metric_history(run.info.run_id, "train_loss")
        assert [point.step for point in points] == list(range(1, EPOCHS + 1))
        assert "test_accuracy" in run.data.metrics
    assert delivery.undelivered() == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "visualize"])
def test_fault_30_no_password_is_printed(finished_copy: Path, stage: str) -> None:
    code, line = run_stage(stage, finished_copy, MLFLOW_TRACKING_URI="http://mary:hush@127.0.0.1:9")
    assert "hush" not in line
    assert code == (0 if stage == "prepare" else 1)
    assert stage == "prepare" or re.search(r"http://\*\*\*@127\.0\.0\.1:9 failed: ", line)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
