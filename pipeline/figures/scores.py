"""How good the CNN is and where it fails: counts, intervals, mistakes, and the space of its features."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from pipeline.errors import counted
from pipeline.figures import canvas
from pipeline.figures.tiles import Array

TITLES = {"precision": "precision: of predictions of the class", "recall": "recall: of images of the class"}


def confusion_matrix(counts: Array, class_names: Sequence[str], title: str) -> Figure:
    """Counts (classes, classes), row = actual; a mistake is coloured by its share of the row."""
    figure = canvas.of_height(7.2)
    axes = figure.subplots()
    shade = _draw_shares(axes, counts)
    size = 9 if len(counts) <= 12 else 6.5 if len(counts) <= 20 else 4.5
    for (row, column), count in np.ndenumerate(counts):
        dark = row != column and shade[row, column] > 0.6 * shade.max()
        colour = "white" if dark else "black"
        axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=colour, fontsize=size)
    class_names = [canvas.shortened(name, 20) for name in class_names]
    axes.set_xticks(range(len(class_names)), map(canvas.literal, class_names))
    if max(map(len, class_names)) > 2:
        axes.tick_params("x", labelrotation=45 if len(class_names) <= 12 else 90)
    axes.set_yticks(range(len(class_names)), map(canvas.literal, class_names))
    axes.set_title(f"{title}\ndarker: a larger share of the row", fontsize=10)
    axes.set(xlabel="predicted class", ylabel="actual class")
    return figure


def _draw_shares(axes: Axes, counts: Array) -> Array:
    """Draw the mistakes, each as the root of its share of the row, which is returned."""
    mistakes = counts * (1 - np.eye(len(counts), dtype=int))
    shade: Array = np.sqrt(mistakes / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    axes.imshow(shade, cmap="Oranges", vmin=0)
    # The diagonal has its own colours: on one scale with it, every mistake would be white.
    axes.imshow(np.where(np.eye(len(counts), dtype=bool), 1.0, np.nan), cmap="Greys", vmin=0, vmax=6)
    return shade


def confusion_of_many(counts: Array, pairs: Sequence[tuple[str, str, int]], title: str) -> Figure:
    """Counts (classes, classes), row = actual, of too many classes for numbers and names.

    Below them ``pairs``: the actual class, the predicted one, and the number of these mistakes.
    """
    heights = [7.4, 0.7 + 0.2 * len(pairs)] if pairs else [7.4]
    figure = canvas.of_height(sum(heights))
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = above.subplots()
    _draw_shares(axes, counts)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_title(f"{title}\ndarker: a larger share of the row", fontsize=10)
    axes.set(xlabel="number of the predicted class", ylabel="number of the actual class")
    if pairs:
        _draw_pairs(below[0], pairs)
    return figure


def _draw_pairs(figure: SubFigure, pairs: Sequence[tuple[str, str, int]]) -> None:
    axes = figure.subplots()
    names = [f"{canvas.shortened(actual, 24)} as {canvas.shortened(guess, 24)}" for actual, guess, _ in pairs]
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=canvas.BLUE)
    axes.set_yticks(range(len(pairs)), map(canvas.literal, names), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.invert_yaxis()
    figure.suptitle("The most frequent mistakes: an image of one class as another, how often", fontsize=10)


def per_class(
    shares: Mapping[str, Sequence[tuple[float, float, float]]], class_names: Sequence[str], which: str = ""
) -> Figure:
    """Precision and recall of each class, each as (share, low, high): a point with its 95 % interval.

    ``which`` says which classes these are, if not all.
    """
    figure = canvas.of_height(1.5 + 0.3 * len(class_names))
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True, sharex=True), TITLES.items(), strict=True):
        for position, (share, low, high) in enumerate(shares[measure]):
            axes.plot([low, high], [position, position], color=canvas.BLUE, linewidth=2)
            axes.plot([share], [position], "o", color=canvas.BLUE, markersize=5)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(class_names)), [canvas.literal(canvas.shortened(name, 20)) for name in class_names])
    axes.invert_yaxis()
    figure.suptitle(f"The share that is correct, with its 95 % interval (Wilson){which}", fontsize=11)
    return figure


def reliability(bins: Sequence[tuple[float, float, float, float, int]], title: str) -> Figure:
    """Bins of images as (mean confidence, accuracy, low, high, count), without empty ones.

    ``low`` and ``high`` are the ends of the accuracy's 95 % interval.
    """
    figure = canvas.of_height(4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    confidence, accuracy, low, high, counts = (np.array(each) for each in zip(*bins, strict=True))
    above.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfect calibration")
    above.vlines(confidence, low, high, color=canvas.BLUE, alpha=0.5, label="95 % interval (Wilson)")
    above.plot(confidence, accuracy, "o-", color=canvas.BLUE, markersize=5, label="this network")
    above.set(ylabel="accuracy", ylim=(0, 1.03), xlim=(0, 1.01), title=title)
    above.legend(frameon=False)
    below.bar(confidence, counts, width=0.02, color=canvas.BLUE)
    below.set(yscale="log", ylabel="images", xlabel="confidence: probability of the predicted class")
    below.yaxis.set_minor_formatter(NullFormatter())
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def robustness(accuracies: Mapping[str, Sequence[tuple[float, float]]], units: Mapping[str, str]) -> Figure:
    """For each corruption of the images a curve of (strength, accuracy); ``units`` are those of the strengths."""
    columns = 3
    rows = math.ceil(len(accuracies) / columns)
    figure = canvas.of_height(0.6 + rows * 2.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (corruption, curve) in zip(grid.flat, accuracies.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), "o-", color=canvas.BLUE, markersize=4)
        axes.set(title=corruption, xlabel=units[corruption], ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(accuracies) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("accuracy")
    figure.suptitle("Accuracy on corrupted test images", fontsize=11)
    return figure


def captioned(images: Array, captions: Sequence[str], title: str) -> Figure:
    """Images (N, H, W, C) in [0, 255], each with its caption; the title alone if there are none."""
    if not len(images):
        figure = canvas.of_height(1)
        figure.text(0.5, 0.5, title, ha="center", va="center", fontsize=11)
        return figure
    columns = 5
    rows = math.ceil(len(images) / columns)
    figure = canvas.of_height(0.6 + rows * 1.75)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if index >= len(images):
            axes.set_axis_off()
            continue
        canvas.show_image(axes, images[index])
        axes.set_title(canvas.wrapped(captions[index], 24), fontsize=8, pad=3)
    figure.suptitle(title)
    return figure


def components(
    points: Array,
    shares: Sequence[float],
    labels: Array,
    wrong: Array,
    class_names: Mapping[int, str],
    which: str = "",
) -> Figure:
    """Images as points (N, 2), each drawn as its class, with a ring where its prediction is ``wrong``.

    ``class_names`` has the names of the ``labels`` (N,). ``which`` says which classes these are, if not all.
    """
    figure = canvas.of_height(6.4)
    axes = figure.subplots()
    short = all(len(name) == 1 and name.isascii() and name.isalnum() for name in class_names.values())
    for index, name in class_names.items():
        symbol = name if short else str(index)
        colour = canvas.COLOURS[index % len(canvas.COLOURS)]
        (dots,) = axes.plot(*points[labels == index].T, color=colour, marker=f"${symbol}$", linestyle="none")
        dots.set_label("" if short else canvas.literal(canvas.shortened(name, 16)))
        dots.set(markersize=4 + len(symbol), markeredgewidth=0.3, alpha=0.7)
    (rings,) = axes.plot(*points[wrong].T, color="black", marker="o", linestyle="none", label="mistake")
    rings.set(markersize=9, markerfacecolor="none")
    figure.legend(
        frameon=False, loc="outside right upper", fontsize=8, labelspacing=0.8 if len(class_names) < 20 else 0.3
    )
    axes.set(
        xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
        ylabel=f"second ({shares[1]:.0%})",
    )
    title = (
        f"{counted(len(points), 'test image')} as the dense layer sees them,\n"
        f"drawn as their class; mistakes are ringed{which}"
    )
    axes.set_title(title, fontsize=10)
    return figure
