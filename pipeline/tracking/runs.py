"""MLflow runs: open one, find one by its hashes, and write numbers, figures, data sets and the model into it."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, RunStatus
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline import files
from pipeline.errors import Fault, without_password
from pipeline.images.splits import Dataset
from pipeline.network.cnn import CNN, parameter_count
from pipeline.network.model_file import Saved
from pipeline.network.training import Epoch
from pipeline.params import MACHINE, Params, digest, flat
from pipeline.tracking import lineage
from pipeline.tracking.lineage import PARAMS_SHA256

EXPERIMENT = "convtrack"
MODEL_SHA256 = "model.sha256"
EVALUATION = "evaluation"  # the folder of a run's artifacts with what evaluate wrote
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
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of a few kilobytes
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
    tags = {PARAMS_SHA256: params.sha256, lineage.CODE: lineage.code()} | lineage.surroundings()
    with store_faults(), open_run(dataset, tags) as run_id:
        mlflow.log_params(params.recipe | {f"train.{knob}": getattr(params.train, knob) for knob in MACHINE})
        yield run_id


@contextmanager
def open_run(
    dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None
) -> Iterator[str]:
    """A new run with its tags and data sets, or an earlier one gone on with; yields its id."""
    run_id = mlflow.start_run(
        run_id=run_id, run_name=name or _run_name(dataset.name), tags=dataset.tags | tags, log_system_metrics=False
    ).info.run_id
    try:
        _log_inputs(
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


def _log_inputs(run_id: str, inputs: list[DatasetInput]) -> None:
    try:
        MlflowClient().log_inputs(run_id, inputs)
    except STORE_ERRORS as error:
        if "UNIQUE" not in str(error).upper():
            raise
        MlflowClient().log_inputs(run_id, inputs)  # another run has told the store of the same data a moment before


def _end(status: int, failure: str = "") -> None:
    with suppress(*STORE_ERRORS):  # a store that is gone must not hide why the run ended
        if failure:
            mlflow.set_tag("failure", without_password(failure)[:5000])
        mlflow.end_run(RunStatus.to_string(status))


def _run_name(otherwise: str) -> str:
    return os.environ.get("DVC_EXP_NAME") or otherwise


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
def find_or_restore(model_sha256: str, saved: Saved, dataset: Dataset, history: Sequence[Mapping[str, str]]) -> str:
    """The id of the newest finished run whose model has this hash.

    Where there is none, because DVC took the model from its cache, a run is opened from what the files tell and
    tagged ``restored``: the recipe, the data and the rows of history.csv, not on what machine and by what code.
    """
    found = mlflow.search_runs(
        filter_string=f"tags.`{MODEL_SHA256}` = '{model_sha256}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    if found:
        return str(found[0].info.run_id)
    tags = {**saved.data, PARAMS_SHA256: digest(saved.recipe), "restored": "true"}
    with open_run(dataset, tags) as run_id:
        mlflow.log_params(dict(saved.recipe))
        for row in history:
            mlflow.log_metrics({key: float(row[key]) for key in row if key != "epoch"}, step=int(row["epoch"]))
        describe_model(saved.cnn, dataset, model_sha256)
    return run_id


@store_faults()
def lineage_of(run_id: str) -> dict[str, str]:
    """The tags of a run that say where its model comes from: all but those that MLflow set for itself."""
    tags = MlflowClient().get_run(run_id).data.tags
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.")}


@store_faults()
def log_evaluation(run_id: str, dataset: Dataset, scores: Mapping[str, object]) -> None:
    """The scores on the test images, and that data set, into a run that has ended; its status stays."""
    numbers = {key: value for key, value in flat(scores).items() if isinstance(value, int | float)}
    mlflow.log_metrics({_metric_name(f"test_{key}"): value for key, value in numbers.items()}, run_id=run_id)
    _log_inputs(run_id, [_dataset_input(dataset, "test", "testing")])


def _metric_name(key: str) -> str:
    """A name that mlflow takes, whatever a class is called. What stands before the slash is a section in the UI."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace(".", "/", 1))


@store_faults()
def log_files(run_id: str, paths: Iterable[Path], folder: str) -> None:
    """Files into a run that has ended; its status stays."""
    for path in paths:
        MlflowClient().log_artifact(run_id, str(path), folder)
