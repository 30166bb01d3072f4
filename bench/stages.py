"""Whole stages: their time besides the epochs."""

import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient

from bench import measurement, recipes
from bench.measurement import Finished
from pipeline import files
from pipeline.data.splits import read_dataset
from pipeline.tracking import store

SHORT_PAIRS = 5  # a round


def workspace(folder: Path, overrides: Mapping[str, object]) -> Path:
    """A repository with the published recipe, changed by ``overrides``, its prepared images and a tracking store.

    The store exists already, as it does in all runs but the first.
    """
    folder.mkdir()
    commit = ["-c", "user.name=bench", "-c", "user.email=", "commit", "--quiet", "--allow-empty", "--message=empty"]
    for words in (["init", "--quiet"], commit):  # a run is tagged with the commit
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "params.yaml").write_text(recipes.as_yaml(overrides))
    mirror = files.raw_folder() / read_dataset().name
    in_folder(folder, "-m", "pipeline.prepare", PIPELINE_DATA_MIRROR=str(mirror.resolve()))
    in_folder(folder, "-c", "from pipeline.tracking import store; store.connect()")
    return folder


def in_folder(folder: Path, *arguments: str, **environment: str) -> Finished:
    """Run Python on this project in a workspace."""
    here = {"PYTHONPATH": str(Path.cwd()), "DVC_ROOT": str(folder)}
    return measurement.run([sys.executable, *arguments], folder, **here, **environment)


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
    """The stage both ways; the number decides which comes first."""
    programs = ("pipeline.train", "bench.contenders.convtrack_untracked")[:: 1 if number % 2 else -1]
    done = {program: in_folder(folder, "-m", program) for program in programs}
    tracked, untracked = done["pipeline.train"], done["bench.contenders.convtrack_untracked"]
    return Pair(tracked.seconds, untracked.seconds, tracked.peak_mb)


@dataclass
class Stages:
    """What was measured, round by round."""

    whole: list[Pair] = field(default_factory=list)  # on MNIST
    short: list[list[Pair]] = field(default_factory=list)  # on the packaged images
    around_the_epochs: list[float] = field(default_factory=list)


def take(folder: Path, rounds: int) -> Stages:
    """Whole stages, short ones and `dvc repro`, in turn.

    MLflow's work in the stage `train` depends on the number of epochs, not of images, so short stages measure it more
    precisely than stages of half a minute.
    """
    whole, short = (workspace(folder / name, {"data.dataset": name}) for name in ("mnist", "mnist-5k"))
    found = Stages()
    for number in range(rounds):
        found.whole.append(pair(whole, number))
        found.short.append([pair(short, each) for each in range(SHORT_PAIRS)])
        found.around_the_epochs.append(around_the_epochs(folder / f"clone {number}"))
    return found


def around_the_epochs(folder: Path) -> float:
    """Seconds of `dvc repro` in a fresh clone, from the published files to the figures, without its epochs.

    Every epoch counts as the median one: the first takes longer, and that is not training.
    """
    subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
    (folder / "params.yaml").write_text(recipes.as_yaml({}))
    mirror = files.raw_folder() / read_dataset().name
    repro = measurement.run(["dvc", "repro"], folder, PIPELINE_DATA_MIRROR=str(mirror.resolve()))
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    epochs = [metric.value for metric in client.get_metric_history(run.info.run_id, "seconds")]
    return repro.seconds - len(epochs) * statistics.median(epochs)
