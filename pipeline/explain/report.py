"""Which figures and tables there are: what a model learned and where it fails, from the model and the images.

pipeline/network says what there is to see, as tensors, and pipeline/figures draws it; here one is handed to the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.splits import Dataset, LabelledImages
from pipeline.errors import UserError
from pipeline.explain import activation_maximization, attribution, corruptions
from pipeline.explain.activation_maximization import Regularization
from pipeline.figures import canvas, curves, network, scores
from pipeline.figures.network import Heat
from pipeline.model import metrics
from pipeline.model.cnn import CNN, as_input, layers
from pipeline.params import Visualize

Rows = list[dict[str, object]]
MOST_POINTS = 1000  # images that are drawn as points, beside the mistakes; more would hide each other
MOST_IN_A_ROW, MOST_IN_A_TABLE = 10, 30  # classes that have room beside each other


class ClassImages(NamedTuple):
    """Images (classes, C, H, W) in [0, 1] made to raise the logit of one class each, under a wish.

    How probable each class then is, and the class of the training image that is most like each: (classes,).
    """

    wish: str
    images: Tensor
    probabilities: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class ReportInputs:
    """What is shown: a model, the images that it was trained and tested on, and what the other stages wrote of it."""

    cnn: CNN
    dataset: Dataset
    train: LabelledImages
    test: LabelledImages
    history: Sequence[Mapping[str, str]]
    predictions: Sequence[Mapping[str, str]]
    params: Visualize
    calibration_bins: int

    @cached_property
    def probabilities(self) -> Tensor:
        """Of the test images, (N, classes)."""
        return metrics.predict_logits(self.cnn, self.test.images).softmax(dim=1)

    @cached_property
    def predicted(self) -> Tensor:
        """The classes that evaluate found, (N,)."""
        number = {name: index for index, name in enumerate(self.dataset.class_names)}
        return torch.tensor([number[row["predicted"]] for row in self.predictions])

    @cached_property
    def confidence(self) -> Tensor:
        """Of evaluate's predictions, (N,)."""
        return torch.tensor([float(row["confidence"]) for row in self.predictions])

    @cached_property
    def class_images(self) -> list[ClassImages]:
        """Under each wish in turn; of the first ten classes."""
        classes = torch.arange(len(self.dataset.class_names[:MOST_IN_A_ROW]))
        found = []
        for words, wish in _wishes(self.params):
            images = activation_maximization.made(
                self.cnn, activation_maximization.class_logits, len(classes), wish, _ascent(self.params)
            )
            with torch.no_grad():
                probabilities = self.cnn(images).softmax(dim=1).gather(1, classes[:, None])[:, 0]
            nearest = self.train.labels[nearest_images(images, self.train.images)]
            found.append(ClassImages(words, images, probabilities, nearest))
        return found

    @cached_property
    def one_of_each(self) -> Tensor:
        """The first test image of each of the first ten classes that have one, as indices."""
        labels = self.test.labels.tolist()
        there = [label for label in range(len(self.dataset.class_names)) if label in labels]
        return torch.tensor([labels.index(label) for label in there[:MOST_IN_A_ROW]])

    @cached_property
    def harder(self) -> dict[str, list[tuple[float, float]]]:
        """Accuracy on the test images against how much harder they were made, for each kind of change."""
        return corruptions.accuracies(self.cnn, self.test.images, self.test.labels)

    @cached_property
    def confusion(self) -> Tensor:
        """Counts of the test images (classes, classes): row = actual, column = predicted."""
        return metrics.confusion_matrix(self.test.labels, self.predicted, len(self.dataset.class_names))

    @cached_property
    def confused(self) -> Tensor:
        """The classes with the most mistakes, of and as them, in their order: at most thirty."""
        mistakes = self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - 2 * self.confusion.diag()
        return mistakes.argsort(descending=True, stable=True)[:MOST_IN_A_TABLE].sort().values

    @cached_property
    def bins(self) -> list[metrics.Bin]:
        """How sure and how often right on the test images."""
        return metrics.reliability(self.probabilities, self.test.labels, self.calibration_bins)

    @cached_property
    def shifts(self) -> dict[str, list[float]]:
        """How alike each layer's maps of a thousand test images stay, see attribution.shift_similarity."""
        return attribution.shift_similarity(self.cnn, self.test.images[:1000], shifts=4)

    def names(self, labels: Tensor) -> list[str]:
        """The classes' names."""
        return [self.dataset.class_names[label] for label in labels.tolist()]


def figures(of: ReportInputs) -> Iterator[tuple[str, Figure]]:
    """Every figure by its name, one after the other: drawn, they are large."""
    columns = {name: [float(row[name]) for row in of.history] for name in of.history[0]}
    yield "learning_curves", curves.learning_curves(columns, dropout=of.cnn.architecture.dropout > 0)
    yield from _inside(of)
    yield from _made(of)
    yield "explanations", _explanations(of)
    yield from _properties(of)
    yield from _scores(of)


def _inside(of: ReportInputs) -> Iterator[tuple[str, Figure]]:
    """Filters, maps and patches."""
    use = attribution.use_of_first_filters(of.cnn, of.test.images)
    yield "first_layer_filters", network.filters(attribution.first_filters(of.cnn).numpy(), use.numpy())
    index = of.params.image
    if index >= len(of.test):
        raise UserError(f"params.yaml: visualize.image is {index}; allowed: 0 ... {len(of.test) - 1}, the test images")
    image = of.test.images[index]
    maps = {layer: each[0].numpy() for layer, each in attribution.feature_maps(of.cnn, image[None])}
    (name,) = of.names(of.test.labels[index : index + 1])
    title = f"What each layer makes of test image {index} (class {name})"
    yield "feature_maps", network.feature_maps(image.numpy(), maps, title)

    images = of.test.images[of.one_of_each]
    of_all = {layer: each.numpy() for layer, each in attribution.feature_maps(of.cnn, images)}
    names = of.names(of.test.labels[of.one_of_each])
    yield "maps_of_classes", network.maps_of_classes(images.numpy(), names, of_all, chosen=4)

    patches, strongest = attribution.strongest_patches(of.cnn, of.test.images, of.params.patches)
    drawn = network.strongest_patches(patches.numpy(), strongest.numpy(), _last_layer(of.cnn))
    yield "strongest_patches", drawn


def _last_layer(cnn: CNN) -> str:
    return [layer.name for layer in layers(cnn.architecture) if layer.name.startswith("conv2d")][-1]


def _made(of: ReportInputs) -> Iterator[tuple[str, Figure]]:
    """Images that were made to please the network."""
    made, names = of.class_images, of.dataset.class_names[:MOST_IN_A_ROW]
    shown = {each.wish: each.images.permute(0, 2, 3, 1).numpy() for each in made}
    probabilities = {each.wish: each.probabilities.numpy() for each in made}
    yield "class_images", network.class_images(shown, probabilities, names, of.names(made[-1].nearest))

    wish = Regularization(total_variation=of.params.maximisation.total_variation, jitter=of.params.maximisation.jitter)
    filters = of.cnn.architecture.filters[-1]
    images = activation_maximization.made(
        of.cnn, activation_maximization.filter_sums, filters, wish, _ascent(of.params)
    )
    with torch.no_grad():
        sums = activation_maximization.filter_sums(of.cnn, torch.arange(filters))(images)
    shown_images = images.permute(0, 2, 3, 1).numpy()
    yield "filter_images", network.filter_images(shown_images, sums.numpy(), _last_layer(of.cnn))


def _wishes(params: Visualize) -> list[tuple[str, Regularization]]:
    """From none to all of them, as the lesson goes."""
    m = params.maximisation
    return [
        ("left to itself", Regularization()),
        ("few bright pixels (L1)", Regularization(l1=m.l1)),
        ("smooth (total variation)", Regularization(total_variation=m.total_variation)),
        ("smooth, and moved at each step", Regularization(total_variation=m.total_variation, jitter=m.jitter)),
        ("all of it", Regularization(m.l1, m.total_variation, m.jitter)),
    ]


def _ascent(params: Visualize) -> activation_maximization.Ascent:
    m = params.maximisation
    return activation_maximization.Ascent(m.steps, m.step_size, m.noise, m.seed)


def nearest_images(made: Tensor, images: Tensor) -> Tensor:
    """For each image made (M, C, H, W) the index of the real one (N, H, W, C) most like it, (M,).

    Both are brought to mean 0 and length 1 first, so that neither brightness nor contrast counts.
    """

    def normalised(pixels: Tensor) -> Tensor:
        return F.normalize(pixels - pixels.mean(dim=1, keepdim=True))

    ours = normalised(made.flatten(1))
    best, index = torch.full((len(made),), -2.0), torch.zeros(len(made), dtype=torch.long)
    for start in range(0, len(images), 10_000):
        alike, place = (ours @ normalised(as_input(images[start : start + 10_000]).flatten(1)).T).max(dim=1)
        index = torch.where(alike > best, place + start, index)
        best = torch.maximum(alike, best)
    return index


def _explanations(of: ReportInputs) -> Figure:
    """Right and wrong predictions, explained in three ways, each once more with random weights."""
    right = of.one_of_each[of.predicted[of.one_of_each] == of.test.labels[of.one_of_each]][:4]
    wrong = attribution.most_confident_mistakes(of.test.labels, of.predicted, of.confidence, 4)
    chosen = torch.cat([right, wrong])
    images, classes = as_input(of.test.images[chosen]), of.predicted[chosen]
    side = of.params.occlusion_side
    squares = f"{side}\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}{side}"
    heats = {}
    for weights, cnn in (("", of.cnn), (", random weights", attribution.with_random_weights(of.cnn))):
        heats[f"saliency |dy/dx|{weights}"] = Heat(attribution.saliency(cnn, images, classes).numpy(), False)
        heats[f"occlusion {squares}{weights}"] = Heat(attribution.occlusion(cnn, images, classes, side).numpy(), True)
        heats[f"Grad-CAM{weights}"] = Heat(attribution.grad_cam(cnn, images, classes).numpy(), False)
    said, labels = (
        [canvas.shortened(name, 12) for name in of.names(each)] for each in (classes, of.test.labels[chosen])
    )
    titles = [a if a == b else f"{a}, labelled {b}" for a, b in zip(said, labels, strict=True)]
    title = "What speaks for the predicted class, in right predictions and in wrong ones"
    return network.explanations(of.test.images[chosen].numpy(), titles, heats, title)


def _properties(of: ReportInputs) -> Iterator[tuple[str, Figure]]:
    """Why convolution and pooling suit images."""
    image = of.test.images[of.params.image]
    moves = {"3 down": (3, 0), "3 to the right": (0, 3), "3 to the left": (0, -3)}
    made = {"as it is": image} | {words: corruptions.moved(image[None], *by)[0] for words, by in moves.items()}
    made["one pixel in four"] = corruptions.subsampled(image[None], 2)[0]
    images = torch.stack(list(made.values()))
    _, maps = attribution.feature_maps(of.cnn, images)[0]
    # The filter whose map has the highest peak above what it answers to nothing.
    strongest = int((maps[0].flatten(1).amax(dim=1) - maps[0].flatten(1).median(dim=1).values).argmax())
    found = of.names(metrics.predict_logits(of.cnn, images).argmax(dim=1))
    titles = [f"{how}:\npredicted {canvas.shortened(name, 11)}" for how, name in zip(made, found, strict=True)]
    yield (
        "same_pattern_everywhere",
        network.equivariance(
            images.numpy(),
            maps[:, strongest].numpy(),
            titles,
            f"Filter {strongest} finds its pattern wherever it is: its map moves with the image",
        ),
    )
    yield "pooling_and_shifts", network.shifts(of.shifts)
    yield "shared_weights", network.parameter_sharing(attribution.parameters_of_convolutions(of.cnn.architecture))


def _scores(of: ReportInputs) -> Iterator[tuple[str, Figure]]:
    wrong, names = of.predicted != of.test.labels, of.names(of.confused)
    mistakes = canvas.counted(int(wrong.sum()), "mistake")
    title = f"{mistakes} in {len(of.test):,} test images of {of.dataset.label}"
    if len(names) < len(of.dataset.class_names):
        title += f"; the {len(names)} classes with the most"
    yield "confusion_matrix", scores.confusion_matrix(of.confusion[of.confused][:, of.confused].numpy(), names, title)
    shares = {fact: [each[index] for index in of.confused] for fact, each in metrics.shares(of.confusion).items()}
    yield "per_class", scores.per_class(shares, names)
    error = metrics.expected_calibration_error(of.probabilities, of.test.labels, of.calibration_bins)
    title = f"How sure it is, and how often right: {of.dataset.label}; expected calibration error {error:.2%}"
    yield "reliability", scores.reliability(of.bins, title)
    units = {change.name: change.unit for change in corruptions.CHANGES}
    yield "robustness", scores.robustness(of.harder, units)

    worst = attribution.most_confident_mistakes(of.test.labels, of.predicted, of.confidence, of.params.mistakes)
    title = f"The {canvas.counted(len(worst), 'most confident mistake')}: predicted class (confidence), label"
    told = list(zip(worst, of.predicted[worst], of.confidence[worst], strict=True))
    yield "confident_mistakes", _captioned(of, told, title if told else f"No mistake in {len(of.test):,} test images")
    doubts = attribution.likely_label_errors(of.probabilities, of.test.labels)
    all_told = list(zip(*doubts, of.probabilities[doubts.images, doubts.classes], strict=True))
    told = all_told[: of.params.mistakes]
    title = f"{len(told)} of the {canvas.counted(len(all_told), 'label')} that confident learning would look at again"
    yield "doubtful_labels", _captioned(of, told, title if told else "No label that confident learning would doubt")

    shown = (wrong | (torch.arange(len(wrong)) < MOST_POINTS)) & torch.isin(of.test.labels, of.confused)
    features = attribution.penultimate_features(of.cnn, of.test.images[shown])
    points, of_variance = attribution.principal_components(features, 2)
    place = torch.searchsorted(of.confused, of.test.labels[shown])
    picture = scores.components(points.numpy(), of_variance.tolist(), place.numpy(), wrong[shown].numpy(), names)
    yield "principal_components", picture


def _captioned(of: ReportInputs, told: Sequence[tuple[Tensor, Tensor, Tensor]], title: str) -> Figure:
    """Test images, each told of as (index, a class that it may be of, how probable that is), and their labels."""
    short = [canvas.shortened(name, 16) for name in of.dataset.class_names]
    captions = [f"{short[guess]} ({sure:.1%}), labelled {short[of.test.labels[index]]}" for index, guess, sure in told]
    chosen = torch.tensor([int(index) for index, _, _ in told], dtype=torch.long)
    return scores.captioned(of.test.images[chosen].numpy(), captions, title)


def tables(of: ReportInputs) -> dict[str, Rows]:
    """What `dvc plots` compares between experiments: each table's rows by its name."""
    layers = list(of.shifts.values())
    # The same columns whatever the layers are called and however many there are: dvc.yaml names them.
    ends = {"first_convolution": layers[0], "first_pooling": layers[1]}
    ends |= {"last_convolution": layers[-2], "last_pooling": layers[-1]}
    found: dict[str, Rows] = {
        "class_images": [
            {
                "wish": each.wish,
                "class": name,
                "probability": f"{probability:.6f}",
                "total_variation": f"{rough:.6f}",
                "nearest": like,
            }
            for each in of.class_images
            for name, probability, rough, like in zip(
                of.dataset.class_names,
                each.probabilities.tolist(),
                activation_maximization.total_variation(each.images).tolist(),
                of.names(each.nearest),
                strict=False,  # of many classes the first ones have images
            )
        ],
        "reliability": [
            {**{name: f"{value:.6f}" for name, value in each._asdict().items()}, "images": each.images}
            for each in of.bins
        ],
        "per_class": _shares_of_classes(metrics.shares(of.confusion), of.dataset.class_names),
        "shared_weights": [
            {"layer": layer, "convolution": ours, "dense": dense}
            for layer, (ours, dense) in attribution.parameters_of_convolutions(of.cnn.architecture).items()
        ],
        "pooling_and_shifts": [
            {"pixels": pixels} | {end: f"{alike[pixels]:.6f}" for end, alike in ends.items()}
            for pixels in range(len(layers[0]))
        ],
    }
    for change, curve in of.harder.items():
        found[f"accuracy_{change}"] = [
            {"strength": f"{strength:g}", "accuracy": f"{accuracy:.6f}"} for strength, accuracy in curve
        ]
    return found


def _shares_of_classes(shares: metrics.Shares, class_names: Sequence[str]) -> Rows:
    """A row a class: precision and recall, each with the ends of its interval."""
    rows: Rows = [{"class": name} for name in class_names]
    for fact, of_classes in shares.items():
        for row, (share, low, high) in zip(rows, of_classes, strict=True):
            row |= {fact: f"{share:.6f}", f"{fact}_low": f"{low:.6f}", f"{fact}_high": f"{high:.6f}"}
    return rows
