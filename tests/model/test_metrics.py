"""Scores against numbers worked out by hand."""

import math

import pytest
import torch

from pipeline.data.splits import LabelledImages
from pipeline.model import metrics
from pipeline.model.cnn import CNN, Architecture, as_input

LABELS = torch.tensor([0, 0, 1, 2])
PREDICTED = torch.tensor([0, 1, 1, 1])


def test_accuracy_and_cross_entropy() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    labels = torch.tensor([0, 1, 1])
    assert metrics.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert metrics.cross_entropy(logits, labels) == pytest.approx(-math.log(0.9 * 0.8 * 0.4) / 3)


def test_balanced_accuracy_macro_f1_and_the_majority_baseline_by_hand() -> None:
    """Eight images of class 0, two of class 1, none of class 2: nine answers are 0, and one, for class 0, is 2."""
    labels, answers = torch.tensor([0] * 8 + [1] * 2), torch.tensor([0] * 7 + [2] + [0] * 2)
    logits = torch.nn.functional.one_hot(answers, 4).float()
    assert metrics.accuracy(logits, labels) == pytest.approx(0.7)
    assert metrics.balanced_accuracy(logits, labels) == pytest.approx((7 / 8 + 0) / 2)  # class 2 has no images
    assert metrics.macro_f1(logits, labels) == pytest.approx((14 / 17 + 0 + 0) / 3)  # class 2 is answered, 3 is not
    assert metrics.baseline_accuracy({"a": 5, "b": 9, "c": 9}, {"a": 6, "b": 3, "c": 1}) == 0.3


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_and_macro_f1_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=generator) ** 2 // 5  # 0, 1 and 3: classes of three sizes
    logits = torch.randn(200, 4, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 4)
    predicted = logits.argmax(dim=1)
    assert 0.5 < metrics.accuracy(logits, labels) < 1
    assert metrics.balanced_accuracy(logits, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics.macro_f1(logits, labels) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_confusion_matrix_has_actual_rows_and_predicted_columns() -> None:
    assert metrics.confusion_matrix(LABELS, PREDICTED, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_precision_and_recall_of_each_class() -> None:
    scores = metrics.per_class(metrics.confusion_matrix(LABELS, PREDICTED, 3))
    assert [(score.precision, score.recall) for score in scores] == [(1, 0.5), (pytest.approx(1 / 3), 1), (0, 0)]


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    labels = torch.tensor([0, 1, 0, 0])
    # Two images at 0.95, half of them right; two at 0.65, both right.
    assert metrics.expected_calibration_error(probabilities, labels, 10) == pytest.approx((0.45 + 0.35) / 2)
    # A bin ends with its upper edge: 0.5 belongs to 0.4 ... 0.5, and 0.55 to the next bin.
    edge = torch.tensor([[0.5, 0.5], [0.55, 0.45]], dtype=torch.float64)
    assert metrics.expected_calibration_error(edge, torch.tensor([0, 1]), 10) == pytest.approx((0.5 + 0.55) / 2)
    assert metrics.expected_calibration_error(torch.eye(2), torch.tensor([0, 1]), 10) == 0


@pytest.mark.faults
def test_fault_25_logits_are_the_same_alone_and_in_a_batch(digits: dict[str, LabelledImages]) -> None:
    cnn = CNN(Architecture((28, 28, 1), tuple("0123456789"), (8,)), torch.Generator().manual_seed(0))
    images = digits["train"].images[: 2 * metrics.CHUNK + 3]  # several chunks, the last one small
    logits = metrics.predict_logits(cnn, images)
    assert cnn.training  # left as it was found
    with torch.no_grad():
        torch.testing.assert_close(logits[-1:], cnn.eval()(as_input(images[-1:])))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(9922, 10_000, 0.99028, 0.99375), (10, 10, 0.72247, 1.0), (0, 20, 0.0, 0.16113), (50, 100, 0.40383, 0.59617)],
)
def test_the_interval_of_a_share_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert metrics.wilson_interval(right, count) == pytest.approx((low, high), abs=2e-5)
    assert metrics.wilson_interval(0, 0) == (0, 1)  # a class that the test images lack


def test_shares_are_precision_and_recall_with_wilsons_intervals() -> None:
    confusion = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    found = metrics.shares(confusion)
    each = metrics.per_class(confusion)
    assert [share for share, _, _ in found["precision"]] == [score.precision for score in each]
    assert [share for share, _, _ in found["recall"]] == [score.recall for score in each]
    assert found["recall"][0][1:] == metrics.wilson_interval(8, 10)
    assert found["recall"][2] == (0, 0, 1)  # no image: nothing is known


def test_reliability_is_what_the_calibration_error_adds_up() -> None:
    probabilities = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)).pow(3)
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    labels = torch.arange(500) % 4
    bins = metrics.reliability(probabilities, labels, bins=10)
    assert sum(each.images for each in bins) == 500
    assert all(each.low < each.accuracy < each.high for each in bins if each.accuracy not in (0, 1))
    error = sum(abs(each.confidence - each.accuracy) * each.images for each in bins) / 500
    assert error == pytest.approx(metrics.expected_calibration_error(probabilities, labels, 10))
