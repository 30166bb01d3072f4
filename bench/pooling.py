"""What pooling does for the accuracy on shifted test images: the same recipe trained with and without it.

    python -m bench.pooling [--seeds 5] [--output FILE] [--picture FILE] [parameter=value ...]

Needs the prepared splits (`dvc repro prepare`). `make pooling` writes bench/pooling.json and the picture of
docs/what-the-cnn-learned.md.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.ticker import PercentFormatter

from bench import recipes
from bench.measurement import origin
from pipeline import files, recipe
from pipeline.data.splits import TEST, TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain.corruptions import moved
from pipeline.figures import canvas
from pipeline.model import metrics
from pipeline.model.cnn import parameter_count
from pipeline.params import read_params

SHIFTS = range(7)  # pixels to the right
KINDS: dict[str, dict[str, object]] = {
    "max pooling": {"model.pool": "max", "model.pool_size": 2, "model.stride": 1},
    "mean pooling": {"model.pool": "mean", "model.pool_size": 2, "model.stride": 1},
    "no pooling, stride 2": {"model.pool_size": 1, "model.stride": 2},
    "no pooling, stride 1": {"model.pool_size": 1, "model.stride": 1},
}


class Kind(NamedTuple):
    """A kind of network: its size, and a row of accuracies, one for each shift, for each seed."""

    parameters: int
    rows: list[list[float]]

    @property
    def means(self) -> list[float]:
        """After each shift, over the seeds."""
        return [statistics.fmean(column) for column in zip(*self.rows, strict=True)]

    @property
    def deviations(self) -> list[float]:
        """After each shift, over the seeds."""
        return [statistics.stdev(column) for column in zip(*self.rows, strict=True)]


def main() -> None:
    """Train each kind once a seed, print a line each, write the output and its picture."""
    arguments = _arguments()
    params = read_params().changed(recipes.from_words(arguments.overrides))
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation, test = (read_split(dataset, name).to(device) for name in (TRAIN, VALIDATION, TEST))
    found: dict[str, Kind] = {}
    for kind, overrides in KINDS.items():
        of_kind = params.changed(overrides)
        rows = []
        for seed in range(arguments.seeds):
            cnn, _ = recipes.fitted(seed, of_kind, dataset, train, validation)
            shifted = (moved(test.images, 0, pixels) for pixels in SHIFTS)
            rows.append([metrics.accuracy(metrics.predict_logits(cnn, images), test.labels) for images in shifted])
            print(f"{kind}, seed {seed}: {'  '.join(f'{accuracy:.4f}' for accuracy in rows[-1])}", flush=True)
        found[kind] = Kind(parameter_count(recipe.architecture(of_kind, dataset)), rows)
    facts = {"dataset": dataset.name, "overrides": arguments.overrides, "seeds": arguments.seeds}
    facts |= origin()
    kinds = {
        kind: {"parameters": each.parameters, "mean": each.means, "deviation": each.deviations, "rows": each.rows}
        for kind, each in found.items()
    }
    files.write_json(arguments.output, facts | {"shifts": list(SHIFTS), "kinds": kinds})
    write_picture(
        arguments.picture,
        SHIFTS,
        {f"{kind} ({each.parameters:,} parameters)": (each.means, each.deviations) for kind, each in found.items()},
    )


def write_picture(
    path: Path, shifts: Sequence[int], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """A line for each kind of network: mean accuracy and its deviation over the seeds, against the shift in pixels."""
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against shift, with and without pooling.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on; at least 2 (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("bench/pooling.json"), help="(default: %(default)s)")
    picture = Path("docs/accuracy_after_shifts.png")
    parser.add_argument("--picture", type=Path, default=picture, help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="parameter=value", help="other values for some parameters")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a standard deviation needs at least 2 seeds")
    return arguments


if __name__ == "__main__":
    run_command(main)
