"""Which finalist wins, and whether its gain is more than chance."""

import pytest

from pipeline.tuning.finalists import Finalist, Outcome, Verdict, gain, judge, table, winner

PRESENT = Outcome(Finalist(None, {"model.dropout": 0.5}, 34_826), (0.985, 0.987, 0.986))
SMALL = Outcome(Finalist(7, {"model.dropout": 0.25}, 9_000), (0.99, 0.991, 0.992))
LARGE = Outcome(Finalist(12, {"model.dropout": 0.1234567}, 90_000), (0.992, 0.99, 0.991))


def test_the_mean_decides_and_then_the_size() -> None:
    assert winner([PRESENT, LARGE, SMALL]) is SMALL
    assert winner([PRESENT, LARGE]) is LARGE
    better = Outcome(LARGE.finalist, (0.992, 0.992, 0.992))
    assert winner([SMALL, better]) is better


def test_a_gain_is_taken_seed_by_seed() -> None:
    gained, error = gain(SMALL, PRESENT)
    assert gained == pytest.approx(0.005)
    assert error == pytest.approx(0.001 / 3**0.5)  # of the differences 0.005, 0.004 and 0.006
    assert judge([PRESENT, SMALL]) == Verdict(SMALL, gained, error)
    assert judge([PRESENT, SMALL]).is_real
    assert str(judge([PRESENT, SMALL])) == "trial 7 against the current values: +0.500% +- 0.058%, a real gain"
    almost = Outcome(PRESENT.finalist, (0.99, 0.992, 0.9905))
    assert not judge([almost, LARGE]).is_real
    assert str(judge([almost, LARGE])).endswith("within two standard errors: it may be chance")
    assert str(judge([PRESENT])) == "the current values are the best"


def test_the_table_has_a_row_for_each_the_best_first() -> None:
    head, *rows = table([PRESENT, LARGE], "validation accuracy").splitlines()
    assert head.split() == ["validation", "accuracy", "n", "parameters", "values"]
    assert [row.split()[:2] for row in rows] == [["trial", "12"], ["current", "98.600%"]]
    assert rows[0].endswith("99.100% +- 0.100%         3      90,000  model.dropout=0.1235")
