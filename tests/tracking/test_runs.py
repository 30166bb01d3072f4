"""What a user finds in MLflow after the stages have run; on a real MLflow database."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Run

from pipeline import evaluate, files, machine, processes, train, visualize
from pipeline.data.splits import read_dataset
from pipeline.errors import Fault
from pipeline.model import model_file
from pipeline.model.cnn import Classifier
from pipeline.params import read_params
from pipeline.tracking import addresses, delivery, models, registry, runs, store, studies
from pipeline.tracking.runs import TrainingRun
from tests.conftest import (
    OWN_MOUNTS,
    QUICK,
    REPOSITORY,
    needs_namespaces,
    run_stage,
    tracking_server,
    write_params,
)


def every_run() -> list[Run]:
    return list(mlflow.search_runs(output_format="list", order_by=["attributes.start_time DESC"]))


def only_run() -> Run:
    (run,) = every_run()
    return run


def test_one_run_holds_the_whole_story(finished: Path) -> None:
    run = only_run()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"mnist-5k-{files.sha256(files.MODEL.read_bytes())[:8]}"
    assert run.data.params["model.filters"] == "[32, 64]"
    assert run.data.params["train.epochs"] == "2"
    assert run.data.params["seed"] == "0"
    assert run.data.params["parameters"] == "34826"


@pytest.mark.slow
def test_a_server_holds_the_whole_story_too(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking_server(tmp_path / "server") as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        for stage in (train, evaluate, visualize):
            assert run_stage(stage.__name__.rpartition(".")[2], workspace) == (0, "")
        store.connect()
        run = only_run()
        assert run.info.status == "FINISHED"
        assert run.data.params["parameters"] == "34826"
        points = MlflowClient().get_metric_history(run.info.run_id, "validation_loss")
        assert [point.step for point in points] == [1, 2]
        assert run.data.metrics["test_accuracy"] == json.loads(files.METRICS.read_text())["test"]["accuracy"]
        figures = {Path(each.path).name for each in MlflowClient().list_artifacts(run.info.run_id, "figures")}
        assert figures == {path.name for path in files.FIGURES.glob("*.png")}
        champion = registry.find("champion")
        assert champion.tags[runs.MODEL_SHA256] == files.sha256(files.MODEL.read_bytes())
        assert registry.load(champion).preprocessing == read_dataset().preprocessing
        assert not (workspace / "mlruns").exists()


def test_the_curves_have_one_point_an_epoch_and_agree_with_the_history(finished: Path) -> None:
    run = only_run()
    history = files.read_table(files.HISTORY, made_by="train")
    assert list(history[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "learning_rate",
    ]
    for name in [*list(history[0])[1:], "seconds"]:
        points = MlflowClient().get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == [1, 2]
        if name != "seconds":
            assert [point.value for point in points] == [float(row[name]) for row in history]


def test_the_tags_record_the_lineage_of_the_model(finished: Path) -> None:
    tags = only_run().data.tags
    dataset = read_dataset()
    assert tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert tags["data.sha256"] == dataset.sha256
    assert tags["data.name"] == "mnist-5k"
    assert tags["params.sha256"] == read_params().sha256
    assert tags["torch.version"] == torch.__version__
    assert tags["cpu.threads"] == str(torch.get_num_threads())
    assert tags["cpu.capability"] == torch.backends.cpu.get_cpu_capability()
    assert "restored" not in tags


def test_the_data_sets_carry_our_digests(finished: Path) -> None:
    dataset = read_dataset()
    logged = only_run().inputs
    assert logged is not None
    inputs = {entry.tags[0].value: entry.dataset for entry in logged.dataset_inputs}
    assert set(inputs) == {"training", "validation", "testing"}
    for context, split in (("training", "train"), ("validation", "validation"), ("testing", "test")):
        assert inputs[context].name == f"mnist-5k-{split}"
        assert dataset.splits[split].sha256.startswith(inputs[context].digest)
        assert json.loads(str(inputs[context].profile))["features_shape"] == [dataset.splits[split].count, 28, 28, 1]


def test_the_scores_and_the_figures_are_in_the_same_run(finished: Path) -> None:
    run = only_run()
    metrics = json.loads(files.METRICS.read_text())
    assert run.data.metrics["test_accuracy"] == metrics["test"]["accuracy"]
    for name in ("balanced_accuracy", "macro_f1", "baseline_accuracy"):
        assert run.data.metrics[f"test_{name}"] == metrics["test"][name]
    assert run.data.metrics["validation_balanced_accuracy"] == metrics["validation"]["balanced_accuracy"]
    assert run.data.metrics["test_error_count"] == metrics["test"]["error_count"]
    assert run.data.metrics["test_per_class/7.recall"] == metrics["test"]["per_class"]["7"]["recall"]
    logged = {
        file.path
        for folder in ("figures", "evaluation", "data", "data/contact_sheets")
        for file in MlflowClient().list_artifacts(run.info.run_id, folder)
    }
    drawn = {f"figures/{path.name}" for path in files.FIGURES.iterdir()}
    assert drawn
    written = ("metrics.json", "model_card.md", "predictions.csv", "promotion.json")
    sheets = {f"data/contact_sheets/{number:02}-{number}.png" for number in range(10)}
    about_data = {"data/contact_sheets", "data/data_summary.json", *sheets}
    assert logged == drawn | {f"evaluation/{name}" for name in written} | about_data


def test_the_scores_of_every_class_are_logged_whatever_the_classes_are_called(workspace: Path) -> None:
    odd = ("a=b", "a,b", "a:b@c", "a//b", "../a", "/", "猫 🐈", "{", "}", "x" * 300, "x" * 299 + "y")
    names = [*odd, *(f"class {number}" for number in range(400))]  # more scores than MLflow takes at once
    scores = {name: {"precision": 0.5, "recall": number / 1000, "f1": 0.5} for number, name in enumerate(names)}
    store.connect()
    dataset = read_dataset()
    with runs.open_run(dataset, {}) as run_id:
        runs.log_evaluation(run_id, dataset, {"accuracy": 0.5, "per_class": scores})
    logged = MlflowClient().get_run(run_id).data.metrics
    assert len(logged) == 1 + 3 * len(names)
    recalls = [value for name, value in logged.items() if name.startswith("test_per_class/") and "recall" in name]
    assert sorted(recalls) == [number / 1000 for number in range(len(names))]


def test_the_logged_model_is_the_trained_one_and_no_pickle(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    outputs = only_run().outputs
    assert outputs is not None
    loaded = mlflow.pyfunc.load_model(f"models:/{outputs.model_outputs[0].model_id}")
    images = torch.randint(256, (5, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Classifier(model_file.from_bytes(files.MODEL.read_bytes()).cnn)(images).numpy()
    assert loaded.input_example.shape == (2, 28, 28, 1)
    for count in (5, 1, 3):
        np.testing.assert_allclose(loaded.predict(images[:count].numpy()), expected[:count], atol=1e-6)
    with pytest.raises(mlflow.MlflowException, match=r"\(-1, 28, 28, 1\)"):
        loaded.predict(np.zeros((2, 32, 32, 1), dtype=np.uint8))


def test_a_model_is_logged_once_and_one_that_was_cut_off_again(finished_copy: Path) -> None:
    evaluate.main()
    evaluate.main()
    whole = only_run().outputs
    assert whole is not None
    assert len(whole.model_outputs) == 1

    started = mlflow.initialize_logged_model(name="model", source_run_id=only_run().info.run_id)  # and then the kill
    MlflowClient().log_outputs(only_run().info.run_id, [LoggedModelOutput(started.model_id, step=0)])
    dataset, model = read_dataset(), files.MODEL.read_bytes()
    arguments = model_file.from_bytes(model).cnn, dataset, files.sha256(model)
    assert models.log_model(only_run().info.run_id, *arguments) == whole.model_outputs[0].model_id
    MlflowClient().delete_logged_model(whole.model_outputs[0].model_id)
    again = models.log_model(only_run().info.run_id, *arguments)
    assert again not in (started.model_id, whole.model_outputs[0].model_id)
    assert mlflow.pyfunc.load_model(f"models:/{again}").predict(np.zeros((1, 28, 28, 1), dtype=np.uint8)).shape == (
        1,
        10,
    )
    assert only_run().info.status == "FINISHED"


@pytest.mark.usefixtures("either_store")
@pytest.mark.faults
def test_fault_21_a_training_that_diverges_is_a_failed_run_and_writes_nothing(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.learning_rate": 1e6})
    with pytest.raises(
        Fault, match=r"the training loss is .* in epoch 1: try a lower train.learning_rate than 1e\+06 in params.yaml"
    ):
        train.main()
    run = only_run()
    assert run.info.status == "FAILED"
    assert "the training loss is" in run.data.tags["failure"]
    assert not (workspace / "models").exists()
    assert not (workspace / files.HISTORY).exists()


@pytest.mark.usefixtures("either_store")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_training_is_a_killed_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    def interrupt(run: object, epoch: object) -> None:
        raise interruption

    monkeypatch.setattr(TrainingRun, "log_epoch", interrupt)
    with pytest.raises(type(interruption)):
        train.main()
    assert only_run().info.status == "KILLED"


@pytest.mark.slow
def test_a_model_from_the_cache_gets_a_run_that_says_so(finished_copy: Path) -> None:
    assert every_run() == []
    write_params(finished_copy, QUICK | {"model.dropout": 0.1})
    visualize.main()
    write_params(finished_copy, QUICK)  # evaluate refuses a model of other parameters
    evaluate.main()
    run = only_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags["restored"] == "true"
    assert run.data.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert run.data.params["model.dropout"] == "0.5"  # from the model file, whatever params.yaml said then
    assert (run.data.params["seed"], run.data.params["train.epochs"]) == ("0", "2")
    assert run.data.tags["params.sha256"] == read_params().sha256
    assert run.data.tags["data.sha256"] == read_dataset().sha256
    assert not {"git.commit", "code", "torch.version", "cpu.threads"} & set(run.data.tags)  # nobody knows these
    history = files.read_table(files.HISTORY, made_by="train")
    points = MlflowClient().get_metric_history(run.info.run_id, "validation_loss")
    assert [(point.step, point.value) for point in points] == [
        (int(row["epoch"]), float(row["validation_loss"])) for row in history
    ]
    assert "test_accuracy" in run.data.metrics
    assert len(MlflowClient().list_artifacts(run.info.run_id, "figures")) == 18


def test_the_newest_run_of_a_model_is_the_one_that_is_written_into(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": 1, "train.threads": 1})
    train.main()
    train.main()
    evaluate.main()
    newest, oldest = every_run()
    assert newest.data.tags["model.sha256"] == oldest.data.tags["model.sha256"]
    assert "test_accuracy" in newest.data.metrics
    assert "test_accuracy" not in oldest.data.metrics


@pytest.mark.faults
def test_fault_51_the_newest_run_and_evaluation_are_not_those_of_a_clock_that_steps_back(workspace: Path) -> None:
    store.connect()
    dataset, tags = read_dataset(), {"model.sha256": "a" * 64, "fingerprint": "f"}

    def later(table: str, column: str) -> None:
        with closing(sqlite3.connect(workspace / "mlflow.db")) as database, database:
            database.execute(f"UPDATE {table} SET {column} = {column} + 3600000")

    for _ in range(3):
        with runs.open_run(dataset, dict(tags)) as newest:
            pass
        assert runs.finished_run("f", "a" * 64) == newest
        later("runs", "start_time")
    for accuracy in (0.9, 0.8, 0.7):
        runs.log_evaluation(newest, dataset, {"accuracy": accuracy})
        assert mlflow.get_run(newest).data.metrics["test_accuracy"] == accuracy
        later("metrics", "timestamp")
        later("latest_metrics", "timestamp")


def test_a_run_that_failed_is_never_written_into(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": 1})
    train.main()
    good = only_run().info.run_id
    failed = mlflow.start_run(tags={"model.sha256": files.sha256(files.MODEL.read_bytes())}).info.run_id
    mlflow.end_run("FAILED")
    evaluate.main()
    assert "test_accuracy" in mlflow.get_run(good).data.metrics
    assert "test_accuracy" not in mlflow.get_run(failed).data.metrics


@pytest.mark.faults
@pytest.mark.parametrize("answer", ["closed", pytest.param("silent", marks=pytest.mark.slow)])
@pytest.mark.parametrize("store", ["http://127.0.0.1:{port}", "postgresql+psycopg://mary:hush@127.0.0.1:{port}/runs"])
def test_fault_12_an_unresponsive_server_is_reported_within_ten_seconds(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, answer: str, store: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if answer == "silent" else 9
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(port=port))
        started = time.perf_counter()
        named = store.format(port=port).replace("mary:hush", "***")
        with pytest.raises(Fault, match=re.escape(f"the tracking store {named} failed")) as error:
            train.main()
        assert "hush" not in str(error.value)
        assert time.perf_counter() - started < 10


class Unreachable:
    """A store that answers for some time, and then does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.patch, self.answers, self.whole = monkeypatch, after, MlflowClient.log_batch
        monkeypatch.setattr(MlflowClient, "log_batch", self.log_batch)

    def log_batch(self, *arguments: Any, **named: Any) -> None:
        self.answers -= 1
        if self.answers < 0:
            raise mlflow.MlflowException("(sqlite3.OperationalError) database is locked\n[SQL: ...]")
        self.whole(MlflowClient(), *arguments, **named)

    def comes_back(self) -> None:
        self.patch.setattr(MlflowClient, "log_batch", self.whole)


@pytest.mark.usefixtures("either_store")
@pytest.mark.faults
def test_fault_13_a_store_that_goes_away_in_mid_training_costs_a_warning_and_no_number(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(workspace, QUICK | {"train.epochs": 4})
    store = Unreachable(monkeypatch, after=1 + 2)  # the parameters, and two epochs
    train.main()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "database is locked): training continues without it" in warnings[0]
    assert ": nothing is lost: the missing data is in " in warnings[1]
    assert files.MODEL.exists()
    assert len(files.read_table(files.HISTORY, made_by="train")) == 4
    assert "model.sha256" not in only_run().data.tags

    store.comes_back()
    evaluate.main()
    run = only_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert run.data.params["parameters"] == "34826"
    points = MlflowClient().get_metric_history(run.info.run_id, "validation_loss")
    rows = files.read_table(files.HISTORY, made_by="train")
    assert [(point.step, point.value) for point in points] == [
        (number, float(row["validation_loss"])) for number, row in enumerate(rows, 1)
    ]
    assert delivery.undelivered() == []
    assert run.info.end_time < time.time() * 1000 - 100  # when the training ended, not when the update was sent


@pytest.mark.usefixtures("either_store")
def test_what_could_not_be_sent_is_sent_once_also_when_that_is_interrupted(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(workspace, QUICK | {"train.epochs": 3})
    store = Unreachable(monkeypatch, after=1)
    train.main()
    for answers in (0, 1, 2):  # the rest fails again and again, each time a little later
        store.answers = answers
        with pytest.raises(Fault, match="database is locked"):
            evaluate.main()
        assert len(delivery.undelivered()) == 1
    store.comes_back()
    evaluate.main()
    points = MlflowClient().get_metric_history(only_run().info.run_id, "train_loss")
    assert [point.step for point in points] == [1, 2, 3]
    assert delivery.undelivered() == []


@pytest.mark.parametrize("content", [b'{"run_', b"{}", b"[]", b'{"rows": {"x": {}}, "times": {}}', b"\xff"])
def test_a_damaged_file_of_updates_stops_nothing_and_stays(
    finished_copy: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = files.checkpoints_folder() / f"abc{delivery.SUFFIX}"
    files.write(path, content)
    runs.close_stale_runs()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"warning: {path} is damaged (")
    assert printed.endswith("), so its run stays incomplete: delete the file\n")
    assert path.read_bytes() == content


@needs_namespaces
@pytest.mark.faults
@pytest.mark.slow
def test_fault_3_a_full_disk_with_the_artifacts_costs_the_live_images_and_no_number(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.epochs": 6})
    (workspace / "mlruns").mkdir(exist_ok=True)
    small = f"mount -t tmpfs -o size=60k tmpfs mlruns && exec {sys.executable} -m pipeline.train"
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", small],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)},
        capture_output=True,
        text=True,
        check=False,
    )
    warning = (
        r"warning: the tracking store failed \(\[Errno 28\] .*: make room on that disk\): .* without live images\n"
    )
    assert re.fullmatch(warning, done.stderr), done.stderr
    assert done.returncode == 0
    store.connect()
    run = only_run()
    assert run.info.status == "FINISHED"
    assert len(MlflowClient().get_metric_history(run.info.run_id, "validation_loss")) == 6


def test_what_is_of_another_store_stays(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Unreachable(monkeypatch, after=1)
    train.main()
    store.comes_back()
    (path,) = delivery.undelivered()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / 'other.db'}")
    evaluate.main()
    assert path.exists()
    assert f"{path} belongs to a run that this tracking store does not have" in capsys.readouterr().err


@pytest.mark.usefixtures("either_store")
def test_a_run_whose_process_was_killed_is_closed_and_one_that_lives_is_not(workspace: Path) -> None:
    store.connect()
    experiment = store.experiment_id()
    here = {"process.host": socket.gethostname()}
    this = processes.this()
    place = this.partition(" in ")[2]
    of_runs = {
        "dead": here | {"process": f"999999999 since 1 in {place}"},
        "of an older version": here | {"process": "999999999 since 1"},
        "its number is another's now": here | {"process": f"{os.getpid()} since 1 in {place}"},
        "alive": here | {"process": this},
        "in another container": here | {"process": f"999999999 since 1 in {place.split()[0]} pid:[1]"},
        "elsewhere": {"process.host": "another machine", "process": "1 since 1"},
        "not ours": {},
    }
    for name, tags in of_runs.items():
        MlflowClient().create_run(experiment, tags=tags, run_name=name)
    runs.close_stale_runs()
    statuses = {str(run.info.run_name): run.info.status for run in every_run()}
    assert statuses == {
        "dead": "FAILED",
        "of an older version": "FAILED",
        "its number is another's now": "FAILED",
        "alive": "RUNNING",
        "in another container": "RUNNING",
        "elsewhere": "RUNNING",
        "not ours": "RUNNING",
    }


@pytest.mark.usefixtures("either_store")
def test_a_run_from_before_a_restart_is_closed_where_no_other_machine_has_the_store(workspace: Path) -> None:
    """Another machine of the same name, which writes to the same server, was not started when this one was either."""
    store.connect()
    tags = {"process.host": socket.gethostname(), "process": "1 since 1 in 0b0c2b6e-0000 pid:[1]"}
    run = MlflowClient().create_run(store.experiment_id(), tags=tags)
    runs.close_stale_runs()
    is_file = addresses.address().startswith("sqlite")
    assert MlflowClient().get_run(run.info.run_id).info.status == ("FAILED" if is_file else "RUNNING")


@pytest.mark.usefixtures("either_store")
def test_a_run_that_was_closed_and_then_ends_well_has_no_failure(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(run: TrainingRun, epoch: object) -> None:
        MlflowClient().set_tag(run.run_id, "failure", "its process was killed, or its machine went down")
        MlflowClient().set_terminated(run.run_id, "FAILED")

    monkeypatch.setattr(TrainingRun, "log_epoch", close)
    train.main()
    run = only_run()
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_the_experiment_of_dvc_names_the_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "bold-idea")
    monkeypatch.setenv("DVC_STAGE", "train")
    write_params(workspace, QUICK | {"train.epochs": 1, "train.threads": 1})
    train.main()
    assert only_run().info.run_name == "bold-idea"
    assert only_run().data.tags["dvc.exp"] == "bold-idea"
    assert only_run().data.tags["dvc.stage"] == "train"
    assert only_run().data.tags["cpu.threads"] == "1"


def test_the_commit_is_in_the_tags_where_there_is_one(workspace: Path) -> None:
    def git(*words: str) -> str:
        return machine._git_or_none("-c", "user.name=n", "-c", "user.email=e@x", *words) or ""

    assert {"git.commit", "git.dirty"} & set(machine.environment_tags()) == set()
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    tags = machine.environment_tags()
    assert tags["git.commit"] == git("rev-parse", "HEAD")
    assert len(tags["git.commit"]) == 40
    assert tags["git.dirty"] == "false"
    write_params(workspace, {"seed": 7})
    assert machine.environment_tags()["git.dirty"] == "true"


def test_the_store_is_the_one_that_mlflow_ui_opens(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()
    store.connect()
    assert (workspace / "mlflow.db").exists()
    experiment = mlflow.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    assert experiment.artifact_location == (workspace / "mlruns").as_uri()
    assert MlflowClient().get_experiment("0").artifact_location == (workspace / "mlruns/0").as_uri()


@pytest.mark.faults
def test_fault_30_a_store_that_cannot_be_used_is_one_line_without_the_password(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://mary:secret@host/db")
    with pytest.raises(Fault) as error:
        store.connect()
    assert str(error.value).startswith("the tracking store nonsense://***@host/db failed: ")
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert os.environ["MLFLOW_TRACKING_URI"].endswith("db")


@pytest.mark.faults
def test_fault_36_tags_of_runs_that_somebody_has_changed_are_one_line_or_leave_the_run_alone(workspace: Path) -> None:
    store.connect()
    client, number = MlflowClient(), store.experiment_id()
    for process in ({}, {runs.PROCESS: "garbage"}, {runs.PROCESS: "-3 since 1"}):
        client.create_run(number, tags={runs.HOST: socket.gethostname()} | process)
    assert runs.stale_runs() == []  # whose process may be alive
    study, *trials = (client.create_run(number).info.run_id for _ in range(3))
    for run_id, trial in zip(trials, ("0", "first"), strict=True):
        client.set_tag(run_id, studies.TRIAL, trial)
        client.set_tag(run_id, "mlflow.parentRunId", study)
    with pytest.raises(Fault, match=f"the run {trials[1]} of a trial has the tag trial.number 'first', which is not a"):
        studies.StudyRun(study, number, read_params(), {}).log_missing([])
    client.set_tag(study, runs.SEQUENCE, "abc")
    with pytest.raises(Fault, match=f"the run {study} has the tag run.sequence 'abc', which is not a number: delete"):
        train.main()
    client.delete_tag(study, runs.SEQUENCE)
    assert runs._last_sequence() == 0
