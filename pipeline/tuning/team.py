"""The study's workers, seen from the process that coordinates them."""

import subprocess
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from pipeline.network.training import Epoch
from pipeline.params import Params
from pipeline.tuning.messages import Lost, Message

Line: TypeAlias = "Connection[Any, Any]"


class Team:
    """So many workers; one that dies is replaced. Tasks are named by the caller."""

    def __init__(self, workers: int) -> None:
        self._processes: dict[Line, subprocess.Popen[bytes]] = {}
        self._at: dict[Hashable, Line] = {}
        for _ in range(workers):
            self._hire()

    def _hire(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            # In a session of its own: an interrupt on the terminal is the coordinator's to answer.
            self._processes[ours] = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tuning.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def has_idle(self) -> bool:
        """Whether a worker has nothing to do."""
        return len(self._at) < len(self._processes)

    @property
    def tasks(self) -> list[Hashable]:
        """What the others are at."""
        return list(self._at)

    def give(self, task: Hashable, params: Params) -> None:
        """Have an idle worker train the network of ``params``."""
        self._at[task] = next(line for line in self._processes if line not in self._at.values())
        with suppress(OSError):  # it has died, which `messages` tells
            self._at[task].send(params)

    def messages(self, seconds: float) -> list[tuple[Hashable, Message]]:
        """What the workers say of their tasks, waiting for so many seconds for it. An epoch wants an answer."""
        ready = wait(list(self._at.values()), seconds)
        return [(task, self._message(task)) for task, line in list(self._at.items()) if line in ready]

    def _message(self, task: Hashable) -> Message:
        line = self._at[task]
        try:
            message: Message = line.recv()
        except (EOFError, OSError):
            del self._at[task]
            reason = self._buried(line)
            self._hire()
            return Lost(reason)
        if not isinstance(message, Epoch):
            del self._at[task]
        return message

    def answer(self, task: Hashable, go_on: bool) -> None:
        """Whether the worker shall go on after an epoch."""
        with suppress(OSError):  # it has died, which `messages` tells
            self._at[task].send(go_on)

    def _buried(self, line: Line) -> str:
        process = self._processes.pop(line)
        line.close()
        code = process.wait()
        return f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with exit code {code}"

    def dismiss(self) -> None:
        """End all workers at once, whatever they are at."""
        for process in self._processes.values():
            process.kill()
        for line in list(self._processes):
            self._buried(line)
        self._at.clear()


@contextmanager
def team(workers: int) -> Iterator[Team]:
    """Workers that are gone afterwards, however it ends."""
    hired = Team(workers)
    try:
        yield hired
    finally:
        hired.dismiss()
