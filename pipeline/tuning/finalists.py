"""The last word: the best trials and the present parameters, trained again with other seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Values = Mapping[str, object]


@dataclass(frozen=True)
class Finalist:
    """A set of values for the tuned knobs. ``trial`` is None for the present ones."""

    trial: int | None
    values: Values
    parameters: int

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return "present" if self.trial is None else f"trial {self.trial}"


@dataclass(frozen=True)
class Outcome:
    """The validation accuracies of a finalist, one a seed, in the order of the seeds."""

    finalist: Finalist
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds."""
        return statistics.stdev(self.accuracies)


def winner(outcomes: Iterable[Outcome]) -> Outcome:
    """The highest mean; of equal ones that with the fewest parameters."""
    return max(outcomes, key=lambda outcome: (outcome.mean, -outcome.finalist.parameters))


def gain(best: Outcome, present: Outcome) -> tuple[float, float]:
    """By how much ``best`` is more accurate, seed by seed, and the standard error of that mean difference."""
    differences = [a - b for a, b in zip(best.accuracies, present.accuracies, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


@dataclass(frozen=True)
class Verdict:
    """The winner, and what it gains on the present values: mean and standard error of the paired differences."""

    best: Outcome
    gained: float
    error: float

    @property
    def is_real(self) -> bool:
        """Whether the gain is more than chance would give: above two standard errors."""
        return self.gained > 2 * self.error

    def __str__(self) -> str:
        if self.best.finalist.trial is None:
            return "the present values are the best"
        meaning = "a real gain" if self.is_real else "within two standard errors: it may be chance"
        return (
            f"{self.best.finalist.name} against the present values: {self.gained:+.3%} +- {self.error:.3%}, {meaning}"
        )


def judged(outcomes: Sequence[Outcome]) -> Verdict:
    """Which of the finalists, the present values among them, is the best."""
    best = winner(outcomes)
    (present,) = (outcome for outcome in outcomes if outcome.finalist.trial is None)
    return Verdict(best, *gain(best, present))


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a finalist, the best first."""
    rows = [f"{'':<12}{'validation accuracy':<24}{'n':>3}{'parameters':>12}  values"]
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.mean):
        values = "  ".join(f"{path}={_short(value)}" for path, value in outcome.finalist.values.items())
        accuracy = f"{outcome.mean:.3%} +- {outcome.deviation:.3%}"
        count = len(outcome.accuracies)
        rows.append(f"{outcome.finalist.name:<12}{accuracy:<24}{count:>3}{outcome.finalist.parameters:>12,}  {values}")
    return "\n".join(rows)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
