"""Which model becomes champion: the rules, on predictions made up for them."""

import itertools
from dataclasses import fields
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from pipeline.model.metrics import METRICS
from pipeline.model.training import Epoch
from pipeline.params import Evaluate, Promotion
from pipeline.tracking import gate, studies
from pipeline.tracking.gate import COMPARISONS, Paired, ScoredModel, compare, decide, sign_flip_p_value

LABELS = np.repeat(np.arange(10), 100)


def model(wrong: range, parameters: int = 1000) -> ScoredModel:
    correct = np.ones(1000, dtype=bool)
    correct[list(wrong)] = False
    return ScoredModel(correct, parameters)


def rules(metric: str = "accuracy", **changed: Any) -> Evaluate:
    return Evaluate.model_validate({"metric": metric, "promotion": Promotion.model_validate(changed)})


def test_what_decides_is_a_metric_that_training_the_gate_and_the_study_know() -> None:
    choices = set(get_args(Evaluate.model_fields["metric"].annotation))
    assert choices == set(COMPARISONS) == set(studies.ERRORS)
    assert choices <= set(METRICS)
    assert {f"validation_{name}" for name in choices} <= {each.name for each in fields(Epoch)}


def test_the_table_counts_every_image_once() -> None:
    paired = compare(model(range(0, 30)).correct, model(range(20, 100)).correct)
    assert paired == Paired(both_right=900, only_challenger_right=70, only_champion_right=20, both_wrong=10)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (2, 9), (30, 12), (0, 6)])
def test_the_p_value_is_that_of_a_fair_coin(b: int, c: int) -> None:
    """Twice the tail of the binomial distribution, at most 1 (McNemar's test in its exact form)."""
    expected = min(1.0, 2 * binom.cdf(min(b, c), b + c, 0.5)) if b + c else 1.0
    assert Paired(5, b, c, 7).p_value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("challenger", "changed", "alias", "reason"),
    [
        (model(range(49)), {}, "champion", "49 test errors against 50 of version 1 (p = 1)"),
        (model(range(1)), {}, "champion", "1 test error against 50 of version 1 (p = "),
        (model(range(50)), {}, "challenger", "50 test errors against 50 of version 1 (p = 1)"),
        (model(range(49)), {"alpha": 0.05}, "challenger", "49 test errors against 50 of version 1, not significantly "),
        (model(range(30)), {"alpha": 0.05}, "champion", "30 test errors against 50 of version 1 (p = 1.9e-06)"),
        (
            model(range(10, 61), 999),
            {},
            "champion",
            "51 test errors against 50 of version 1, not significantly more (p = 1), and 999 parameters against 1,000",
        ),
        (model(range(70), 999), {}, "challenger", "70 test errors against 50 of version 1 (p = 1.9e-06)"),
        (model(range(55), 999), {"alpha": 0.5}, "challenger", "55 test errors against 50 of version 1 (p = 0.062)"),
        (
            model(range(10)),
            {"min_accuracy": 0.995},
            "challenger",
            "its accuracy 0.9900 is below evaluate.promotion.min_",
        ),
        (
            model(range(10)),
            {"max_ece": 0.01},
            "challenger",
            "its calibration error 0.0200 is above evaluate.promotion.m",
        ),
        (model(range(10)), {"max_parameters": 900}, "challenger", "its 1,000 parameters are more than evaluate.promot"),
        (model(range(10)), {"min_accuracy": 0.99, "max_ece": 0.02, "max_parameters": 1000}, "champion", "10 test err"),
    ],
)
def test_a_model_with_fewer_errors_or_a_smaller_one_that_is_not_worse_becomes_champion(
    challenger: ScoredModel, changed: dict[str, Any], alias: str, reason: str
) -> None:
    decision = decide(challenger, 0.02, model(range(50)), "1", LABELS, rules(**changed))
    assert decision.alias == alias
    assert decision.reason.startswith(reason)
    assert decision.comparison
    assert decision.comparison.table == compare(challenger.correct, model(range(50)).correct)


def test_the_first_model_only_has_to_meet_the_limits() -> None:
    assert decide(model(range(50)), 0.02, None, "", LABELS, rules()).alias == "champion"
    assert decide(model(range(50)), 0.02, None, "", LABELS, rules(min_accuracy=0.96)).alias == "challenger"


def scored(labels: NDArray[np.int64], recalls: dict[int, float], parameters: int = 1000, at: int = 0) -> ScoredModel:
    """A model that gets a share of each class right: its images from the ``at``-th on, from the first again."""
    correct = np.zeros(len(labels), dtype=bool)
    for label, recall in recalls.items():
        images = np.flatnonzero(labels == label)
        correct[np.roll(images, -at)[: round(recall * len(images))]] = True
    return ScoredModel(correct, parameters)


RARE = np.repeat([0, 1], [900, 100])
BLIND, FAIR = scored(RARE, {0: 1.0, 1: 0.1}), scored(RARE, {0: 0.95, 1: 0.5})  # 91.0 % and 90.5 %; 55 % and 72.5 %


def test_balanced_accuracy_promotes_the_model_that_finds_the_rare_class_and_accuracy_does_not() -> None:
    decision = decide(FAIR, 0.02, BLIND, "1", RARE, rules())
    assert (decision.alias, decision.reason) == ("challenger", "95 test errors against 90 of version 1 (p = 0.66)")
    decision = decide(FAIR, 0.02, BLIND, "1", RARE, rules("balanced_accuracy"))
    reason = "test balanced accuracy 0.7250 against 0.5500 of version 1 (p = 3.5e-09)"
    assert (decision.alias, decision.reason) == ("champion", reason)
    assert decision.as_dict()["metric"] == "balanced_accuracy"
    assert decide(BLIND, 0.02, FAIR, "1", RARE, rules()).alias == "champion"
    assert decide(BLIND, 0.02, FAIR, "1", RARE, rules("balanced_accuracy")).alias == "challenger"


@pytest.mark.parametrize(
    ("recall", "parameters", "changed", "alias", "end"),
    [
        (0.52, 1000, {}, "champion", "0.7350 against 0.7250 of version 1 (p = 0.5)"),
        (0.52, 1000, {"alpha": 0.05}, "challenger", "not significantly higher (p = 0.5; evaluate.promotion.alpha is 0"),
        (0.48, 999, {}, "champion", "not significantly lower (p = 0.5), and 999 parameters against 1,000"),
        (0.20, 999, {}, "challenger", "0.5750 against 0.7250 of version 1 (p = 1.9e-09)"),
        (0.52, 1000, {"min_accuracy": 0.95}, "challenger", "its accuracy 0.9070 is below evaluate.promotion.min_accur"),
        (0.52, 1000, {"min_balanced_accuracy": 0.8}, "challenger", "its balanced accuracy 0.7350 is below evaluate.pr"),
    ],
)
def test_the_rules_hold_for_balanced_accuracy_in_its_own_words(
    recall: float, parameters: int, changed: dict[str, Any], alias: str, end: str
) -> None:
    challenger = scored(RARE, {0: 0.95, 1: recall}, parameters)
    decision = decide(challenger, 0.02, FAIR, "1", RARE, rules("balanced_accuracy", **changed))
    assert decision.alias == alias
    assert end in decision.reason
    assert "error" not in decision.reason


def test_the_first_model_meets_a_limit_of_balanced_accuracy_or_not() -> None:
    assert decide(BLIND, 0.02, None, "", RARE, rules(min_balanced_accuracy=0.56)).alias == "challenger"
    assert decide(BLIND, 0.02, None, "", RARE, rules(min_balanced_accuracy=0.55)).alias == "champion"


@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_with_classes_of_one_size_the_permutation_test_is_mcnemar_s(at: int) -> None:
    one = scored(LABELS, {label: 0.9 + label / 100 for label in range(10)})
    other = scored(LABELS, {label: 0.97 - label / 200 for label in range(10)}, at=at)
    by_accuracy, balanced = (COMPARISONS[name](one, other, LABELS) for name in ("accuracy", "balanced_accuracy"))
    assert by_accuracy.p_value == pytest.approx(balanced.p_value, abs=1e-12)
    assert (by_accuracy.gain > 0) == (balanced.gain > 0)


@pytest.mark.parametrize("differing", [{3: 2}, {3: 2, 5: 4}, {2: 3, 3: 3, 7: 2}])
def test_the_p_value_is_the_share_of_all_signs_that_differ_as_much(differing: dict[int, int]) -> None:
    weights = [Fraction(1, size) for size, count in differing.items() for _ in range(count)]
    every = [sum(signed, Fraction(0)) for signed in itertools.product(*((weight, -weight) for weight in weights))]
    for gain in sorted(set(every))[::4]:
        share = np.mean([abs(each) >= abs(gain) for each in every])
        assert sign_flip_p_value(gain, differing) == pytest.approx(share, abs=1e-12)


def test_too_many_sums_are_sampled_and_agree_with_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    differing = {90: 12, 101: 9, 220: 15}
    gains = [Fraction(won, 101) for won in (1, 5, 9)]
    exact = [sign_flip_p_value(gain, differing) for gain in gains]
    monkeypatch.setattr(gate, "MAX_SUMS", 1)
    sampled = [sign_flip_p_value(gain, differing) for gain in gains]
    assert sampled == pytest.approx(exact, abs=0.007)  # four standard errors
    assert sampled == [sign_flip_p_value(gain, differing) for gain in gains]
    assert sampled != exact
    assert sign_flip_p_value(Fraction(0), differing) == 1
    assert sign_flip_p_value(Fraction(1), differing) == 1 / (gate.DRAWS + 1)  # never 0


def test_many_classes_of_many_sizes_take_no_time() -> None:
    labels = np.repeat(np.arange(200), np.arange(20, 220))
    one, other = (scored(labels, dict.fromkeys(range(200), share)) for share in (0.90, 0.93))
    assert COMPARISONS["balanced_accuracy"](other, one, labels).p_value == 1 / (gate.DRAWS + 1)
