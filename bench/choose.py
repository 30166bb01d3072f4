"""Which short recipe is the best: all candidates and the validation accuracy they reach.

    python -m bench.choose

Every candidate is trained with four seeds; the best four of each length again with eight other seeds, and their mean
there decides. The test images are never opened. Needs the prepared splits (`dvc repro prepare`) and half an hour;
writes bench/candidates.json.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import recipes
from bench.machine import machine
from bench.seeds import fitted
from pipeline import files
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.model import training

CANDIDATES = Path("bench/candidates.json")
SCREENING_SEEDS, DECIDING_SEEDS = range(1000, 1004), range(2000, 2008)  # none of those that the figures come from
FINALISTS = 4


@dataclass(frozen=True)
class Score:
    """What a candidate reached: mean and deviation over seeds."""

    knobs: dict[str, object]
    validation_accuracy: float
    deviation: float
    seeds: list[int]


def main() -> None:
    """Screen all candidates, decide between the best; print a line each, write the file."""
    dataset = read_dataset()
    params = recipes.published()
    training.set_up("cpu", params.train.threads, params.train.precision)
    splits = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    found: dict[str, object] = {"dataset": dataset.name, "machine": machine()}
    for epochs in recipes.SHORT_EPOCHS:
        screened = _best_first(recipes.candidates(epochs), SCREENING_SEEDS, dataset, splits)
        finalists = [row.knobs for row in screened[:FINALISTS]]
        decided = _best_first(finalists, DECIDING_SEEDS, dataset, splits)
        found[f"{epochs} epochs"] = {
            "decided": [asdict(score) for score in decided],
            "screened": [asdict(score) for score in screened],
        }
    files.write_json(CANDIDATES, found)


def _best_first(
    candidates: list[dict[str, object]],
    seeds: range,
    dataset: Dataset,
    splits: tuple[LabelledImages, LabelledImages],
) -> list[Score]:
    scores = []
    for knobs in candidates:
        params = recipes.published().changed(knobs)
        reached = [fitted(seed, params, dataset, *splits)[1][-1].validation_accuracy for seed in seeds]
        scores.append(Score(knobs, statistics.fmean(reached), statistics.stdev(reached), list(seeds)))
        mean, deviation = scores[-1].validation_accuracy, scores[-1].deviation
        words = " ".join(recipes.as_words(knobs))
        print(f"{mean:.5f} +- {deviation:.5f}  n = {len(seeds)}  {words}", flush=True)
    return sorted(scores, key=lambda score: score.validation_accuracy, reverse=True)


if __name__ == "__main__":
    run_command(main)
