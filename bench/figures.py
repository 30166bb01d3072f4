"""The pictures of the measurements."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from pipeline import files
from pipeline.figures import canvas

OURS, OTHERS = "tab:blue", "tab:gray"


def write_speed(path: Path, seconds: dict[str, tuple[float, float, float]]) -> None:
    """Bars of the median seconds of an epoch, the fastest on top, with a line from the least to the most."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    slowest_first = sorted(seconds.items(), key=lambda each: -each[1][1])
    for place, (name, (least, median, most)) in enumerate(slowest_first):
        axes.barh(place, median, color=OURS if name.startswith("convtrack") else OTHERS)
        axes.plot([least, most], [place, place], color="black", linewidth=1)
        axes.text(most, place, f"  {median:.1f} s", va="center")
    axes.set_yticks(range(len(seconds)), [name for name, _ in slowest_first])
    axes.set_xlabel("seconds for one epoch, validation included")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write_shifts(
    path: Path, shifts: Sequence[int], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """A line a kind of network: mean accuracy, and its deviation over the seeds, against the shift in pixels."""
    figure = canvas.of_height(4)
    axes = figure.subplots()
    colours = (canvas.BLUE, canvas.GREEN, canvas.ORANGE, canvas.PINK)
    for (label, (means, deviations)), colour, marker in zip(curves.items(), colours, "os^D", strict=True):
        axes.errorbar(shifts, means, deviations, fmt=f"{marker}-", color=colour, capsize=3, markersize=5, label=label)
    axes.set(xlabel="shift to the right, pixels", ylabel="accuracy on the test images", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    files.write(path, canvas.as_png(figure))
