"""What the figures and tables of a report are made from; what several of them need is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pipeline.data.splits import Dataset, LabelledImages
from pipeline.errors import UserError
from pipeline.explain import attribution, corruptions
from pipeline.explain.class_images import ClassImages, class_images
from pipeline.figures import canvas
from pipeline.model import metrics
from pipeline.model.cnn import CNN
from pipeline.params import Visualize

MAX_COLUMNS = 10  # classes shown side by side as images
MAX_ROWS = 30  # classes shown in a table
MAX_PAIRS = 20  # of classes
SAMPLES = 8  # training images shown with their augmentations
AUGMENTATION = "train.augmentation."  # how the names of its parameters begin


@dataclass(frozen=True)
class ReportInputs:
    """A model, the images it was trained and tested on, and the tables that train and evaluate wrote."""

    cnn: CNN
    dataset: Dataset
    train: LabelledImages
    test: LabelledImages
    history: Sequence[Mapping[str, str]]
    predictions: Sequence[Mapping[str, str]]
    params: Visualize
    calibration_bins: int
    recipe: Mapping[str, object] = field(default_factory=dict)  # of the model, by dotted paths

    @cached_property
    def augmentations(self) -> dict[str, float]:
        """The strengths of the augmentations that the model was trained with; empty if there were none."""
        return {
            path.removeprefix(AUGMENTATION): float(strength)
            for path, strength in self.recipe.items()
            if path.startswith(AUGMENTATION) and isinstance(strength, int | float) and strength
        }

    @cached_property
    def samples(self) -> Tensor:
        """The indices of a few training images, of as many classes as possible."""
        labels = self.train.labels
        by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        within_class = torch.empty_like(labels)
        within_class[by_class] = torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[labels[by_class]]
        return (within_class * len(counts) + labels).argsort()[:SAMPLES]

    def names(self, classes: Tensor) -> list[str]:
        """The names of classes (N,)."""
        return [self.dataset.class_names[index] for index in classes.tolist()]

    def shown(self, classes: Tensor) -> list[str]:
        """The names of classes (N,), or what the figures can show of them."""
        return [canvas.legible(self.dataset.class_names[index], index) for index in classes.tolist()]

    @property
    def image_index(self) -> int:
        """The test image that params.yaml selects. Raises UserError where there is none."""
        index = self.params.image
        if index >= len(self.test):
            raise UserError(
                f"params.yaml: visualize.image is {index}; allowed: 0 ... {len(self.test) - 1}, the test images"
            )
        return index

    @cached_property
    def first_of_each_class(self) -> Tensor:
        """The index of the first test image of each class that has one, for at most ten classes."""
        labels = self.test.labels.tolist()
        present = [label for label in range(len(self.dataset.class_names)) if label in labels]
        return torch.tensor([labels.index(label) for label in present[:MAX_COLUMNS]])

    @cached_property
    def predicted(self) -> Tensor:
        """The class that evaluate predicted for each test image, (N,)."""
        number = {name: index for index, name in enumerate(self.dataset.class_names)}
        return torch.tensor([number[row["predicted"]] for row in self.predictions])

    @cached_property
    def confidence(self) -> Tensor:
        """The confidence of each of these predictions, (N,)."""
        return torch.tensor([float(row["confidence"]) for row in self.predictions])

    @cached_property
    def wrong(self) -> Tensor:
        """Whether each of these predictions is wrong, (N,) bool."""
        return self.predicted != self.test.labels

    @cached_property
    def probabilities(self) -> Tensor:
        """The model's probabilities for the test images, (N, classes)."""
        return metrics.predict_logits(self.cnn, self.test.images).softmax(dim=1)

    @cached_property
    def confusion(self) -> Tensor:
        """Counts of the test images (classes, classes): row = actual, column = predicted."""
        return metrics.confusion_matrix(self.test.labels, self.predicted, len(self.dataset.class_names))

    @cached_property
    def hardest_classes(self) -> Tensor:
        """The classes, at most thirty, that are most often mistaken for others or others for them; ascending."""
        mistakes = self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - 2 * self.confusion.diag()
        return mistakes.argsort(descending=True, stable=True)[:MAX_ROWS].sort().values

    @property
    def which_classes(self) -> str:
        """Which these are, to be added to a title; empty if they are all."""
        count, all_classes = len(self.hardest_classes), len(self.dataset.class_names)
        return "" if count == all_classes else f"\nonly the {count} of {all_classes:,} classes with the most mistakes"

    @cached_property
    def confused_pairs(self) -> list[tuple[str, str, int]]:
        """The most frequent mistakes, at most twenty: the actual class, the predicted one, the number of images."""
        counts = self.confusion - self.confusion.diag().diag()
        most = counts.flatten().sort(descending=True, stable=True).indices[:MAX_PAIRS]
        rows, columns = most // len(counts), most % len(counts)
        found = zip(self.shown(rows), self.shown(columns), counts.flatten()[most].tolist(), strict=True)
        return [pair for pair in found if pair[2]]

    @cached_property
    def shares(self) -> metrics.Shares:
        """Precision and recall of each class, with their intervals."""
        return metrics.shares(self.confusion)

    @cached_property
    def reliability(self) -> list[metrics.Bin]:
        """Confidence and accuracy on the test images, in bins of confidence."""
        return metrics.reliability(self.probabilities, self.test.labels, self.calibration_bins)

    @cached_property
    def robustness(self) -> dict[str, list[tuple[float, float]]]:
        """(strength, accuracy) on the test images for each corruption."""
        return corruptions.accuracies(self.cnn, self.test.images, self.test.labels)

    @cached_property
    def shift_similarity(self) -> dict[str, list[float]]:
        """How similar each layer's maps of a thousand test images stay when these shift by 0 ... 4 pixels."""
        return attribution.shift_similarity(self.cnn, self.test.images[:1000], shifts=4)

    @cached_property
    def class_images(self) -> list[ClassImages]:
        """Images of the first ten classes for each kind of regularization."""
        classes = len(self.dataset.class_names[:MAX_COLUMNS])
        return class_images(self.cnn, self.train, classes, self.params.maximisation)
