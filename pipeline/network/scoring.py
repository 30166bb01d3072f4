"""How good the CNN is: its probabilities, and the figures that are read off them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.network import fused, workers
from pipeline.network.cnn import CNN

PIECE = 250  # images at a time


def predict_logits(cnn: CNN, images: Tensor) -> Tensor:
    """Logits (N, classes) float32 of images (N, H, W, C) uint8, on the images' device."""

    @torch.no_grad()
    def predict(piece: Tensor) -> Tensor:
        return fused.logits(cnn, piece)

    was_training = cnn.training
    cnn.eval()
    try:
        with workers.hired(cnn, images.device) as team:
            return torch.cat(list(team.map(predict, torch.split(images, PIECE))))
    finally:
        cnn.train(was_training)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The share of images whose highest score (N, classes) is that of their label (N,)."""
    return (scores.argmax(dim=1) == labels).double().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log p(label) over all images, in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """How far confidence and accuracy lie apart, on average over images (Guo et al., 2017, equation 3).

    Images are put into ``bins`` of equal width by their highest probability; each bin counts by its size.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = confidence - (predicted == labels).double()
    per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, surplus)
    return (per_bin.abs().sum() / len(labels)).item()


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): row = actual class, column = predicted class."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class ClassScore:
    """Of the images predicted as this class, and of the images of this class: the share that is right."""

    precision: float
    recall: float


def per_class(confusion: Tensor) -> list[ClassScore]:
    """Precision and recall of each class; 0 where nothing was predicted or nothing belongs to the class."""
    right = confusion.diag().double()
    precision = right / confusion.sum(dim=0).clamp(min=1)
    recall = right / confusion.sum(dim=1).clamp(min=1)
    return [ClassScore(*pair) for pair in zip(precision.tolist(), recall.tolist(), strict=True)]
