"""The tuning study: search the ranges of ``tune.space``, check the best values, and write them into params.yaml.

    python -m pipeline.tune [--trials N] [--workers K] [--study NAME] [--apply [--force]]

Not a stage of `dvc repro`: a stage that changes its own parameters would never be up to date. Only the training and
validation images are read.
"""

import difflib
import fcntl
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import torch

from pipeline import command_line, files, recipe
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, read_dataset, read_split
from pipeline.errors import Fault, UserError, counted, run_command
from pipeline.params import PARAMS, Params, read_params, with_values
from pipeline.tracking import runs, store, studies
from pipeline.tuning import coordinator, finalists, plots
from pipeline.tuning.finalists import Outcome, Verdict
from pipeline.tuning.progress import Progress
from pipeline.tuning.storage import FOLDER, database_lock, open_storage, storage_faults
from pipeline.tuning.study import Study, current_values, open_study
from pipeline.tuning.workers import Workers

MAX_FILE_NAME = 200  # characters
WAIT_FOR_OTHERS = 5  # seconds; another machine may still be writing its trial into a shared store


def main() -> None:
    """Run the study to its number of trials, train the finalists, print the best, and apply it with --apply."""
    arguments = command_line.parse("tune")
    params, dataset = read_params(), read_dataset()
    params.check_space()
    count, threads = _workers_and_threads(arguments.workers, params)
    total = arguments.trials or params.tune.trials
    with _lock():
        _check_needs(params, dataset)
        # The workers come before the study, since both take long to start.
        with storage_faults(), closing(Workers(count, threads)) as workers:
            with database_lock():
                study = open_study(open_storage(), arguments.study, params, dataset, total)
            if current_values(params) is None:
                print(f"the current values of {PARAMS} are outside tune.space: they are tried only as a finalist")
            store.connect()
            runs.close_stale_runs()
            with studies.study_run(study.id, f"tuning {arguments.study}", params, dataset) as run:
                _run_trials(study, workers, run)
                outcomes = _train_finalists(study, workers)
                workers.close()
                verdict = _conclude(study, outcomes, run)
                if arguments.apply:
                    _apply(study, verdict, run, arguments.force)


def _workers_and_threads(workers: int | None, params: Params) -> tuple[int, int]:
    """The number of workers, and of threads for each: its share of the cores."""
    cores = params.train.threads or torch.get_num_threads()
    if workers is not None and workers > cores:
        raise UserError(f"--workers is {workers}; allowed: 1 to {cores}, one per core")
    return workers or cores, cores // (workers or cores)


@contextmanager
def _lock() -> Iterator[None]:
    """Refuse a second study in the same folder: each would requeue the running trials of the other."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another study is running in this folder: wait for it, or stop it") from None
        yield


def _check_needs(params: Params, dataset: Dataset) -> None:
    """Raise one error here for what every trial needs, instead of one from each worker."""
    recipe.device_for(params)
    for split in (TRAIN, VALIDATION):
        read_split(dataset, split, memory_limit=0)  # only checked


def _run_trials(study: Study, workers: Workers, run: studies.StudyRun) -> None:
    """Run the trials that are left; print the progress, and log each trial to MLflow once it has ended."""
    progress = Progress(study)

    def on_change() -> None:
        run.log_trials(trial for trial in study.ended(without=run.written) if trial.number in study.asked)
        progress.show()

    started = time.time()
    run.log_missing(study.ended())
    progress.show()
    try:
        coordinator.run_trials(study, workers, on_change)
        progress.show()  # the last ones may have ended elsewhere
    finally:
        progress.end()
    if study.has_others_since(max(started, time.time() - WAIT_FOR_OTHERS)):
        time.sleep(WAIT_FOR_OTHERS)
    run.log_missing(study.ended())
    if not study.best(1):
        failure = next((trial.failure for trial in reversed(study.ended()) if trial.failure), "none was completed")
        raise Fault(f"no trial of the study was completed; the last one: {failure}")


def _train_finalists(study: Study, workers: Workers) -> list[Outcome]:
    chosen = finalists.choose(study)
    seeds = study.params.tune.seeds
    best = counted(len(chosen) - 1, "best trial")
    print(f"training the {best} and the current values, each with {seeds} other seeds:", flush=True)
    finalist_study = finalists.open_finalists(study, chosen)
    progress = Progress(finalist_study, "trainings")
    progress.show()
    try:
        coordinator.run_trials(finalist_study, workers, progress.show)
    finally:
        progress.end()
    return finalist_study.outcomes()


def _conclude(study: Study, outcomes: Sequence[Outcome], run: studies.StudyRun) -> Verdict:
    """Print the tables; write and log the summary and the figures."""
    verdict, name = finalists.judge(outcomes), study.optuna.study_name
    print(finalists.table(outcomes, study.score_in_words), verdict, sep="\n")
    second, front = study.params.tune.second_objective, study.front()
    if second:
        print(_front_table(front, study.score_in_words, second))
    folder = _folder(name)
    summary, figures = folder / "summary.json", folder / "figures"
    facts = {
        "study": name,
        "data": {"name": study.dataset.name, "sha256": study.dataset.sha256},
        "trials": study.counted(),
    }
    if second:
        facts["front"] = [
            {
                "trial": each.number,
                "values": each.values,
                study.score: each.validation_score,
                second: each.sizes[second],
            }
            for each in front
        ]
    files.write_json(summary, facts | finalists.summary(outcomes, verdict, study.score))
    run.log_files([summary], "study")
    run.log_files(plots.write(study, figures), "figures")
    best = verdict.best
    run.log_best(study.counted(), best.finalist.values, {f"best_{study.score}": best.mean})
    print(f"{summary}, {figures}/, and the MLflow run {run.run_id}")
    return verdict


def _front_table(front: Sequence[studies.TrialRecord], score: str, size: str) -> str:
    """One row for each trial of which no other is smaller and as accurate."""
    width = max(24, len(score) + 2)
    rows = [f"{'the front':<12}{score:<{width}}{size.replace('_', '-'):>15}  values"]
    for each in front:
        number, reached = f"trial {each.number}", f"{each.validation_score:.3%}"
        rows.append(f"{number:<12}{reached:<{width}}{each.sizes[size]:>15,}  {finalists.in_words(each.values)}")
    return "\n".join(rows)


def _folder(study: str) -> Path:
    """Where the results of a study are written. Its name may have any characters."""
    if study == command_line.STUDY:
        return FOLDER
    name = quote(study, safe=" ").replace(".", "%2E")
    return FOLDER / "studies" / (name if len(name) <= MAX_FILE_NAME else hashlib.sha256(study.encode()).hexdigest())


def _apply(study: Study, verdict: Verdict, run: studies.StudyRun, force: bool) -> None:
    """Write the winner's values into params.yaml, and leave the rest of it as it is."""
    winner = verdict.best.finalist
    if winner.trial is None:
        print(f"{PARAMS} is unchanged")
        return
    if not (verdict.is_real or force):
        print(f"{PARAMS} is unchanged; --force writes the winner's values")
        return
    before = PARAMS.read_bytes()
    after = with_values(before, winner.values)
    old, new = (content.decode("utf-8-sig").splitlines(True) for content in (before, after))
    print(*difflib.unified_diff(old, new, str(PARAMS), str(PARAMS), n=0), sep="", end="")
    files.write(PARAMS, after)
    run.log_applied(study.optuna.study_name, winner.trial, winner.values)
    print(f"{PARAMS} has the values of {winner.name}: `dvc repro` trains with them")


if __name__ == "__main__":
    run_command(main)
