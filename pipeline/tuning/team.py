"""The study's workers, seen from the process that coordinates them."""

import subprocess
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from pipeline.errors import Fault
from pipeline.network.training import Epoch
from pipeline.network.workers import most_threads
from pipeline.params import Params
from pipeline.tuning.messages import STOP, Lost, Message

SIGNALS = 128  # exit codes from here on say that a signal ended the process
Line: TypeAlias = "Connection[Any, Any]"


@dataclass
class _Task:
    """What a worker is at, and on how many threads: now, and at most if no bit of its result shall change."""

    line: Line
    threads: int
    most: int


class Team:
    """So many workers; one that dies is replaced. Tasks are named by the caller.

    Together they never have more threads than there are cores. Each has its share of them; the shares of those that
    will have nothing to do go to the others, but no more than leave every bit of a result as it is.
    """

    def __init__(self, workers: int, cores: int) -> None:
        self._cores, self._share = cores, cores // workers
        self._processes: dict[Line, subprocess.Popen[bytes]] = {}
        self._silent = set[Line]()  # those that have not said anything yet
        self._at: dict[Hashable, _Task] = {}
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
        self._silent.add(ours)

    @property
    def has_idle(self) -> bool:
        """Whether a worker has nothing to do, and its share of the cores is free."""
        return len(self._at) < len(self._processes) and self._free >= self._share

    @property
    def _free(self) -> int:
        return self._cores - sum(task.threads for task in self._at.values())

    @property
    def tasks(self) -> list[Hashable]:
        """What the others are at."""
        return list(self._at)

    def threads(self, task: Hashable) -> int:
        """On how many it is trained, from the last answer on."""
        return self._at[task].threads

    def give(self, task: Hashable, params: Params) -> None:
        """Have an idle worker train the network of ``params``."""
        busy = [each.line for each in self._at.values()]
        line = next(line for line in self._processes if line not in busy)
        most = max(self._share, most_threads(params.train.batch_size, params.model.batch_norm))
        self._at[task] = _Task(line, self._share, most)
        with suppress(OSError):  # it has died, which `messages` tells
            line.send(params.changed({"train.threads": self._share}))

    def messages(self, seconds: float) -> list[tuple[Hashable, Message]]:
        """What the workers say of their tasks, waiting for so many seconds for it. An epoch wants an answer.

        Raises Fault where a worker ends before it says anything: the next would too.
        """
        ready = wait([task.line for task in self._at.values()], seconds)
        return [(name, self._message(name)) for name, task in list(self._at.items()) if task.line in ready]

    def _message(self, task: Hashable) -> Message:
        line = self._at[task].line
        try:
            message: Message = line.recv()
        except (EOFError, OSError):
            del self._at[task]
            silent, code = line in self._silent, self._buried(line)
            if 0 <= code < SIGNALS and silent:
                raise Fault(f"a worker could not begin: it ended with exit code {code}") from None
            self._hire()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Lost(f"its worker {how}")
        self._silent.discard(line)
        if not isinstance(message, Epoch):
            del self._at[task]
        return message

    def answer(self, task: Hashable, go_on: bool, nothing_waits: bool = False) -> None:
        """Whether the worker shall go on after an epoch; on more cores where the idle ones will not need theirs."""
        at = self._at[task]
        fair = self._cores // len(self._at)
        at.threads = min(fair, at.threads + self._free, at.most) if nothing_waits else self._share
        with suppress(OSError):  # it has died, which `messages` tells
            at.line.send(at.threads if go_on else STOP)

    def _buried(self, line: Line) -> int:
        """The exit code of a worker that ends, or minus the number of the signal that killed it."""
        process = self._processes.pop(line)
        line.close()
        self._silent.discard(line)
        return process.wait()

    def dismiss(self) -> None:
        """End all workers at once, whatever they are at."""
        for process in self._processes.values():
            process.kill()
        for line in list(self._processes):
            self._buried(line)
        self._at.clear()


@contextmanager
def team(workers: int, cores: int) -> Iterator[Team]:
    """Workers that are gone afterwards, however it ends."""
    hired = Team(workers, cores)
    try:
        yield hired
    finally:
        hired.dismiss()
