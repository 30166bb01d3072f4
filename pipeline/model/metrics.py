"""How good the CNN is: its logits, and the metrics computed from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import Fault
from pipeline.model import cpu_threads
from pipeline.model.cnn import CNN

CHUNK = 250  # images that are scored together, if they are small
CHUNK_PIXELS = CHUNK * 28 * 28  # of larger images there are fewer: the maps of 250 would take gigabytes
Result = TypeVar("Result")


def predict_logits(cnn: CNN, images: Tensor) -> Tensor:
    """Logits (N, classes) float32 of images (N, H, W, C) uint8, on the images' device."""

    @torch.no_grad()
    def predict(chunk: Tensor) -> Tensor:
        logits: Tensor = cnn(chunk)
        return logits

    return torch.cat(in_chunks(cnn, images, predict))


def in_chunks(cnn: CNN, images: Tensor, function: Callable[[Tensor], Result]) -> list[Result]:
    """What ``function`` gives for each chunk of images (N, H, W, C), with ``cnn`` in evaluation mode."""
    pixels, was_training = images.shape[1] * images.shape[2], cnn.training
    cnn.eval()
    try:
        with cpu_threads.thread_pool(cnn, images.device) as pool:
            return list(pool.map(function, torch.split(images, min(CHUNK, max(1, CHUNK_PIXELS // pixels)))))
    finally:
        cnn.train(was_training)


def finite(logits: Tensor) -> Tensor:
    """These logits (N, classes). Raises Fault where one of them is not a number, or infinite."""
    if not logits.isfinite().all():
        raise Fault(
            "the model's answer is not a number, so it cannot be used: choose another version, or train again with a "
            "lower train.learning_rate"
        )
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose highest logit (N, classes) is that of their label (N,)."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a success rate, after ``right`` successes in ``count`` (Wilson, 1927).

    Without any trial it is all of 0 to 1.
    """
    if not count:
        return 0.0, 1.0
    z = 1.959964  # 2.5 % of the normal distribution lie above
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    reach = z * math.sqrt((share * (1 - share) + spread / 4) / count)
    return max(0.0, (middle - reach) / (1 + spread)), min(1.0, (middle + reach) / (1 + spread))


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log p(label) over all images, in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The mean recall of the classes that have images: every class counts the same, however many images it has."""
    confusion = _confusion(logits, labels)
    counts = confusion.sum(dim=1)
    return (confusion.diag() / counts)[counts > 0].mean().item()


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """The mean F1 score, 2 precision recall / (precision + recall), of the classes that have images or predictions."""
    confusion = _confusion(logits, labels)
    counts = confusion.sum(dim=0) + confusion.sum(dim=1)
    return (2 * confusion.diag() / counts)[counts > 0].mean().item()


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """confusion_matrix() of these logits (N, classes), as float64."""
    return confusion_matrix(labels, logits.argmax(dim=1), logits.shape[1]).double()


def baseline_accuracy(training: Mapping[str, int], split: Mapping[str, int]) -> float:
    """The accuracy on a split of always answering the most common class of the training images.

    Both are numbers of images by class. Of equally common classes it is the first.
    """
    return split[max(training, key=training.__getitem__)] / sum(split.values())


# Measured on the validation and test images, from logits (N, classes) and labels (N,), by the name in metrics.json.
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "loss": cross_entropy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
}


BESIDE_ACCURACY = ("balanced_accuracy", "macro_f1", "baseline_accuracy")


def beside_accuracy(scores: Mapping[str, Any]) -> str:
    """The scores of BESIDE_ACCURACY in words: what an accuracy does not say where classes are not of one size."""
    return (
        f"{scores['balanced_accuracy']:.2%} balanced accuracy, macro F1 {scores['macro_f1']:.4f}; always answering the "
        f"most common class: {scores['baseline_accuracy']:.2%}"
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """The mean distance between confidence and accuracy over all images (Guo et al., 2017, equation 3).

    Images are put into ``bins`` of equal width by their highest probability; each bin counts by its size.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of = _bins_of(confidence, bins)
    surplus = confidence - (predicted == labels).double()
    per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, surplus)
    return (per_bin.abs().sum() / len(labels)).item()


def _bins_of(confidence: Tensor, bins: int) -> Tensor:
    """The bin of each, of ``bins`` of equal width; a value on an edge is in the lower bin."""
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): row = actual class, column = predicted class."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class ClassScore:
    """The correct share of the images predicted as this class, and of the images of this class."""

    precision: float
    recall: float


def per_class(confusion: Tensor) -> list[ClassScore]:
    """Precision and recall of each class; 0 where nothing was predicted or nothing belongs to the class."""
    found = shares(confusion)
    pairs = zip(found["precision"], found["recall"], strict=True)
    return [ClassScore(precision, recall) for (precision, *_), (recall, *_) in pairs]


Shares = dict[str, list[tuple[float, float, float]]]


def shares(confusion: Tensor) -> Shares:
    """Precision and recall of each class with their 95 % intervals, as (share, low, high)."""
    right = confusion.diag().tolist()
    of = {"precision": confusion.sum(dim=0).tolist(), "recall": confusion.sum(dim=1).tolist()}
    return {
        fact: [(hits / max(count, 1), *wilson_interval(hits, count)) for hits, count in zip(right, counts, strict=True)]
        for fact, counts in of.items()
    }


class Bin(NamedTuple):
    """Images of about equal confidence: its mean, the share that is correct, and the interval of that share."""

    confidence: float
    accuracy: float
    low: float
    high: float
    images: int


def reliability(probabilities: Tensor, labels: Tensor, bins: int) -> list[Bin]:
    """A reliability diagram: the bins of equal width, ``bins`` in all, that have images."""
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of = _bins_of(confidence, bins)
    counts = torch.bincount(bin_of, minlength=bins)
    sure, right = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, each).tolist()
        for each in (confidence, (predicted == labels).double())
    )
    rows = zip(sure, right, counts.tolist(), strict=True)
    return [Bin(total / n, hits / n, *wilson_interval(int(hits), n), n) for total, hits, n in rows if n]
