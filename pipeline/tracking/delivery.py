"""The numbers of a training on their way into its MLflow run.

A thread sends them, so that the training waits for no store that is slow, locked or gone. What had not arrived by the
end is put down beside the checkpoints, and sent by the next command that writes into the store: once, and in order.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import Fault
from pipeline.tracking.store import STORE_ERRORS, one_line

PATIENCE = 10.0  # seconds for which the end of a training waits for the store
SUFFIX = ".undelivered.json"
NUMBERS, PICTURES = "numbers", "pictures"  # what is sent


@dataclass
class PendingUpdates:
    """All that a run is still to be told: rows of metrics by their epoch, and how it ended.

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
        """One more row."""
        self.rows[epoch], self.times[epoch] = dict(row), _now()

    def metrics(self, epoch: int) -> list[Metric]:
        """Of a row, as MLflow takes them: all or none."""
        return [Metric(name, value, self.times[epoch], epoch) for name, value in self.rows[epoch].items()]


class AsyncLogger:
    """Sends the rows of an open run while the training goes on, as long as the store answers."""

    def __init__(self, run_id: str) -> None:
        self.updates = PendingUpdates(run_id)
        self._waiting: queue.SimpleQueue[tuple[str, Callable[[MlflowClient], object]] | None] = queue.SimpleQueue()
        self._given_up: set[str] = set()
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    def send(self, epoch: int, row: Mapping[str, float]) -> None:
        """Does not wait for the store."""
        self.updates.add(epoch, row)
        metrics = self.updates.metrics(epoch)
        self._waiting.put((NUMBERS, lambda client: client.log_batch(self.updates.run_id, metrics=metrics)))

    def show(self, epoch: int, name: str, picture: NDArray[np.uint8]) -> None:
        """An image (H, W, 3) that the run's page plays. Unlike a row it is lost where the store does not take it."""
        self._waiting.put(
            (PICTURES, lambda client: client.log_image(self.updates.run_id, picture, key=name, step=epoch))
        )

    def _send_all(self) -> None:
        client = MlflowClient()
        while (waiting := self._waiting.get()) is not None:
            what, send = waiting
            if what in self._given_up:
                continue
            try:
                send(client)
            except STORE_ERRORS as error:
                # Files lie elsewhere than numbers, on a disk of their own maybe.
                self._given_up |= {PICTURES} if what == PICTURES else {NUMBERS, PICTURES}
                without = "live images" if what == PICTURES else "it"
                _warn(f"the tracking store failed ({one_line(error)}): the training goes on without {without}")

    def end(self, status: str) -> None:
        """Tell the run all that it does not know yet, and how it ended; put it down where that cannot be told."""
        self.updates.status, self.updates.ended = status, _now()
        self._waiting.put(None)
        self._thread.join(PATIENCE / 2)
        self._given_up.add(PICTURES)  # they must not hold up the numbers
        self._thread.join(PATIENCE / 2)
        try:
            if self._thread.is_alive():
                raise TimeoutError(f"no answer within {PATIENCE:.0f} s")
            deliver(self.updates)
        except STORE_ERRORS as error:
            _warn(f"the tracking store failed ({one_line(error)}): {self._save()}")

    def _save(self) -> str:
        """What becomes of a updates that nobody takes."""
        path = _path(self.updates.run_id)
        try:
            files.write_json(path, asdict(self.updates))
        except Fault as fault:  # must not hide why the run ended
            return f"the end of the run is not told, {fault}"
        return f"nothing is lost, what the run is still to be told is in {path}, and the next `dvc repro` sends it"


def deliver(updates: PendingUpdates) -> None:
    """Tell a run what it does not know. Done twice, it is as if it had been done once."""
    client = MlflowClient()
    with quick_answers():
        known: set[int] = set()
        if updates.rows:
            name = next(iter(next(iter(updates.rows.values()))))
            known = {metric.step for metric in client.get_metric_history(updates.run_id, name)}
        for epoch in sorted(set(updates.rows) - known):
            client.log_batch(updates.run_id, metrics=updates.metrics(epoch))
        params = [Param(*each) for each in updates.params.items()]
        client.log_batch(updates.run_id, params=params, tags=[RunTag(*each) for each in updates.tags.items()])
        client.set_terminated(updates.run_id, updates.status, updates.ended)


def deliver_all() -> None:
    """Send what earlier trainings could not. What is of a run that this store does not know stays where it is."""
    for path in undelivered():
        try:
            updates = read(path)
        except DamagedError as error:
            _warn(f"{path} is damaged ({error}): its run is not told the rest, delete it")
            continue
        try:
            deliver(updates)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            _warn(f"{path} is of a run that this tracking store does not have")
            continue
        path.unlink()
        print(f"the tracking store has now been told the rest of run {updates.run_id}")


class DamagedError(Exception):
    """A file that holds no updates."""


def read(path: Path) -> PendingUpdates:
    """A updates that was put down. Raises DamagedError."""
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        for numbered in ("rows", "times"):  # JSON has text for keys
            fields[numbered] = {int(epoch): value for epoch, value in fields[numbered].items()}
        return PendingUpdates(**fields)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(one_line(error)) from error


def undelivered() -> list[Path]:
    """The files of what could not be sent."""
    return sorted(files.checkpoints_folder().glob(f"*{SUFFIX}"))


@contextmanager
def quick_answers() -> Iterator[None]:
    """mlflow tries for four minutes to reach a server; inside, one that does not answer is given up in seconds."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    lent = {name: value for name, value in short.items() if name not in os.environ}
    os.environ.update(lent)
    try:
        yield
    finally:
        for name in lent:
            os.environ.pop(name, None)


def _path(run_id: str) -> Path:
    return files.checkpoints_folder() / f"{run_id}{SUFFIX}"


def _now() -> int:
    return round(time.time() * 1000)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
