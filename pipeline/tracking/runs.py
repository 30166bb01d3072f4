"""MLflow runs: open one, find one by its hashes, and write numbers, figures, data sets and the model into it."""

import fcntl
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import mlflow
import numpy as np
import psutil
import sqlalchemy
import torch
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from pipeline import files, machine
from pipeline.data.splits import Dataset
from pipeline.errors import without_password
from pipeline.explain import live_images
from pipeline.model.cnn import CNN, parameter_count
from pipeline.model.model_file import TrainedModel
from pipeline.model.training import Epoch
from pipeline.params import MACHINE_PARAMETERS, Params, digest, flat
from pipeline.tracking import delivery, lineage
from pipeline.tracking.lineage import PARAMS_SHA256
from pipeline.tracking.store import STORE_ERRORS, store_faults

EXPERIMENT = "convtrack"
MODEL_SHA256 = "model.sha256"
EVALUATION = "evaluation"  # the folder of a run's artifacts with what evaluate wrote
FINGERPRINT = "fingerprint"
SECONDS_FOR_A_DATABASE = 8
ROOM_FOR_A_DATABASE = 8 << 20  # bytes: an empty one, a copy of it and what SQLite keeps beside it
HOST, PROCESS = "process.host", "process"  # which process writes a run, so that one that died is known


@store_faults()
def connect() -> None:
    """Point mlflow at ``MLFLOW_TRACKING_URI``, else at mlflow.db and mlruns/ in the repository's root.

    These two are also where `mlflow ui` looks when it is started there without a flag. Raises Fault.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(given or own_store())
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of a few kilobytes
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database tells of each of its migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it also raises
    # mlflow itself lets several processes make the tables of an empty database at once, and then all but one fail.
    with one_at_a_time("connect"), delivery.quick_answers():
        _reach_database(given or own_store())
        _make_database(given or own_store())
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            _create_experiment(None if given else (files.root() / "mlruns").as_uri())
        mlflow.set_experiment(EXPERIMENT)


def _reach_database(address: str) -> None:
    """mlflow tries for two minutes to open a database; one on a server that does not answer is given up in seconds."""
    if address.startswith(("postgresql", "mysql")):
        engine = sqlalchemy.create_engine(address, connect_args={"connect_timeout": SECONDS_FOR_A_DATABASE})
        engine.connect().close()
        engine.dispose()


def _make_database(address: str) -> None:
    """An SQLite file that is not there yet, whole or not at all.

    mlflow makes the tables one after the other, and cannot go on where it was killed.
    """
    path = Path(address.removeprefix("sqlite:///"))
    if not address.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    files.check_room(Path(gettempdir()), ROOM_FOR_A_DATABASE)
    with TemporaryDirectory(prefix="convtrack-") as folder:
        made, copied = Path(folder) / "made.db", Path(folder) / "copied.db"
        MlflowClient(f"sqlite:///{made}").search_experiments()  # makes the tables
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(copied)) as target:
            source.backup(target)  # with what may still be in a log beside the file
        files.write(path, copied.read_bytes())


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """No two processes on this machine do this at once in the same store: others wait."""
    with _lock(what).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel, however this process ends
        yield


def _lock(what: str) -> Path:
    """The same file for all who use the same store: beside that of this repository, else named by its address."""
    address = mlflow.get_tracking_uri()
    if address == own_store():
        path = files.root() / "mlruns" / f".{what}.lock"
    else:
        folder = Path(gettempdir()) / f"convtrack-{os.getuid()}"
        path = folder / f"{files.sha256(address.encode())[:16]}.{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def own_store() -> str:
    """The address of the store in this repository, which is used where no other is given."""
    return f"sqlite:///{files.root() / 'mlflow.db'}"


def _create_experiment(artifact_location: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location)
    except MlflowException:
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            raise  # otherwise another process was faster, which is as good


@store_faults()
def close_stale_runs() -> None:
    """Before a command writes into the store: send what earlier ones could not, and close the runs they left open."""
    delivery.deliver_all()
    client = MlflowClient()
    for run_id in left_open():
        client.set_tag(run_id, "failure", "its process was killed, or its machine went down")
        client.set_terminated(run_id, "FAILED")


@store_faults()
def left_open() -> list[str]:
    """The ids of runs of processes on this machine that have died."""
    running = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    found = MlflowClient().search_runs([_experiment_id()], running)
    undelivered = {path.name.partition(".")[0] for path in delivery.undelivered()}  # these will be told how they ended
    return [
        str(run.info.run_id)
        for run in found
        if not _is_alive(run.data.tags[PROCESS]) and run.info.run_id not in undelivered
    ]


def _process() -> str:
    """This process, and no other that may get its number later."""
    return f"{os.getpid()} since {psutil.Process().create_time():.0f}"


def _is_alive(process: str) -> bool:
    number, _, since = process.partition(" since ")
    try:
        return bool(abs(psutil.Process(int(number)).create_time() - int(since)) <= 1)
    except psutil.NoSuchProcess:
        return False


class TrainingRun:
    """An open run, told of a training while it goes on."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self._logger = run_id, delivery.AsyncLogger(run_id)

    def log_epoch(self, epoch: Epoch) -> None:
        """One row of metrics."""
        row = asdict(epoch)
        self._logger.send(row.pop("epoch"), row)

    def show(self, epoch: int, pictures: Mapping[str, live_images.Picture]) -> None:
        """Images of an epoch by their names."""
        for name, picture in pictures.items():
            self._logger.show(epoch, name, picture)

    def describe_model(self, cnn: CNN, dataset: Dataset, model_sha256: str) -> None:
        """What the model that it gave is known by. Told when the run ends."""
        params, tags = _model_facts(cnn, dataset, model_sha256)
        self._logger.updates.params |= params
        self._logger.updates.tags |= tags

    def end(self, status: str, failure: str = "") -> None:
        """See delivery.AsyncLogger."""
        if failure:
            self._logger.updates.tags["failure"] = failure
        self._logger.end(status)


@contextmanager
def training_run(
    params: Params, dataset: Dataset, device: torch.device, fingerprint: str, continues: str | None = None
) -> Iterator[TrainingRun]:
    """Open a run with its parameters, tags and data sets. ``continues`` is the run of which it does the rest.

    It ends FINISHED; KILLED when interrupted; FAILED with the reason in the tag ``failure``. From here on a store that
    fails costs a warning.
    """
    tags = {PARAMS_SHA256: params.sha256, lineage.CODE: lineage.code(), FINGERPRINT: fingerprint}
    with store_faults():
        run_id = _begin(dataset, tags | machine.environment_tags(device))
        facts = params.recipe | {f"train.{knob}": getattr(params.train, knob) for knob in MACHINE_PARAMETERS}
        mlflow.log_params(facts, run_id=run_id)
        if continues:
            _link(run_id, continues)
    with delivery.quick_answers():
        run = TrainingRun(run_id)
        with _ending(run.end):
            yield run


def _link(run_id: str, before: str) -> None:
    """Two runs that are one training in two parts; the first of them may be of another store."""
    client = MlflowClient()
    with suppress(MlflowException):
        client.set_tag(before, "continued.by", run_id)
        client.set_tag(run_id, "continues", before)


@contextmanager
def _ending(end: Callable[[str, str], object]) -> Iterator[None]:
    """Have a run end as what happens inside does: with its status, and the reason where it fails."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        end("KILLED", "")
        raise
    except BaseException as error:
        end("FAILED", without_password(f"{type(error).__name__}: {error}")[:5000])
        raise
    end("FINISHED", "")


@contextmanager
def open_run(
    dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None
) -> Iterator[str]:
    """A new run with its tags and data sets, or an earlier one gone on with; yields its id."""
    run_id = _begin(dataset, tags, name, run_id)
    with _ending(partial(_end, run_id)):
        yield run_id


def _begin(dataset: Dataset, tags: dict[str, str], name: str | None = None, run_id: str | None = None) -> str:
    client = MlflowClient()
    tags = dataset.tags | tags | {HOST: socket.gethostname(), PROCESS: _process()}
    if run_id is None:
        known = resolve_tags(tags)  # mlflow adds who runs what
        run = client.create_run(_experiment_id(), round(time.time() * 1000), known, name or _run_name(dataset.name))
        run_id = str(run.info.run_id)
    else:
        client.update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))
        for tag in tags.items():
            client.set_tag(run_id, *tag)
    _log_inputs(
        run_id, [_dataset_input(dataset, "train", "training"), _dataset_input(dataset, "validation", "validation")]
    )
    return run_id


def _end(run_id: str, status: str, failure: str) -> None:
    # A store that is gone must not hide why the run ended.
    with store_faults() if status == "FINISHED" else suppress(*STORE_ERRORS):
        if failure:
            MlflowClient().set_tag(run_id, "failure", failure)
        MlflowClient().set_terminated(run_id, status)


def _experiment_id() -> str:
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None  # see connect
    return str(experiment.experiment_id)


def _log_inputs(run_id: str, inputs: list[DatasetInput]) -> None:
    try:
        MlflowClient().log_inputs(run_id, inputs)
    except STORE_ERRORS as error:
        if "UNIQUE" not in str(error).upper():
            raise
        MlflowClient().log_inputs(run_id, inputs)  # another run has told the store of the same data a moment before


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


def _model_facts(cnn: CNN, dataset: Dataset, model_sha256: str) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters and tags by which the model that a run gave is known."""
    name = _run_name(f"{dataset.name}-{model_sha256[:8]}")
    return {"parameters": str(parameter_count(cnn.architecture))}, {MODEL_SHA256: model_sha256, "mlflow.runName": name}


@store_faults()
def has_given(fingerprint: str, model_sha256: str) -> str | None:
    """The id of a finished run of the training with this fingerprint that gave this model."""
    return _finished(f"tags.{FINGERPRINT} = '{fingerprint}' and tags.`{MODEL_SHA256}` = '{model_sha256}'")


def _finished(fingerprint: str) -> str | None:
    """The id of the newest finished run of which this filter holds."""
    found = mlflow.search_runs(
        filter_string=f"{fingerprint} and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    return str(found[0].info.run_id) if found else None


@store_faults()
def find_or_restore(
    model_sha256: str, saved: TrainedModel, dataset: Dataset, history: Sequence[Mapping[str, str]]
) -> str:
    """The id of the newest finished run whose model has this hash.

    Where there is none, because DVC took the model from its cache, a run is opened from what the files tell and
    tagged ``restored``: the recipe, the data and the rows of history.csv, not on what machine and by what code.
    """
    if found := _finished(f"tags.`{MODEL_SHA256}` = '{model_sha256}'"):
        return found
    tags = {**saved.data, PARAMS_SHA256: digest(saved.recipe), "restored": "true"}
    with open_run(dataset, tags) as run_id:
        params, facts = _model_facts(saved.cnn, dataset, model_sha256)
        mlflow.log_params(dict(saved.recipe) | params, run_id=run_id)
        for row in history:
            numbers = {key: float(row[key]) for key in row if key != "epoch"}
            mlflow.log_metrics(numbers, step=int(row["epoch"]), run_id=run_id)
        for tag in facts.items():
            MlflowClient().set_tag(run_id, *tag)
    return run_id


@store_faults()
def lineage_of(run_id: str) -> dict[str, str]:
    """The tags of a run that say where its model comes from: not those of MLflow's own and of its process."""
    tags = MlflowClient().get_run(run_id).data.tags
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.") and key not in (HOST, PROCESS)}


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
