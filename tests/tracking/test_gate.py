"""Which model becomes champion: the rules, on predictions made up for them."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.params import Promotion
from pipeline.tracking.gate import Paired, ScoredModel, compare, decide

NO_RULES: dict[str, Any] = {"min_accuracy": None, "max_ece": None, "max_parameters": None, "alpha": None}


def model(wrong: range, parameters: int = 1000) -> ScoredModel:
    correct = np.ones(1000, dtype=bool)
    correct[list(wrong)] = False
    return ScoredModel(correct, parameters)


def rules(**changed: object) -> Promotion:
    return Promotion.model_validate(NO_RULES | changed)


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
    challenger: ScoredModel, changed: dict[str, object], alias: str, reason: str
) -> None:
    decision = decide(challenger, 0.02, model(range(50)), "1", rules(**changed))
    assert decision.alias == alias
    assert decision.reason.startswith(reason)
    assert decision.paired == compare(challenger.correct, model(range(50)).correct)


def test_the_first_model_only_has_to_meet_the_limits() -> None:
    assert decide(model(range(50)), 0.02, None, "", rules()).alias == "champion"
    assert decide(model(range(50)), 0.02, None, "", rules(min_accuracy=0.96)).alias == "challenger"
