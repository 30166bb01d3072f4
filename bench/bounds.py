"""What a figure must reach, and whether it does."""

import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Bound:
    """A figure and what it must reach; ``low`` where less is better."""

    what: str
    figures: tuple[float, ...]  # their median counts
    bound: float
    aim: float
    unit: str
    low: bool = False

    @property
    def figure(self) -> float:
        """The median."""
        return statistics.median(self.figures)

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return self.figure <= self.bound if self.low else self.figure >= self.bound

    def as_row(self) -> dict[str, object]:
        """For a results file."""
        return asdict(self) | {"figure": self.figure, "holds": self.holds}

    def __str__(self) -> str:
        least = "at most" if self.low else "at least"
        verdict = "holds" if self.holds else "FALLS SHORT"
        spread = f"({min(self.figures):.2f} ... {max(self.figures):.2f})" if len(self.figures) > 1 else ""
        reached = f"{self.what:<62}{self.figure:>7.2f} {self.unit:<7}{spread:<18}"
        return f"{reached}{least} {self.bound:g} (aim {self.aim:g})  {verdict}"


def conclude(bounds: Iterable[Bound]) -> None:
    """Print a line a bound; exit 1 where one falls short."""
    verdicts = []
    for bound in bounds:
        print(bound)
        verdicts.append(bound.holds)
    if not all(verdicts):
        sys.exit(1)
