"""What `make bench` measures with: its arithmetic, its recipes, its verdicts."""

import pytest

from bench import arithmetic, recipes, speed
from bench.contenders import usual
from pipeline.network.cnn import Architecture

PUBLISHED = Architecture((28, 28, 1), tuple("0123456789"), (32, 64))


def test_the_operations_of_the_published_network_are_those_counted_by_hand() -> None:
    first, second, dense = 24 * 24 * 32 * 9, 10 * 10 * 64 * 32 * 9, 1600 * 10
    forward, back = first + second + dense, first + 2 * second + 2 * dense
    assert arithmetic.needed_operations(PUBLISHED, train=1, validation=0) == 2 * (forward + back)
    assert arithmetic.needed_operations(PUBLISHED, train=0, validation=1) == 2 * forward
    # 54,000 and 6,000 images at the 149 GFLOP/s of a slower machine: 4.4 seconds.
    assert arithmetic.needed_operations(PUBLISHED, 54_000, 6_000) / 149e9 == pytest.approx(4.4, abs=0.1)


def test_the_others_train_the_same_network() -> None:
    assert sum(parameter.numel() for parameter in usual.network().parameters()) == 34_826


def test_a_recipe_can_be_said_in_words_and_understood() -> None:
    knobs = {
        "model.batch_norm": True,
        "train.threads": None,
        "train.learning_rate": 0.015,
        "train.schedule": "one-cycle",
    }
    assert recipes.from_words(recipes.as_words(knobs)) == knobs
    params = recipes.changed(recipes.published(), recipes.SHORT)
    assert (params.train.epochs, params.train.schedule, params.model.dropout) == (4, "one-cycle", 0.1)
    assert params.model.filters == recipes.published().model.filters
    with pytest.raises(ValueError, match=r"train\.epoch is no knob"):
        recipes.changed(params, {"train.epoch": 3})


@pytest.mark.parametrize(("figures", "low", "holds"), [((1.5, 1.7, 9), False, True), ((1.5, 1.7, 9), True, False)])
def test_the_median_decides_whether_a_bound_holds(figures: tuple[float, ...], low: bool, holds: bool) -> None:
    bound = speed.Bound("an epoch", figures, 1.6, 2, "x", low=low)
    assert bound.holds == holds
    assert ("holds" if holds else "FALLS SHORT") in str(bound)
    assert "1.70 x" in str(bound)
    assert "(1.50 ... 9.00)" in str(bound)


def test_the_dataloader_is_judged_by_its_faster_number_of_workers() -> None:
    seconds = dict.fromkeys(speed.CONTENDERS, 1.0) | {"DataLoader loop": 8.0, "DataLoader loop, 2 workers": 6.0}
    turns = {name: [speed.Turn([each], 0.99, 1000)] for name, each in seconds.items()}
    bounds = {bound.what: bound.figure for bound in speed.epoch_bounds(turns, [100e9], 80 * 10**9)}
    assert bounds["epoch, float32, against the DataLoader loop"] == 6
    assert bounds["share of the float32 peak, zero gradients counted as work"] == 80
