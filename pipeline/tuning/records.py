"""A trial as others read it, whatever storage it lies in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    ``values`` are those of the tuned knobs by their dotted paths, ``scores`` what the study compares by name, empty
    unless it is complete; ``history`` has a row an epoch with its number under "epoch"; ``failure`` says why it failed.
    ``parameters`` is None for one that failed, whose layers may not even fit.
    ``counts`` is false for one that was lost and is tried again. Times are milliseconds since 1970.
    """

    number: int
    status: Status
    failure: str
    counts: bool
    values: Mapping[str, object]
    parameters: int | None
    scores: Mapping[str, float]
    history: Sequence[Mapping[str, float]]
    started: int
    ended: int
