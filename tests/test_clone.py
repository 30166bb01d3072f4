"""A whole `dvc repro` in a fresh clone, the way a person runs it: real DVC, real MLflow, real digits, no network."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow.entities import Run
from ruamel.yaml import YAML

from pipeline import dvc_files, files
from pipeline.explain import report
from pipeline.model import model_file
from tests import forked
from tests.conftest import REPOSITORY, make_ui, write_params
from tests.test_readme import commands

ONE_EPOCH = {
    "data.dataset": "mnist-5k",
    "model.filters": [8, 8],
    "train.batch_size": 32,
    "train.epochs": 1,
    "visualize.maximisation.steps": 3,
}
TOOLS = Path(sys.executable).parent


def run(*command: str, folder: Path, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command with this environment's tools first on the PATH and nothing of the tests in its variables."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment() | dict(more or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC", "PYTEST"))} | {
        "PATH": f"{TOOLS}:{os.environ['PATH']}"
    }


def succeed(*command: str, folder: Path, more: Mapping[str, str] | None = None) -> str:
    done = run(*command, folder=folder, more=more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(folder: Path) -> None:
    succeed("git", "add", "-A", folder=folder)
    succeed("git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "all", folder=folder)


def repro(*arguments: str, folder: Path) -> str:
    """`dvc repro`, whose stages are forked from a process that has their libraries."""
    return succeed("dvc", "repro", *arguments, folder=folder, more=fast())


def fast() -> dict[str, str]:
    """Variables in which `python -m` does not import its libraries again."""
    return {"PATH": f"{Path(forked.python()).parent}:{TOOLS}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows or would add, committed in a new repository whose path has a space and an umlaut."""
    folder = tmp_path_factory.mktemp("clones") / "frische Kopie ü"
    for name in succeed("git", "ls-files", "-z", "-co", "--exclude-standard", folder=REPOSITORY).split("\0"):
        if name and (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    write_params(folder, ONE_EPOCH)
    succeed("git", "init", "-q", folder=folder)
    commit(folder)
    succeed("dvc", "repro", folder=folder)
    return folder


def runs_of(clone: Path) -> list[Run]:
    mlflow.set_tracking_uri(f"sqlite:///{clone / 'mlflow.db'}")
    return list(mlflow.search_runs(search_all_experiments=True, output_format="list"))


def test_the_workflow_runs_from_nothing(clone: Path) -> None:
    metrics = json.loads((clone / files.METRICS).read_text())
    assert metrics["dataset"] == "mnist-5k"
    assert metrics["test"]["accuracy"] > 0.6  # one epoch on 3,644 digits
    assert {path.stem for path in (clone / files.FIGURES).iterdir()} == set(report.FIGURES)
    (training_run,) = runs_of(clone)
    assert training_run.info.status == "FINISHED"
    assert training_run.data.tags["git.commit"] == succeed("git", "rev-parse", "HEAD", folder=clone).strip()
    assert training_run.data.tags["dvc.stage"] == "train"
    assert training_run.data.tags["git.dirty"] == "false"


def test_dvc_shows_the_metrics_the_plots_and_the_figures(clone: Path) -> None:
    assert "mnist-5k" in succeed("dvc", "metrics", "show", folder=clone)
    succeed("dvc", "plots", "show", "--out", "plots page", folder=clone)
    page = (clone / "plots page/index.html").read_text()
    for part in (
        "train_loss",
        "validation_accuracy",
        "Mistakes",
        "Accuracy when rotated",
        "learning_curves.png",
    ):
        assert part in page


def test_nothing_of_what_a_run_leaves_is_seen_by_git(clone: Path) -> None:
    changed = succeed("git", "status", "--porcelain", folder=clone).splitlines()
    names = {line[3:] for line in changed if "plots page" not in line}
    assert names <= {"dvc.lock", "reports/history.csv", "reports/metrics.json"}


@pytest.mark.slow
def test_the_champion_is_served_to_any_process_without_this_repository(clone: Path, tmp_path: Path) -> None:
    code = """
import sys, numpy as np, mlflow
assert not any("pipeline" in name for name in sys.modules)
model = mlflow.pyfunc.load_model("models:/mnist-5k-cnn@champion")
for count in (1, 5, 300):
    probabilities = model.predict(np.zeros((count, 28, 28, 1), dtype=np.uint8))
    assert probabilities.shape == (count, 10) and abs(probabilities.sum(axis=1) - 1).max() < 1e-5
try:
    model.predict(np.zeros((5, 32, 32, 1), dtype=np.uint8))
except mlflow.MlflowException as error:
    print(error)
"""
    more = {"MLFLOW_TRACKING_URI": f"sqlite:///{clone / 'mlflow.db'}", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = run(sys.executable, "-c", code, folder=tmp_path, more=more)
    assert done.returncode == 0, done.stderr
    assert "(-1, 28, 28, 1)" in done.stdout
    assert "(5, 32, 32, 1)" in done.stdout


def test_a_second_call_runs_nothing(clone: Path) -> None:
    before, seconds = (clone / "dvc.lock").read_bytes(), list[float]()
    while min(seconds, default=2) >= 2:  # another test may slow one of the calls down
        started = time.perf_counter()
        printed = succeed("dvc", "repro", folder=clone)
        seconds.append(time.perf_counter() - started)
        assert len(seconds) <= 5, seconds
    assert "Running stage" not in printed
    assert "Data and pipelines are up to date." in printed
    assert (clone / "dvc.lock").read_bytes() == before


@pytest.mark.slow
def test_what_is_compiled_beside_the_code_is_ignored_and_a_stage_runs_again_for_its_own_code(
    clone: Path, tmp_path: Path
) -> None:
    """Python writes into the folders that the stages depend on while the stages run."""
    clone = shutil.copytree(clone, tmp_path / "clone", ignore=shutil.ignore_patterns("__pycache__"))

    def repro_after(changed: str | None, *options: str) -> set[str]:
        """The stages that run after a comment was added to a file."""
        if changed:
            with (clone / changed).open("a") as code:
                code.write("# a comment\n")
        printed = succeed("dvc", "repro", *options, folder=clone, more={"PYTHONDONTWRITEBYTECODE": ""})
        return {stage for stage in ("prepare", "train", "evaluate", "visualize") if f"stage '{stage}':" in printed}

    assert "train" in repro_after("pipeline/model/cnn.py")
    assert any((clone / "pipeline/model/__pycache__").iterdir())
    assert repro_after(None) == set()
    assert repro_after("pipeline/tracking/runs.py") == set()
    assert repro_after("pipeline/explain/report.py", "--dry") == {"evaluate", "visualize"}


@pytest.mark.slow
def test_a_forced_repetition_gives_the_same_lock_and_a_new_run_with_the_same_hashes(clone: Path) -> None:
    lock = (clone / "dvc.lock").read_bytes()
    repro("-f", folder=clone)
    assert (clone / "dvc.lock").read_bytes() == lock
    newest, oldest = runs_of(clone)
    assert newest.info.run_id != oldest.info.run_id
    for tag in ("model.sha256", "data.sha256", "params.sha256"):
        assert newest.data.tags[tag] == oldest.data.tags[tag]
    versions = mlflow.MlflowClient().search_model_versions("name = 'mnist-5k-cnn'")
    assert [str(version.version) for version in versions] == ["1"]
    assert str(mlflow.MlflowClient().get_model_version_by_alias("mnist-5k-cnn", "champion").version) == "1"


def test_make_installs_again_only_if_the_lock_file_changes(clone: Path) -> None:
    """`make -n` prints what would be run; the environment is a stamp as after an installation."""
    stamp = clone / ".venv/.installed"
    stamp.parent.mkdir()
    for target in ("repro", "test"):
        stamp.unlink(missing_ok=True)
        assert "pip install" in succeed("make", "-n", target, folder=clone)
        stamp.touch()
        assert "pip install" not in succeed("make", "-n", target, folder=clone)
        os.utime(stamp, (0, 0))
        assert "pip install" in succeed("make", "-n", target, folder=clone)


@pytest.mark.slow
def test_the_fallback_is_never_restored_silently_by_dvc(clone: Path) -> None:
    """DVC's run cache would restore the outputs of an earlier `prepare` with the same values, without its warning."""
    for fraction in (0.2, 0.1):
        write_params(clone, ONE_EPOCH | {"data.validation_fraction": fraction})
        assert "Running stage 'prepare'" in repro("prepare", folder=clone)


@pytest.mark.slow
def test_returning_to_earlier_parameters_logs_to_the_new_run_too(clone: Path) -> None:
    """With its run cache DVC would train again and then skip the stages that log the scores and figures to the run."""
    for dropout in (0.4, 0.5):
        write_params(clone, ONE_EPOCH | {"model.dropout": dropout})
        printed = repro(folder=clone)
        for stage in ("train", "evaluate", "visualize"):
            assert f"Running stage '{stage}'" in printed
    newest, other, *_, first = runs_of(clone)
    assert newest.data.tags["model.sha256"] == first.data.tags["model.sha256"] != other.data.tags["model.sha256"]
    assert newest.data.metrics["test_accuracy"] == first.data.metrics["test_accuracy"]
    assert "test_accuracy" in other.data.metrics


@pytest.mark.slow
def test_a_stage_that_fails_leaves_the_older_outputs(clone: Path) -> None:
    outputs = [files.MODEL, files.HISTORY, files.METRICS, files.FIGURES / "feature_maps.png"]
    before = [(clone / path).read_bytes() for path in outputs]
    write_params(clone, ONE_EPOCH | {"train.learning_rate": 1e30})
    assert run("dvc", "repro", folder=clone, more=fast()).returncode != 0
    assert [(clone / path).read_bytes() for path in outputs] == before
    write_params(clone, ONE_EPOCH)


@pytest.mark.slow
@pytest.mark.faults
def test_fault_29_the_values_of_params_yaml_reach_no_shell(clone: Path) -> None:
    done = run("dvc", "exp", "run", "-S", "data.dataset='; touch PWNED'", folder=clone, more=fast())
    assert done.returncode != 0
    assert "data.dataset is '; touch PWNED'; allowed: mnist" in done.stdout + done.stderr
    assert not list(clone.rglob("PWNED"))


@pytest.mark.slow
def test_experiments_in_copies_of_their_own_log_into_the_same_store(clone: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(clone, tmp_path / "plain clone")  # DVC makes copies of ASCII paths only
    (clone / "mlflow.db").unlink()
    write_params(clone, ONE_EPOCH)
    succeed("dvc", "exp", "run", "--temp", "--name", "bold", "-S", "model.filters=[6,8]", folder=clone, more=fast())
    (shown,) = (words for words in commands(REPOSITORY / "README.md") if "--drop" in words)
    table = succeed(*shown, folder=clone).splitlines()
    assert any("model.filters" in line for line in table)
    assert max(len(line.rstrip()) for line in table) <= 150
    succeed("dvc", "exp", "run", "--queue", "--name", "waiting", "-S", "model.filters=[4,8]", "evaluate", folder=clone)
    succeed("dvc", "queue", "start", folder=clone, more=fast())
    deadline = time.monotonic() + 240
    while "waiting" not in {each.info.run_name for each in runs_of(clone) if "test_accuracy" in each.data.metrics}:
        assert time.monotonic() < deadline, succeed("dvc", "queue", "status", folder=clone)
        time.sleep(1)
    new = {each.info.run_name: each for each in runs_of(clone)}
    assert set(new) == {"bold", "waiting"}
    for name, filters in (("bold", "[6, 8]"), ("waiting", "[4, 8]")):
        assert new[name].data.tags["dvc.exp"] == name
        assert new[name].data.params["model.filters"] == filters
        (version,) = mlflow.MlflowClient().search_model_versions(f"run_id = '{new[name].info.run_id}'")
        assert version.tags["dvc.exp"] == name
        assert version.tags["git.commit"] == new[name].data.tags["git.commit"]


@pytest.mark.slow
def test_the_whole_story_of_champions(clone: Path, tmp_path: Path) -> None:
    """A baseline, a worse model, a better one, a rollback, an experiment in a copy, an empty store; by commands."""
    clone = shutil.copytree(clone, tmp_path / "plain clone")
    for name in clone.glob("mlflow.db*"):
        name.unlink()
    shutil.rmtree(clone / "checkpoints", ignore_errors=True)

    def promotion() -> tuple[str, str]:
        report = json.loads((clone / files.PROMOTION).read_text())
        return report["version"], report["decision"]

    def aliases() -> dict[str, str]:
        runs_of(clone)
        registered = mlflow.MlflowClient().get_registered_model("mnist-5k-cnn")
        return {alias: str(number) for alias, number in registered.aliases.items()}

    def champion(*words: str) -> str:
        return succeed(forked.python(), "-m", "pipeline.models", *words, folder=clone)

    without_images = ONE_EPOCH | {"train.live_images": False}
    write_params(clone, without_images | {"train.epochs": 2})
    repro("evaluate", folder=clone)
    assert promotion() == ("1", "champion")

    write_params(clone, without_images | {"model.filters": [2, 2]})
    repro("evaluate", folder=clone)
    assert promotion() == ("2", "challenger")
    report = json.loads((clone / files.PROMOTION).read_text())
    assert report["table"]["only_champion_right"] > report["table"]["only_challenger_right"]
    assert report["p_value"] < 0.001
    assert aliases() == {"champion": "1", "challenger": "2"}

    write_params(clone, without_images | {"train.epochs": 6})
    repro("evaluate", folder=clone)
    assert promotion() == ("3", "champion")
    assert " against " in json.loads((clone / files.PROMOTION).read_text())["reason"]
    assert "This checkout would train the same model again." in champion()

    assert champion("--rollback") == "mnist-5k-cnn version 1 is the champion\n"
    assert "This checkout would train a different model:\n  params: train.epochs was 2, here it is 6" in champion()
    assert [line[21:30] for line in champion("--history").splitlines()] == ["version 1", "version 3", "version 1"]

    bold = ("exp", "run", "--temp", "--name", "bold", "-S", "train.epochs=8", "evaluate")
    succeed("dvc", *bold, folder=clone, more=fast())
    assert aliases() == {"champion": "4", "challenger": "2"}
    assert "(experiment bold)" in champion()

    model = (clone / files.MODEL).read_bytes()  # that of six epochs still
    for name in (clone / files.MODEL, *clone.glob("mlflow.db*")):
        name.unlink()
    clone = clone.rename(tmp_path / "fresh store")  # this process has the old one open under its name
    succeed("dvc", "checkout", folder=clone)
    assert (clone / files.MODEL).read_bytes() == model
    repro("--force", "--single-item", "evaluate", folder=clone)
    assert aliases() == {"champion": "1"}
    (restored,) = runs_of(clone)
    assert restored.data.tags["restored"] == "true"
    assert "DVC restored it from a cache" in champion()


@pytest.mark.slow
def test_a_model_restored_by_dvc_gets_a_run_in_an_empty_store(clone: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(clone, tmp_path / "clone")  # whose store this process has not open
    write_params(clone, ONE_EPOCH)
    repro(folder=clone)
    model = (clone / files.MODEL).read_bytes()
    succeed("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"), folder=clone)
    succeed("dvc", "push", folder=clone)
    shutil.rmtree(clone / ".dvc/cache")
    for name in (clone / files.MODEL, *clone.glob("mlflow.db*")):
        name.unlink()
    succeed("dvc", "pull", folder=clone)
    assert (clone / files.MODEL).read_bytes() == model
    repro("--force", "--single-item", "evaluate", "visualize", folder=clone)
    (restored,) = runs_of(clone)
    assert restored.data.tags["restored"] == "true"
    assert restored.data.params["train.epochs"] == "1"
    assert len(mlflow.MlflowClient().list_artifacts(restored.info.run_id, "figures")) == len(report.FIGURES)
    version = mlflow.MlflowClient().get_model_version_by_alias("mnist-5k-cnn", "champion")
    assert version.run_id == restored.info.run_id
    assert version.tags["restored"] == "true"
    assert "DVC restored it from a cache" in str(version.description)
    printed = succeed(forked.python(), "-m", "pipeline.models", folder=clone)
    assert printed.endswith("would train the same model: DVC restored it from a cache.\n")


@pytest.mark.slow
@pytest.mark.faults
def test_fault_27_the_page_answers_this_machine_alone(clone: Path) -> None:
    def answer(method: str, url: str, **headers: str) -> int:
        return requests.request(method, url, headers=headers, json={"max_results": 1}, timeout=30).status_code

    with make_ui(clone, environment()) as port:
        page = f"http://127.0.0.1:{port}/"
        search = f"{page}api/2.0/mlflow/experiments/search"
        assert answer("POST", search) == 200
        assert answer("POST", search, Origin=f"http://localhost:{port}") == 200
        for foreign in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example"):
            assert answer("GET", page, Host=foreign) == 403
            assert answer("POST", search, Host=foreign) == 403
            assert answer("POST", search, Origin=f"http://{foreign}") == 403
        with pytest.raises(OSError), socket.create_connection((other_address(), port), timeout=5):
            pass  # nothing listens there


def other_address() -> str:
    """One of this machine that others could use; where it has none, another one of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.2"
        return str(out.getsockname()[0])


@pytest.mark.slow
@pytest.mark.faults
def test_fault_44_params_edited_while_dvc_trains_are_not_noted_in_its_lock(clone: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(clone, tmp_path / "clone")
    write_params(clone, ONE_EPOCH | {"seed": 1})
    before, model = (clone / "dvc.lock").read_bytes(), (clone / files.MODEL).read_bytes()
    with subprocess.Popen(
        ["dvc", "repro", "train"],
        cwd=clone,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        assert training.stdout is not None
        assert any(line.startswith("Layer ") for line in training.stdout)  # what `train` says before it begins
        write_params(clone, ONE_EPOCH | {"seed": 2})
        _, errors = training.communicate(timeout=300)
    assert training.returncode != 0
    assert "error: `train` began with other inputs than are here now (seed was 1, here it is 2): undo that" in errors
    assert ((clone / "dvc.lock").read_bytes(), (clone / files.MODEL).read_bytes()) == (before, model)
    repro("train", folder=clone)
    assert model_file.from_bytes((clone / files.MODEL).read_bytes()).recipe["seed"] == 2


@pytest.mark.slow
@pytest.mark.faults
def test_fault_6_dvc_reports_a_damaged_rwlock_and_concurrent_runs(clone: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(clone, tmp_path / "clone")
    write_params(clone, ONE_EPOCH)
    repro(folder=clone)
    whole, model = (clone / "dvc.lock").read_text(), (clone / files.MODEL).read_bytes()

    (clone / "dvc.lock").write_text(whole[: whole.index("md5: ") + 2])  # in the middle of a word
    done = run("dvc", "repro", folder=clone)
    assert done.returncode != 0
    assert "dvc.lock" in done.stderr
    (clone / "dvc.lock").write_text(whole)

    rwlock = clone / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir(exist_ok=True)
    rwlock.write_text('{"read": ')
    done = run("dvc", "repro", folder=clone)
    assert done.returncode != 0
    assert "RWLock-file" in done.stderr
    rwlock.unlink()

    command = ["dvc", "repro", "--force", "train"]
    with subprocess.Popen(
        command, cwd=clone, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as first:
        assert first.stdout is not None
        assert any(line.startswith("Layer ") for line in first.stdout)  # what `train` says before it begins
        os.killpg(first.pid, signal.SIGSTOP)  # so that it is in the middle of it for as long as the second takes
        try:
            second = run(*command, folder=clone)
        finally:
            os.killpg(first.pid, signal.SIGCONT)
        first.communicate(timeout=300)
    assert first.returncode == 0
    assert second.returncode != 0
    assert "busy" in second.stderr or "Unable to acquire lock" in second.stderr
    assert (clone / files.MODEL).read_bytes() == model
    succeed("dvc", "repro", folder=clone)
    assert (clone / "dvc.lock").read_text() == whole


@pytest.mark.slow
def test_verify_builds_twice_from_nothing_and_compares(clone: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(clone, tmp_path / "clone")
    write_params(clone, ONE_EPOCH | {"data.memory_limit": 1e-6})  # the splits stay on the disk
    succeed("dvc", "repro", folder=clone)
    commit(clone)
    lock = clone / "dvc.lock"
    lock.write_text(re.sub("md5: [0-9a-f]{32}", f"md5: {'a' * 32}", lock.read_text()))  # not committed
    printed = succeed(sys.executable, "-m", "pipeline.verify", folder=clone)
    assert printed.endswith("\nBoth builds gave the same bytes.\n")
    rows = [line.split() for line in printed.splitlines() if "same" in line]
    assert {row[0] for row in rows if row[2:] == ["same", "same"]} == set(dvc_files.outputs(clone))

    # From here on only up to the model, in which two builds then differ.
    with (clone / "dvc.yaml").open("r+") as workflow:
        stages = YAML().load(workflow)["stages"]
        workflow.seek(0)
        workflow.truncate()
        YAML().dump({"stages": {name: stages[name] for name in ("prepare", "train")}}, workflow)
    recipe = clone / "pipeline/recipe.py"
    recipe.write_text(
        recipe.read_text().replace("manual_seed(params.seed)", "manual_seed(__import__('time').time_ns())")
    )
    done = run(sys.executable, "-m", "pipeline.verify", folder=clone, more=fast())
    assert done.returncode == 1
    assert done.stderr == "error: two runs of this code on this machine do not give the same bytes\n"
    (model,) = [line for line in done.stdout.splitlines() if line.startswith("models/model.safetensors ")]
    assert "DIFFERENT" in model
