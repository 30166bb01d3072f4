"""`python -m pipeline.models`: where a model comes from, and rollback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline import evaluate, files, machine, train
from pipeline.tracking import lineage, registry, store
from tests.conftest import QUICK, change_training_images, run_command, write_params


def output(folder: Path, *arguments: str) -> str:
    done = run_command("models", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.mark.slow
def test_a_version_shows_its_lineage_and_whether_it_can_be_reproduced(workspace: Path) -> None:
    """Each stage as a process of its own: the code that made a model is what its process had loaded."""
    for stage in ("train", "evaluate"):
        assert run_command(stage, folder=workspace).returncode == 0
    tags = _champion_tags()
    printed = output(workspace)
    for fact in ("mnist-5k-cnn version 1", tags["model.sha256"], tags["data.sha256"], tags["params.sha256"]):
        assert fact in printed
    assert "\n  model.dropout             0.5\n" in printed
    assert printed.endswith("This checkout would train the same model again.\n")
    assert set(json.loads(tags["code"])) >= {"pipeline/train.py", "pipeline/model/cpu_kernels.py", "pipeline/params.py"}
    assert not {name for name in json.loads(tags["code"]) if "tracking" in name or "figures" in name}

    write_params(workspace, QUICK | {"model.dropout": 0.3, "evaluate.calibration_bins": 10})
    assert "a different model:\n  params: model.dropout was 0.5, here it is 0.3\n" in output(workspace, "1")
    write_params(workspace, QUICK)
    change_training_images()
    assert "\n  data: SHA-256 was " in output(workspace, "champion")
    (files.PREPARED / "dataset.json").unlink()
    assert "\n  data: none are prepared here yet: dvc repro prepare\n" in output(workspace, "mnist-5k-cnn@champion")


def _champion_tags() -> dict[str, str]:
    store.connect()
    return dict(registry.find("champion").tags)


TAGS = {"recipe": "{}", "data.sha256": "a" * 64, "code": json.dumps({"pipeline/train.py": "0" * 16})}


def test_other_code_and_another_machine_are_named() -> None:
    assert list(lineage.differences(TAGS, {}, "a" * 64)) == [("code", "pipeline/train.py has changed")]
    cpu = torch.device("cpu")
    assert lineage.other_machine({"device": "NVIDIA H100", "cpu.capability": "AVX1024"}, cpu) == [
        "device was NVIDIA H100, here it is cpu",
        f"cpu.capability was AVX1024, here it is {torch.backends.cpu.get_cpu_capability()}",
    ]
    assert lineage.other_machine(machine.environment_tags(cpu), cpu) == []


@pytest.mark.slow
def test_the_threads_of_params_yaml_are_those_that_count(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": 1, "train.threads": 1})
    for stage in ("train", "evaluate"):
        assert run_command(stage, folder=workspace).returncode == 0
    assert output(workspace).endswith("This checkout would train the same model again.\n")
    write_params(workspace, QUICK | {"train.epochs": 1, "train.threads": 2})
    assert "since the machine is different:\n  cpu.threads was 1, here it is 2\n" in output(workspace)


def test_a_version_that_somebody_registered_by_hand_is_one_line(finished_copy: Path) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("mnist-5k-cnn")
    client.create_model_version("mnist-5k-cnn", str(finished_copy))
    done = run_command("models", "1", folder=finished_copy)
    assert done.returncode == 2
    line = (
        "error: mnist-5k-cnn version 1 has no tag recipe: it was not registered by `evaluate`, or somebody has deleted"
    )
    assert done.stderr.decode().startswith(line)
    assert done.stderr.count(b"\n") == 1


@pytest.mark.faults
def test_fault_36_a_tag_that_somebody_has_changed_is_one_line_and_evaluate_writes_it_again(finished_copy: Path) -> None:
    evaluate.main()
    before = _champion_tags()
    client = mlflow.MlflowClient()
    for tag, value in {"recipe": "garbage", "test.accuracy": "abc"}.items():
        client.set_model_version_tag("mnist-5k-cnn", "1", tag, value)
        done = run_command("models", folder=finished_copy)
        line = f"error: mnist-5k-cnn version 1 has the tag {tag} '{value}', which cannot be read: somebody has changed"
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
        assert done.stderr.decode().startswith(line)
        assert b"with `dvc repro -f -s evaluate`" in done.stderr
    client.delete_model_version_tag("mnist-5k-cnn", "1", "params.sha256")
    client.set_model_version_tag("mnist-5k-cnn", "1", "code", "[]")
    evaluate.main()
    assert _champion_tags() == before | {"code": "[]"}  # which only the run can know
    assert output(finished_copy).endswith("would train the same model: its tag code cannot be read.\n")


@pytest.mark.slow
def test_history_and_rollback(finished_copy: Path) -> None:
    evaluate.main()
    refused = run_command("models", "--rollback", folder=finished_copy)
    assert refused.returncode == 2
    assert b"error: mnist-5k-cnn has no earlier champion to roll back to" in refused.stderr
    write_params(finished_copy, QUICK | {"train.epochs": 5})
    train.main()
    evaluate.main()
    assert output(finished_copy, "--rollback") == "mnist-5k-cnn version 1 is the champion\n"
    lines = output(finished_copy, "--history").splitlines()
    assert [line[21:30] for line in lines] == ["version 1", "version 2", "version 1"]
    assert lines[2].endswith("version 1: by hand, replacing version 2")
    evaluate.main()  # the better model again: it stays deposed
    assert str(registry.find("champion").version) == "1"
    assert mlflow.MlflowClient().get_model_version("mnist-5k-cnn", "2").tags["gate.reason"].startswith("it was rolled")
    assert output(finished_copy, "2", "--rollback") == "mnist-5k-cnn version 2 is the champion\n"


@pytest.mark.parametrize("arguments", [["7"], ["--history"], ["--rollback"], []])
def test_where_nothing_is_registered_it_says_what_to_do(workspace: Path, arguments: list[str]) -> None:
    done = run_command("models", *arguments, folder=workspace)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: no model mnist-5k-cnn is registered here; run `dvc repro` first\n"


@pytest.mark.faults
@pytest.mark.parametrize("deleted", ["the version", "the model"])
def test_after_dvc_pull_it_says_what_registers_the_model(finished_copy: Path, deleted: str) -> None:
    """The outputs are here, and the store has no version: `dvc repro` has nothing to do."""
    evaluate.main()
    client = mlflow.MlflowClient()
    client.delete_model_version("mnist-5k-cnn", "1")
    if deleted == "the model":
        client.delete_registered_model("mnist-5k-cnn")
    line = run_command("models", folder=finished_copy).stderr.decode()
    missing = {
        "the version": "mnist-5k-cnn has no version champion; it has none",
        "the model": "no model mnist-5k-cnn is registered here",
    }[deleted]
    assert line == f"error: {missing}; `dvc repro -f -s evaluate` registers models/model.safetensors\n"
    evaluate.main()
    assert "version 1" in output(finished_copy) or "version 2" in output(finished_copy)


@pytest.mark.faults
def test_a_deleted_experiment_is_restored_by_the_command_that_the_line_names(workspace: Path) -> None:
    store.connect()
    mlflow.MlflowClient().delete_experiment(store.experiment_id())
    line = run_command("models", folder=workspace).stderr.decode()
    command = re.fullmatch(
        r"error: the experiment convtrack was deleted in sqlite:\S+: `(mlflow .*)`, then run again\n", line
    )
    assert command
    subprocess.run([sys.executable, "-m", *command[1].split()], cwd=workspace, check=True, capture_output=True)
    assert "run `dvc repro` first" in run_command("models", folder=workspace).stderr.decode()
