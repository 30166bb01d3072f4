"""A tuning study in MLflow: a parent run, and a child for each trial, written once the trial has ended.

So no child is left running, whatever is killed: what is not there yet is written when the study goes on.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline import machine
from pipeline.data.splits import Dataset
from pipeline.params import Params
from pipeline.tracking import lineage, runs, store
from pipeline.tracking.store import store_faults
from pipeline.tuning.records import TrialRecord

STUDY, TRIAL = "study.id", "trial.number"
MOST_METRICS = 1000  # that MLflow takes at a time
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class StudyRun:
    """The parent run of a study, open to be written to; ``written`` are the numbers of the trials in it."""

    def __init__(self, run_id: str, experiment_id: str, params: Params, tags: Mapping[str, str]) -> None:
        self.run_id, self._experiment_id, self.written = run_id, experiment_id, set[int]()
        self._params, self._tags = params, tags  # these say where all the trials come from
        self._begun: dict[int, str] = {}  # children that are not written to their end

    @store_faults()
    def log_missing(self, trials: Iterable[TrialRecord]) -> None:
        """Child runs for those that nobody has written: others may write to the same store."""
        self._look()
        self.log_trials(trial for trial in trials if trial.number not in self.written)

    def log_trials(self, trials: Iterable[TrialRecord]) -> None:
        """A child run for each, of which none are among those ``written``."""
        for trial in trials:
            self._log_trial(trial)

    @store_faults()
    def _log_trial(self, trial: TrialRecord) -> None:
        """Write a child run, or the rest of one that was begun. What is there already, MLflow leaves as it is."""
        client = MlflowClient()
        child = self._begun.get(trial.number) or self._begin(trial)
        metrics = [
            Metric(key, float(value), trial.ended, int(row["epoch"]))
            for row in trial.history
            for key, value in row.items()
            if key != "epoch"
        ] + [Metric(key, value, trial.ended, 0) for key, value in trial.scores.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            client.log_batch(child, metrics[start : start + MOST_METRICS])
        facts = {**trial.values, **({"parameters": trial.parameters} if trial.parameters else {})}
        client.log_batch(child, params=[Param(key, str(value)) for key, value in facts.items()])
        client.set_terminated(child, STATUS[trial.status], end_time=trial.ended)
        self.written.add(trial.number)

    def _begin(self, trial: TrialRecord) -> str:
        knobs = {**trial.values, "train.epochs": self._params.tune.epochs}
        recipe = {lineage.PARAMS_SHA256: self._params.changed(knobs).sha256}
        tags = {**self._tags, **recipe, MLFLOW_PARENT_RUN_ID: self.run_id, TRIAL: str(trial.number)}
        if trial.failure:
            tags["failure"] = trial.failure[:5000]
        child = MlflowClient().create_run(self._experiment_id, trial.started, tags, f"trial {trial.number}")
        return str(child.info.run_id)

    def _look(self) -> None:
        """See which trials have a child run in the store."""
        client, token = MlflowClient(), None
        while token != "":
            page = client.search_runs(
                [self._experiment_id],
                f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}'",
                page_token=token,
                max_results=1000,
            )
            for child in page:
                number = int(child.data.tags[TRIAL])
                if child.info.status == "RUNNING":
                    self._begun[number] = child.info.run_id
                else:
                    self.written.add(number)
            token = page.token or ""

    @store_faults()
    def log_best(self, trials: int, values: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """The best values after so many trials.

        MLflow never changes a parameter, so its name tells after how many, and which time: other finalists, or more
        seeds, can make others the best of the same trials.
        """
        client, now = MlflowClient(), round(time.time() * 1000)
        there = client.get_run(self.run_id).data.params
        for attempt in itertools.count(1):
            name = f"best_of_{trials}" if attempt == 1 else f"best_of_{trials}.{attempt}"
            named = {f"{name}/{path}": str(value) for path, value in values.items()}
            if all(there.get(key, value) == value for key, value in named.items()):
                break
        figures = [Metric(key, value, now, trials) for key, value in metrics.items()]
        client.log_batch(self.run_id, metrics=figures, params=[Param(*each) for each in named.items()])

    @store_faults()
    def log_applied(self, study: str, trial: int | None, values: Mapping[str, object]) -> None:
        """What was written into params.yaml, and where it comes from."""
        facts = {"study": study, "trial": trial, **values}
        tags = [RunTag(f"applied.{key}", str(value)) for key, value in facts.items()]
        MlflowClient().log_batch(self.run_id, tags=tags)

    def log_files(self, paths: Iterable[Path], folder: str) -> None:
        """Figures and tables of the study."""
        runs.log_files(self.run_id, paths, folder)


@contextmanager
def study_run(study_id: str, name: str, params: Params, dataset: Dataset) -> Iterator[StudyRun]:
    """The parent run of a study, found again by the study's id or made. Its status ends true, as that of a training."""
    with ExitStack() as stack:
        with store_faults():  # not around what the study does: its own storage has errors of the same types
            experiment = MlflowClient().get_experiment_by_name(store.EXPERIMENT)
            assert experiment is not None
            experiment_id = experiment.experiment_id
            run_id = _found(study_id) or _made(study_id, experiment_id, name, params)
            tags = machine.environment_tags() | {lineage.PARAMS_SHA256: params.sha256}
            stack.enter_context(runs.open_run(dataset, tags, name, run_id))
        yield StudyRun(run_id, experiment_id, params, dataset.tags | tags)


def _found(study_id: str) -> str | None:
    oldest_first = mlflow.search_runs(
        filter_string=f"tags.`{STUDY}` = '{study_id}'",
        order_by=["attributes.start_time", "attributes.run_id"],
        output_format="list",
    )
    return str(oldest_first[0].info.run_id) if oldest_first else None


def _made(study_id: str, experiment_id: str, name: str, params: Params) -> str:
    client = MlflowClient()
    made = client.create_run(experiment_id, run_name=name, tags={STUDY: study_id}).info.run_id
    run_id = _found(study_id) or made
    if run_id != made:  # other machines begin the same study at the same time
        client.delete_run(made)
    client.log_batch(run_id, params=[Param(f"tune.space.{path}", space) for path, space in _space(params).items()])
    return run_id


def _space(params: Params) -> dict[str, str]:
    return {path: str(space.model_dump(exclude_unset=True)) for path, space in params.tune.space.items()}
