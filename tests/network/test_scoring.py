"""Scores against numbers worked out by hand."""

import math

import pytest
import torch

from pipeline.images.splits import LabelledImages
from pipeline.network import scoring
from pipeline.network.cnn import CNN, Architecture, as_input

LABELS = torch.tensor([0, 0, 1, 2])
PREDICTED = torch.tensor([0, 1, 1, 1])


def test_accuracy_and_cross_entropy() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    labels = torch.tensor([0, 1, 1])
    assert scoring.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert scoring.cross_entropy(logits, labels) == pytest.approx(-math.log(0.9 * 0.8 * 0.4) / 3)


def test_confusion_matrix_has_actual_rows_and_predicted_columns() -> None:
    assert scoring.confusion_matrix(LABELS, PREDICTED, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_precision_and_recall_of_each_class() -> None:
    scores = scoring.per_class(scoring.confusion_matrix(LABELS, PREDICTED, 3))
    assert [(score.precision, score.recall) for score in scores] == [(1, 0.5), (pytest.approx(1 / 3), 1), (0, 0)]


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    labels = torch.tensor([0, 1, 0, 0])
    # Two images at 0.95, half of them right; two at 0.65, both right.
    assert scoring.expected_calibration_error(probabilities, labels, 10) == pytest.approx((0.45 + 0.35) / 2)
    # A bin ends with its upper edge: 0.5 belongs to 0.4 ... 0.5, and 0.55 to the next bin.
    edge = torch.tensor([[0.5, 0.5], [0.55, 0.45]], dtype=torch.float64)
    assert scoring.expected_calibration_error(edge, torch.tensor([0, 1]), 10) == pytest.approx((0.5 + 0.55) / 2)
    assert scoring.expected_calibration_error(torch.eye(2), torch.tensor([0, 1]), 10) == 0


def test_logits_are_the_same_alone_and_in_a_batch(digits: dict[str, LabelledImages]) -> None:
    cnn = CNN(Architecture((28, 28, 1), tuple("0123456789"), (8,)), torch.Generator().manual_seed(0))
    images = digits["train"].images[: 2 * scoring.PIECE + 3]  # several pieces, the last one small
    logits = scoring.predict_logits(cnn, images)
    assert cnn.training  # left as it was found
    with torch.no_grad():
        torch.testing.assert_close(logits[-1:], cnn.eval()(as_input(images[-1:])))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(9922, 10_000, 0.99028, 0.99375), (10, 10, 0.72247, 1.0), (0, 20, 0.0, 0.16113), (50, 100, 0.40383, 0.59617)],
)
def test_the_interval_of_a_share_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert scoring.wilson_interval(right, count) == pytest.approx((low, high), abs=2e-5)


def test_images_are_made_harder_as_the_names_say() -> None:
    images = torch.zeros(2, 9, 9, 1, dtype=torch.uint8)
    images[:, 2, 3] = 200
    assert torch.nonzero(scoring.shifted(images, 2)).tolist() == [[0, 4, 5, 0], [1, 4, 5, 0]]
    quarter = scoring.rotated(images, 90)
    assert int(quarter.sum()) == pytest.approx(400, abs=8)
    assert quarter[0].argmax() != images[0].argmax()
    torch.testing.assert_close(scoring.rotated(images, 360), images)
    noisy = scoring.noisy(torch.full((100, 9, 9, 1), 128, dtype=torch.uint8), 0.1).double()
    assert float(noisy.mean()) == pytest.approx(128, abs=1)
    assert float(noisy.std()) == pytest.approx(25.5, abs=1)
    assert torch.equal(scoring.noisy(images, 0.1), scoring.noisy(images, 0.1))
    assert sorted(set(scoring.paler(images, 0.5).flatten().tolist())) == [64, 164]


def test_robustness_is_the_accuracy_on_the_harder_images(digits: dict[str, LabelledImages]) -> None:
    test, cnn = digits["test"], CNN(Architecture((28, 28, 1), tuple("0123456789"), (4,)), torch.Generator())
    found = scoring.robustness(cnn, test.images, test.labels)
    assert set(found) == {"shifted_2_pixels", "rotated_15_degrees", "noise_20_percent", "half_contrast"}
    logits = scoring.predict_logits(cnn, scoring.shifted(test.images, 2))
    assert found["shifted_2_pixels"] == scoring.accuracy(logits, test.labels)
