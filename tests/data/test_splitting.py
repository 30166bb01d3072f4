"""The splits are honest: nothing on both sides, every class on each, and nothing moves when pictures are added."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import splitting
from pipeline.data.splits import SPLITS, TEST, TRAIN, VALIDATION
from pipeline.data.splitting import Assignment, Pictures
from pipeline.errors import UserError

CLASSES = ("cat", "cow", "dog")
FRACTIONS: dict[str, Any] = {"validation_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def pictures(count: int, start: int = 0, **changed: Any) -> Pictures:
    """As many pictures, in turn of each class, that have nothing to do with each other."""
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)]
    facts: dict[str, Any] = {
        "keys": keys,
        "labels": np.arange(start, start + count) % len(CLASSES),
        "class_names": CLASSES,
        "groups": [None] * count,
        "copies": np.arange(count),
        "published": [None] * count,
    }
    return Pictures(**facts | changed)


def assign(given: Pictures, **changed: Any) -> Assignment:
    return splitting.assign(given, **FRACTIONS | changed)


def test_the_shares_are_about_those_that_are_asked_for_in_each_class() -> None:
    given = pictures(6000)
    found = assign(given).splits
    for label in range(3):
        counts = Counter(split for split, own in zip(found, given.labels, strict=True) if own == label)
        assert counts[TEST] == pytest.approx(0.2 * 2000, abs=80)
        assert counts[VALIDATION] == pytest.approx(0.1 * 0.8 * 2000, abs=60)


def test_another_seed_gives_another_split_and_the_same_seed_the_same() -> None:
    given = pictures(300)
    assert assign(given) == assign(given)
    assert assign(given).splits != assign(given, seed=1).splits


def test_adding_pictures_moves_none_of_the_old_ones() -> None:
    assert assign(pictures(1000)).splits == assign(pictures(1500)).splits[:1000]


def test_the_order_and_the_other_pictures_do_not_matter() -> None:
    given = pictures(1000)
    order = np.random.default_rng(0).permutation(1000)
    copies = np.arange(1000) // 2
    turned = pictures(1000, keys=[given.keys[row] for row in order], labels=given.labels[order], copies=copies[order])
    before, after = assign(replace(given, copies=copies)), assign(turned)
    assert [before.splits[row] for row in order] == list(after.splits)
    assert before.leaks == after.leaks > 50


def test_copies_and_pictures_of_one_subject_stay_together() -> None:
    random = np.random.default_rng(0)
    groups = [f"patient {number}" if number % 3 else None for number in random.integers(0, 200, 2000)]
    copies = random.integers(0, 1900, 2000)
    found = assign(pictures(2000, groups=groups, copies=copies))
    for names in (groups, copies.tolist()):
        of: dict[object, str] = {}
        for name, split in zip(names, found.splits, strict=True):
            if name is not None:
                assert of.setdefault(name, split) == split
    assert found.leaks > 50


def test_a_subject_keeps_its_split_when_it_gets_more_pictures() -> None:
    groups = [f"patient {number % 300}" for number in range(900)]
    before, after = assign(pictures(600, groups=groups[:600])), assign(pictures(900, groups=groups))
    assert before.splits == after.splits[:600]


def test_without_copies_and_subjects_nothing_leaks() -> None:
    assert assign(pictures(300)).leaks == 0


def test_a_rare_class_is_in_every_split() -> None:
    labels = np.array([0] * 997 + [1] * 3)
    found = assign(pictures(1000, labels=labels, class_names=("common", "rare")))
    assert set(found.splits[-3:]) == set(SPLITS)
    assert {name for name, _ in found.completed} <= {"rare"}


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_with_too_few_pictures_is_refused(count: int) -> None:
    labels = np.array([0] * 100 + [1] * count)
    with pytest.raises(
        UserError, match=rf"class rare has too few pictures .* \({count}\); each of 3 splits needs one: add"
    ):
        assign(pictures(100 + count, labels=labels, class_names=("common", "rare")))


def test_a_class_of_copies_is_refused() -> None:
    copies = np.array([*range(100), *[100] * 50])
    labels = np.array([0] * 100 + [1] * 50)
    with pytest.raises(UserError, match=r"the class copied has too few pictures .* \(1\);"):
        assign(pictures(150, labels=labels, copies=copies, class_names=("common", "copied")))


def test_published_splits_are_kept() -> None:
    published = [SPLITS[number // 100] for number in range(300)]
    found = assign(pictures(300, published=published))
    assert list(found.splits) == published
    assert found.moved == ()


def test_validation_is_taken_from_train_if_it_is_not_published() -> None:
    found = assign(pictures(900, published=[TRAIN] * 600 + [TEST] * 300))
    assert set(found.splits[600:]) == {TEST}
    assert Counter(found.splits[:600])[VALIDATION] == pytest.approx(60, abs=25)
    assert found.moved == ()


def test_a_copy_on_both_sides_of_a_published_split_goes_where_most_are() -> None:
    published = [SPLITS[number // 100] for number in range(300)]
    copies = np.arange(300)
    copies[[5, 205]] = 5  # one of each: to train
    copies[[17, 217, 218]] = 17  # most in test
    found = assign(pictures(300, published=published, copies=copies))
    assert found.splits[205] == TRAIN
    assert found.splits[17] == TEST
    assert found.moved == (17, 205)


@given(st.data())
def test_whatever_is_given_every_class_is_in_every_split_and_no_unit_in_two(data: st.DataObject) -> None:
    count = data.draw(st.integers(9, 60))
    some = st.lists(st.integers(0, count // 3), min_size=count, max_size=count)
    copies = np.array(data.draw(some))
    groups = [f"group {number}" if number % 2 else None for number in data.draw(some)]
    labels = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    published = data.draw(st.sampled_from([None, (TRAIN, TEST), SPLITS]))
    splits = [None] * count if published is None else [published[number % len(published)] for number in range(count)]
    given_pictures = pictures(count, copies=copies, groups=groups, labels=labels, published=splits)
    try:
        found = assign(given_pictures, seed=data.draw(st.integers(0, 9)))
    except UserError:
        return
    units = given_pictures.units()
    assert len(set(zip(units.tolist(), found.splits, strict=True))) == len(set(units.tolist()))
    present = set(zip(labels.tolist(), found.splits, strict=True))
    if published is None:
        assert present == {(label, split) for label in range(3) for split in SPLITS}
