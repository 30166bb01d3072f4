"""Images that raise the logit of one class each, without a penalty and with several: see activation_maximization."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.splits import LabelledImages
from pipeline.explain import activation_maximization
from pipeline.explain.activation_maximization import Ascent, Regularization
from pipeline.model.cnn import CNN, as_input
from pipeline.params import Maximisation

MAX_VALUES = 10_000 * 28 * 28  # of the pixels of training images that are compared at a time


class ClassImages(NamedTuple):
    """Images (classes, C, H, W) in [0, 1] for one kind of regularization.

    For each image: the probability of its class, and the class of the training image most similar to it, (classes,).
    """

    regularization: str
    images: Tensor
    probabilities: Tensor
    nearest: Tensor


def class_images(cnn: CNN, train: LabelledImages, classes: int, settings: Maximisation) -> list[ClassImages]:
    """Images of the first ``classes`` classes, once for each kind of regularization."""
    found = []
    for name, regularization in _regularizations(settings).items():
        images = activation_maximization.maximize(
            cnn, activation_maximization.class_logits, classes, regularization, ascent(settings)
        )
        with torch.no_grad():
            probabilities = cnn(images).softmax(dim=1).diag()
        nearest = train.labels[nearest_images(images, train.images)]
        found.append(ClassImages(name, images, probabilities, nearest))
    return found


def _regularizations(settings: Maximisation) -> dict[str, Regularization]:
    """From none to all three, named as the figure labels them."""
    l1, variation, jitter = settings.l1, settings.total_variation, settings.jitter
    return {
        "no penalty": Regularization(),
        "few bright pixels (L1)": Regularization(l1=l1),
        "smooth (total variation)": Regularization(total_variation=variation),
        "smooth, with jitter": Regularization(total_variation=variation, jitter=jitter),
        "all three": Regularization(l1, variation, jitter),
    }


def ascent(settings: Maximisation) -> Ascent:
    """The gradient ascent that params.yaml asks for."""
    return Ascent(settings.steps, settings.step_size, settings.noise, settings.seed)


def nearest_images(images: Tensor, candidates: Tensor) -> Tensor:
    """For each image (M, C, H, W) the index of the candidate (N, H, W, C) most similar to it, (M,).

    Similarity is the correlation of the pixels, so neither brightness nor contrast counts.
    """

    def normalised(pixels: Tensor) -> Tensor:
        return F.normalize(pixels - pixels.mean(dim=1, keepdim=True))

    targets = normalised(images.flatten(1))
    count = max(1, MAX_VALUES // candidates[0].numel())
    best, index = torch.full((len(images),), -2.0), torch.zeros(len(images), dtype=torch.long)
    for start in range(0, len(candidates), count):
        chunk = normalised(as_input(candidates[start : start + count]).flatten(1))
        similarity, place = (targets @ chunk.T).max(dim=1)
        index = torch.where(similarity > best, place + start, index)
        best = torch.maximum(similarity, best)
    return index
