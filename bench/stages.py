"""The measurements of whole stages: what is around the epochs."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient

from bench import recipes
from pipeline import files
from pipeline.images.splits import read_dataset
from pipeline.tracking import runs


def timed(command: Sequence[str], folder: Path, **more: str) -> tuple[float, str]:
    """Seconds of a command that sees no GPU and no settings from outside, and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **more}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def workspace(folder: Path) -> Path:
    """A folder with the published recipe and the prepared images."""
    folder.mkdir()
    (folder / "params.yaml").write_bytes(recipes.PUBLISHED.read_bytes())
    (folder / "data").mkdir()
    (folder / files.PREPARED).symlink_to(files.PREPARED.resolve())
    return folder


def tracking_share(folder: Path, pairs: int) -> tuple[list[float], float]:
    """What share of the stage `train` MLflow takes, pair by pair, and the stage's peak megabytes.

    The tracking store is there before, as it is in all runs but the first. MLflow is at work before, between and after
    the epochs; what the epochs themselves take more in one run than in the other is none of its doing and left out.
    """
    here = {"PYTHONPATH": str(Path.cwd()), "DVC_ROOT": str(folder)}
    timed([sys.executable, "-c", "from pipeline.tracking import runs; runs.connect()"], folder, **here)
    shares, peaks = [], []
    for number in range(pairs):
        around, whole = {}, {}
        for way in ("tracked", "untracked")[:: 1 if number % 2 else -1]:  # neither is always first
            whole[way], printed = timed([sys.executable, "-m", "bench.train_stage", way], folder, **here)
            epochs, memory = map(json.loads, printed.splitlines()[-2:])
            around[way] = whole[way] - epochs["seconds_in_epochs"]
            if way == "tracked":
                peaks.append(memory["peak_mb"])
        shares.append((around["tracked"] - around["untracked"]) / whole["tracked"])
    return shares, max(peaks)


def around_the_epochs(folder: Path) -> float:
    """Seconds of `dvc repro` in a fresh clone, from the published files on, that are not spent in epochs.

    An epoch counts as the median one: what the first one takes longer, to set things up, is not training.
    """
    subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
    (folder / "params.yaml").write_bytes(recipes.PUBLISHED.read_bytes())
    mirror = files.raw_folder() / read_dataset().name
    seconds, _ = timed(["dvc", "repro"], folder, PIPELINE_DATA_MIRROR=str(mirror.resolve()))
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(runs.EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    epochs = [metric.value for metric in client.get_metric_history(run.info.run_id, "seconds")]
    return seconds - len(epochs) * statistics.median(epochs)
