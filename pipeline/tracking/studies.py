"""A tuning study in MLflow: a parent run, and a child for each trial, written once the trial has ended.

So no child is ever left running, whatever is killed; what is not there yet is written when the study goes on.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.images.splits import Dataset
from pipeline.params import Params
from pipeline.tracking import runs
from pipeline.tuning.records import TrialRecord

STUDY, TRIAL = "study.id", "trial.number"
MOST_METRICS = 1000  # that MLflow takes at a time
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class StudyRun:
    """The parent run of a study, open to be written to; ``written`` are the numbers of the trials in it."""

    def __init__(self, run_id: str, written: set[int]) -> None:
        self.run_id, self.written = run_id, written

    @runs.store_faults()
    def log_trial(self, trial: TrialRecord) -> None:
        """A child run for a trial that is not among those ``written``."""
        client = MlflowClient()
        name = f"trial {trial.number}"
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, TRIAL: str(trial.number)}
        if trial.failure:
            tags["failure"] = trial.failure[:5000]
        experiment = client.get_run(self.run_id).info.experiment_id
        child = client.create_run(experiment, start_time=trial.started, tags=tags, run_name=name).info.run_id
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

    @runs.store_faults()
    def log_best(self, trials: int, values: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """The best values after so many trials. MLflow never changes a parameter, so its name tells after how many."""
        params = [Param(f"best_of_{trials}/{path}", str(value)) for path, value in values.items()]
        now = round(time.time() * 1000)
        figures = [Metric(key, value, now, trials) for key, value in metrics.items()]
        MlflowClient().log_batch(self.run_id, metrics=figures, params=params)

    @runs.store_faults()
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
        with runs.store_faults():  # not around what the study does: its own storage has errors of the same types
            found = mlflow.search_runs(filter_string=f"tags.`{STUDY}` = '{study_id}'", output_format="list")
            run_id = found[0].info.run_id if found else None
            tags = {STUDY: study_id} | runs.surroundings()
            opened = stack.enter_context(runs.open_run(dataset, tags, name, run_id))
            if run_id is None:
                mlflow.log_params({f"tune.space.{path}": space for path, space in _space(params).items()})
            run = StudyRun(opened, _written(opened))
        yield run


def _space(params: Params) -> dict[str, str]:
    return {path: str(space.model_dump(exclude_unset=True)) for path, space in params.tune.space.items()}


def _written(parent: str) -> set[int]:
    """The numbers of the trials that have a child run. One that was not written to its end is deleted."""
    client, numbers = MlflowClient(), set()
    experiment = client.get_run(parent).info.experiment_id
    token = None
    while token != "":
        page = client.search_runs(
            [experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'", page_token=token, max_results=1000
        )
        for child in page:
            if child.info.status == "RUNNING":
                client.delete_run(child.info.run_id)
            else:
                numbers.add(int(child.data.tags[TRIAL]))
        token = page.token or ""
    return numbers
