"""How good the CNN is: its probabilities, and the figures that are read off them."""

import math
from collections.abc import Callable
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


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Between which shares the true one lies with 95 % confidence, after ``right`` of ``count`` (Wilson, 1927)."""
    z = 1.959964  # of the normal distribution, 2.5 % lie above it
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    reach = z * math.sqrt((share * (1 - share) + spread / 4) / count)
    return (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)


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


def robustness(cnn: CNN, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on the same images (N, H, W, C) uint8 after each change that makes them harder."""
    return {name: accuracy(predict_logits(cnn, change(images)), labels) for name, change in CHANGES.items()}


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Images (N, H, W, C) moved to the right and down, black where nothing was."""
    moved = torch.zeros_like(images)
    moved[:, pixels:, pixels:] = images[:, :-pixels, :-pixels]
    return moved


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images (N, H, W, C) uint8 turned around their middle, black where nothing was."""
    height, width = images.shape[1:3]
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    # The grid is in half sides, so that an image that is no square needs its two sides' ratio.
    turn = torch.tensor([[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]], device=images.device)
    pixels = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(turn.expand(1, 2, 3), [1, pixels.shape[1], height, width], align_corners=False)
    turned = F.grid_sample(pixels, grid.expand(len(images), -1, -1, -1), align_corners=False)
    return turned.round().to(torch.uint8).permute(0, 2, 3, 1)


def noisy(images: Tensor, deviation: float) -> Tensor:
    """Images uint8 with Gaussian noise of so many times the whole range, the same noise at each call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (images + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def paler(images: Tensor, contrast: float) -> Tensor:
    """Images uint8 with less contrast, around the grey in the middle of the range."""
    return (127.5 + (images - 127.5) * contrast).round().to(torch.uint8)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted_2_pixels": lambda images: shifted(images, 2),
    "rotated_15_degrees": lambda images: rotated(images, 15),
    "noise_20_percent": lambda images: noisy(images, 0.2),
    "half_contrast": lambda images: paler(images, 0.5),
}
