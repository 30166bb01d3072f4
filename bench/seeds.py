"""The recipe of params.yaml over many seeds: mean and deviation of its test accuracy and loss.

    python -m bench.seeds --seeds 10

Needs the prepared splits (`dvc repro prepare`) and writes bench/seeds.json.
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch

from pipeline import files
from pipeline.errors import run_command
from pipeline.images.splits import TEST, TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.network import scoring, training
from pipeline.params import Params, read_params
from pipeline.train import build

RESULTS = Path("bench/seeds.json")


def main() -> None:
    """Train and score once a seed, print a line each and the summary, write bench/seeds.json."""
    parser = argparse.ArgumentParser(description="Test accuracy and loss of the recipe in params.yaml over many seeds.")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed 0 on; 2 or more (default: 10)")
    seeds = parser.parse_args().seeds
    if seeds < 2:
        parser.error("a deviation needs 2 seeds or more")
    params, dataset = read_params(), read_dataset()
    device = training.set_up(params.train.device, params.train.threads, params.train.precision)
    splits = {name: read_split(dataset, name).to(device) for name in (TRAIN, VALIDATION, TEST)}

    rows = []
    for seed in range(seeds):
        rows.append({"seed": seed, **_run(seed, params, dataset, splits)})
        print("  ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()), flush=True)
    summary = {key: _summary([row[key] for row in rows]) for key in ("test_accuracy", "test_loss")}
    for key, value in summary.items():
        print(f"{key}: mean {value['mean']:.5g}, deviation {value['deviation']:.2g}, n = {seeds}")
    files.write_json(RESULTS, {"dataset": dataset.name, "machine": _machine(), "summary": summary, "rows": rows})


def _run(seed: int, params: Params, dataset: Dataset, splits: dict[str, LabelledImages]) -> dict[str, float]:
    cnn = build(params.model_copy(update={"seed": seed}), dataset)
    train, validation, test = (splits[name] for name in (TRAIN, VALIDATION, TEST))
    *_, last = training.fit(
        cnn,
        (train.images, train.labels),
        (validation.images, validation.labels),
        generator=torch.Generator(train.images.device).manual_seed(seed),
        **params.train.model_dump(exclude={"device", "threads"}),
    )
    logits = scoring.predict_logits(cnn, test.images)
    return {
        "test_accuracy": scoring.accuracy(logits, test.labels),
        "test_loss": scoring.cross_entropy(logits, test.labels),
        "validation_accuracy": last.validation_accuracy,
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    run_command(main)
