"""Arrays in, matplotlib figure out. Every figure is readable at README width, on a light and on a dark page."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

Array = NDArray[np.floating | np.integer]

WIDTH = 8.5  # inches
DOTS_PER_INCH = 110
TRAINING, VALIDATION = "#0072B2", "#D55E00"  # told apart by every kind of colour vision (Okabe and Ito, 2008)
LABELS = {"train": "training (with dropout)", "validation": "validation (without)"}


def as_png(figure: Figure, tight: bool = False) -> bytes:
    """The figure as PNG; the same figure gives the same bytes, since nothing of the machine is written into it.

    ``tight`` makes room for what would stick out, in figures that were not laid out here.
    """
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=DOTS_PER_INCH,
        facecolor="white",
        metadata={"Software": None},
        bbox_inches="tight" if tight else None,
    )
    return buffer.getvalue()


def learning_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Loss and accuracy of the training and validation images over the epochs; the columns are those of history.csv."""
    figure = _figure(3.6)
    left, right = figure.subplots(1, 2)
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for split, colour in (("train", TRAINING), ("validation", VALIDATION)):
            axes.plot(
                history["epoch"], history[f"{split}_{what}"], "o-", color=colour, markersize=3, label=LABELS[split]
            )
        axes.set(title=what.capitalize(), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.set(ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(ylabel="images classified rightly")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def study_history(numbers: Sequence[int], accuracies: Sequence[float], pruned: Sequence[bool]) -> Figure:
    """A point a trial; a line is the best complete one so far. At least one is complete.

    The pruned ones, which were ended early, stand with the accuracy of their last epoch. So that the best can be told
    apart, the axis ends below the middle by three times what the best is above it; what lies lower stands on its edge,
    with a mark of its own.
    """
    figure = _figure(4.2)
    axes = figure.subplots()
    rows = sorted(zip(numbers, accuracies, pruned, strict=True))
    complete = [(number, accuracy) for number, accuracy, was_pruned in rows if not was_pruned]
    best, middle = max(accuracy for _, accuracy in complete), np.median([accuracy for _, accuracy in complete])
    room = max(best - middle, 1e-4)
    lowest = middle - 3 * room

    def draw(points: Sequence[tuple[int, float]], marker: str, label: str) -> None:
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=TRAINING, alpha=0.6, markersize=5, label=label)

    draw([trial for trial in complete if trial[1] >= lowest], "o", "complete")
    ended_early = [(number, accuracy) for number, accuracy, was_pruned in rows if was_pruned]
    draw([trial for trial in ended_early if trial[1] >= lowest], "x", "pruned, at its last epoch")
    draw([(number, lowest) for number, accuracy, _ in rows if accuracy < lowest], "v", "lower than shown")
    steps = list(itertools.accumulate(complete, lambda so_far, trial: (trial[0], max(so_far[1], trial[1]))))
    steps.append((rows[-1][0], best))
    axes.step(*zip(*steps, strict=True), where="post", color=VALIDATION, label="best so far")
    axes.set(xlabel="trial", ylabel="validation accuracy", ylim=(lowest - room / 4, max(accuracies) + room / 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    return figure


def accuracy_against_size(parameters: Sequence[int], accuracies: Sequence[float]) -> Figure:
    """A point a network; a line joins those that no smaller one is as accurate as (the Pareto front)."""
    figure = _figure(4.2)
    axes = figure.subplots()
    axes.plot(parameters, accuracies, "o", color=TRAINING, alpha=0.6, markersize=5, markeredgewidth=0)
    front: list[tuple[int, float]] = []
    for size, accuracy in sorted(zip(parameters, accuracies, strict=True), key=lambda each: (each[0], -each[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    axes.step(*zip(*front, strict=True), where="post", color=VALIDATION, label="best for its size")
    axes.set(xlabel="parameters", ylabel="validation accuracy", xscale="log")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def confusion_matrix(counts: Array, class_names: Sequence[str], title: str) -> Figure:
    """Counts (classes, classes), row = actual. Colour is the share of the row, so that mistakes can be seen."""
    figure = _figure(7.2)
    axes = figure.subplots()
    mistakes = counts * (1 - np.eye(len(counts), dtype=int))
    shade = np.sqrt(mistakes / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    picture = axes.imshow(shade, cmap="Oranges", vmin=0)
    # The diagonal would drown every mistake if it shared their colours.
    axes.imshow(np.where(np.eye(len(counts), dtype=bool), 1.0, np.nan), cmap="Greys", vmin=0, vmax=6)
    size = 9 if len(counts) <= 12 else 6
    for (row, column), count in np.ndenumerate(counts):
        dark = row != column and shade[row, column] > 0.6 * picture.get_clim()[1]
        colour = "white" if dark else "black"
        axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(range(len(class_names)), class_names)
    if max(map(len, class_names)) > 2:
        axes.tick_params("x", labelrotation=45)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_title(f"{title}\nthe darker, the larger the share of the row that went there", fontsize=10)
    axes.set(xlabel="predicted class", ylabel="actual class")
    return figure


def filters(weights: Array) -> Figure:
    """First-layer filters (filters, C, H, W), red for weights above 0, blue for weights below, one scale for all.

    A filter of more than one channel is drawn as one tile a channel, side by side.
    """
    tiles = weights.transpose(0, 2, 1, 3).reshape(len(weights), weights.shape[2], -1)
    columns = max(1, 8 // weights.shape[1])
    rows = math.ceil(len(tiles) / columns)
    limit = float(np.abs(weights).max())
    figure = _figure(0.9 + rows * WIDTH * 0.9 / columns / weights.shape[1])
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        _bare(axes)
        if index < len(tiles):
            picture = axes.imshow(tiles[index], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_title(str(index), fontsize=7, pad=2)
        else:
            axes.set_axis_off()
    figure.suptitle(f"The {len(tiles)} filters of the first convolution ({_sides(weights)} pixels)")
    figure.colorbar(picture, ax=grid, shrink=0.6, label="weight")
    return figure


def feature_maps(image: Array, maps: Mapping[str, Array], title: str) -> Figure:
    """One image (H, W, C) in [0, 255] and, for each layer's name, its maps (filters, H, W) on one scale a layer."""
    mosaics = {layer: _mosaic(each, columns=16) for layer, each in maps.items()}
    heights = [1.5, *(WIDTH * 0.86 * mosaic.shape[0] / mosaic.shape[1] + 0.25 for mosaic in mosaics.values())]
    figure = _figure(sum(heights) + 0.6)
    grid = figure.subplots(len(heights), 1, height_ratios=heights)
    _bare(grid[0])
    _show_image(grid[0], image)
    grid[0].set_title(f"input {_sides(image[None].transpose(0, 3, 1, 2))}", fontsize=9)
    for axes, (layer, mosaic) in zip(grid[1:], mosaics.items(), strict=True):
        _bare(axes)
        axes.imshow(mosaic, cmap="viridis", interpolation="nearest")
        axes.set_title(f"{layer}: {len(maps[layer])} maps of {_sides(maps[layer][None])}", fontsize=9)
    figure.suptitle(f"{title}\nthe brighter, the stronger the response; one scale a layer", fontsize=11)
    return figure


def mistakes(images: Array, actual: Sequence[str], predicted: Sequence[str], confidence: Sequence[float]) -> Figure:
    """Wrongly classified images (N, H, W, C) in [0, 255], each with its predicted and its actual class."""
    columns = 5
    rows = max(1, math.ceil(len(images) / columns))
    figure = _figure(0.6 + rows * 1.75)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        _bare(axes)
        if index < len(images):
            _show_image(axes, images[index])
            line = f"{predicted[index]} ({confidence[index]:.1%}), really {actual[index]}"
            axes.set_title(line if len(line) < 24 else line.replace(", ", ",\n"), fontsize=8, pad=3)
        else:
            axes.set_axis_off()
    figure.suptitle(
        f"The {len(images)} most confident mistakes: predicted class (confidence), actual class"
        if len(images)
        else "No mistakes"
    )
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])


def _show_image(axes: Axes, image: Array) -> None:
    if image.shape[2] == 1:
        axes.imshow(image[:, :, 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(image, interpolation="nearest")


def _mosaic(maps: Array, columns: int) -> NDArray[np.float64]:
    """Maps (filters, H, W) side by side with a gap of one pixel, ``columns`` a row; gaps are NaN."""
    count, height, width = maps.shape
    rows = math.ceil(count / columns)
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for index, each in enumerate(maps):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        mosaic[top : top + height, left : left + width] = each
    return mosaic


def _sides(stack: Array) -> str:
    """The two sides of maps (..., H, W), as text."""
    return f"{stack.shape[-2]} x {stack.shape[-1]}"
