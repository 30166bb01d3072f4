"""MLflow runs: open one, find one by its hashes, and write numbers, files and data sets into it."""

import os
import posixpath
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, Metric, Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.validation import MAX_METRICS_PER_BATCH
from numpy.typing import NDArray

from pipeline import files, machine, processes
from pipeline.data.splits import Dataset
from pipeline.errors import Fault, printable, without_password
from pipeline.model.cnn import CNN, parameter_count
from pipeline.model.model_file import TrainedModel
from pipeline.model.training import Epoch
from pipeline.params import Params, digest, flat
from pipeline.tracking import delivery, lineage
from pipeline.tracking.addresses import configured, sqlite_path
from pipeline.tracking.delivery import FAILURE, PendingUpdates
from pipeline.tracking.faults import STORE_ERRORS
from pipeline.tracking.lineage import PARAMS_SHA256
from pipeline.tracking.store import equals, experiment_id, short_timeouts, store_faults

MODEL_SHA256 = "model.sha256"
EVALUATION = "evaluation"  # the folder of a run's artifacts with what evaluate wrote
DATA = "data"  # the same with what prepare wrote about the images
FINGERPRINT = "fingerprint"
HOST, PROCESS = "process.host", "process"  # the process of a run: if it dies, the run is closed
SEQUENCE = "run.sequence"  # which run is newer: clocks step back
MAX_TAG_LENGTH = 5000  # characters of a tag
MAX_METRIC_NAME = 200  # characters of the name of a score


@store_faults()
def close_stale_runs() -> None:
    """Before a command writes into the store: send what earlier ones could not, and close the runs they left open."""
    delivery.deliver_all()
    client = MlflowClient()
    for run_id in stale_runs():
        client.set_tag(run_id, FAILURE, "its process was killed, or its machine went down")
        client.set_terminated(run_id, "FAILED")


@store_faults()
def stale_runs() -> list[str]:
    """The ids of open runs whose process, on this machine, has died."""
    running = f"attributes.status = 'RUNNING' and {equals(f'tags.`{HOST}`', socket.gethostname())}"
    undelivered = {path.name.partition(".")[0] for path in delivery.undelivered()}  # their end is still to be sent
    is_file = sqlite_path(configured()) is not None  # a server has runs of other machines too
    return [
        str(run.info.run_id)
        for run in MlflowClient().search_runs([experiment_id()], running)
        if _has_ended(run, is_file) and run.info.run_id not in undelivered
    ]


def _has_ended(run: Run, is_file: bool) -> bool:
    """Whether the process of an open run has ended for sure; not where somebody has changed the tag that names it."""
    try:
        return processes.has_ended(run.data.tags.get(PROCESS, ""), same_machine=is_file)
    except ValueError:
        return False


class TrainingRun:
    """An open run that a training writes into."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self._logger = run_id, delivery.AsyncLogger(run_id)

    def log_epoch(self, epoch: Epoch) -> None:
        """Send the metrics of an epoch."""
        row = asdict(epoch)
        self._logger.log_metrics(row.pop("epoch"), row)

    def log_images(self, epoch: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Send images (H, W, 3) by their names; MLflow's page plays them epoch by epoch."""
        for name, image in images.items():
            self._logger.log_image(epoch, name, image)

    def describe_model(self, cnn: CNN, dataset: Dataset, model_sha256: str) -> None:
        """Add the tags by which the trained model is found; they are sent when the run ends."""
        _describe_model(self._logger.pending, cnn, dataset, model_sha256)

    def end(self, status: str, failure: str = "") -> None:
        """See delivery.AsyncLogger."""
        if failure:
            self._logger.pending.tags[FAILURE] = failure
        self._logger.end(status)


@contextmanager
def training_run(
    params: Params, dataset: Dataset, device: torch.device, fingerprint: str, continues: str | None = None
) -> Iterator[TrainingRun]:
    """Open a run with its parameters, tags and data sets. ``continues`` is the run of the interrupted training.

    It ends FINISHED; KILLED when interrupted; FAILED with the reason in the tag ``failure``. Once it is open, a store
    that fails costs only a warning.
    """
    tags = {PARAMS_SHA256: params.sha256, lineage.CODE: lineage.code(), FINGERPRINT: fingerprint}
    with store_faults():
        run_id = _begin(dataset, tags | machine.environment_tags(device))
        facts = flat(params.model_dump(mode="json", include={"seed", "data", "model", "train"}))
        mlflow.log_params(facts, run_id=run_id)
        if continues:
            _link(continues, run_id)
    with short_timeouts():
        run = TrainingRun(run_id)
        with _ends_with_outcome(run.end):
            yield run


def _link(interrupted: str, run_id: str) -> None:
    """Link the two runs of one training. The interrupted one may be in another store."""
    client = MlflowClient()
    with suppress(MlflowException):
        client.set_tag(interrupted, "continued.by", run_id)
        client.set_tag(run_id, "continues", interrupted)


@contextmanager
def open_run(
    dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None
) -> Iterator[str]:
    """Open a new run with its tags and data sets, or an earlier one again; yields its id."""
    run_id = _begin(dataset, tags, name, run_id)
    with _ends_with_outcome(partial(_end, run_id)):
        yield run_id


@contextmanager
def _ends_with_outcome(end: Callable[[str, str], object]) -> Iterator[None]:
    """Call ``end`` with the final status of a run, and the reason if it failed."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        end("KILLED", "")
        raise
    except BaseException as error:
        end("FAILED", without_password(f"{type(error).__name__}: {error}")[:MAX_TAG_LENGTH])
        raise
    end("FINISHED", "")


def _begin(dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None) -> str:
    client = MlflowClient()
    tags = dataset.tags | tags | {HOST: socket.gethostname(), PROCESS: processes.this()}
    if run_id is None:
        tags[SEQUENCE] = f"{_last_sequence() + 1:08d}"  # compared as text
        with_context = resolve_tags(tags)  # mlflow adds who runs what
        start = round(time.time() * 1000)
        run = client.create_run(experiment_id(), start, with_context, name or _run_name(dataset.name))
        run_id = str(run.info.run_id)
    else:
        client.update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))
        for tag in tags.items():
            client.set_tag(run_id, *tag)
    _log_inputs(
        run_id, [_dataset_input(dataset, "train", "training"), _dataset_input(dataset, "validation", "validation")]
    )
    return run_id


def _last_sequence() -> int:
    found = _newest(f"tags.`{SEQUENCE}` != ''")
    if not found:
        return 0
    try:
        return int(found.data.tags[SEQUENCE])
    except ValueError as error:
        reason = f"the tag {SEQUENCE} '{printable(found.data.tags[SEQUENCE])}', which is not a number"
        raise Fault(f"the run {found.info.run_id} has {reason}: delete that tag") from error


def _newest(matching: str) -> Run | None:
    found = mlflow.search_runs(
        filter_string=matching,
        order_by=[f"tags.`{SEQUENCE}` DESC", "attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    return found[0] if found else None


def _end(run_id: str, status: str, failure: str) -> None:
    # A store that is gone must not hide why the run ended.
    with store_faults() if status == "FINISHED" else suppress(*STORE_ERRORS):
        if failure:
            MlflowClient().set_tag(run_id, FAILURE, failure)
        delivery.end_run(MlflowClient(), run_id, status)


def _log_inputs(run_id: str, inputs: list[DatasetInput]) -> None:
    try:
        MlflowClient().log_inputs(run_id, inputs)
    except STORE_ERRORS as error:
        if "UNIQUE" not in str(error).upper():
            raise
        MlflowClient().log_inputs(run_id, inputs)  # another run has just stored the same data set


def _dataset_input(dataset: Dataset, split: str, context: str) -> DatasetInput:
    facts = dataset.splits[split]
    sources: Any = mlflow.data.sources  # mlflow creates the classes in it when it is imported
    # mlflow reads shapes and types off the arrays, and computes its digest from a few of their values. Ours covers
    # every byte, so arrays that only have the right shape are enough.
    described = from_numpy(
        np.broadcast_to(np.uint8(0), (facts.count, *dataset.image_shape)),
        source=sources.LocalArtifactDatasetSource(str(files.PREPARED / f"{split}.safetensors")),
        targets=np.broadcast_to(np.int64(0), (facts.count,)),
        name=f"{dataset.name}-{split}",
        digest=facts.sha256[:32],
    )
    return DatasetInput(described._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])


def _run_name(default: str) -> str:
    return os.environ.get("DVC_EXP_NAME") or default


def _describe_model(updates: PendingUpdates, cnn: CNN, dataset: Dataset, model_sha256: str) -> None:
    """Add the parameters and tags by which the model of a run is found."""
    updates.params["parameters"] = str(parameter_count(cnn.architecture))
    updates.tags[MODEL_SHA256] = model_sha256
    updates.tags["mlflow.runName"] = _run_name(f"{dataset.name}-{model_sha256[:8]}")


@store_faults()
def finished_run(fingerprint: str, model_sha256: str) -> str | None:
    """The id of the newest finished run with this fingerprint that trained this model."""
    return _newest_finished(
        f"{equals(f'tags.{FINGERPRINT}', fingerprint)} and {equals(f'tags.`{MODEL_SHA256}`', model_sha256)}"
    )


def _newest_finished(matching: str) -> str | None:
    found = _newest(f"{matching} and attributes.status = 'FINISHED'")
    return str(found.info.run_id) if found else None


def run_of_model(model_sha256: str) -> str | None:
    """The id of the newest finished run whose model has this hash."""
    return _newest_finished(equals(f"tags.`{MODEL_SHA256}`", model_sha256))


@store_faults()
def find_or_restore(
    model_sha256: str, trained: TrainedModel, dataset: Dataset, history: Sequence[Mapping[str, str]]
) -> str:
    """The id of the newest finished run whose model has this hash.

    If DVC restored it from its cache there may be none. Then a run tagged ``restored`` is created from the files:
    they hold the recipe, the data and the rows of history.csv, but not the machine and the code.
    """
    if found := run_of_model(model_sha256):
        return found
    tags = {**trained.data, PARAMS_SHA256: digest(trained.recipe), "restored": "true"}
    with open_run(dataset, tags) as run_id:
        updates = PendingUpdates(run_id, params={key: str(value) for key, value in trained.recipe.items()})
        for row in history:
            updates.add(int(row["epoch"]), {key: float(row[key]) for key in row if key != "epoch"})
        _describe_model(updates, trained.cnn, dataset, model_sha256)
        delivery.deliver(updates)
    return run_id


@store_faults()
def lineage_of(run_id: str) -> dict[str, str]:
    """The tags of a run that say where its model comes from: not MLflow's own, and not those of its process."""
    tags = MlflowClient().get_run(run_id).data.tags
    of_the_run = (HOST, PROCESS, SEQUENCE)
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.") and key not in of_the_run}


@store_faults()
def log_evaluation(run_id: str, dataset: Dataset, scores: Mapping[str, object]) -> None:
    """Write the scores on the test images, and that data set, into a run that has ended; its status stays."""
    numbers = {key: value for key, value in flat(scores).items() if isinstance(value, int | float)}
    names, now = _metric_names(numbers), round(time.time() * 1000)
    # MLflow shows the value of the highest step, and of equal steps that of the latest time.
    step = len(MlflowClient().get_metric_history(run_id, names[0]))
    log_metrics(run_id, [Metric(*each, now, step) for each in zip(names, numbers.values(), strict=True)])
    _log_inputs(run_id, [_dataset_input(dataset, "test", "testing")])


def log_metrics(run_id: str, metrics: Sequence[Metric]) -> None:
    """Write metrics into a run, as many at a time as MLflow takes."""
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        MlflowClient().log_batch(run_id, metrics[start : start + MAX_METRICS_PER_BATCH])


def _metric_names(keys: Iterable[str]) -> list[str]:
    """Names that mlflow takes, each a different one, whatever the classes are called."""
    names = dict[str, None]()
    for key in keys:
        name = _metric_name(f"test_{key}")
        names[name if name not in names else f"{name} {len(names)}"] = None
    return list(names)


def _metric_name(key: str) -> str:
    """A name that mlflow takes. The part before the first slash is a section in the UI."""
    name = re.sub(r"[^\w\-. :/]", "_", key.replace(".", "/", 1))
    if posixpath.normpath(name) != name:  # mlflow takes no name that would be another as a path
        section, slash, rest = name.partition("/")
        name = section + slash + rest.replace("/", "_")
    if len(name) <= MAX_METRIC_NAME:
        return name
    half = MAX_METRIC_NAME // 2 - 1  # the end says which score it is
    return f"{name[:half]}..{name[-half:]}"


@store_faults()
def log_files(run_id: str, paths: Iterable[Path], folder: str) -> None:
    """Copy files into a run that has ended; its status stays."""
    for path in paths:
        MlflowClient().log_artifact(run_id, str(path), folder)
