"""How fast the training is, compared with Keras, a DataLoader loop and Lightning: `make bench-training`.

    python -m bench.speed [--quick]

Each contender runs in a process of its own, one after the other, round after round, so that whatever slows the machine
for a while slows all of them. Nothing else should run. Writes bench/results.json and docs/speed.png; exits 1 where a
figure falls short of its bound.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bench import arithmetic, measurement, recipes, rounds, stages
from bench.measurement import Bound, conclude
from bench.rounds import CONTENDERS, Turn, ours, take_turn, time_whole_processes
from pipeline import files
from pipeline.data.splits import LabelledImages, read_dataset
from pipeline.errors import UserError, run_command

RESULTS, PICTURE = Path("bench/results.json"), Path("docs/speed.png")
SEEDS = {"short": 10, "shortest": 30}
Study = dict[str, dict[str, float]]


def main() -> None:
    """Run the rounds, then the rest; print, write, and exit 1 where a bound is not reached."""
    parser = argparse.ArgumentParser(description="Compare the training with Keras, a DataLoader loop and Lightning.")
    parser.add_argument("--quick", action="store_true", help="one round of one epoch, and only the bounds of an epoch")
    quick = parser.parse_args().quick
    if not quick and measurement.code().endswith("-dirty"):
        raise UserError("some measurements run in a clone: commit the changes first, or use --quick")
    count, epochs = (1, 1) if quick else (3, 2)
    train, validation = rounds.read_images()
    operations = operations_of_an_epoch(train, validation)
    turns: dict[str, list[Turn]] = defaultdict(list)
    studies: dict[str, Study] = {}
    whole: Mapping[str, list[float]] = {}
    staged = stages.Stages()
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "images.npz"
        rounds.write_images(data, train, validation)
        for number in range(1, count + 1):
            peaks.append(arithmetic.peak())
            for name, contender in CONTENDERS.items():
                turns[name].append(take_turn(contender, data, epochs))
                shown = ", ".join(f"{seconds:.2f}" for seconds in turns[name][-1].seconds)
                print(f"round {number}  {name:<28}{shown} s an epoch", flush=True)
        bounds = epoch_bounds(turns, peaks, operations["all gradients"])
        if not quick:
            whole = time_whole_processes(data, count)
            studies["short"] = over_seeds(folder, recipes.SHORT, SEEDS["short"])
            studies["shortest"] = over_seeds(folder, recipes.SHORTEST, SEEDS["shortest"])
            bounds += recipe_bounds(studies, whole)
            staged = stages.take(folder, count)
            bounds += stage_bounds(staged) + size_bounds(folder, train)
    print_figures(turns, peaks, operations, studies)
    if not quick:
        files.write_json(
            RESULTS,
            {
                **measurement.origin(),
                "float32_peak_gflops": [rate / 1e9 for rate in peaks],
                "gflop_an_epoch": {name: count / 1e9 for name, count in operations.items()},
                "turns": {name: [asdict(turn) for turn in each] for name, each in turns.items()},
                "whole_processes": whole,
                "studies": studies,
                "stages": asdict(staged),
                "bounds": [each.as_row() for each in bounds],
            },
        )
        write_picture(PICTURE, seconds_of(turns))
    conclude(bounds)


def operations_of_an_epoch(train: LabelledImages, validation: LabelledImages) -> dict[str, int]:
    """Floating-point operations with all gradients, and with those alone that are not zero after an epoch."""
    overrides = {"train.epochs": 1}
    params = recipes.published().changed(overrides)
    cnn, _ = recipes.fitted(params.seed, params, read_dataset(), train, validation)
    live = arithmetic.live_gradients(cnn, train[:1000], torch.Generator().manual_seed(params.seed))
    counts = len(train), len(validation)
    return {
        "all gradients": arithmetic.needed_operations(cnn.architecture, *counts),
        "gradients that are not zero": arithmetic.needed_operations(cnn.architecture, *counts, live),
    }


def over_seeds(folder: Path, overrides: Mapping[str, object], count: int) -> Study:
    """Mean and deviation of the published recipe with other values for some parameters."""
    output, published = folder / "seeds.json", folder / "published.yaml"
    published.write_text(recipes.as_yaml({}))
    recipe = ("--recipe", str(published), "--output", str(output), "--seeds", str(count))
    measurement.run([sys.executable, "-m", "bench.seeds", *recipe, *recipes.as_words(overrides)], Path.cwd())
    summary: Study = json.loads(output.read_text())["summary"]
    return summary


def epoch_bounds(turns: Mapping[str, list[Turn]], peaks: Sequence[float], operations: int) -> list[Bound]:
    """Ratios and shares, each of one round."""
    of_round = {name: [statistics.median(turn.seconds) for turn in each] for name, each in turns.items()}
    # The DataLoader counts with the number of workers that is faster here.
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


def recipe_bounds(studies: Mapping[str, Study], whole_processes: Mapping[str, Sequence[float]]) -> list[Bound]:
    """The accuracy of the short recipes, and the time of the shortest."""
    accuracy = {name: (100 * study["test_accuracy"]["mean"],) for name, study in studies.items()}
    keras, shortest = whole_processes["Keras, 15 epochs"], whole_processes["shortest recipe"]
    times = tuple(a / b for a, b in zip(keras, shortest, strict=True))
    return [
        Bound(f"test accuracy of the {name} recipe, mean of {SEEDS[name]} seeds", accuracy[name], 99.23, 99.23, "%")
        for name in ("short", "shortest")
    ] + [
        Bound("whole process: 15 epochs of Keras against the shortest recipe", times, 8, 12, "x"),
        Bound("whole process of the shortest recipe", tuple(shortest), 60, 10, "s", low=True),
    ]


def stage_bounds(found: stages.Stages) -> list[Bound]:
    """Of whole stages. MLflow's share: the seconds it adds to a short stage over those of that round's whole one."""
    shares = tuple(
        100 * pair.added / whole.tracked
        for whole, pairs in zip(found.whole, found.short, strict=True)
        for pair in pairs
    )
    repro, peaks = tuple(found.around_the_epochs), tuple(pair.peak_mb / 1000 for pair in found.whole)
    return [
        Bound("dvc repro from the published files, without the epochs", repro, 25, 15, "s", low=True),
        Bound("MLflow's share of the stage train", shares, 5, 2, "%", low=True),
        Bound("peak memory of the stage train", peaks, 1.3, 1, "GB", low=True),
    ]


def size_bounds(folder: Path, train: LabelledImages) -> list[Bound]:
    """Of four times the images."""
    sizes = [(take_turn(ours(), folder, 1), take_turn(ours(copies=4), folder, 1)) for _ in range(5)]
    times = tuple(large.seconds[0] / small.seconds[0] for small, large in sizes)
    added = 3 * train.images.nbytes / 1e6
    more = tuple((large.peak_mb - small.peak_mb) / added for small, large in sizes)
    return [
        Bound("one epoch with 4x the images", times, 4.4, 4, "x", low=True),
        Bound("extra memory for them, in multiples of the bytes added", more, 1.25, 1, "x", low=True),
    ]


def seconds_of(turns: Mapping[str, list[Turn]]) -> dict[str, tuple[float, float, float]]:
    """For each contender the least, median and most seconds of an epoch."""
    found = {}
    for name, each in turns.items():
        seconds = [second for turn in each for second in turn.seconds]
        found[name] = min(seconds), statistics.median(seconds), max(seconds)
    return found


def write_picture(path: Path, seconds: Mapping[str, tuple[float, float, float]]) -> None:
    """Bars of the median seconds of an epoch, the fastest on top, with a line from the least to the most."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    slowest_first = sorted(seconds.items(), key=lambda each: -each[1][1])
    for place, (name, (least, median, most)) in enumerate(slowest_first):
        axes.barh(place, median, color="tab:blue" if name.startswith("convtrack") else "tab:gray")
        axes.plot([least, most], [place, place], color="black", linewidth=1)
        axes.text(most, place, f"  {median:.1f} s", va="center")
    axes.set_yticks(range(len(seconds)), [name for name, _ in slowest_first])
    axes.set_xlabel("seconds for one epoch, validation included")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def print_figures(
    turns: Mapping[str, list[Turn]],
    peaks: Sequence[float],
    operations: Mapping[str, int],
    studies: Mapping[str, Study],
) -> None:
    """The figures that the bounds are computed from."""
    print()
    seconds = seconds_of(turns)
    for name, (least, median, most) in seconds.items():
        memory = max(turn.peak_mb for turn in turns[name])
        print(f"{name:<28}{median:6.2f} s an epoch ({least:.2f} ... {most:.2f}), {memory:,.0f} MB")
    peak = statistics.median(peaks)
    print(f"float32 peak {peak / 1e9:,.0f} GFLOP/s")
    for name, count in operations.items():
        share = count / seconds["convtrack, float32"][1] / peak
        print(f"an epoch, counting {name}: {count / 1e9:,.0f} GFLOP, {share:.1%} of the peak")
    for name, study in studies.items():
        found = ", ".join(f"{key} {each['mean']:.5g} +- {each['deviation']:.2g}" for key, each in study.items())
        print(f"{name} recipe: {found}")
    print()


if __name__ == "__main__":
    run_command(main)
