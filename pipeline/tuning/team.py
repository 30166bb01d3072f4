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
from pipeline.model.training import Epoch
from pipeline.params import Params
from pipeline.tuning.messages import Lost, Message, Ready, Threads

SIGNALS = 128  # exit codes from here on say that a signal ended the process
MOST_NEVER_READY = 5  # workers that were killed before they could begin
Line: TypeAlias = "Connection[Any, Any]"


@dataclass
class _Task:
    """What a worker is at, and on how many threads: now, and at most if no bit of its result shall change."""

    line: Line
    threads: int
    most: int


class Team:
    """So many workers; one that dies is replaced. Tasks are named by the caller.

    Together they never have more threads than there are cores. Each has its share of them; `spread` gives the shares
    of those that have nothing to do to the others, but no more than leave every bit of a result as it is.
    """

    def __init__(self, workers: int, cores: int) -> None:
        self._cores, self._share = cores, cores // workers
        self._processes: dict[Line, subprocess.Popen[bytes]] = {}
        self._silent = set[Line]()  # those that are not ready yet
        self._never_ready = 0
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
        """Whether a worker is ready and has nothing to do, and its share of the cores is free."""
        return bool(self._idle - self._silent) and self._free >= self._share

    @property
    def _idle(self) -> set[Line]:
        return set(self._processes) - {task.line for task in self._at.values()}

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
        line = next(iter(self._idle - self._silent or self._idle))
        most = self._share
        self._at[task] = _Task(line, self._share, most)
        with suppress(OSError):  # it has died, which `messages` tells
            line.send(params.changed({"train.threads": self._share}))

    def messages(self, seconds: float) -> list[tuple[Hashable, Message]]:
        """What the workers say of their tasks, waiting for so many seconds for it. An epoch wants an answer.

        Raises Fault where a worker ends before it says anything: the next would too.
        """
        heard = []
        at = {task.line: name for name, task in self._at.items()}
        for line in wait([*at, *self._silent - set(at)], seconds):
            assert isinstance(line, Connection)
            message = self._message(line)
            if line in at and not isinstance(message, Ready):
                heard.append((at[line], message))
                if not isinstance(message, Epoch):
                    del self._at[at[line]]
        return heard

    def _message(self, line: Line) -> Message | Ready:
        try:
            message: Message | Ready = line.recv()
        except (EOFError, OSError):
            silent, code = line in self._silent, self._reap(line)
            self._never_ready += silent
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if silent and (0 <= code < SIGNALS or self._never_ready > MOST_NEVER_READY):
                raise Fault(f"a worker could not begin: it {how}") from None
            self._hire()
            return Lost(f"its worker {how}")
        self._silent.discard(line)
        return message

    def answer(self, task: Hashable, go_on: bool) -> None:
        """Whether the worker shall go on after an epoch."""
        with suppress(OSError):  # it has died, which `messages` tells
            self._at[task].line.send(go_on)

    def spread(self) -> None:
        """Give the cores that nobody will need to those at work, from their next step on."""
        while self._free and (narrow := [task for task in self._at.values() if task.threads < task.most]):
            self._tell(min(narrow, key=lambda task: task.threads), more=1)

    def reclaim(self) -> None:
        """Take back what was spread: there is something to do again."""
        for task in self._at.values():
            if task.threads > self._share:
                self._tell(task, more=self._share - task.threads)

    def _tell(self, task: _Task, more: int) -> None:
        task.threads += more
        with suppress(OSError):
            task.line.send(Threads(task.threads))

    def _reap(self, line: Line) -> int:
        """The exit code of a worker that ends, or minus the number of the signal that killed it."""
        process = self._processes.pop(line)
        line.close()
        self._silent.discard(line)
        return process.wait()

    def terminate(self) -> None:
        """End all workers at once, whatever they are at."""
        for process in self._processes.values():
            process.kill()
        for line in list(self._processes):
            self._reap(line)
        self._at.clear()


@contextmanager
def team(workers: int, cores: int) -> Iterator[Team]:
    """Workers that are gone afterwards, however it ends."""
    team_of_workers = Team(workers, cores)
    try:
        yield team_of_workers
    finally:
        team_of_workers.terminate()
