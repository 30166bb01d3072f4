"""The picture of the measurements."""

from pathlib import Path

import matplotlib.pyplot as plt

OURS, OTHERS = "tab:blue", "tab:gray"


def write_speed(path: Path, rows: list[tuple[str, tuple[float, float, float], float]]) -> None:
    """Bars of the median seconds of an epoch, the fastest at the bottom, with a line from the least to the most."""
    rows = sorted(rows, key=lambda row: -row[1][1])
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for place, (name, (least, median, most), _) in enumerate(reversed(rows)):
        axes.barh(place, median, color=OURS if name.startswith("convtrack") else OTHERS)
        axes.plot([least, most], [place, place], color="black", linewidth=1)
        axes.text(most, place, f"  {median:.1f} s", va="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set_xlabel("seconds for one epoch, validation included")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
