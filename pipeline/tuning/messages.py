"""What a worker and its coordinator say to each other.

The worker says that it is ready, then, of each task that it is given, its epochs and a last word. After an epoch it
waits to be told whether to go on. On how many threads it shall be may be told at any time.
"""

from dataclasses import dataclass

from pipeline.model.training import Epoch


@dataclass(frozen=True)
class Ready:
    """The worker has all that it needs, and waits for its first task."""


@dataclass(frozen=True)
class Done:
    """The training has come to its end, or was stopped."""


@dataclass(frozen=True)
class Failed:
    """The training cannot come to its end, and would not on another try either."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The training was broken off, and may come to its end on another try: the worker has died, or had no memory."""

    reason: str


@dataclass(frozen=True)
class Threads:
    """To the worker: on so many, from the next step on."""

    count: int


GO_ON, STOP = True, False
Message = Epoch | Done | Failed | Lost
