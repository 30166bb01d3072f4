"""The overhead of checkpoints and live images, as a share of an epoch.

    python -m bench.overhead [--times 20] [--output FILE] [parameter=value ...]

Needs Linux and the prepared splits (`dvc repro prepare`). The epochs of one training take turns: bare, with live
images, bare, with a checkpoint. The overhead is the time that the training waits, plus the processor time of the thread
that sends to MLflow, as if the training waited for that as well. How much longer such epochs took than the bare ones
before and after them is printed too, but epochs differ by more than that. The run goes to a store of its own.
`make overhead` writes bench/overhead.json.
"""

import argparse
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import recipes
from bench.measurement import Bound, conclude, origin
from pipeline import checkpoints, files, recipe
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain.live_images import LiveImages
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.training import Epoch
from pipeline.params import Params, read_params
from pipeline.tracking import runs, store

BARE, LIVE, CHECKPOINT = "bare", "live images", "a checkpoint"
TURN = (BARE, LIVE, BARE, CHECKPOINT)
MOST = 2  # per cent


@dataclass(frozen=True)
class Timed:
    """Seconds from the end of one epoch to the end of the next.

    In total; of waiting for the live images or the checkpoint; and of processor time in the thread that sends to
    MLflow.
    """

    way: str
    seconds: float
    waited: float
    sent: float


def main() -> None:
    """Train, print the figures, write the output; exit 1 where one is too large."""
    arguments = _arguments()
    params = read_params().changed(recipes.from_words(arguments.overrides))
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation = (read_split(dataset, split).to(device) for split in (TRAIN, VALIDATION))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ |= {"DVC_ROOT": folder, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        epochs = _epochs(params, dataset, train, validation, arguments.times)
    bounds = []
    for way in (LIVE, CHECKPOINT):
        mean, error = _mean_and_error(costs(epochs, way))
        print(f"{way} after each epoch: {mean:.2f} % +- {error:.2f} of it, n = {arguments.times}")
        mean_longer, error = _mean_and_error(longer(epochs, way))
        print(f"  such epochs took {mean_longer:.2f} % +- {error:.2f} longer than the bare epochs before and after")
        bounds.append(Bound(f"{way} after each epoch", (mean,), MOST, 0, "%", low=True))
    facts = {"dataset": dataset.name, "overrides": arguments.overrides} | origin()
    results = {"epochs": [asdict(each) for each in epochs], "bounds": [bound.as_row() for bound in bounds]}
    files.write_json(arguments.output, facts | results)
    conclude(bounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The time that checkpoints and live images take of an epoch.")
    parser.add_argument("--times", type=int, default=20, help="repetitions of each; at least 2 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench/overhead.json"), help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="parameter=value", help="other values for some parameters")
    arguments = parser.parse_args()
    if arguments.times < 2:
        parser.error("a standard error needs at least 2 repetitions")
    arguments.output = arguments.output.resolve()
    return arguments


def _epochs(
    params: Params, dataset: Dataset, train: LabelledImages, validation: LabelledImages, times: int
) -> list[Timed]:
    """TURN repeated ``times`` times, and a final bare epoch, so that each has a bare one after it.

    The first epoch, which includes set-up, is left out.
    """
    count = len(TURN) * times + 1
    params = params.changed({"train.epochs": count + 1})
    cnn = recipe.build(params, dataset)
    history, found = list[Epoch](), list[Timed]()
    files.checkpoints_folder().mkdir()
    store.connect()
    with runs.training_run(params, dataset, train.images.device, "bench") as run:
        (sender,) = [thread for thread in threading.enumerate() if thread.name == "tracking"]
        assert sender.ident is not None
        clock = time.pthread_getcpuclockid(sender.ident)
        pictures = LiveImages(cnn, params.visualize.maximisation)
        waited = [0.0]

        def way() -> str:
            return TURN[(len(history) - 1) % len(TURN)]

        def keep(reached: Checkpoint) -> None:
            if way() == CHECKPOINT:
                with _added_to(waited):
                    checkpoints.save("bench", reached, history, run.run_id)

        began = None
        for epoch in recipe.fit(cnn, train, validation, params, save_checkpoint=keep):
            now, sent = time.perf_counter(), time.clock_gettime(clock)
            if began:
                found.append(Timed(way(), now - began[0], waited[0], sent - began[1]))
            began, waited[0] = (now, sent), 0.0
            history.append(epoch)
            run.log_epoch(epoch)
            if way() == LIVE:
                with _added_to(waited):
                    run.log_images(epoch.epoch, pictures.after_epoch())
    return found


@contextmanager
def _added_to(total: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    total[0] += time.perf_counter() - started


def costs(epochs: Sequence[Timed], way: str) -> list[float]:
    """The overhead of each epoch of this way, in per cent of a bare epoch.

    A bare epoch sends its figures too; that part is not counted.
    """
    bare = [each for each in epochs if each.way == BARE]
    seconds, numbers = (statistics.fmean(values) for values in zip(*((b.seconds, b.sent) for b in bare), strict=True))
    return [100 * (each.waited + each.sent - numbers) / seconds for each in epochs if each.way == way]


def longer(epochs: Sequence[Timed], way: str) -> list[float]:
    """By how many per cent each of this way took longer than the bare ones before and after it."""
    found = []
    for before, each, after in zip(epochs, epochs[1:], epochs[2:], strict=False):
        if each.way == way:
            found.append(100 * (2 * each.seconds / (before.seconds + after.seconds) - 1))
    return found


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    run_command(main)
