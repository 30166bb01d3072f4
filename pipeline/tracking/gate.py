"""The champion gate: which of two models is better, judged on the same test images. Pure: no MLflow and no files."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from pipeline.params import Promotion

CHAMPION, CHALLENGER = "champion", "challenger"
NOT_WORSE = 0.05  # the p-value above which more errors may be chance, where evaluate.promotion.alpha is not set


@dataclass(frozen=True)
class ScoredModel:
    """What the gate looks at: which test images a model classifies correctly, (N,) bool, and its size."""

    correct: NDArray[np.bool_]
    parameters: int

    @property
    def error_count(self) -> int:
        """How many test images it gets wrong."""
        return int((~self.correct).sum())


@dataclass(frozen=True)
class Paired:
    """How many of the same test images both models, only one of them, or neither gets right."""

    both_right: int
    only_challenger_right: int
    only_champion_right: int
    both_wrong: int

    @property
    def p_value(self) -> float:
        """How likely two equally good models differ as much (exact McNemar test, two-sided; McNemar, 1947).

        Images that both get right or both get wrong do not count. The others are equally likely for either model.
        """
        differing = self.only_challenger_right + self.only_champion_right
        fewer = min(self.only_challenger_right, self.only_champion_right)
        # scipy.stats has this test, and would take a second of each command's start.
        return min(1.0, 2 * float(bdtr(fewer, differing, 0.5)))


@dataclass(frozen=True)
class Decision:
    """The alias that a model gets, why, and the comparison if there was one."""

    alias: str
    reason: str
    paired: Paired | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON and for tags."""
        table = {"p_value": self.paired.p_value, "table": asdict(self.paired)} if self.paired else {}
        return {"decision": self.alias, "reason": self.reason, **table}


def compare(challenger: NDArray[np.bool_], champion: NDArray[np.bool_]) -> Paired:
    """The 2x2 table of two models on the same images: ``correct`` of each, both (N,) bool."""
    return Paired(
        int((challenger & champion).sum()),
        int((challenger & ~champion).sum()),
        int((~challenger & champion).sum()),
        int((~challenger & ~champion).sum()),
    )


def decide(
    challenger: ScoredModel, ece: float, champion: ScoredModel | None, version: str, rules: Promotion
) -> Decision:
    """Whether ``challenger`` replaces ``champion``, which is registered as ``version``.

    It must meet the limits of ``rules``, one of them for its expected calibration error ``ece``, and either make
    (significantly) fewer errors or be smaller and not significantly worse.
    """
    paired = compare(challenger.correct, champion.correct) if champion else None
    if missed := list(_missed_limits(challenger, ece, rules)):
        return Decision(CHALLENGER, "; ".join(missed), paired)
    if champion is None or paired is None:
        return Decision(CHAMPION, "there was no champion")
    alias, reason = _compared(challenger, champion, version, paired.p_value, rules.alpha)
    return Decision(alias, reason, paired)


def _missed_limits(challenger: ScoredModel, ece: float, rules: Promotion) -> Iterator[str]:
    accuracy = float(challenger.correct.mean())
    if rules.min_accuracy is not None and accuracy < rules.min_accuracy:
        yield f"its accuracy {accuracy:.4f} is below evaluate.promotion.min_accuracy {rules.min_accuracy:g}"
    if rules.max_ece is not None and ece > rules.max_ece:
        yield f"its calibration error {ece:.4f} is above evaluate.promotion.max_ece {rules.max_ece:g}"
    if rules.max_parameters is not None and challenger.parameters > rules.max_parameters:
        yield (
            f"its {challenger.parameters:,} parameters are more than evaluate.promotion.max_parameters "
            f"{rules.max_parameters:,}"
        )


def _compared(
    challenger: ScoredModel, champion: ScoredModel, version: str, p_value: float, alpha: float | None
) -> tuple[str, str]:
    """The alias and the reason for it."""
    counts = f"{challenger.error_count} test errors against {champion.error_count} of version {version}"
    test = f"p = {p_value:.2g}"
    fewer = challenger.error_count < champion.error_count
    if fewer and (alpha is None or p_value < alpha):
        return CHAMPION, f"{counts} ({test})"
    not_worse = challenger.error_count <= champion.error_count or p_value >= (alpha or NOT_WORSE)
    if challenger.parameters < champion.parameters and not_worse:
        sizes = f"{challenger.parameters:,} parameters against {champion.parameters:,}"
        return CHAMPION, f"{counts}, not significantly more ({test}), and {sizes}"
    if fewer:
        return CHALLENGER, f"{counts}, not significantly fewer ({test}; evaluate.promotion.alpha is {alpha:g})"
    return CHALLENGER, f"{counts} ({test})"
