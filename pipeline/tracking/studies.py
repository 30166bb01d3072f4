"""A tuning study in MLflow: a parent run, and a child for each trial, written once the trial has ended.

So no child run is left open after a kill: missing ones are written when the study is resumed.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline import machine
from pipeline.data.splits import Dataset
from pipeline.errors import Fault, printable
from pipeline.params import Params
from pipeline.tracking import lineage, runs, store
from pipeline.tracking.store import equals, store_faults

STUDY, TRIAL = "study.id", "trial.number"
ERRORS = {"accuracy": "validation_error", "balanced_accuracy": "validation_balanced_error"}  # by evaluate.metric
Status = Literal["complete", "pruned", "failed"]
STATUS: dict[Status, str] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    ``values`` are those of the tuned parameters by their dotted paths; ``validation_error`` is 1 minus the score that
    evaluate.metric names, and None unless it is complete; ``sizes`` has the network's parameters and multiply-adds, and
    is empty for one that failed, whose layers may not even fit; ``history`` has a row for each epoch with its number
    under "epoch"; ``failure`` says why it failed. Times are milliseconds since 1970.
    """

    number: int
    status: Status
    failure: str
    values: Mapping[str, object]
    sizes: Mapping[str, int]
    validation_error: float | None
    history: Sequence[Mapping[str, float]]
    started: int
    ended: int

    @property
    def validation_score(self) -> float:
        """Of one that is complete: the score that evaluate.metric names."""
        assert self.validation_error is not None
        return 1 - self.validation_error


class StudyRun:
    """The open parent run of a study; ``written`` has the numbers of the trials that are in the store."""

    def __init__(self, run_id: str, experiment_id: str, params: Params, tags: Mapping[str, str]) -> None:
        self.run_id, self._experiment_id, self.written = run_id, experiment_id, set[int]()
        self._params, self._tags = params, tags  # the tags of every trial
        self._error = ERRORS[params.evaluate.metric]
        self._unfinished: dict[int, str] = {}  # child runs by the number of their trial
        self._lowest_error = math.inf  # of the trials that are written

    @store_faults()
    def log_missing(self, trials: Iterable[TrialRecord]) -> None:
        """Write those that are not in the store, into which other machines may write, too."""
        self._look_up()
        self.log_trials(trial for trial in trials if trial.number not in self.written)

    def log_trials(self, trials: Iterable[TrialRecord]) -> None:
        """Write a child run for each; none of them may be ``written`` already."""
        for trial in trials:
            self._log_trial(trial)

    @store_faults()
    def _log_trial(self, trial: TrialRecord) -> None:
        """Write a child run, or the rest of an unfinished one: MLflow does not write the same values twice."""
        client = MlflowClient()
        child = self._unfinished.get(trial.number) or self._start(trial)
        metrics = [
            Metric(key, float(value), trial.ended, int(row["epoch"]))
            for row in trial.history
            for key, value in row.items()
            if key != "epoch"
        ]
        if trial.validation_error is not None:
            metrics.append(Metric(self._error, trial.validation_error, trial.ended, 0))
        runs.log_metrics(child, metrics)
        facts = {**trial.values, **trial.sizes}
        client.log_batch(child, params=[Param(key, str(value)) for key, value in facts.items()])
        client.set_terminated(child, STATUS[trial.status], end_time=trial.ended)
        self._add_written(trial.number, trial.validation_error)
        if self._lowest_error < math.inf:
            name = f"best_trial_validation_{self._params.evaluate.metric}"
            best = Metric(name, 1 - self._lowest_error, trial.ended, len(self.written))
            client.log_batch(self.run_id, metrics=[best])

    def _add_written(self, number: int, validation_error: float | None) -> None:
        self.written.add(number)
        if validation_error is not None:
            self._lowest_error = min(self._lowest_error, validation_error)

    def _start(self, trial: TrialRecord) -> str:
        parameters = {**trial.values, "train.epochs": self._params.tune.epochs}
        recipe = {lineage.PARAMS_SHA256: self._params.changed(parameters).sha256}
        tags = {**self._tags, **recipe, MLFLOW_PARENT_RUN_ID: self.run_id, TRIAL: str(trial.number)}
        if trial.failure:
            tags["failure"] = trial.failure[:5000]
        child = MlflowClient().create_run(self._experiment_id, trial.started, tags, f"trial {trial.number}")
        return str(child.info.run_id)

    def _look_up(self) -> None:
        """Find the trials that have a child run in the store."""
        client, token = MlflowClient(), None
        while token != "":
            page = client.search_runs(
                [self._experiment_id],
                equals(f"tags.`{MLFLOW_PARENT_RUN_ID}`", self.run_id),
                page_token=token,
                max_results=1000,
            )
            for child in page:
                number = _number_of(child)
                if child.info.status == "RUNNING":
                    self._unfinished[number] = child.info.run_id
                else:
                    self._add_written(number, child.data.metrics.get(self._error))
            token = page.token or ""

    @store_faults()
    def log_best(self, trials: int, values: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """The best values after this many trials.

        MLflow never changes a parameter, so its name has the number of trials, and a count where other finalists or
        more seeds have given another result for the same trials.
        """
        client, now = MlflowClient(), round(time.time() * 1000)
        present = client.get_run(self.run_id).data.params
        for attempt in itertools.count(1):
            name = f"best_of_{trials}" if attempt == 1 else f"best_of_{trials}.{attempt}"
            named = {f"{name}/{path}": str(value) for path, value in values.items()}
            if all(present.get(key, value) == value for key, value in named.items()):
                break
        figures = [Metric(key, value, now, trials) for key, value in metrics.items()]
        client.log_batch(self.run_id, metrics=figures, params=[Param(*each) for each in named.items()])

    @store_faults()
    def log_applied(self, study: str, trial: int | None, values: Mapping[str, object]) -> None:
        """The values that were written into params.yaml, and where they come from."""
        facts = {"study": study, "trial": trial, **values}
        tags = [RunTag(f"applied.{key}", str(value)) for key, value in facts.items()]
        MlflowClient().log_batch(self.run_id, tags=tags)

    def log_files(self, paths: Iterable[Path], folder: str) -> None:
        """Figures and tables of the study."""
        runs.log_files(self.run_id, paths, folder)


@contextmanager
def study_run(study_id: str, name: str, params: Params, dataset: Dataset) -> Iterator[StudyRun]:
    """The parent run of a study, found by the study's id or created. It ends as FINISHED, KILLED or FAILED."""
    with ExitStack() as stack:
        with store_faults():  # not around the study itself, whose storage raises errors of the same types
            experiment = MlflowClient().get_experiment_by_name(store.EXPERIMENT)
            assert experiment is not None
            experiment_id = experiment.experiment_id
            run_id = _find(study_id) or _create(study_id, experiment_id, name, params)
            tags = machine.environment_tags() | {lineage.PARAMS_SHA256: params.sha256}
            stack.enter_context(runs.open_run(dataset, tags, name, run_id))
        yield StudyRun(run_id, experiment_id, params, dataset.tags | tags)


def _number_of(child: Run) -> int:
    """The number of the trial of a child run. Raises Fault where somebody has deleted or changed its tag."""
    given = child.data.tags.get(TRIAL, "")
    if not given.isdecimal():
        reason = f"the tag {TRIAL} '{printable(given)}', which is not a number"
        raise Fault(f"the run {child.info.run_id} of a trial has {reason}: correct it, or delete that run")
    return int(given)


def _find(study_id: str) -> str | None:
    oldest_first = mlflow.search_runs(
        filter_string=equals(f"tags.`{STUDY}`", study_id),
        order_by=["attributes.start_time", "attributes.run_id"],
        output_format="list",
    )
    return str(oldest_first[0].info.run_id) if oldest_first else None


def _create(study_id: str, experiment_id: str, name: str, params: Params) -> str:
    client = MlflowClient()
    created = client.create_run(experiment_id, run_name=name, tags={STUDY: study_id}).info.run_id
    run_id = _find(study_id) or created
    if run_id != created:  # other machines create the same run at the same time
        client.delete_run(created)
    client.log_batch(run_id, params=[Param(f"tune.space.{path}", space) for path, space in _space(params).items()])
    return run_id


def _space(params: Params) -> dict[str, str]:
    return {path: str(space.model_dump(exclude_defaults=True)) for path, space in params.tune.space.items()}
