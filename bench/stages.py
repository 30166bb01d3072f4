"""The measurements of whole stages: what is around the epochs."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient

from bench import recipes
from pipeline import files
from pipeline.data.splits import read_dataset
from pipeline.tracking import store

SHORT_PAIRS = 5  # a round


def timed(command: Sequence[str], folder: Path, **more: str) -> tuple[float, str]:
    """Seconds of a command that sees no GPU and no settings from outside, and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC", "OPTUNA"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **more}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def workspace(folder: Path, knobs: Mapping[str, object]) -> Path:
    """A repository with the published recipe, but for some knobs, its prepared images and a tracking store.

    The store is there before, as it is in all runs but the first.
    """
    folder.mkdir()
    commit = ["-c", "user.name=bench", "-c", "user.email=", "commit", "--quiet", "--allow-empty", "--message=empty"]
    for words in (["init", "--quiet"], commit):  # what a run is tagged with comes from it
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "params.yaml").write_text(recipes.as_yaml(knobs))
    mirror = files.raw_folder() / read_dataset().name
    in_folder(folder, "-m", "pipeline.prepare", PIPELINE_DATA_MIRROR=str(mirror.resolve()))
    in_folder(folder, "-c", "from pipeline.tracking import store; store.connect()")
    return folder


def in_folder(folder: Path, *arguments: str, **environment: str) -> tuple[float, str]:
    """Run Python on this project in a workspace."""
    here = {"PYTHONPATH": str(Path.cwd()), "DVC_ROOT": str(folder)}
    return timed([sys.executable, *arguments], folder, **here, **environment)


def train_stage(folder: Path, way: str) -> tuple[float, float]:
    """Seconds and peak megabytes of the stage `train`, "tracked" or "untracked"."""
    seconds, printed = in_folder(folder, "-m", "bench.train_stage", way)
    return seconds, json.loads(printed.splitlines()[-1])["peak_mb"]


@dataclass(frozen=True)
class Pair:
    """The stage `train` with MLflow and without: seconds from start to end, and the peak megabytes of the first."""

    tracked: float
    untracked: float
    peak_mb: float

    @property
    def added(self) -> float:
        """Seconds that MLflow adds."""
        return self.tracked - self.untracked


def pair(folder: Path, number: int) -> Pair:
    """The stage both ways, in an order that depends on the number: neither way is always first."""
    ways = ("tracked", "untracked")[:: 1 if number % 2 else -1]
    done = {way: train_stage(folder, way) for way in ways}
    (tracked, peak), (untracked, _) = done["tracked"], done["untracked"]
    return Pair(tracked, untracked, peak)


@dataclass
class Stages:
    """What was measured, round by round."""

    whole: list[Pair] = field(default_factory=list)  # on MNIST
    short: list[list[Pair]] = field(default_factory=list)  # on the packaged images
    around_the_epochs: list[float] = field(default_factory=list)


def take(folder: Path, rounds: int) -> Stages:
    """Whole stages, short ones and `dvc repro`, in turn.

    What MLflow does in the stage `train` depends on the epochs, not on the images, so between short stages it is seen
    more sharply than between stages of half a minute.
    """
    whole, short = (workspace(folder / name, {"data.dataset": name}) for name in ("mnist", "mnist-5k"))
    found = Stages()
    for number in range(rounds):
        found.whole.append(pair(whole, number))
        found.short.append([pair(short, each) for each in range(SHORT_PAIRS)])
        found.around_the_epochs.append(around_the_epochs(folder / f"clone {number}"))
    return found


def around_the_epochs(folder: Path) -> float:
    """Seconds of `dvc repro` in a fresh clone, from the published files on, that are not spent in epochs.

    An epoch counts as the median one: what the first one takes longer, to set things up, is not training.
    """
    subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
    (folder / "params.yaml").write_text(recipes.as_yaml({}))
    mirror = files.raw_folder() / read_dataset().name
    seconds, _ = timed(["dvc", "repro"], folder, PIPELINE_DATA_MIRROR=str(mirror.resolve()))
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    epochs = [metric.value for metric in client.get_metric_history(run.info.run_id, "seconds")]
    return seconds - len(epochs) * statistics.median(epochs)
