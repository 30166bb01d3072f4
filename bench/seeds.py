"""A recipe over many seeds: mean and deviation of its scores on the test images, and of its training time.

    python -m bench.seeds [--seeds 10] [--recipe params.yaml] [--output FILE] [parameter=value ...]

Needs the prepared splits (`dvc repro prepare`). `make seeds` writes bench/seeds.json, of MNIST alone: the figures of
other images, such as your own, are printed, and written where --output says.
"""

import argparse
import statistics
from pathlib import Path

from bench import recipes
from bench.measurement import DATASET, origin
from pipeline import files
from pipeline.data.splits import TEST, TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.model import metrics, training
from pipeline.params import PARAMS, Params, read_params

OUTPUT = Path("bench/seeds.json")


def main() -> None:
    """Train and score once for each seed, print a line each and the summary, write the output."""
    arguments = _arguments()
    params = read_params(arguments.recipe).changed(recipes.from_words(arguments.overrides))
    dataset = read_dataset()
    device = training.set_up(params.train.device, params.train.threads, params.train.precision)
    limit = params.data.memory_limit
    splits = {name: read_split(dataset, name, memory_limit=limit).to(device) for name in (TRAIN, VALIDATION, TEST)}

    rows = []
    for seed in range(arguments.seeds):
        rows.append(_run(seed, params, dataset, splits))
        print("  ".join(f"{key} {value:.5g}" for key, value in {"seed": seed, **rows[-1]}.items()), flush=True)
    summary = {key: _summary([row[key] for row in rows]) for key in rows[0]}
    for key, value in summary.items():
        print(f"{key}: mean {value['mean']:.5g}, deviation {value['deviation']:.2g}, n = {arguments.seeds}")
    baseline = metrics.baseline_accuracy(*(dataset.splits[name].per_class for name in (TRAIN, TEST)))
    print(f"always answering the most common class: test_accuracy {baseline:.5g}")
    if output := arguments.output or (OUTPUT if dataset.name == DATASET else None):
        facts = {"dataset": dataset.name, "overrides": arguments.overrides, **origin()}
        scores = {"test_baseline_accuracy": baseline, "summary": summary}
        files.write_json(output, facts | scores | {"rows": [{"seed": seed, **row} for seed, row in enumerate(rows)]})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The test scores of a recipe over many seeds.")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0 on; at least 2 (default: 10)")
    parser.add_argument("--recipe", type=Path, default=PARAMS, help="a file like params.yaml (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default: {OUTPUT} for {DATASET}, none for other images)")
    parser.add_argument("overrides", nargs="*", metavar="parameter=value", help="other values for some parameters")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a standard deviation needs at least 2 seeds")
    return arguments


def _run(seed: int, params: Params, dataset: Dataset, splits: dict[str, LabelledImages]) -> dict[str, float]:
    cnn, history = recipes.fitted(seed, params, dataset, splits[TRAIN], splits[VALIDATION])
    test = splits[TEST]
    logits = metrics.predict_logits(cnn, test.images)
    return {f"test_{name}": metric(logits, test.labels) for name, metric in metrics.METRICS.items()} | {
        "validation_accuracy": history[-1].validation_accuracy,
        "validation_balanced_accuracy": history[-1].validation_balanced_accuracy,
        "fit_seconds": sum(epoch.seconds for epoch in history),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


if __name__ == "__main__":
    run_command(main)
