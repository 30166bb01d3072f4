"""Send the metrics of a training to its MLflow run in the background.

A thread sends them, so that the training never waits for a store that is slow, locked or unreachable. What was not sent
by the end is saved with the checkpoints, and the next command that writes into the store sends it: once, and in order.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import Fault
from pipeline.tracking.faults import STORE_ERRORS, one_line
from pipeline.tracking.store import short_timeouts

END_TIMEOUT = 10.0  # seconds to wait for the store at the end of a training
SUFFIX = ".undelivered.json"
FAILURE = "failure"  # the tag that says why a run failed
METRICS, IMAGES = "metrics", "images"  # what the thread sends

Send = Callable[[MlflowClient], object]


@dataclass
class PendingUpdates:
    """Data that a run has not received: metrics by their epoch, parameters, tags, and how it ended.

    ``times`` are those of the rows, in milliseconds since 1970, as is ``ended``.
    """

    run_id: str
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = ""
    ended: int = 0

    def add(self, epoch: int, row: Mapping[str, float]) -> None:
        """Add the metrics of an epoch."""
        self.rows[epoch], self.times[epoch] = dict(row), _now()

    def metrics(self, epoch: int) -> list[Metric]:
        """The metrics of an epoch as MLflow takes them, in one call: all or none."""
        return [Metric(name, value, self.times[epoch], epoch) for name, value in self.rows[epoch].items()]


class AsyncLogger:
    """Sends the metrics and images of an open run from a thread, as long as the store answers."""

    def __init__(self, run_id: str) -> None:
        self.pending = PendingUpdates(run_id)
        self._queue: queue.SimpleQueue[tuple[str, Send] | None] = queue.SimpleQueue()
        self._given_up: set[str] = set()
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    def log_metrics(self, epoch: int, row: Mapping[str, float]) -> None:
        """Send the metrics of an epoch, without waiting for the store."""
        self.pending.add(epoch, row)
        metrics = self.pending.metrics(epoch)
        self._queue.put((METRICS, lambda client: client.log_batch(self.pending.run_id, metrics=metrics)))

    def log_image(self, epoch: int, name: str, image: NDArray[np.uint8]) -> None:
        """Send an image (H, W, 3). Unlike metrics it is lost if the store does not accept it."""
        self._queue.put((IMAGES, lambda client: client.log_image(self.pending.run_id, image, key=name, step=epoch)))

    def _send_all(self) -> None:
        client = MlflowClient()
        while (item := self._queue.get()) is not None:
            what, send = item
            if what in self._given_up:
                continue
            try:
                send(client)
            except STORE_ERRORS as error:
                # Images are files: they may be on another disk than the metrics.
                self._given_up |= {IMAGES} if what == IMAGES else {METRICS, IMAGES}
                without = "live images" if what == IMAGES else "it"
                _warn(f"the tracking store failed ({one_line(error)}): training continues without {without}")

    def end(self, status: str) -> None:
        """End the run with this status and send the missing data; save it if the store does not accept it."""
        self.pending.status, self.pending.ended = status, _now()
        self._queue.put(None)
        self._thread.join(END_TIMEOUT / 2)
        self._given_up.add(IMAGES)  # they must not delay the metrics
        self._thread.join(END_TIMEOUT / 2)
        try:
            if self._thread.is_alive():
                raise TimeoutError(f"no answer within {END_TIMEOUT:.0f} s")
            deliver(self.pending)
        except STORE_ERRORS as error:
            _warn(f"the tracking store failed ({one_line(error)}): {self._save()}")

    def _save(self) -> str:
        """Save the pending updates, and say where."""
        path = files.checkpoints_folder() / f"{self.pending.run_id}{SUFFIX}"
        try:
            files.write_json(path, asdict(self.pending))
        except Fault as fault:  # must not hide why the run ended
            return f"the end of the run is lost, {fault}"
        return f"nothing is lost: the missing data is in {path}, and the next `dvc repro` sends it"


def deliver(updates: PendingUpdates) -> None:
    """Send a run its missing data, and end it if ``updates`` has a status. Safe to repeat."""
    client = MlflowClient()
    with short_timeouts():
        for epoch in sorted(set(updates.rows) - _logged_epochs(client, updates)):
            client.log_batch(updates.run_id, metrics=updates.metrics(epoch))
        params = [Param(*each) for each in updates.params.items()]
        client.log_batch(updates.run_id, params=params, tags=[RunTag(*each) for each in updates.tags.items()])
        if updates.status:
            end_run(client, updates.run_id, updates.status, updates.ended)


def end_run(client: MlflowClient, run_id: str, status: str, ended: int | None = None) -> None:
    """End a run. If it ends well, why it had failed before, or was closed as dead, no longer applies."""
    if status == "FINISHED" and FAILURE in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, FAILURE)
    client.set_terminated(run_id, status, ended)


def _logged_epochs(client: MlflowClient, updates: PendingUpdates) -> set[int]:
    if not updates.rows:
        return set()
    name = next(iter(next(iter(updates.rows.values()))))
    return {metric.step for metric in client.get_metric_history(updates.run_id, name)}


def deliver_all() -> None:
    """Send what earlier trainings could not. Updates of a run that this store does not have stay where they are."""
    for path in undelivered():
        try:
            updates = read(path)
        except DamagedError as error:
            _warn(f"{path} is damaged ({error}), so its run stays incomplete: delete the file")
            continue
        try:
            deliver(updates)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            _warn(f"{path} belongs to a run that this tracking store does not have")
            continue
        path.unlink()
        print(f"sent the missing data of run {updates.run_id} to the tracking store")


class DamagedError(Exception):
    """A file that does not hold pending updates."""


def read(path: Path) -> PendingUpdates:
    """The pending updates that were saved in a file. Raises DamagedError."""
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        for by_epoch in ("rows", "times"):  # JSON has text for keys
            fields[by_epoch] = {int(epoch): value for epoch, value in fields[by_epoch].items()}
        return PendingUpdates(**fields)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(one_line(error)) from error


def undelivered() -> list[Path]:
    """The files with pending updates."""
    return sorted(files.checkpoints_folder().glob(f"*{SUFFIX}"))


def _now() -> int:
    return round(time.time() * 1000)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
