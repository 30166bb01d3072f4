"""MLflow runs: open one, find one by its hashes, and write numbers, figures, data sets and the model into it."""

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, LoggedModelStatus, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from sqlalchemy.exc import SQLAlchemyError

from pipeline import files
from pipeline.errors import Fault, without_password
from pipeline.images.splits import Dataset
from pipeline.network.cnn import CNN, Classifier, parameter_count
from pipeline.network.training import Epoch
from pipeline.params import Params

EXPERIMENT = "convtrack"
MODEL_SHA256 = "model.sha256"
DATA_DECIDES = ("image_shape", "class_names")
STORE_ERRORS = (MlflowException, SQLAlchemyError)


@contextmanager
def store_faults() -> Iterator[None]:
    """Errors of the tracking store leave as a Fault of one line. Also a decorator."""
    try:
        yield
    except STORE_ERRORS as error:
        reason = f"the tracking store {mlflow.get_tracking_uri()} failed: {str(error).splitlines()[0]}"
        raise Fault(without_password(reason)) from error


@store_faults()
def connect() -> None:
    """Point mlflow at ``MLFLOW_TRACKING_URI``, else at mlflow.db and mlruns/ in the repository's root.

    These two are also where `mlflow ui` looks when it is started there without a flag. Raises Fault.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(given or f"sqlite:///{files.root() / 'mlflow.db'}")
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database tells of each of its migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it also raises
    with _impatience():
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            _create_experiment(None if given else (files.root() / "mlruns").as_uri())
        mlflow.set_experiment(EXPERIMENT)


@contextmanager
def _impatience() -> Iterator[None]:
    """mlflow tries for four minutes to reach a server; here a wrong address is said in seconds."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    lent = {name: value for name, value in short.items() if name not in os.environ}
    os.environ.update(lent)
    try:
        yield
    finally:
        for name in lent:
            del os.environ[name]


def _create_experiment(artifact_location: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location)
    except MlflowException:
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            raise  # otherwise another process was faster, which is as good


@contextmanager
def training_run(params: Params, dataset: Dataset) -> Iterator[str]:
    """Open a run with its parameters, tags and data sets; yields its id.

    It ends FINISHED; KILLED when interrupted; FAILED with the reason in the tag ``failure``.
    """
    with store_faults(), open_run(dataset, {"params.sha256": params.sha256} | surroundings()) as run_id:
        mlflow.log_params(_flat(params.model_dump(include={"seed", "data", "model", "train"})))
        yield run_id


@contextmanager
def open_run(
    dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None
) -> Iterator[str]:
    """A new run with its tags and data sets, or an earlier one gone on with; yields its id."""
    data = {"data.name": dataset.name, "data.requested": dataset.requested, "data.sha256": dataset.sha256}
    run_id = mlflow.start_run(
        run_id=run_id, run_name=name or _run_name(dataset.name), tags=data | tags, log_system_metrics=False
    ).info.run_id
    try:
        MlflowClient().log_inputs(
            run_id, [_dataset_input(dataset, "train", "training"), _dataset_input(dataset, "validation", "validation")]
        )
        yield run_id
    except (KeyboardInterrupt, SystemExit):
        _end(RunStatus.KILLED)
        raise
    except BaseException as error:
        _end(RunStatus.FAILED, f"{type(error).__name__}: {error}")
        raise
    mlflow.end_run()


def _end(status: int, failure: str = "") -> None:
    with suppress(*STORE_ERRORS):  # a store that is gone must not hide why the run ended
        if failure:
            mlflow.set_tag("failure", without_password(failure)[:5000])
        mlflow.end_run(RunStatus.to_string(status))


def _run_name(otherwise: str) -> str:
    return os.environ.get("DVC_EXP_NAME") or otherwise


def surroundings() -> dict[str, str]:
    """The code and the machine. Names that git or DVC did not give are left out."""
    # The stages write these themselves, so that they say nothing of the code.
    changes = _git("status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock")
    tags = {
        "git.commit": _git("rev-parse", "HEAD"),
        "git.dirty": None if changes is None else str(bool(changes)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "dvc.exp": os.environ.get("DVC_EXP_NAME"),
        "torch.version": torch.__version__,
        "cpu.capability": torch.backends.cpu.get_cpu_capability(),
        "cpu.threads": str(torch.get_num_threads()),
    }
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _flat(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _dataset_input(dataset: Dataset, split: str, context: str) -> DatasetInput:
    facts = dataset.splits[split]
    sources: Any = mlflow.data.sources  # mlflow makes the classes in it when it is imported
    # mlflow reads shapes and types off the arrays, and its own digest off a few of their values. Our digest is that
    # of every byte, so arrays that only have the right shape do.
    described = from_numpy(
        np.broadcast_to(np.uint8(0), (facts.count, *dataset.image_shape)),
        source=sources.LocalArtifactDatasetSource(str(files.PREPARED / f"{split}.safetensors")),
        targets=np.broadcast_to(np.int64(0), (facts.count,)),
        name=f"{dataset.name}-{split}",
        digest=facts.sha256[:32],
    )
    return DatasetInput(described._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])


def log_epoch(epoch: Epoch) -> None:
    """One row of metrics into the open run."""
    row = asdict(epoch)
    mlflow.log_metrics(row, step=row.pop("epoch"))


def describe_model(cnn: CNN, dataset: Dataset, model_sha256: str) -> None:
    """Into the open run, what the model that it gave is known by."""
    mlflow.set_tags({MODEL_SHA256: model_sha256, "mlflow.runName": _run_name(f"{dataset.name}-{model_sha256[:8]}")})
    mlflow.log_param("parameters", parameter_count(cnn.architecture))


@store_faults()
def log_model(run_id: str, cnn: CNN, dataset: Dataset, model_sha256: str) -> str:
    """The model of a run that has ended, if it does not have it yet; its status stays. Returns the model's id.

    The model takes images (N, H, W, C) uint8 and gives class probabilities (N, classes). It is logged when it is
    evaluated, since exporting it is no part of the training.
    """
    found = MlflowClient().search_logged_models(
        experiment_ids=[MlflowClient().get_run(run_id).info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
    )
    for model in found:
        if model.status == LoggedModelStatus.READY:
            return str(model.model_id)
    a = cnn.architecture
    logged = Model.log(
        artifact_path=None,
        flavor=mlflow.pytorch,
        run_id=run_id,
        name="model",
        pytorch_model=Classifier(cnn),
        serialization_format="pt2",
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *a.image_shape))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(a.class_names)))]),
        ),
        input_example=np.zeros((2, *a.image_shape), dtype=np.uint8),  # two rows leave the batch size free
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "torch")],
        tags={MODEL_SHA256: model_sha256, "data.sha256": dataset.sha256},
    )
    return str(logged.model_id)


@store_faults()
def find_or_restore(model_sha256: str, cnn: CNN, dataset: Dataset, history: Sequence[Mapping[str, str]]) -> str:
    """The id of the newest finished run whose model has this hash.

    Where there is none, because DVC took the model from its cache, a run is opened from what the files tell and
    tagged ``restored``: the architecture, the data and the rows of history.csv, not how and where it was trained.
    """
    found = mlflow.search_runs(
        filter_string=f"tags.`{MODEL_SHA256}` = '{model_sha256}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    if found:
        return str(found[0].info.run_id)
    with open_run(dataset, {"restored": "true"}) as run_id:
        layers = {key: value for key, value in asdict(cnn.architecture).items() if key not in DATA_DECIDES}
        mlflow.log_params({f"model.{key}": value for key, value in layers.items()})
        for row in history:
            mlflow.log_metrics({key: float(row[key]) for key in row if key != "epoch"}, step=int(row["epoch"]))
        describe_model(cnn, dataset, model_sha256)
    return run_id


@store_faults()
def log_evaluation(run_id: str, dataset: Dataset, scores: Mapping[str, object]) -> None:
    """The scores on the test images, and that data set, into a run that has ended; its status stays."""
    numbers = {key: value for key, value in _flat(scores).items() if isinstance(value, int | float)}
    mlflow.log_metrics({_metric_name(f"test_{key}"): value for key, value in numbers.items()}, run_id=run_id)
    MlflowClient().log_inputs(run_id, [_dataset_input(dataset, "test", "testing")])


def _metric_name(key: str) -> str:
    """A name that mlflow takes, whatever a class is called. What stands before the slash is a section in the UI."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace(".", "/", 1))


@store_faults()
def log_files(run_id: str, paths: Iterable[Path], folder: str) -> None:
    """Files into a run that has ended; its status stays."""
    for path in paths:
        MlflowClient().log_artifact(run_id, str(path), folder)
