"""Choose the short recipes: train every candidate and rank them by validation accuracy.

    python -m bench.choose

Each candidate is trained with four seeds, and the best four of each length again with eight other seeds; the mean over
those decides. The test images are never opened. Needs the prepared splits (`dvc repro prepare`) and half an hour;
writes bench/candidates.json.
"""

import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import recipes
from bench.measurement import machine
from pipeline import files
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.model import training

CANDIDATES = Path("bench/candidates.json")
SCREENING_SEEDS, DECIDING_SEEDS = range(1000, 1004), range(2000, 2008)  # not those of the published figures
FINALISTS = 4


@dataclass(frozen=True)
class Score:
    """The validation accuracy of a candidate: mean and deviation over seeds."""

    overrides: dict[str, object]
    validation_accuracy: float
    deviation: float
    seeds: list[int]


def candidates(epochs: int) -> list[dict[str, object]]:
    """The candidates for a recipe of ``epochs`` epochs, as changes to the published one."""
    common = {"train.epochs": epochs, "train.schedule": "one-cycle", "train.augmentation.shift": 1}
    rates, dropouts, smoothings, sizes = (0.01, 0.015, 0.02), (0.1, 0.2), (0.0, 0.1), (64, 128)
    grid: list[dict[str, object]] = [
        {
            "model.dropout": dropout,
            "train.learning_rate": rate,
            "train.label_smoothing": smoothing,
            "train.batch_size": size,
        }
        for rate, dropout, smoothing, size in itertools.product(rates, dropouts, smoothings, sizes)
    ]
    middle: dict[str, object] = {"model.dropout": 0.1, "train.learning_rate": 0.015, "train.label_smoothing": 0.1}
    others: list[dict[str, object]] = [
        middle | {"train.learning_rate": 0.005},
        middle | {"model.dropout": 0.3},
        middle | {"model.dropout": 0.0},
        middle | {"train.label_smoothing": 0.05},
        middle | {"train.label_smoothing": 0.2},
        middle | {"train.augmentation.shift": 0},
        middle | {"train.augmentation.shift": 2},
        middle | {"train.optimizer": "adamw", "train.weight_decay": 0.02},
        middle | {"train.optimizer": "sgd", "train.learning_rate": 0.1},
        middle | {"model.batch_norm": True},
    ]
    return [common | each for each in grid + others]


def main() -> None:
    """Screen all candidates, decide between the best; print a line each, write the file."""
    dataset = read_dataset()
    params = recipes.published()
    training.set_up("cpu", params.train.threads, params.train.precision)
    splits = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    found: dict[str, object] = {"dataset": dataset.name, "machine": machine()}
    for epochs in recipes.SHORT_EPOCHS:
        screened = _best_first(candidates(epochs), SCREENING_SEEDS, dataset, splits)
        finalists = [row.overrides for row in screened[:FINALISTS]]
        decided = _best_first(finalists, DECIDING_SEEDS, dataset, splits)
        found[f"{epochs} epochs"] = {
            "decided": [asdict(score) for score in decided],
            "screened": [asdict(score) for score in screened],
        }
    files.write_json(CANDIDATES, found)


def _best_first(
    choices: list[dict[str, object]],
    seeds: range,
    dataset: Dataset,
    splits: tuple[LabelledImages, LabelledImages],
) -> list[Score]:
    scores = []
    for overrides in choices:
        params = recipes.published().changed(overrides)
        reached = [recipes.fitted(seed, params, dataset, *splits)[1][-1].validation_accuracy for seed in seeds]
        scores.append(Score(overrides, statistics.fmean(reached), statistics.stdev(reached), list(seeds)))
        mean, deviation = scores[-1].validation_accuracy, scores[-1].deviation
        words = " ".join(recipes.as_words(overrides))
        print(f"{mean:.5f} +- {deviation:.5f}  n = {len(seeds)}  {words}", flush=True)
    return sorted(scores, key=lambda score: score.validation_accuracy, reverse=True)


if __name__ == "__main__":
    run_command(main)
