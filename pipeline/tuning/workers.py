"""The study's worker processes, as the coordinator sees them, and the messages between the two.

A worker sends None once it is ready. The coordinator sends it the parameters of a trial; the worker sends an Epoch
after each pass, waits for True (continue) or False (stop), and ends the trial with Done or Failed.
"""

import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.params import Params

SIGNALS = 128  # exit codes from here on mean that a signal ended the process
MAX_KILLED_AT_START = 5


@dataclass(frozen=True)
class Done:
    """The training has run all its epochs, or was stopped."""


@dataclass(frozen=True)
class Failed:
    """The training failed. ``retry``: another attempt may succeed, since the worker died or ran out of memory."""

    reason: str
    retry: bool = False


Message: TypeAlias = Epoch | Done | Failed


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"
    ready: bool = False
    trial: int | None = None

    @property
    def is_idle(self) -> bool:
        return self.ready and self.trial is None

    def send(self, message: Params | bool) -> None:
        with suppress(OSError):  # the process has died: reading from it will show that
            self.connection.send(message)

    def close(self) -> int:
        """Kill the process if it is running; its exit code, or minus the number of the signal that ended it."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


class Workers:
    """``count`` processes that train one trial each at a time, on ``threads`` threads. One that dies is replaced."""

    def __init__(self, count: int, threads: int) -> None:
        self._threads, self._killed_at_start = threads, 0
        self._workers = [_start() for _ in range(count)]

    @property
    def has_idle(self) -> bool:
        """Whether a worker is ready and has no trial."""
        return any(worker.is_idle for worker in self._workers)

    @property
    def trials(self) -> set[int]:
        """The trials that are being trained."""
        return {worker.trial for worker in self._workers if worker.trial is not None}

    def assign(self, trial: int, params: Params) -> None:
        """Train a trial with ``params`` on an idle worker."""
        worker = next(worker for worker in self._workers if worker.is_idle)
        worker.trial = trial
        worker.send(params.changed({"train.threads": self._threads}))

    def reply(self, trial: int, proceed: bool) -> None:
        """Whether to continue the trial after an epoch."""
        next(worker for worker in self._workers if worker.trial == trial).send(proceed)

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        """What the workers send, with the number of the trial, waiting up to ``seconds`` for it.

        Each Epoch needs an answer. Raises Fault where a worker cannot start.
        """
        received: list[tuple[int, Message]] = []
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), seconds):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            message = self._receive(worker)
            if worker.trial is not None and message is not None:
                received.append((worker.trial, message))
                if not isinstance(message, Epoch):
                    worker.trial = None
        return received

    def _receive(self, worker: _Worker) -> Message | None:
        try:
            message: Message | None = worker.connection.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        worker.ready = True
        return message

    def _replace(self, dead: _Worker) -> Failed:
        code = dead.process.wait()
        dead.connection.close()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if not dead.ready:
            self._killed_at_start += 1
            if 0 <= code < SIGNALS or self._killed_at_start > MAX_KILLED_AT_START:
                raise Fault(f"a worker could not start: it {how}")
        self._workers[self._workers.index(dead)] = _start()
        return Failed(f"its worker {how}", retry=True)

    def close(self) -> None:
        """Kill all workers, whatever they are doing."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()


def _start() -> _Worker:
    # A module of its own, since multiprocessing would import the command, with MLflow and Optuna, in each worker.
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.tuning.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # an interrupt in the terminal reaches the coordinator alone
        )
    return _Worker(process, ours)
