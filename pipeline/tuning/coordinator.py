"""The process that gives work to the team: trials of the study until there are enough, then the finalists' seeds."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.params import Params
from pipeline.tuning.finalists import Finalist, Outcome
from pipeline.tuning.messages import Done, Failed, Lost, Message
from pipeline.tuning.storage import STORAGE_ERRORS
from pipeline.tuning.study import MOST_RETRIES, Study, knobs_of, retries_of
from pipeline.tuning.team import Team

WAIT = 1.0  # seconds for which nothing need happen


@dataclass
class _AtWork:
    """A trial that a worker is at."""

    trial: Trial
    params: Params
    history: list[Epoch] = field(default_factory=list)
    pruned: bool = False


def run_trials(study: Study, team: Team, total: int, on_change: Callable[[], None]) -> None:
    """Go on with the study until it has so many trials; ``on_change`` is called whenever one may have ended.

    What is at work when this is interrupted is tried again when the study goes on.
    """
    at_work: dict[int, _AtWork] = {}
    try:
        while at_work or study.counted() < total:
            _give_work(study, team, at_work, total)
            if study.wants_another(total):
                team.reclaim()
            else:
                team.spread()
            study.heartbeat(work.trial for work in at_work.values())
            if not at_work:
                on_change()  # others, elsewhere, may be at the last trials
            for task, message in team.messages(WAIT):
                assert isinstance(task, int)
                if _has_ended(study, team, at_work[task], message):
                    del at_work[task]
                    on_change()
    except BaseException:
        with suppress(Fault, OSError, *STORAGE_ERRORS):  # a storage that is gone must not hide why this ended
            study.requeue_all(work.trial for work in at_work.values())
        raise


def _give_work(study: Study, team: Team, at_work: dict[int, _AtWork], total: int) -> None:
    while team.has_idle and study.wants_another(total):
        trial = study.next()
        if not study.answer_from_history(trial):
            params = study.params.changed(knobs_of(trial) | {"train.epochs": study.params.tune.epochs})
            at_work[trial.number] = _AtWork(trial, params)
            team.give(trial.number, params)


def _has_ended(study: Study, team: Team, work: _AtWork, message: Message) -> bool:
    try:
        return _taken_in(study, team, work, message)
    except UpdateFinishedTrialError:  # nothing was heard from here for so long that others have given it up
        if isinstance(message, Epoch):
            team.answer(work.trial.number, go_on=False)
        return not isinstance(message, Epoch)


def _taken_in(study: Study, team: Team, work: _AtWork, message: Message) -> bool:
    """Whether the trial has ended with this message."""
    trial = work.trial
    match message:
        case Epoch():
            work.history.append(message)
            work.pruned = not study.report(trial, message)
            team.answer(trial.number, go_on=not work.pruned)
            return False
        case Done():
            study.finish(trial, work.params, work.history, work.pruned)
        case Failed(reason):
            study.fail(trial, work.history, reason)
        case Lost() if retries_of(trial) < MOST_RETRIES:
            study.requeue(trial, blamed=True)
        case Lost(reason):
            study.fail(trial, work.history, f"{reason}, {retries_of(trial) + 1} times")
    return True


def train_again(study: Study, team: Team, finalists: Sequence[Finalist]) -> list[Outcome]:
    """Each finalist with each of ``tune.seeds`` seeds, none of them that of the trials.

    What is known from an earlier call is not done again. Raises Fault where one fails.
    """
    tune = study.params.tune
    seeds = [(study.params.seed + 1 + number) % 2**32 for number in range(tune.seeds)]
    pairs = [(index, seed) for seed in seeds for index in range(len(finalists))]
    waiting = [(index, seed) for index, seed in pairs if not study.has_accuracy(finalists[index].values, seed)]
    random.shuffle(waiting)  # other machines may be at the same ones: so few are done twice
    last: dict[object, Epoch] = {}
    lost: Counter[object] = Counter()  # how often a worker has died at one
    while waiting or team.tasks:
        while waiting and team.has_idle:
            index, seed = waiting.pop(0)
            if study.has_accuracy(finalists[index].values, seed):  # another process was faster
                continue
            knobs = {**finalists[index].values, "train.epochs": tune.epochs, "seed": seed}
            team.give((index, seed), study.params.changed(knobs))
        if waiting:
            team.reclaim()
        else:
            team.spread()
        for task, message in team.messages(WAIT):
            assert isinstance(task, tuple)
            finalist, seed = finalists[task[0]], task[1]
            match message:
                case Epoch():
                    last[task] = message
                    team.answer(task, go_on=True)
                case Done():
                    study.keep_accuracy(finalist.values, seed, last[task].validation_accuracy)
                case Lost() if lost[task] < MOST_RETRIES:
                    lost[task] += 1
                    waiting.append(task)
                case Failed(reason) | Lost(reason):
                    raise Fault(f"{finalist.name} with seed {seed} failed: {reason}")
    return [Outcome(each, tuple(study.accuracy(each.values, seed) for seed in seeds)) for each in finalists]
