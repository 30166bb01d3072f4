"""What pooling does to the accuracy when test images are shifted: the same recipe trained with and without it.

    python -m bench.pooling [--seeds 5] [--output FILE] [--picture FILE] [knob=value ...]

Needs the prepared splits (`dvc repro prepare`). `make pooling` writes bench/pooling.json and the picture of
docs/what-the-cnn-learned.md.
"""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from bench import figures, recipes
from bench.machine import code, machine, today
from bench.seeds import fitted
from pipeline import files, recipe
from pipeline.data.splits import TEST, TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain.corruptions import moved
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
    """A kind of network: its size, and for each seed its accuracies after the shifts."""

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
    params = read_params().changed(recipes.from_words(arguments.knobs))
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation, test = (read_split(dataset, name).to(device) for name in (TRAIN, VALIDATION, TEST))
    found: dict[str, Kind] = {}
    for kind, knobs in KINDS.items():
        of_kind = params.changed(knobs)
        rows = []
        for seed in range(arguments.seeds):
            cnn, _ = fitted(seed, of_kind, dataset, train, validation)
            shifted = (moved(test.images, 0, pixels) for pixels in SHIFTS)
            rows.append([metrics.accuracy(metrics.predict_logits(cnn, images), test.labels) for images in shifted])
            print(f"{kind}, seed {seed}: {'  '.join(f'{accuracy:.4f}' for accuracy in rows[-1])}", flush=True)
        found[kind] = Kind(parameter_count(recipe.architecture(of_kind, dataset)), rows)
    facts = {"dataset": dataset.name, "knobs": arguments.knobs, "seeds": arguments.seeds}
    facts |= {"machine": machine(), "date": today(), "code": code()}
    kinds = {
        kind: {"parameters": each.parameters, "mean": each.means, "deviation": each.deviations, "rows": each.rows}
        for kind, each in found.items()
    }
    files.write_json(arguments.output, facts | {"shifts": list(SHIFTS), "kinds": kinds})
    figures.write_shifts(
        arguments.picture,
        SHIFTS,
        {f"{kind} ({each.parameters:,} parameters)": (each.means, each.deviations) for kind, each in found.items()},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against shift, with and without pooling.")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from seed 0 on; 2 or more (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("bench/pooling.json"), help="(default: %(default)s)")
    picture = Path("docs/accuracy_after_shifts.png")
    parser.add_argument("--picture", type=Path, default=picture, help="(default: %(default)s)")
    parser.add_argument("knobs", nargs="*", metavar="knob=value", help="other values for some knobs of params.yaml")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a deviation needs 2 seeds or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
