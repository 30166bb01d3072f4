"""The study's workers, seen from the process that coordinates them."""

import subprocess
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from pipeline.errors import Fault
from pipeline.network.training import Epoch
from pipeline.network.workers import LARGEST_PIECE
from pipeline.params import Params
from pipeline.tuning.messages import STOP, Lost, Message

SIGNALS = 128  # exit codes from here on say that a signal ended the process
Line: TypeAlias = "Connection[Any, Any]"


class Team:
    """So many workers; one that dies is replaced. Tasks are named by the caller.

    Together they never have more threads than there are cores. Each has its share of them; the shares of those that
    will have nothing to do go to the others, but no more than leave every bit of a result as it is.
    """

    def __init__(self, workers: int, cores: int) -> None:
        self._cores, self._share = cores, cores // workers
        self._processes: dict[Line, subprocess.Popen[bytes]] = {}
        self._at: dict[Hashable, Line] = {}
        self._heard = set[Line]()  # those that have said something
        self.threads: dict[Hashable, int] = {}  # of each task
        self._most: dict[Hashable, int] = {}
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
        """Whether a worker has nothing to do, and its share of the cores is free."""
        return len(self._at) < len(self._processes) and sum(self.threads.values()) + self._share <= self._cores

    @property
    def tasks(self) -> list[Hashable]:
        """What the others are at."""
        return list(self._at)

    def give(self, task: Hashable, params: Params) -> None:
        """Have an idle worker train the network of ``params``."""
        self._at[task] = next(line for line in self._processes if line not in self._at.values())
        self.threads[task] = self._share
        parted = 1 if params.model.batch_norm else params.train.batch_size // LARGEST_PIECE
        self._most[task] = max(self._share, parted)
        with suppress(OSError):  # it has died, which `messages` tells
            self._at[task].send(params.changed({"train.threads": self._share}))

    def messages(self, seconds: float) -> list[tuple[Hashable, Message]]:
        """What the workers say of their tasks, waiting for so many seconds for it. An epoch wants an answer.

        Raises Fault where a worker ends before it says anything: the next would too.
        """
        ready = wait(list(self._at.values()), seconds)
        return [(task, self._message(task)) for task, line in list(self._at.items()) if line in ready]

    def _message(self, task: Hashable) -> Message:
        line = self._at[task]
        try:
            message: Message = line.recv()
        except (EOFError, OSError):
            self._forget(task)
            begun, code = line in self._heard, self._buried(line)
            if 0 <= code < SIGNALS and not begun:
                raise Fault(f"a worker could not begin: it ended with exit code {code}") from None
            self._hire()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Lost(f"its worker {how}")
        self._heard.add(line)
        if not isinstance(message, Epoch):
            self._forget(task)
        return message

    def _forget(self, task: Hashable) -> None:
        for kept in (self._at, self.threads, self._most):
            del kept[task]

    def answer(self, task: Hashable, go_on: bool, nothing_waits: bool = False) -> None:
        """Whether the worker shall go on after an epoch; on more cores where the idle ones will not need theirs."""
        if nothing_waits:
            free = self._cores - sum(self.threads.values())
            fair = self._cores // len(self._at)
            self.threads[task] = min(fair, self.threads[task] + free, self._most[task])
        else:
            self.threads[task] = self._share
        with suppress(OSError):  # it has died, which `messages` tells
            self._at[task].send(self.threads[task] if go_on else STOP)

    def _buried(self, line: Line) -> int:
        """The exit code of a worker that ends, or minus the number of the signal that killed it."""
        process = self._processes.pop(line)
        line.close()
        self._heard.discard(line)
        return process.wait()

    def dismiss(self) -> None:
        """End all workers at once, whatever they are at."""
        for process in self._processes.values():
            process.kill()
        for line in list(self._processes):
            self._buried(line)
        for kept in (self._at, self.threads, self._most):
            kept.clear()


@contextmanager
def team(workers: int, cores: int) -> Iterator[Team]:
    """Workers that are gone afterwards, however it ends."""
    hired = Team(workers, cores)
    try:
        yield hired
    finally:
        hired.dismiss()
