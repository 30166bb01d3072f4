"""The tuning study: try values for the knobs of ``tune.space``, check the best, and write them into params.yaml.

    python -m pipeline.tune [--trials N] [--workers K] [--study NAME] [--apply [--force]]

Not a stage of `dvc repro`: a stage that changes its own parameters would never come to an end. Only the training and
validation images are read.
"""

import argparse
import difflib
import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline import files, recipe
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, read_dataset, read_split
from pipeline.errors import Fault, UserError, run_command
from pipeline.params import PARAMS, Params, read_params, with_values
from pipeline.tracking import runs, store, studies
from pipeline.tuning import coordinator, finalists, plots
from pipeline.tuning.finalists import Outcome, Verdict
from pipeline.tuning.storage import FOLDER, in_turn, open_storage, storage_faults
from pipeline.tuning.study import ERROR, Study
from pipeline.tuning.team import Team, team

SUMMARY = FOLDER / "summary.json"
FIGURES = FOLDER / "figures"
LONGEST_NAME = 100  # characters
PATIENCE = 5  # seconds in which another machine writes a trial of its own into a store that it may share with this one


def main() -> None:
    """Go on with the study to its number of trials, train the finalists, say which is the best, apply it if wanted."""
    arguments = _arguments()
    params = read_params()
    dataset = read_dataset()
    total = arguments.trials or params.tune.trials
    workers, cores = _workers_and_cores(arguments.workers, params)
    with _alone():
        _check_needs(params, dataset)
        # The workers come before the study, since they take as long to begin as it does.
        with storage_faults(), team(workers, cores) as team_of_workers:
            with in_turn():
                study = Study.open(open_storage(), arguments.study, params, dataset)
            if study.present is None:
                print(f"the present values of {PARAMS} are outside tune.space: they are no trial, but a finalist")
            store.connect()
            runs.close_stale_runs()
            with studies.study_run(study.id, f"tuning {arguments.study}", params, dataset) as run:
                _run_trials(study, team_of_workers, total, run)
                outcomes = _check_finalists(study, team_of_workers)
                team_of_workers.terminate()
                verdict = _conclude(study, outcomes, run)
                if arguments.apply:
                    _apply(study, verdict, run, arguments.force)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tune", description="Tune the knobs of tune.space.")
    parser.add_argument("--trials", type=_natural, help="how many the study should have in all (default: tune.trials)")
    parser.add_argument("--workers", type=_natural, help="processes that train at the same time (default: one a core)")
    parser.add_argument(
        "--study", type=_name, default="convtrack", help="its name in the storage (default: %(default)s)"
    )
    parser.add_argument("--apply", action="store_true", help="write the winner's values into params.yaml")
    parser.add_argument("--force", action="store_true", help="with --apply: also where the gain may be chance")
    arguments = parser.parse_args()
    if arguments.force and not arguments.apply:
        parser.error("--force goes with --apply")
    return arguments


def _natural(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def _name(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"a study's name has 1 to {LONGEST_NAME} characters, all on one line")
    return text


def _workers_and_cores(workers: int | None, params: Params) -> tuple[int, int]:
    """How many workers there are, and how many cores they have among them."""
    cores = params.train.threads or torch.get_num_threads()
    if workers is not None and workers > cores:
        raise UserError(f"--workers is {workers}; allowed: 1 to {cores}, a core each")
    return workers or cores, cores


@contextmanager
def _alone() -> Iterator[None]:
    """No two of these commands in one folder: they would take each other's unfinished trials for lost."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another study is at work in this folder: wait for it, or end it") from None
        yield


def _check_needs(params: Params, dataset: Dataset) -> None:
    """What no trial could do without is missed here, in one line, and not by each worker and each trial."""
    recipe.device_for(params)
    for split in (TRAIN, VALIDATION):
        read_split(dataset, split)


def _run_trials(study: Study, team_of_workers: Team, total: int, run: studies.StudyRun) -> None:
    progress = _Progress(study, total)

    def on_change() -> None:
        run.log_trials(trial for trial in study.ended(without=run.written) if trial.number in study.asked)
        progress.show()

    started = time.time()
    run.log_missing(study.ended())
    progress.show()
    try:
        coordinator.run_trials(study, team_of_workers, total, on_change)
        progress.show()  # the last ones may have been done elsewhere
    finally:
        progress.end()
    if study.has_others_since(max(started, time.time() - PATIENCE)):
        time.sleep(PATIENCE)
    run.log_missing(study.ended())
    if study.best(1) == []:
        failure = next((trial.failure for trial in reversed(study.ended()) if trial.failure), "none was completed")
        raise Fault(f"no trial of the study came to its end; the last one: {failure}")


class _Progress:
    """One line, counted from the storage: rewritten on a terminal, else a new one whenever it has changed."""

    def __init__(self, study: Study, total: int) -> None:
        self._study, self._total = study, total
        self._started, self._before = time.monotonic(), study.counted()
        self._shown, self._rewrites = "", sys.stdout.isatty()

    def show(self) -> None:
        """The line as it is now."""
        counts = self._study.count_by_status()
        done = counts.total()
        best, elsewhere = self._study.best(1), self._study.elsewhere()
        parts = [
            f"{done}/{self._total} trials",
            *(f"{counts[name]} {name}" for name in ("pruned", "failed") if counts[name]),
            *([f"{elsewhere} at work elsewhere"] if elsewhere else []),
        ]
        if best:
            parts.append(f"best validation accuracy {1 - best[0].scores[ERROR]:.2%} (trial {best[0].number})")
        if self._before < done < self._total:
            left = (time.monotonic() - self._started) / (done - self._before) * (self._total - done)
            parts.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        line = ", ".join(parts)
        if line != self._shown:
            self._shown = line
            print(*(("\r", line, "\033[K") if self._rewrites else (line, "\n")), sep="", end="", flush=True)

    def end(self) -> None:
        """What follows starts on a line of its own."""
        if self._rewrites:
            print()


def _check_finalists(study: Study, team_of_workers: Team) -> list[Outcome]:
    chosen = study.finalists()
    seeds = study.params.tune.seeds
    print(f"the {len(chosen) - 1} best and the present values, each with {seeds} other seeds:", flush=True)
    return coordinator.train_again(study, team_of_workers, chosen)


def _conclude(study: Study, outcomes: Sequence[Outcome], run: studies.StudyRun) -> Verdict:
    """Print the table; write and log the summary and the figures."""
    print(finalists.table(outcomes))
    verdict = finalists.judged(outcomes)
    best = verdict.best
    print(verdict)
    summary = {
        "study": study.optuna.study_name,
        "data": {"name": study.dataset.name, "sha256": study.dataset.sha256},
        "trials": study.counted(),
        "winner": best.finalist.name,
        "gain": {"mean": verdict.gained, "standard_error": verdict.error, "real": verdict.is_real},
        "finalists": [
            {
                "name": each.finalist.name,
                "values": dict(each.finalist.values),
                "parameters": each.finalist.parameters,
                "validation_accuracy": {"mean": each.mean, "deviation": each.deviation, "n": len(each.accuracies)},
            }
            for each in sorted(outcomes, key=lambda outcome: -outcome.mean)
        ],
    }
    files.write_json(SUMMARY, summary)
    run.log_files([SUMMARY], "study")
    run.log_files(plots.write(study, FIGURES), "figures")
    run.log_best(study.counted(), best.finalist.values, {"best_validation_accuracy": best.mean})
    print(f"{SUMMARY}, {FIGURES}/, and the MLflow run {run.run_id}")
    return verdict


def _apply(study: Study, verdict: Verdict, run: studies.StudyRun, force: bool) -> None:
    """Write the winner's values into params.yaml, all else in it untouched."""
    best = verdict.best
    if best.finalist.trial is None or not (verdict.is_real or force):
        print(
            f"{PARAMS} stays as it is" + ("" if best.finalist.trial is None else "; --force writes the winner's values")
        )
        return
    before = PARAMS.read_text()
    after = with_values(before, best.finalist.values)
    print(
        "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(PARAMS), str(PARAMS), n=0)),
        end="",
    )
    files.write(PARAMS, after.encode())
    run.log_applied(study.optuna.study_name, best.finalist.trial, best.finalist.values)
    print(f"{PARAMS} has the values of {best.finalist.name}: `dvc repro` trains with them")


if __name__ == "__main__":
    run_command(main)
