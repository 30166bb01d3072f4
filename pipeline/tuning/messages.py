"""What a worker says of its task: after an epoch it waits for an answer, the others are its last word.

The answer is the number of threads for the next epoch, or STOP.
"""

from dataclasses import dataclass

from pipeline.network.training import Epoch


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


STOP = 0
Message = Epoch | Done | Failed | Lost
