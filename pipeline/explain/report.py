"""The figures and tables of a report: what a model learned and where it fails.

A new figure is a function that draws arrays in pipeline/figures, and a function and a line of FIGURES here.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import counted
from pipeline.explain import activation_maximization, attribution, corruptions
from pipeline.explain.activation_maximization import Regularization
from pipeline.explain.class_images import ascent
from pipeline.explain.report_inputs import MAX_COLUMNS, MAX_ROWS, ReportInputs
from pipeline.figures import canvas, curves, network, samples, scores, tiles
from pipeline.figures.network import Heatmap
from pipeline.model import metrics
from pipeline.model.augment import augment, mixup
from pipeline.model.cnn import CNN, as_input, layer_names

Rows = list[dict[str, object]]
DRAWS = 3  # how often all augmentations together are shown
MAX_POINTS = 1000  # images drawn as points, and as many mistakes; more would hide each other


def _learning_curves(inputs: ReportInputs) -> Figure:
    columns = {name: [float(row[name]) for row in inputs.history] for name in inputs.history[0]}
    return curves.learning_curves(columns, dropout=inputs.cnn.architecture.dropout > 0)


def _first_layer_filters(inputs: ReportInputs) -> Figure:
    use = attribution.use_of_first_filters(inputs.cnn, inputs.test.images)
    return network.filters(attribution.first_filters(inputs.cnn).numpy(), use.numpy())


def _feature_maps(inputs: ReportInputs) -> Figure:
    index = inputs.image_index
    image = inputs.test.images[index]
    maps = {layer: each[0].numpy() for layer, each in attribution.feature_maps(inputs.cnn, image[None])}
    (name,) = inputs.shown(inputs.test.labels[index : index + 1])
    return network.feature_maps(
        image.numpy(), maps, f"Feature maps of test image {index} (class {canvas.shortened(name, 40)})"
    )


def _maps_of_classes(inputs: ReportInputs) -> Figure:
    images = inputs.test.images[inputs.first_of_each_class]
    maps = {layer: each.numpy() for layer, each in attribution.feature_maps(inputs.cnn, images)}
    names = inputs.shown(inputs.test.labels[inputs.first_of_each_class])
    many = len(inputs.dataset.class_names) > MAX_COLUMNS
    which = f"each of {len(names)} classes" if many else "each class"
    return network.maps_of_classes(images.numpy(), names, maps, chosen=4, which=which)


def _strongest_patches(inputs: ReportInputs) -> Figure:
    patches, strongest = attribution.strongest_patches(inputs.cnn, inputs.test.images, inputs.params.patches)
    return network.strongest_patches(patches.numpy(), strongest.numpy(), _last_convolution(inputs.cnn))


def _class_images(inputs: ReportInputs) -> Figure:
    """One row for each kind of regularization, one column for each of the first ten classes."""
    rows = inputs.class_images
    images = {row.regularization: row.images.permute(0, 2, 3, 1).numpy() for row in rows}
    probabilities = {row.regularization: row.probabilities.numpy() for row in rows}
    names = inputs.shown(torch.arange(len(rows[0].images)))
    return network.class_images(images, probabilities, names, inputs.shown(rows[-1].nearest))


def _filter_images(inputs: ReportInputs) -> Figure:
    """For each filter of the last convolution an image made to raise the sum of its map."""
    settings, filters = inputs.params.maximisation, inputs.cnn.block_list()[-1].convolutions()[-1].out_channels
    smooth = Regularization(total_variation=settings.total_variation, jitter=settings.jitter)
    images = activation_maximization.maximize(
        inputs.cnn, activation_maximization.filter_sums, filters, smooth, ascent(settings)
    )
    with torch.no_grad():
        sums = activation_maximization.filter_sums(inputs.cnn, torch.arange(filters))(images)
    return network.filter_images(images.permute(0, 2, 3, 1).numpy(), sums.numpy(), _last_convolution(inputs.cnn))


def _last_convolution(cnn: CNN) -> str:
    return layer_names(cnn)[cnn.block_list()[-1].convolutions()[-1]]


def _explanations(inputs: ReportInputs) -> Figure:
    """Four correct predictions and four mistakes, explained in three ways, each once more with random weights."""
    correct = inputs.first_of_each_class[~inputs.wrong[inputs.first_of_each_class]][:4]
    mistakes = attribution.most_confident_mistakes(inputs.test.labels, inputs.predicted, inputs.confidence, 4)
    chosen = torch.cat([correct, mistakes])
    images, classes = inputs.test.images[chosen], inputs.predicted[chosen]
    untrained = attribution.with_random_weights(inputs.cnn)
    side = inputs.params.occlusion_side
    heatmaps = _heatmaps(inputs.cnn, images, classes, side)
    heatmaps |= {
        f"{method}, random weights": each for method, each in _heatmaps(untrained, images, classes, side).items()
    }
    names = [canvas.shortened(name, 12) for name in inputs.shown(classes)]
    labels = [canvas.shortened(name, 12) for name in inputs.shown(inputs.test.labels[chosen])]
    titles = [name if name == label else f"{name}, labelled {label}" for name, label in zip(names, labels, strict=True)]
    title = "Evidence for the predicted class, in correct and in wrong predictions"
    return network.explanations(images.numpy(), titles, heatmaps, title)


def _heatmaps(cnn: CNN, images: Tensor, classes: Tensor, side: int) -> dict[str, Heatmap]:
    """What each method finds in images (N, H, W, C) for one class (N,) each; occluded by squares of ``side`` pixels."""
    pixels, square = as_input(images), f"{side}\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}{side}"
    return {
        "saliency |dy/dx|": Heatmap(attribution.saliency(cnn, pixels, classes).numpy(), signed=False),
        f"occlusion {square}": Heatmap(attribution.occlusion(cnn, pixels, classes, side).numpy(), signed=True),
        "Grad-CAM": Heatmap(attribution.grad_cam(cnn, pixels, classes).numpy(), signed=False),
    }


def _same_pattern_everywhere(inputs: ReportInputs) -> Figure:
    """The map of one filter moves as its image does, and subsampling hardly changes it."""
    image = inputs.test.images[inputs.image_index][None]
    variants = {
        "original": image,
        "3 down": corruptions.moved(image, 3, 0),
        "3 to the right": corruptions.moved(image, 0, 3),
        "3 to the left": corruptions.moved(image, 0, -3),
        "one pixel in four": corruptions.subsampled(image, 2),
    }
    images = torch.cat(list(variants.values()))
    predicted = inputs.shown(metrics.predict_logits(inputs.cnn, images).argmax(dim=1))
    titles = [f"{how}:\npredicted {canvas.shortened(name, 11)}" for how, name in zip(variants, predicted, strict=True)]
    maps = attribution.feature_maps(inputs.cnn, images)[0].maps
    original = maps[0].flatten(1)
    # The filter whose map has the highest peak above its background.
    strongest = int((original.amax(dim=1) - original.median(dim=1).values).argmax())
    title = f"Filter {strongest} finds its pattern wherever it is: its map moves with the image"
    return network.equivariance(images.numpy(), maps[:, strongest].numpy(), titles, title)


def _pooling_and_shifts(inputs: ReportInputs) -> Figure:
    return network.shift_similarity(inputs.shift_similarity)


def _shared_weights(inputs: ReportInputs) -> Figure:
    return network.parameter_sharing(attribution.parameters_of_convolutions(inputs.cnn.architecture))


def _confusion_matrix(inputs: ReportInputs) -> Figure:
    mistakes = counted(int(inputs.wrong.sum()), "mistake")
    title = f"{mistakes} in {counted(len(inputs.test), 'test image')} of {inputs.dataset.label}"
    classes = torch.arange(len(inputs.dataset.class_names))
    if len(classes) > MAX_ROWS:
        return scores.confusion_of_many(inputs.confusion.numpy(), inputs.confused_pairs, title)
    return scores.confusion_matrix(inputs.confusion.numpy(), inputs.shown(classes), title)


def _per_class(inputs: ReportInputs) -> Figure:
    classes = inputs.hardest_classes
    shares = {measure: [of_each[index] for index in classes] for measure, of_each in inputs.shares.items()}
    return scores.per_class(shares, inputs.shown(classes), inputs.which_classes)


def _reliability(inputs: ReportInputs) -> Figure:
    error = metrics.expected_calibration_error(inputs.probabilities, inputs.test.labels, inputs.calibration_bins)
    title = f"Confidence and accuracy on {inputs.dataset.label}; expected calibration error {error:.2%}"
    return scores.reliability(inputs.reliability, title)


def _robustness(inputs: ReportInputs) -> Figure:
    units = {name: corruption.unit for name, corruption in corruptions.CORRUPTIONS.items()}
    return scores.robustness(inputs.robustness, units)


def _confident_mistakes(inputs: ReportInputs) -> Figure:
    images = attribution.most_confident_mistakes(
        inputs.test.labels, inputs.predicted, inputs.confidence, inputs.params.mistakes
    )
    title = f"The {counted(len(images), 'most confident mistake')}: predicted class (confidence), label"
    if not len(images):
        title = f"No mistake in {counted(len(inputs.test), 'test image')}"
    return _captioned(inputs, images, inputs.predicted[images], inputs.confidence[images], title)


def _doubtful_labels(inputs: ReportInputs) -> Figure:
    found = attribution.likely_label_errors(inputs.probabilities, inputs.test.labels)
    images, classes = (each[: inputs.params.mistakes] for each in found)
    title = f"{len(images)} of the {counted(len(found.images), 'label')} that confident learning flags"
    if not len(images):
        title = "Confident learning flags no label"
    return _captioned(inputs, images, classes, inputs.probabilities[images, classes], title)


def _captioned(inputs: ReportInputs, images: Tensor, classes: Tensor, probabilities: Tensor, title: str) -> Figure:
    """Test images, given by index, each with a class that it may be, this class's probability, and its label."""
    guesses, labels = (
        [canvas.shortened(name, 16) for name in inputs.shown(each)] for each in (classes, inputs.test.labels[images])
    )
    facts = zip(guesses, probabilities.tolist(), labels, strict=True)
    captions = [f"{guess} ({probability:.1%}), labelled {label}" for guess, probability, label in facts]
    return scores.captioned(inputs.test.images[images].numpy(), captions, title)


def _principal_components(inputs: ReportInputs) -> Figure:
    """The first thousand test images and mistakes in the plane in which their features differ most."""
    classes, labels = inputs.hardest_classes, inputs.test.labels
    mistakes = inputs.wrong & (inputs.wrong.cumsum(dim=0) <= MAX_POINTS)
    shown = (mistakes | (torch.arange(len(labels)) < MAX_POINTS)) & torch.isin(labels, classes)
    features = attribution.penultimate_features(inputs.cnn, inputs.test.images[shown])
    points, variance = attribution.principal_components(features, 2)
    names = dict(zip(classes.tolist(), inputs.shown(classes), strict=True))
    return scores.components(
        points.numpy(),
        variance.tolist(),
        labels[shown].numpy(),
        inputs.wrong[shown].numpy(),
        names,
        inputs.which_classes,
    )


def _augmented_images(inputs: ReportInputs) -> Figure:
    """Training images unchanged, after each augmentation alone, and after all of them."""
    on, images = inputs.augmentations, inputs.train.images[inputs.samples]
    alone = {f"{name.replace('_', ' ')} {strength:g}": {name: strength} for name, strength in on.items()}
    rows = [("original", {}), *(alone.items() if len(on) > 1 else ())]
    rows += [("all together" if len(on) > 1 else next(iter(alone)), on)] * DRAWS
    draws = torch.Generator().manual_seed(0)
    pictures = [_augmented(label, images, strengths, draws) for label, strengths in rows]
    return samples.rows_of_images(pictures, "Training images before and after augmentation")


def _augmented(
    label: str, images: Tensor, strengths: Mapping[str, float], draws: torch.Generator
) -> tuple[str, tiles.Array]:
    """A row of images; where they are mixed, the label says how much of each is its own."""
    images = augment(images, strengths, draws)
    if "mixup" in strengths:
        images, share = mixup(images, strengths["mixup"], draws)
        label = f"{label} ({share:.0%}\N{NO-BREAK SPACE}own)"
    return label, images.numpy()


# In the order in which they are drawn: what takes long comes last.
FIGURES: dict[str, Callable[[ReportInputs], Figure]] = {
    "learning_curves": _learning_curves,
    "feature_maps": _feature_maps,
    "maps_of_classes": _maps_of_classes,
    "same_pattern_everywhere": _same_pattern_everywhere,
    "shared_weights": _shared_weights,
    "confusion_matrix": _confusion_matrix,
    "per_class": _per_class,
    "reliability": _reliability,
    "confident_mistakes": _confident_mistakes,
    "doubtful_labels": _doubtful_labels,
    "principal_components": _principal_components,
    "first_layer_filters": _first_layer_filters,
    "strongest_patches": _strongest_patches,
    "pooling_and_shifts": _pooling_and_shifts,
    "explanations": _explanations,
    "robustness": _robustness,
    "filter_images": _filter_images,
    "class_images": _class_images,
}


def figures_of(inputs: ReportInputs) -> dict[str, Callable[[ReportInputs], Figure]]:
    """The figures that show this model: those of FIGURES, and its augmentations if it was trained with any."""
    augmentations = {"augmented_images": _augmented_images} if inputs.augmentations else {}
    return augmentations | FIGURES


def _class_images_rows(inputs: ReportInputs) -> Rows:
    return [
        {
            "regularization": row.regularization,
            "class": name,
            "probability": f"{probability:.6f}",
            "total_variation": f"{variation:.6f}",
            "nearest": nearest,
        }
        for row in inputs.class_images
        for name, probability, variation, nearest in zip(
            inputs.dataset.class_names[: len(row.images)],
            row.probabilities.tolist(),
            activation_maximization.total_variation(row.images).tolist(),
            inputs.names(row.nearest),
            strict=True,
        )
    ]


def _reliability_rows(inputs: ReportInputs) -> Rows:
    return [
        {name: f"{value:.6f}" for name, value in each._asdict().items()} | {"images": each.images}
        for each in inputs.reliability
    ]


def _per_class_rows(inputs: ReportInputs) -> Rows:
    """Precision and recall of each class, each with the ends of its interval."""
    rows: Rows = [{"class": name} for name in inputs.dataset.class_names]
    for measure, of_each in inputs.shares.items():
        for row, (share, low, high) in zip(rows, of_each, strict=True):
            row |= {measure: f"{share:.6f}", f"{measure}_low": f"{low:.6f}", f"{measure}_high": f"{high:.6f}"}
    return rows


def _shared_weights_rows(inputs: ReportInputs) -> Rows:
    parameters = attribution.parameters_of_convolutions(inputs.cnn.architecture)
    return [
        {"layer": layer, "convolution": convolution, "dense": dense}
        for layer, (convolution, dense) in parameters.items()
    ]


def _pooling_and_shifts_rows(inputs: ReportInputs) -> Rows:
    """The first and the last block: the columns are the same for every network, since dvc.yaml names them."""
    similarity = list(inputs.shift_similarity.values())
    columns = {
        "first_convolution": similarity[0],
        "first_pooling": similarity[1],
        "last_convolution": similarity[-2],
        "last_pooling": similarity[-1],
    }
    return [
        {"pixels": pixels} | {name: f"{values[pixels]:.6f}" for name, values in columns.items()}
        for pixels in range(len(similarity[0]))
    ]


def _accuracy_rows(corruption: str, inputs: ReportInputs) -> Rows:
    curve = inputs.robustness[corruption]
    return [{"strength": f"{strength:g}", "accuracy": f"{accuracy:.6f}"} for strength, accuracy in curve]


# What `dvc plots` compares between experiments.
TABLES: dict[str, Callable[[ReportInputs], Rows]] = {
    "class_images": _class_images_rows,
    "reliability": _reliability_rows,
    "per_class": _per_class_rows,
    "shared_weights": _shared_weights_rows,
    "pooling_and_shifts": _pooling_and_shifts_rows,
    **{f"accuracy_{name}": partial(_accuracy_rows, name) for name in corruptions.CORRUPTIONS},
}
