"""The study: its search space, how its trials start and end, which of them count, and which are retried."""

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.data.splits import Dataset
from pipeline.errors import UserError
from pipeline.model.cnn import multiply_adds, parameter_count
from pipeline.model.training import Epoch
from pipeline.params import MACHINE_PARAMETERS, Params, Range, is_under
from pipeline.recipe import architecture
from pipeline.tracking.studies import ERRORS, Status, TrialRecord
from pipeline.tuning.storage import HEARTBEAT, database_lock, expected_warnings, open_storage, storage_faults

Space = dict[str, BaseDistribution]

FAILURE = "failure"  # why a trial failed; one that is FAIL without it was interrupted, and is tried again
HISTORY = "history"  # one row for each epoch
SAME_AS = "same_as"  # the number of the earlier trial with the same values, whose result was copied
RETRIES = "retries"  # how often a worker has died with these values
MAX_RETRIES = 2
STARTUP_TRIALS = 10
INTERRUPTED = "its process was killed or interrupted"
ENDED: dict[TrialState, Status] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Study:
    """An Optuna study of ``tune.space``, run until ``total`` trials count.

    A trial counts once it is complete, pruned, or failed by itself. One whose process was killed does not count: the
    same values are tried again.
    """

    def __init__(self, study: optuna.Study, params: Params, dataset: Dataset, total: int) -> None:
        self.optuna, self.params, self.dataset, self.total = study, params, dataset, total
        self.space = space_of(params)
        self.score = f"validation_{params.evaluate.metric}"  # the field of an Epoch that the study maximises
        self.asked = set[int]()  # numbers of the trials that this process has started
        self._seen, self._last_heartbeat = set[int](), -math.inf

    @property
    def id(self) -> str:
        """Unique, whatever the study's name."""
        return str(self.optuna.user_attrs["id"])

    @property
    def score_in_words(self) -> str:
        """As in "validation accuracy"."""
        return self.score.replace("_", " ")

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in these states, in the order of their numbers; all of them if no state is given."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def counted(self) -> int:
        """How many trials count."""
        return self.count_by_status().total()

    def is_done(self) -> bool:
        """Whether it has all its trials."""
        return self.counted() >= self.total

    def needs_another_trial(self) -> bool:
        """Whether more trials are needed than those that count and those that are running, here or elsewhere."""
        # Read once: between two readings a trial of another machine could end, and be in neither.
        return sum(trial.state == TrialState.RUNNING or counts(trial) for trial in self.trials()) < self.total

    def running_elsewhere(self) -> int:
        """How many trials other processes are running."""
        return sum(trial.number not in self.asked for trial in self.trials(TrialState.RUNNING))

    def ended(self, without: Collection[int] = ()) -> list[TrialRecord]:
        """The trials that have ended, ``without`` these numbers; also those that are tried again."""
        return [self._record(trial) for trial in self.trials(*ENDED) if trial.number not in without]

    def has_others_since(self, seconds: float) -> bool:
        """Whether a trial of another process has ended since this time, in seconds since 1970."""
        return any(trial.ended > 1000 * seconds for trial in self.ended(without=self.asked))

    def count_by_status(self) -> Counter[Status]:
        """How many of the trials that count are complete, pruned and failed."""
        return Counter(ENDED[trial.state] for trial in self.trials() if counts(trial))

    def remarks(self) -> list[str]:
        """What there is to say of the trials so far, for the line that shows the progress."""
        counts, best = self.count_by_status(), self.best(1)
        return [
            *(f"{counts[name]} {name}" for name in ("pruned", "failed") if counts[name]),
            *(f"best {self.score_in_words} {each.validation_score:.2%} (trial {each.number})" for each in best),
        ]

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        assert trial.datetime_start is not None or trial.datetime_complete is not None
        ended = trial.datetime_complete or datetime.now()
        failure = trial.user_attrs.get(FAILURE, INTERRUPTED) if trial.state == TrialState.FAIL else ""
        return TrialRecord(
            number=trial.number,
            status=ENDED[trial.state],
            failure=failure,
            values=self.values_of(trial),
            sizes={} if trial.state == TrialState.FAIL else self.sizes(self.values_of(trial)),
            validation_error=trial.values[0] if trial.state == TrialState.COMPLETE else None,
            history=trial.user_attrs.get(HISTORY, ()),
            started=round((trial.datetime_start or ended).timestamp() * 1000),
            ended=round(ended.timestamp() * 1000),
        )

    def sizes(self, values: Mapping[str, object]) -> dict[str, int]:
        """The sizes of the network with these values, by the names that ``tune.second_objective`` may have."""
        layers = architecture(self.params.changed(values), self.dataset)
        return {"parameters": parameter_count(layers), "multiply_adds": multiply_adds(layers)}

    def best(self, count: int) -> list[TrialRecord]:
        """The complete trials with the lowest validation errors, each set of values once."""
        return [self._record(trial) for trial in _without_repetitions(self.trials(TrialState.COMPLETE))[:count]]

    def front(self) -> list[TrialRecord]:
        """With a second objective: the trials of which no other is smaller and as accurate, the most accurate first."""
        trials = self.optuna.best_trials if self.params.tune.second_objective else []
        return [self._record(trial) for trial in _without_repetitions(trials)]

    def values_of(self, trial: Trial | FrozenTrial) -> dict[str, object]:
        """The values that it is trained with: 0.15 where the steps of a range add up to 0.15000000000000002."""
        return {path: _read(self.params.tune.space[path], value) for path, value in trial.params.items()}

    def params_of(self, trial: Trial) -> Params:
        """The parameters that it is trained with."""
        return self.params.changed(self.values_of(trial) | {"train.epochs": self.params.tune.epochs})

    def next(self) -> Trial | None:
        """Start a trial; None if none is needed any more, or if it has ended at once."""
        with database_lock():  # else several machines might each start the last one
            return self._start() if self.needs_another_trial() else None

    def _start(self) -> Trial | None:
        """Start the trial that waits to be tried again, else what the sampler proposes.

        None if these values have been tried before: the trial then ends with the same result.
        """
        # With a fixed seed, each run of the command would repeat the sampler's first proposals.
        seed = (self.params.seed + len(self.trials())) % 2**32
        self.optuna.sampler = TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        with expected_warnings():
            trial = self.optuna.ask(self.space)
        self.asked.add(trial.number)
        for earlier in filter(counts, self.trials(*ENDED)):
            if self.values_of(earlier) == self.values_of(trial) and earlier.number != trial.number:
                self._copy_result(earlier, trial)
                return None
        return trial

    def _copy_result(self, earlier: FrozenTrial, trial: Trial) -> None:
        trial.set_user_attr(SAME_AS, earlier.number)
        trial.set_user_attr(HISTORY, earlier.user_attrs.get(HISTORY, []))
        if earlier.state == TrialState.FAIL:
            trial.set_user_attr(FAILURE, earlier.user_attrs[FAILURE])
        for step, value in earlier.intermediate_values.items():
            trial.report(value, step)
        self.optuna.tell(trial, earlier.values if earlier.state == TrialState.COMPLETE else None, earlier.state)

    def report(self, trial: Trial, epoch: Epoch) -> bool:
        """Report an epoch to the pruner; False where the trial should end."""
        if len(self.optuna.directions) > 1:  # Optuna does not prune with several objectives
            return True
        trial.report(self._error(epoch), epoch.epoch)
        return epoch.epoch == self.params.tune.epochs or not trial.should_prune()

    def finish(self, trial: Trial, history: Sequence[Epoch], pruned: bool) -> None:
        """End a trial that has run all its epochs, or was pruned."""
        trial.set_user_attr(HISTORY, [asdict(epoch) for epoch in history])
        if pruned:
            self.optuna.tell(trial, state=TrialState.PRUNED)
            return
        second = self.params.tune.second_objective
        sizes = [self.sizes(self.values_of(trial))[second]] if second else []
        self.optuna.tell(trial, [self._error(history[-1]), *sizes])

    def _error(self, epoch: Epoch) -> float:
        return 1 - float(getattr(epoch, self.score))

    def fail(self, trial: Trial, history: Sequence[Epoch], reason: str) -> None:
        """End a trial that would fail again."""
        trial.set_user_attr(HISTORY, [asdict(epoch) for epoch in history])
        trial.set_user_attr(FAILURE, reason)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def requeue(self, trial: Trial | FrozenTrial, retries: int | None = None) -> None:
        """End a trial that was interrupted, and enqueue the same values again.

        ``retries``: how often a worker has died with these values, so that they are not tried forever.
        """
        stored = self.trials()[trial.number]
        if not stored.state.is_finished():  # another process may have requeued it
            # Optuna writes a trial's values one by one; those that it was enqueued with are there at once.
            values = stored.system_attrs.get("fixed_params", {}) | stored.params
            count = retries_of(stored) if retries is None else retries
            self.optuna.enqueue_trial(values, user_attrs={RETRIES: count})
            self.optuna.tell(trial.number, state=TrialState.FAIL)

    def requeue_all(self, trials: Iterable[Trial]) -> None:
        """Requeue these, and one that was interrupted while it was being started."""
        if self._in_journal:
            # An interrupt can come between any two steps of Optuna and leave a half-read journal, or one of its locks
            # between threads. So the storage is opened again, as after a kill.
            self.optuna = optuna.load_study(study_name=self.optuna.study_name, storage=open_storage())
        for trial in trials:
            self.requeue(trial)
        self.requeue_unfinished()

    def heartbeat(self, trials: Iterable[Trial]) -> None:
        """In a shared storage: send a heartbeat for these trials, and requeue those without one."""
        storage = self.optuna._storage
        if isinstance(storage, BaseHeartbeat) and time.monotonic() - self._last_heartbeat > HEARTBEAT:
            # Optuna never requeues a trial whose process died before its first heartbeat, so each gets one from here.
            unknown = {trial._trial_id for trial in self.trials(TrialState.RUNNING)} - self._seen
            for identifier in unknown.union(trial._trial_id for trial in trials):
                storage.record_heartbeat(identifier)
            self._seen |= unknown
            with expected_warnings():
                optuna.storages.fail_stale_trials(self.optuna)
            self._last_heartbeat = time.monotonic()

    def requeue_unfinished(self) -> None:
        """Requeue the trials that are marked as running in a journal: no other process uses it, so they were killed.

        In a database other machines may be running it; there a trial without a heartbeat is requeued.
        """
        for trial in self.trials(TrialState.RUNNING) if self._in_journal else ():
            self.requeue(trial)

    @property
    def _in_journal(self) -> bool:
        return isinstance(self.optuna._storage, JournalStorage)


@storage_faults()
def open_study(storage: BaseStorage, name: str, params: Params, dataset: Dataset, total: int) -> Study:
    """The study of this name, created if needed. Its first trial has the current values, if they are in the space."""
    pruner = NopPruner() if params.tune.second_objective else MedianPruner(n_startup_trials=STARTUP_TRIALS)
    study = Study(load_or_create(storage, name, params, _identity(params, dataset), pruner), params, dataset, total)
    present = current_values(params)
    if present is not None and not study.trials():
        study.optuna.enqueue_trial({path: _stored(value) for path, value in present.items()})
    study.requeue_unfinished()
    return study


def load_or_create(
    storage: BaseStorage, name: str, params: Params, made_for: Mapping[str, object], pruner: BasePruner
) -> optuna.Study:
    """Optuna's study of this name, created if needed. Raises UserError if it was created with other settings."""
    second = params.tune.second_objective
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        load_if_exists=True,
        directions=["minimize"] * (2 if second else 1),
        pruner=pruner,
    )
    found, defaults = study.user_attrs.get("made_for"), Params().by_path()
    if found is None:
        study.set_user_attr("id", str(uuid.uuid4()))
        with expected_warnings():
            study.set_metric_names([ERRORS[params.evaluate.metric], *([second] if second else [])])
        study.set_user_attr("made_for", made_for)
        return study
    # A parameter that is missing was not there in the release that created the study: it had its default.
    others = [key for key in made_for | found if (defaults | found).get(key) != made_for.get(key)]
    if others:
        before, now = (each.get(others[0], "none") for each in (defaults | found, made_for))
        raise UserError(
            f"the study {name} was created with {others[0]} = {before}, and now it is {now}: change it back, or start "
            "another study with --study NAME"
        )
    return study


def space_of(params: Params) -> Space:
    """An Optuna distribution for each parameter in ``tune.space``."""
    return {path: _distribution(params.tune.space[path], params.value(path)) for path in sorted(params.tune.space)}


def _distribution(space: Range, present: object) -> BaseDistribution:
    if space.choices is not None:
        return CategoricalDistribution([_stored(choice) for choice in space.choices])
    assert space.low is not None
    assert space.high is not None
    if isinstance(present, int):
        return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def _stored(value: object) -> float | str | None:
    """As a study stores it: a list or a mapping as JSON, since Optuna's choices are numbers and text."""
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value)


def _read(space: Range, value: object) -> object:
    """The value of a range that a study has stored."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    composite: dict[object, object] = {
        _stored(choice): choice for choice in space.choices or () if isinstance(choice, list | dict)
    }
    return composite.get(value, value)


def current_values(params: Params) -> dict[str, object] | None:
    """The tuned parameters as params.yaml has them; None if one of them lies outside its range."""
    space = space_of(params)
    values = {path: params.value(path) for path in space}
    return values if all(_contains(space[path], _stored(value)) for path, value in values.items()) else None


def _contains(distribution: BaseDistribution, value: object) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:
        return False


def _without_repetitions(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those with the lowest validation errors first, each set of values once."""
    found: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: (trial.values[0], trial.number)):
        found.setdefault(json.dumps(trial.params, sort_keys=True), trial)
    return list(found.values())


def retries_of(trial: Trial | FrozenTrial) -> int:
    """How often a worker has died with these values."""
    return int(trial.user_attrs.get(RETRIES, 0))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the total."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and FAILURE in trial.user_attrs
    )


def _identity(params: Params, dataset: Dataset) -> dict[str, object]:
    """What must stay the same when a study is resumed, as JSON gives it back."""
    tune = params.tune
    free = [*tune.space, "train.epochs", *(f"train.{name}" for name in MACHINE_PARAMETERS)]
    fixed = {
        path: value for path, value in params.by_path().items() if path.split(".")[0] in ("seed", "model", "train")
    }
    return {
        "data.sha256": dataset.sha256,
        "tune.epochs": tune.epochs,
        "tune.second_objective": tune.second_objective,
        "evaluate.metric": params.evaluate.metric,
        **{f"tune.space.{path}": space.model_dump(exclude_defaults=True) for path, space in tune.space.items()},
        **{path: value for path, value in fixed.items() if not is_under(path, free)},
    }
