"""Lines and points: the course of a training and of a study, and accuracy against size."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.figures import canvas


def learning_curves(history: Mapping[str, Sequence[float]], dropout: bool) -> Figure:
    """Loss and accuracy of the training and validation images over the epochs; the columns are those of history.csv.

    ``dropout``: whether it was on for the training images, which the legend then says.
    """
    labels = {
        "train": "training (with dropout)" if dropout else "training",
        "validation": "validation (without)" if dropout else "validation",
    }
    figure = canvas.of_height(3.6)
    left, right = figure.subplots(1, 2)
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for split, colour in (("train", canvas.BLUE), ("validation", canvas.ORANGE)):
            axes.plot(
                history["epoch"], history[f"{split}_{what}"], "o-", color=colour, markersize=3, label=labels[split]
            )
        axes.set(title=what.capitalize(), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.set(ylabel="loss (nats)", ylim=(0, None))
    right.set(ylabel="images classified correctly")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def study_history(
    numbers: Sequence[int], accuracies: Sequence[float], pruned: Sequence[bool], score: str = "validation accuracy"
) -> Figure:
    """One point per trial and a line for the best complete trial so far; at least one trial is complete.

    A pruned trial is drawn at the accuracy of its last epoch. The axis ends as far below the median as three times the
    distance from the median to the best, so that good trials can be told apart; lower ones are marked on its edge.
    """
    figure = canvas.of_height(4.2)
    axes = figure.subplots()
    rows = sorted(zip(numbers, accuracies, pruned, strict=True))
    complete = [(number, accuracy) for number, accuracy, was_pruned in rows if not was_pruned]
    best, median = max(accuracy for _, accuracy in complete), np.median([accuracy for _, accuracy in complete])
    room = max(best - median, 1e-4)
    lowest = median - 3 * room

    def draw(points: Sequence[tuple[int, float]], marker: str, label: str) -> None:
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=canvas.BLUE, alpha=0.6, markersize=5, label=label)

    draw([trial for trial in complete if trial[1] >= lowest], "o", "complete")
    ended = [(number, accuracy) for number, accuracy, was_pruned in rows if was_pruned]
    draw([trial for trial in ended if trial[1] >= lowest], "x", "pruned, at its last epoch")
    draw([(number, lowest) for number, accuracy, _ in rows if accuracy < lowest], "v", "lower than shown")
    steps = list(itertools.accumulate(complete, lambda so_far, trial: (trial[0], max(so_far[1], trial[1]))))
    steps.append((rows[-1][0], best))
    axes.step(*zip(*steps, strict=True), where="post", color=canvas.ORANGE, label="best so far")
    axes.set(xlabel="trial", ylabel=score, ylim=(lowest - room / 4, max(accuracies) + room / 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    return figure


def accuracy_against_size(
    parameters: Sequence[int], accuracies: Sequence[float], score: str = "validation accuracy"
) -> Figure:
    """One point per network; a line joins those with no smaller network as accurate (the Pareto front)."""
    figure = canvas.of_height(4.2)
    axes = figure.subplots()
    axes.plot(parameters, accuracies, "o", color=canvas.BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
    front: list[tuple[int, float]] = []
    for size, accuracy in sorted(zip(parameters, accuracies, strict=True), key=lambda each: (each[0], -each[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    axes.step(*zip(*front, strict=True), where="post", color=canvas.ORANGE, label="best for its size")
    axes.set(xlabel="parameters", ylabel=score, xscale="log")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
