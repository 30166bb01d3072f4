"""The loop that assigns the trials of a study to the workers."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.tuning.storage import STORAGE_ERRORS
from pipeline.tuning.study import MAX_RETRIES, Study, retries_of
from pipeline.tuning.workers import Done, Failed, Message, Workers

WAIT = 1.0  # seconds to wait for a message before looking at the study again


@dataclass
class _Running:
    trial: Trial
    history: list[Epoch] = field(default_factory=list)
    pruned: bool = False


def run_trials(study: Study, workers: Workers, on_change: Callable[[], object] = lambda: None) -> None:
    """Run the study to its end; ``on_change`` is called whenever a trial may have ended.

    If this is interrupted, the running trials are tried again when the study is resumed.
    """
    running: dict[int, _Running] = {}
    try:
        while running or not study.is_done():
            _start_trials(study, workers, running)
            study.heartbeat(each.trial for each in running.values())
            if not running:
                on_change()  # the last trials may be running on other machines
            for number, message in workers.messages(WAIT):
                if _has_ended(study, workers, running[number], message):
                    del running[number]
                    on_change()
    except BaseException:
        with suppress(Fault, OSError, *STORAGE_ERRORS):  # an unreachable storage must not hide why this ended
            study.requeue_all(each.trial for each in running.values())
        raise


def _start_trials(study: Study, workers: Workers, running: dict[int, _Running]) -> None:
    while workers.has_idle and study.needs_another_trial():
        trial = study.next()
        if trial is not None:
            running[trial.number] = _Running(trial)
            workers.assign(trial.number, study.params_of(trial))


def _has_ended(study: Study, workers: Workers, running: _Running, message: Message) -> bool:
    try:
        if isinstance(message, Epoch):
            running.history.append(message)
            running.pruned = not study.report(running.trial, message)
            workers.reply(running.trial.number, proceed=not running.pruned)
        else:
            _end(study, running, message)
    except UpdateFinishedTrialError:  # it sent no heartbeat for so long that another machine has requeued it
        if isinstance(message, Epoch):
            workers.reply(running.trial.number, proceed=False)
    return not isinstance(message, Epoch)


def _end(study: Study, running: _Running, message: Done | Failed) -> None:
    retries = retries_of(running.trial)
    match message:
        case Done():
            study.finish(running.trial, running.history, running.pruned)
        case Failed(retry=True) if retries < MAX_RETRIES:
            study.requeue(running.trial, retries + 1)
        case Failed(reason, retry):
            study.fail(running.trial, running.history, f"{reason}, {retries + 1} times" if retry else reason)
