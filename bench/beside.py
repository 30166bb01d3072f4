"""What a training does beside learning: the time that checkpoints and live images take of an epoch.

    python -m bench.beside [--times 60] [--output FILE] [knob=value ...]

Needs the prepared splits (`dvc repro prepare`). One training goes through epochs that are bare, with live images, bare,
and with a checkpoint, in turn; each of the second and fourth is compared with the bare ones before and after it. The
run is written into a store of its own. `make beside` writes bench/beside.json.
"""

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from bench import recipes
from bench.bounds import Bound, conclude
from bench.machine import code, machine, today
from pipeline import files, recipe, resuming
from pipeline.errors import run_command
from pipeline.images.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.network.checkpoint import Checkpoint
from pipeline.network.training import Epoch
from pipeline.params import Params, read_params
from pipeline.tracking import runs
from pipeline.tracking.live import LiveImages

BARE, LIVE, CHECKPOINT = "bare", "live images", "a checkpoint"
TURN = (BARE, LIVE, BARE, CHECKPOINT)
MOST = 2  # per cent


def main() -> None:
    """Train, print the figures, write the output; exit 1 where one is too large."""
    arguments = _arguments()
    params = read_params().changed(recipes.from_words(arguments.knobs))
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation = (read_split(dataset, split).to(device) for split in (TRAIN, VALIDATION))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ |= {"DVC_ROOT": folder, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        seconds = _epochs(params, dataset, train, validation, arguments.times)
    bare, bounds = statistics.fmean(seconds[::2]), []
    for way in (LIVE, CHECKPOINT):
        of_epoch = shares(seconds, TURN.index(way))
        mean, error = statistics.fmean(of_epoch), statistics.stdev(of_epoch) / math.sqrt(len(of_epoch))
        print(f"{way}: {mean:.2f} % +- {error:.2f} of an epoch of {bare:.2f} s, n = {len(of_epoch)}")
        bounds.append(Bound(f"{way} after each epoch", (mean,), MOST, 0, "%", low=True))
    facts = {"dataset": dataset.name, "knobs": arguments.knobs, "machine": machine(), "date": today(), "code": code()}
    files.write_json(arguments.output, facts | {"seconds": seconds, "bounds": [bound.as_row() for bound in bounds]})
    conclude(bounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The time that checkpoints and live images take of an epoch.")
    parser.add_argument("--times", type=int, default=60, help="how often each; 2 or more (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench/beside.json"), help="(default: %(default)s)")
    parser.add_argument("knobs", nargs="*", metavar="knob=value", help="other values for some knobs of the recipe")
    arguments = parser.parse_args()
    if arguments.times < 2:
        parser.error("an error needs 2 times or more")
    arguments.output = arguments.output.resolve()
    return arguments


def _epochs(
    params: Params, dataset: Dataset, train: LabelledImages, validation: LabelledImages, times: int
) -> list[float]:
    """Seconds from the end of one epoch to that of the next, with what was done between them: a TURN so many times.

    There is one more at the end, bare, so that each has a bare one after it, and one before all, which is not told of:
    it sets things up.
    """
    count = len(TURN) * times + 1
    params = params.changed({"train.epochs": count + 1})
    cnn = recipe.build(params, dataset)
    history: list[Epoch] = []
    files.checkpoints_folder().mkdir()
    runs.connect()
    with runs.training_run(params, dataset, train.images.device, "bench") as run:
        pictures = LiveImages(cnn, params.visualize.maximisation)

        def way() -> str:
            return TURN[(len(history) - 1) % len(TURN)]

        def keep(reached: Checkpoint) -> None:
            if way() == CHECKPOINT:
                resuming.keep("bench", reached, history, run.run_id)

        ends = []
        for epoch in recipe.fit(cnn, train, validation, params, keep=keep):
            ends.append(time.perf_counter())
            history.append(epoch)
            run.log_epoch(epoch)
            if way() == LIVE:
                run.show(epoch.epoch, pictures.after_epoch())
    return [after - before for before, after in itertools.pairwise(ends)]


def shares(seconds: Sequence[float], place: int) -> list[float]:
    """By how many per cent the epochs at this place of each TURN took longer than the bare ones beside them."""
    found = []
    for index in range(place, len(seconds), len(TURN)):
        beside = (seconds[index - 1] + seconds[index + 1]) / 2
        found.append(100 * (seconds[index] / beside - 1))
    return found


if __name__ == "__main__":
    run_command(main)
