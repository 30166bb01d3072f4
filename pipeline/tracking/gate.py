"""The champion gate: which of two models is better, judged on the same test images. Pure: no MLflow and no files."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from pipeline.errors import counted
from pipeline.params import Evaluate, Promotion

CHAMPION, CHALLENGER = "champion", "challenger"
NOT_WORSE = 0.05  # the p-value above which a lower score may be chance, where evaluate.promotion.alpha is not set
MAX_SUMS = 100_000  # attainable sums of weights up to which a p-value is exact
DRAWS = 100_000  # random signs where there are more; a p-value of 0.05 then has a standard error of 0.0007


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


def compare(challenger: NDArray[np.bool_], champion: NDArray[np.bool_]) -> Paired:
    """The 2x2 table of two models on the same images: ``correct`` of each, both (N,) bool."""
    return Paired(
        int((challenger & champion).sum()),
        int((challenger & ~champion).sum()),
        int((~challenger & champion).sum()),
        int((~challenger & ~champion).sum()),
    )


@dataclass(frozen=True)
class Comparison:
    """How a challenger compares with the champion by a metric.

    ``gain`` is above 0 where its score is higher; ``scores`` has both in words, and ``lower`` and ``higher`` the words
    for a difference.
    """

    metric: str
    gain: Fraction | int
    p_value: float
    table: Paired
    scores: str
    lower: str
    higher: str


def _by_accuracy(challenger: ScoredModel, champion: ScoredModel, labels: NDArray[np.int64]) -> Comparison:
    table = compare(challenger.correct, champion.correct)
    gain = champion.error_count - challenger.error_count
    scores = f"{counted(challenger.error_count, 'test error')} against {champion.error_count}"
    return Comparison("accuracy", gain, table.p_value, table, scores, lower="more", higher="fewer")


def _by_balanced_accuracy(challenger: ScoredModel, champion: ScoredModel, labels: NDArray[np.int64]) -> Comparison:
    of_class = np.bincount(labels)
    wins, losses = (
        np.bincount(labels[one.correct & ~other.correct], minlength=len(of_class))
        for one, other in ((challenger, champion), (champion, challenger))
    )
    each_class = zip(of_class.tolist(), wins.tolist(), losses.tolist(), strict=True)
    rows = [(size, won, lost) for size, won, lost in each_class if won + lost]
    differing = Counter[int]()
    for size, won, lost in rows:
        differing[size] += won + lost
    gain = sum((Fraction(won - lost, size) for size, won, lost in rows), Fraction(0))
    one, other = (balanced_accuracy(model.correct, labels) for model in (challenger, champion))
    return Comparison(
        "balanced_accuracy",
        gain,
        sign_flip_p_value(gain, differing),
        compare(challenger.correct, champion.correct),
        f"test balanced accuracy {one:.4f} against {other:.4f}",
        lower="lower",
        higher="higher",
    )


# By the name in evaluate.metric: how two models compare on the test images, whose labels are (N,).
COMPARISONS: dict[str, Callable[[ScoredModel, ScoredModel, NDArray[np.int64]], Comparison]] = {
    "accuracy": _by_accuracy,
    "balanced_accuracy": _by_balanced_accuracy,
}


def balanced_accuracy(correct: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """The mean recall of the classes that have images; both (N,)."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, weights=correct)[counts > 0] / counts[counts > 0]).mean())


def sign_flip_p_value(gain: Fraction, differing: Mapping[int, int]) -> float:
    """How likely two equally good models differ by as much as ``gain`` (paired permutation test, two-sided).

    ``differing`` is how many images only one of the models gets right, by the number of images of their class. Such an
    image counts as 1 / (images of its class), and is equally likely to be right for either model: a random sign. The
    p-value is exact, from the distribution of the sum, or with too many sums from DRAWS random ones.
    """
    scale = math.lcm(*differing)  # sums are whole numbers of 1 / scale: equal ones are equal
    shares = {0: 1.0}  # the probability of each attainable sum
    for size, count in sorted(differing.items()):
        if len(shares) * (count + 1) > MAX_SUMS:
            return _sampled_p_value(abs(float(gain)), differing)
        before, shares = shares, {}
        for right, share in enumerate(_fair_coin(count)):
            step = (2 * right - count) * (scale // size)
            for total, probability in before.items():
                shares[total + step] = shares.get(total + step, 0.0) + probability * share
    observed = abs(gain * scale)
    return min(1.0, sum(share for total, share in shares.items() if abs(total) >= observed))


def _fair_coin(count: int) -> Iterator[float]:
    """The probabilities of 0, 1, ... ``count`` heads."""
    ways = 1
    for heads in range(count + 1):
        yield ways / 2**count
        ways = ways * (count - heads) // (heads + 1)


def _sampled_p_value(gain: float, differing: Mapping[int, int]) -> float:
    """The share of random sums that are at least as far from 0, this one among them (Phipson and Smyth, 2010)."""
    generator, sums = np.random.default_rng(0), np.zeros(DRAWS)
    for size, count in sorted(differing.items()):
        sums += (2 * generator.binomial(count, 0.5, DRAWS) - count) / size
    as_far = np.abs(sums) >= gain * (1 - 1e-9)  # equal sums may differ in their last bits
    return (1 + int(as_far.sum())) / (1 + DRAWS)


@dataclass(frozen=True)
class Decision:
    """The alias that a model gets, why, and the comparison if there was one."""

    alias: str
    reason: str
    comparison: Comparison | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON and for tags."""
        facts: dict[str, object] = {"decision": self.alias, "reason": self.reason}
        if (found := self.comparison) is None:
            return facts
        return facts | {"metric": found.metric, "p_value": found.p_value, "table": asdict(found.table)}


def decide(
    challenger: ScoredModel,
    ece: float,
    champion: ScoredModel | None,
    version: str,
    labels: NDArray[np.int64],
    rules: Evaluate,
) -> Decision:
    """Whether ``challenger`` replaces ``champion``, which is registered as ``version``.

    It must meet the limits of ``rules.promotion``, one of them for its expected calibration error ``ece``, and either
    have a (significantly) higher score by ``rules.metric`` or be smaller and not significantly worse. ``labels`` (N,)
    are those of the test images.
    """
    comparison = COMPARISONS[rules.metric](challenger, champion, labels) if champion else None
    if missed := list(_missed_limits(challenger, ece, labels, rules.promotion)):
        return Decision(CHALLENGER, "; ".join(missed), comparison)
    if champion is None or comparison is None:
        return Decision(CHAMPION, "there was no champion")
    alias, reason = _compared(challenger, champion, version, comparison, rules.promotion.alpha)
    return Decision(alias, reason, comparison)


def _missed_limits(challenger: ScoredModel, ece: float, labels: NDArray[np.int64], rules: Promotion) -> Iterator[str]:
    scores = {
        "accuracy": float(challenger.correct.mean()),
        "balanced_accuracy": balanced_accuracy(challenger.correct, labels),
    }
    for name, score in scores.items():
        least: float | None = getattr(rules, f"min_{name}")
        if least is not None and score < least:
            yield f"its {name.replace('_', ' ')} {score:.4f} is below evaluate.promotion.min_{name} {least:g}"
    if rules.max_ece is not None and ece > rules.max_ece:
        yield f"its calibration error {ece:.4f} is above evaluate.promotion.max_ece {rules.max_ece:g}"
    if rules.max_parameters is not None and challenger.parameters > rules.max_parameters:
        yield (
            f"its {challenger.parameters:,} parameters are more than evaluate.promotion.max_parameters "
            f"{rules.max_parameters:,}"
        )


def _compared(
    challenger: ScoredModel, champion: ScoredModel, version: str, found: Comparison, alpha: float | None
) -> tuple[str, str]:
    """The alias and the reason for it."""
    scores, test = f"{found.scores} of version {version}", f"p = {found.p_value:.2g}"
    is_better = found.gain > 0
    if is_better and (alpha is None or found.p_value < alpha):
        return CHAMPION, f"{scores} ({test})"
    not_worse = found.gain >= 0 or found.p_value >= (alpha or NOT_WORSE)
    if challenger.parameters < champion.parameters and not_worse:
        sizes = f"{challenger.parameters:,} parameters against {champion.parameters:,}"
        return CHAMPION, f"{scores}, not significantly {found.lower} ({test}), and {sizes}"
    if is_better:
        return CHALLENGER, (
            f"{scores}, not significantly {found.higher} ({test}; evaluate.promotion.alpha is {alpha:g})"
        )
    return CHALLENGER, f"{scores} ({test})"
