"""The picture of the measurements."""

from pathlib import Path

import matplotlib.pyplot as plt

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
