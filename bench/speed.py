"""How fast the training is, beside what people would use instead: `make bench`.

    python -m bench.speed [--quick]

Each contender runs in a process of its own, one after the other, round after round, so that whatever slows the machine
down for a while slows all of them. Nothing else should run. Writes bench/results.json and docs/speed.png; exits 1 where
a figure falls short of its bound.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench import arithmetic, figures, recipes, stages
from bench.machine import machine
from pipeline import files
from pipeline.errors import UserError, run_command
from pipeline.images.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.network.cnn import Architecture

RESULTS, PICTURE = Path("bench/results.json"), Path("docs/speed.png")
KERAS_PYTHON, LIGHTNING = Path("bench/.keras/bin/python"), Path("bench/.lightning")
KERAS_EPOCHS = 15  # of the published recipe
BFLOAT16 = "train.precision=bfloat16"


Command = Callable[[Path, int], list[str | Path]]


def ours(*knobs: str, copies: int = 1) -> Command:
    """This project, on the training images so many times."""
    program = "bench.contenders.convtrack_fit"
    return lambda _, epochs: [sys.executable, "-m", program, str(epochs), str(copies), *knobs]


def usual(program: str, workers: int) -> Command:
    """One of the programs with a DataLoader."""
    return lambda data, epochs: [sys.executable, "-m", f"bench.contenders.{program}", data, str(epochs), str(workers)]


def keras(data: Path, epochs: int) -> list[str | Path]:
    """Keras, in its environment."""
    return [KERAS_PYTHON, "bench/contenders/keras_fit.py", data, str(epochs)]


CONTENDERS = {  # in the order in which they take their turns
    "Keras": keras,
    "convtrack, float32": ours(),
    "DataLoader loop": usual("dataloader_loop", 0),
    "convtrack, bfloat16": ours(BFLOAT16),
    "DataLoader loop, 2 workers": usual("dataloader_loop", 2),
    "Lightning": usual("lightning_loop", 0),
}


@dataclass(frozen=True)
class Turn:
    """One process: seconds of each epoch but the first, in which things are still set up, and its peak memory."""

    seconds: list[float]
    validation_accuracy: float
    peak_mb: float


def take_turn(command: Command, data: Path, epochs: int) -> Turn:
    """Run a contender for one epoch more than asked for."""
    words = list(map(str, command(data, epochs + 1)))
    _, printed = stages.timed(words, Path.cwd(), PYTHONPATH=f"{Path.cwd()}:{LIGHTNING}")
    *rows, memory = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return Turn([row["seconds"] for row in rows[1:]], rows[-1]["validation_accuracy"], memory["peak_mb"])


def write_data(path: Path) -> None:
    """The prepared images as NumPy arrays, which every contender can read."""
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    if dataset.name != "mnist" or (len(train), len(validation)) != (54_000, 6_000):
        raise UserError(f"the prepared images are {dataset.label}; the bounds are those of mnist")
    np.savez(
        path,
        train_images=train.images.numpy(),
        train_labels=train.labels.numpy(),
        validation_images=validation.images.numpy(),
        validation_labels=validation.labels.numpy(),
    )


Study = dict[str, dict[str, float]]


def over_seeds(folder: Path, knobs: Mapping[str, object], seeds: int) -> Study:
    """Mean and deviation of the published recipe with other values for some knobs."""
    output = folder / "seeds.json"
    recipe = ("--recipe", str(recipes.PUBLISHED), "--output", str(output), "--seeds", str(seeds))
    stages.timed([sys.executable, "-m", "bench.seeds", *recipe, *recipes.as_words(knobs)], Path.cwd())
    summary: Study = json.loads(output.read_text())["summary"]
    return summary


@dataclass(frozen=True)
class Bound:
    """A figure and what it must reach; ``low`` where less is better."""

    what: str
    figures: tuple[float, ...]  # their median counts
    bound: float
    aim: float
    unit: str
    low: bool = False

    @property
    def figure(self) -> float:
        """The median."""
        return statistics.median(self.figures)

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return self.figure <= self.bound if self.low else self.figure >= self.bound

    def __str__(self) -> str:
        least = "at most" if self.low else "at least"
        verdict = "holds" if self.holds else "FALLS SHORT"
        spread = f"({min(self.figures):.2f} ... {max(self.figures):.2f})" if len(self.figures) > 1 else ""
        reached = f"{self.what:<62}{self.figure:>7.2f} {self.unit:<7}{spread:<18}"
        return f"{reached}{least} {self.bound:g} (aim {self.aim:g})  {verdict}"


def epoch_bounds(turns: Mapping[str, list[Turn]], peaks: Sequence[float], operations: int) -> list[Bound]:
    """Ratios and shares, each of one round."""
    of_round = {name: [statistics.median(turn.seconds) for turn in each] for name, each in turns.items()}
    # The number of workers that is faster here speaks for the DataLoader.
    of_round["DataLoader loop"] = min(
        (of_round[name] for name in ("DataLoader loop", "DataLoader loop, 2 workers")), key=statistics.median
    )

    def ratios(other: str, ours: str) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(of_round[other], of_round[ours], strict=True))

    float32, bfloat16 = "convtrack, float32", "convtrack, bfloat16"
    shares = tuple(100 * operations / each / peak for each, peak in zip(of_round[float32], peaks, strict=True))
    return [
        Bound("epoch, float32, against Keras", ratios("Keras", float32), 1.6, 2, "x"),
        Bound("epoch, float32, against the DataLoader loop", ratios("DataLoader loop", float32), 3.5, 5, "x"),
        Bound("epoch, bfloat16, against Keras", ratios("Keras", bfloat16), 2.2, 3, "x"),
        Bound("epoch, bfloat16, against the DataLoader loop", ratios("DataLoader loop", bfloat16), 5, 7, "x"),
        Bound("share of the float32 peak, zero gradients counted as work", shares, 70, 85, "%"),
    ]


def other_bounds(folder: Path, turns: Mapping[str, list[Turn]], studies: Mapping[str, Study]) -> list[Bound]:
    """All that is not about one epoch."""
    keras_seconds = KERAS_EPOCHS * statistics.median(itertools.chain(*(turn.seconds for turn in turns["Keras"])))
    (accuracy, seconds), (accuracy_of_shortest, seconds_of_shortest) = (
        (100 * study["test_accuracy"]["mean"], study["fit_seconds"]["mean"]) for study in studies.values()
    )
    shares, megabytes = stages.tracking_share(stages.workspace(folder / "workspace"), pairs=3)
    sizes = [(take_turn(ours(), folder, 1), take_turn(ours(copies=4), folder, 1)) for _ in range(5)]
    times = tuple(large.seconds[0] / small.seconds[0] for small, large in sizes)
    added = 3 * read_split(read_dataset(), TRAIN).images.nbytes / 1e6
    more = tuple((large.peak_mb - small.peak_mb) / added for small, large in sizes)
    around = stages.around_the_epochs(folder / "clone")
    return [
        Bound("test accuracy of the short recipe, mean of 10 seeds", (accuracy,), 99.23, 99.23, "%"),
        Bound("its time against 15 epochs of Keras", (keras_seconds / seconds,), 8, 12, "x less"),
        Bound("test accuracy of the shortest recipe, mean of 30 seeds", (accuracy_of_shortest,), 99, 99, "%"),
        Bound("its time", (seconds_of_shortest,), 60, 10, "s", low=True),
        Bound("dvc repro from the published files, without the epochs", (around,), 25, 15, "s", low=True),
        Bound("MLflow's share of the stage train", tuple(100 * share for share in shares), 5, 2, "%", low=True),
        Bound("peak memory of the stage train", (megabytes / 1000,), 1.3, 1, "GB", low=True),
        Bound("an epoch of four times the images", times, 4.4, 4, "x", low=True),
        Bound("memory it takes more, in sizes of the images added", more, 1.25, 1, "x", low=True),
    ]


def main() -> None:
    """Run the rounds, then the rest; print, write, and exit 1 where a bound is not reached."""
    parser = argparse.ArgumentParser(description="Time the training beside Keras, a DataLoader loop and Lightning.")
    parser.add_argument("--quick", action="store_true", help="one round of one epoch, and only the bounds of an epoch")
    quick = parser.parse_args().quick
    rounds, epochs = (1, 1) if quick else (3, 2)
    turns: dict[str, list[Turn]] = defaultdict(list)
    studies: dict[str, Study] = {}
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "images.npz"
        write_data(data)
        for number in range(1, rounds + 1):
            peaks.append(arithmetic.peak())
            for name, command in CONTENDERS.items():
                turns[name].append(take_turn(command, data, epochs))
                shown = ", ".join(f"{seconds:.2f}" for seconds in turns[name][-1].seconds)
                print(f"round {number}  {name:<28}{shown} s an epoch", flush=True)
        operations = operations_of_an_epoch()
        bounds = epoch_bounds(turns, peaks, operations)
        if not quick:
            studies["short"] = over_seeds(folder, recipes.SHORT, 10)
            studies["shortest"] = over_seeds(folder, recipes.SHORTEST, 30)
            bounds += other_bounds(folder, turns, studies)
    print()
    for name, (least, median, most) in seconds_of(turns).items():
        memory = max(turn.peak_mb for turn in turns[name])
        print(f"{name:<28}{median:6.2f} s an epoch ({least:.2f} ... {most:.2f}), {memory:,.0f} MB")
    print(f"float32 peak {statistics.median(peaks) / 1e9:,.0f} GFLOP/s; an epoch needs {operations / 1e9:,.0f} GFLOP")
    for name, study in studies.items():
        found = ", ".join(f"{key} {each['mean']:.5g} +- {each['deviation']:.2g}" for key, each in study.items())
        print(f"{name} recipe: {found}")
    print()
    for bound in bounds:
        print(bound)
    if not quick:
        files.write_json(
            RESULTS,
            {
                "machine": machine(),
                "float32_peak_gflops": [rate / 1e9 for rate in peaks],
                "gflop_an_epoch": operations / 1e9,
                "turns": {name: [asdict(turn) for turn in each] for name, each in turns.items()},
                "studies": studies,
                "bounds": [asdict(each) | {"figure": each.figure, "holds": each.holds} for each in bounds],
            },
        )
        figures.write_speed(PICTURE, seconds_of(turns))
    sys.exit(not all(bound.holds for bound in bounds))


def operations_of_an_epoch() -> int:
    """Of the published network on the prepared images."""
    dataset = read_dataset()
    architecture = Architecture(dataset.image_shape, dataset.class_names, **recipes.published().model.model_dump())
    return arithmetic.needed_operations(architecture, *(dataset.splits[name].count for name in (TRAIN, VALIDATION)))


def seconds_of(turns: Mapping[str, list[Turn]]) -> dict[str, tuple[float, float, float]]:
    """For each contender the least, median and most seconds of an epoch."""
    found = {}
    for name, each in turns.items():
        seconds = [second for turn in each for second in turn.seconds]
        found[name] = min(seconds), statistics.median(seconds), max(seconds)
    return found


if __name__ == "__main__":
    run_command(main)
