"""A recipe over many seeds: mean and deviation of its test accuracy and loss, and its training time.

    python -m bench.seeds [--seeds 10] [--recipe params.yaml] [--output FILE] [parameter=value ...]

Needs the prepared splits (`dvc repro prepare`). `make seeds` writes bench/seeds.json.
"""

import argparse
import statistics
from pathlib import Path

from bench import recipes
from bench.measurement import origin
from pipeline import files
from pipeline.data.splits import TEST, TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.model import metrics, training
from pipeline.params import PARAMS, Params, read_params

_FIGURES = ("test_accuracy", "test_loss", "validation_accuracy", "fit_seconds")


def main() -> None:
    """Train and score once for each seed, print a line each and the summary, write the output."""
    arguments = _arguments()
    params = read_params(arguments.recipe).changed(recipes.from_words(arguments.overrides))
    dataset = read_dataset()
    device = training.set_up(params.train.device, params.train.threads, params.train.precision)
    splits = {name: read_split(dataset, name).to(device) for name in (TRAIN, VALIDATION, TEST)}

    rows = []
    for seed in range(arguments.seeds):
        rows.append({"seed": seed, **_run(seed, params, dataset, splits)})
        print("  ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()), flush=True)
    summary = {key: _summary([row[key] for row in rows]) for key in _FIGURES}
    for key, value in summary.items():
        print(f"{key}: mean {value['mean']:.5g}, deviation {value['deviation']:.2g}, n = {arguments.seeds}")
    files.write_json(
        arguments.output,
        {"dataset": dataset.name, "overrides": arguments.overrides, **origin(), "summary": summary, "rows": rows},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test accuracy and loss of a recipe over many seeds.")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0 on; at least 2 (default: 10)")
    parser.add_argument("--recipe", type=Path, default=PARAMS, help="a file like params.yaml (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench/seeds.json"), help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="parameter=value", help="other values for some parameters")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a standard deviation needs at least 2 seeds")
    return arguments


def _run(seed: int, params: Params, dataset: Dataset, splits: dict[str, LabelledImages]) -> dict[str, float]:
    cnn, history = recipes.fitted(seed, params, dataset, splits[TRAIN], splits[VALIDATION])
    test = splits[TEST]
    logits = metrics.predict_logits(cnn, test.images)
    return {
        "test_accuracy": metrics.accuracy(logits, test.labels),
        "test_loss": metrics.cross_entropy(logits, test.labels),
        "validation_accuracy": history[-1].validation_accuracy,
        "fit_seconds": sum(epoch.seconds for epoch in history),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


if __name__ == "__main__":
    run_command(main)
