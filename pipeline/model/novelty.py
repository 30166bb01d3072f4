"""Does a picture look like the training images? Novelty detection, also called out-of-distribution detection.

A network gives every picture one of its classes. Two things tell that a picture is not like those it was trained on:
its features are far from those of all training images, and its highest logit is low (Hendrycks et al., 2022, "Scaling
out-of-distribution detection for real-world settings"). The novelty score is the sum of both, each as a standard score.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model import cpu_threads, metrics
from pipeline.model.cnn import CNN, Architecture, output_shape

GRID = 3  # the last maps are averaged over a grid of at most this many cells a side
CENTRES = 5  # of each class
IMAGES = 10_000  # training images that the centres are computed from
CHUNK = 500  # of these images at a time
ITERATIONS = 10  # of k-means
FALSE_ALARMS = 0.005  # the share of validation images above the threshold
MIN_VALIDATION = 200  # images; of fewer, not one would be above it
SMALLEST = 1e-6  # deviation that is divided by


class Outputs(NamedTuple):
    """What the network gives for N images: logits (N, classes), and features (N, D) of length 1."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Novelty:
    """Centres (K, D) of the training images' features, and the statistics of the validation images.

    ``distance`` and ``logit`` are the mean and the standard deviation of the cosine distance to the nearest centre, and
    of the highest logit. Images whose score is above ``threshold`` do not look like the training images.
    """

    centres: Tensor
    distance: tuple[float, float]
    logit: tuple[float, float]
    threshold: float

    def score(self, given: Outputs) -> Tensor:
        """The novelty score (N,) of each image, float64."""
        distances, logits = _distance(given, self.centres), _highest_logit(given)
        return _standard(distances, self.distance) - _standard(logits, self.logit)

    def is_unlike(self, given: Outputs) -> Tensor:
        """Whether each image does not look like the training images: (N,) bool."""
        return self.score(given) > self.threshold


def outputs(cnn: CNN, images: Tensor) -> Outputs:
    """The outputs for images (N, H, W, C) uint8, on the CPU."""
    size = _grid(cnn.architecture)

    @torch.no_grad()
    def compute(chunk: Tensor) -> Outputs:
        maps = cnn.maps(chunk)
        features = F.adaptive_avg_pool2d(maps.float(), size).flatten(1)
        return Outputs(cnn.head(maps).float(), F.normalize(features))

    chunks = metrics.in_chunks(cnn, images, compute)
    return Outputs(*(torch.cat(each).cpu() for each in zip(*chunks, strict=True)))


def feature_count(architecture: Architecture) -> int:
    """D, the number of features."""
    rows, columns = _grid(architecture)
    return output_shape(architecture)[0] * rows * columns


def _grid(architecture: Architecture) -> tuple[int, int]:
    _, height, width = output_shape(architecture)
    return min(GRID, height), min(GRID, width)


def chosen(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The indices of the training images that the centres are computed from, some at a time. There are ``count``."""
    return torch.split(torch.randperm(count, generator=generator)[:IMAGES], CHUNK)


def fit(cnn: CNN, some: Iterable[tuple[Tensor, Tensor]], validation_images: Tensor) -> Novelty | None:
    """The centres of training images (N, H, W, C) with labels (N,), and the statistics of the validation images.

    ``some`` are the images that are `chosen`, and their labels. None with fewer validation images than it takes to know
    such a threshold. The same on any number of threads.
    """
    if len(validation_images) < MIN_VALIDATION:
        return None
    found = [(outputs(cnn, images).features, labels.cpu()) for images, labels in some]
    features, labels = (torch.cat(each) for each in zip(*found, strict=True))
    validation = outputs(cnn, validation_images)
    with cpu_threads.single_thread():
        centres = torch.cat([_centres(features[labels == label]) for label in sorted(set(labels.tolist()))])
        distance = _mean_and_deviation(_distance(validation, centres))
        logit = _mean_and_deviation(_highest_logit(validation))
        scores = Novelty(centres, distance, logit, 0.0).score(validation)
        return Novelty(centres, distance, logit, scores.quantile(1 - FALSE_ALARMS).item())


def _centres(features: Tensor) -> Tensor:
    """The centres (K, D) of features (N, D), by spherical k-means (Dhillon and Modha, 2001)."""
    centres = features[:CENTRES]
    for _ in range(ITERATIONS):
        nearest = (features @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = F.normalize(torch.where((sums == 0).all(dim=1, keepdim=True), centres, sums))
    return centres


def _distance(given: Outputs, centres: Tensor) -> Tensor:
    """The cosine distance (N,) of each image's features to the nearest centre."""
    return 1 - (given.features @ centres.T).amax(dim=1).double()


def _highest_logit(given: Outputs) -> Tensor:
    return given.logits.amax(dim=1).double()


def _mean_and_deviation(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), max(values.std(correction=0).item(), SMALLEST)


def _standard(values: Tensor, statistics: tuple[float, float]) -> Tensor:
    mean, deviation = statistics
    return (values - mean) / deviation
