"""The study in its storage: made or gone on with, its next trial, and what counts as one."""

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.data.splits import Dataset
from pipeline.errors import UserError
from pipeline.model.cnn import multiply_adds, parameter_count
from pipeline.model.training import Epoch
from pipeline.params import MACHINE_PARAMETERS, Params
from pipeline.recipe import architecture
from pipeline.tuning.finalists import Finalist
from pipeline.tuning.records import Status, TrialRecord
from pipeline.tuning.space import present_values, space_of
from pipeline.tuning.storage import HEARTBEAT, as_it_is, open_storage, storage_faults

FAILURE = "failure"  # why a trial cannot be done; one without it and FAIL was lost, and is tried again
HISTORY = "history"  # a row an epoch
SAME_AS = "same_as"  # the number of the earlier trial that answered this one
RETRIES = "retries"
MOST_RETRIES = 2
STARTUP_TRIALS = 10
ERROR = "validation_error"
LOST = "its process was killed or interrupted"
ENDED: dict[TrialState, Status] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Study:
    """Optuna's study of ``tune.space``, with its rules of what counts as a trial and what is tried again.

    A trial counts once it is complete, pruned, or failed for a reason of its own. One that was lost, because a process
    was killed, does not: the same values are tried again.
    """

    def __init__(self, study: optuna.Study, params: Params, dataset: Dataset) -> None:
        self.optuna, self.params, self.dataset, self.space = study, params, dataset, space_of(params)
        self.present = present_values(params, self.space)  # None where they are outside the space
        self.asked = set[int]()  # numbers of the trials that this process has begun
        self._seen, self._last_heartbeat = set[int](), -math.inf

    @classmethod
    @storage_faults()
    def open(cls, storage: BaseStorage, name: str, params: Params, dataset: Dataset) -> "Study":
        """The study of this name, made if there is none. Raises UserError where it was made for something else."""
        second = params.tune.second_objective
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            directions=["minimize"] * (2 if second else 1),
            pruner=_pruner(params),
        )
        made_for, wanted = study.user_attrs.get("made_for"), _identity(params, dataset)
        if made_for is None:
            study.set_user_attr("id", str(uuid.uuid4()))
            with as_it_is():
                study.set_metric_names([ERROR, *([second] if second else [])])
            present = present_values(params, space_of(params))
            if present is not None:
                study.enqueue_trial(present, skip_if_exists=True)
            study.set_user_attr("made_for", wanted)
        elif made_for != wanted:
            key = next(key for key in wanted | made_for if made_for.get(key) != wanted.get(key))
            raise UserError(
                f"the study {name} was made with {key} = {made_for.get(key, 'none')}, "
                f"and now it is {wanted.get(key, 'none')}: change it back, or start another study with --study NAME"
            )
        opened = cls(study, params, dataset)
        opened._requeue_unfinished()
        return opened

    @property
    def id(self) -> str:
        """One that no other study has, whatever its name."""
        return str(self.optuna.user_attrs["id"])

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in these states, in the order of their numbers; all of them for no states."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def counted(self) -> int:
        """How many trials have been done."""
        return self.count_by_status().total()

    def wants_another(self, total: int) -> bool:
        """Whether those that are done and those at work, here or elsewhere, are fewer."""
        return self.counted() + len(self.trials(TrialState.RUNNING)) < total

    def elsewhere(self) -> int:
        """How many are at work in other processes."""
        return sum(trial.number not in self.asked for trial in self.trials(TrialState.RUNNING))

    def ended(self, without: Collection[int] = ()) -> list[TrialRecord]:
        """The trials that have ended, also those that are tried again, but for these numbers."""
        return [self._record(trial) for trial in self.trials(*ENDED) if trial.number not in without]

    def has_others_since(self, seconds: float) -> bool:
        """Whether a trial of another process has ended since then, in seconds since 1970."""
        return any(trial.ended > 1000 * seconds for trial in self.ended(without=self.asked))

    def count_by_status(self) -> Counter[Status]:
        """How many of the trials that count are complete, pruned and failed."""
        return Counter(ENDED[trial.state] for trial in self.trials() if counts(trial))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        assert trial.datetime_start is not None or trial.datetime_complete is not None
        ended = trial.datetime_complete or datetime.now()
        failure = trial.user_attrs.get(FAILURE, LOST) if trial.state == TrialState.FAIL else ""
        return TrialRecord(
            number=trial.number,
            status=ENDED[trial.state],
            failure=failure,
            counts=counts(trial),
            values=knobs_of(trial),
            parameters=None if trial.state == TrialState.FAIL else self._parameters(knobs_of(trial)),
            scores=dict(zip(self.optuna.metric_names or (), trial.values or (), strict=False)),
            history=trial.user_attrs.get(HISTORY, ()),
            started=round((trial.datetime_start or ended).timestamp() * 1000),
            ended=round(ended.timestamp() * 1000),
        )

    def _parameters(self, values: Mapping[str, object]) -> int:
        return parameter_count(architecture(self.params.changed(values), self.dataset))

    def best(self, count: int) -> list[TrialRecord]:
        """The complete trials with the lowest validation errors, each set of values once."""
        found: dict[str, TrialRecord] = {}
        for trial in sorted(self.trials(TrialState.COMPLETE), key=lambda trial: (trial.values[0], trial.number)):
            name = json.dumps(trial.params, sort_keys=True)
            if name not in found and len(found) < count:
                found[name] = self._record(trial)
        return list(found.values())

    def finalists(self) -> list[Finalist]:
        """The best trials, and the present values."""
        knobs = self.params.by_path()
        present = {path: knobs[path] for path in self.space}
        return [
            Finalist(None, present, self._parameters(present)),
            *(
                Finalist(trial.number, trial.values, self._parameters(trial.values))
                for trial in self.best(self.params.tune.finalists + 1)
                if trial.values != present
            ),
        ][: self.params.tune.finalists + 1]

    def next(self) -> Trial:
        """Another trial: one that waits to be tried again, else what the sampler proposes."""
        # A sampler that starts anew with each call of the command would repeat its first proposals.
        seed = (self.params.seed + len(self.trials())) % 2**32
        self.optuna.sampler = TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        with as_it_is():
            trial = self.optuna.ask(self.space)
        self.asked.add(trial.number)
        return trial

    def answer_from_history(self, trial: Trial) -> bool:
        """Finish a trial whose values have been tried before with what came of them; False if they have not."""
        for earlier in filter(counts, self.trials(*ENDED)):
            if knobs_of(earlier) == knobs_of(trial) and earlier.number != trial.number:
                trial.set_user_attr(SAME_AS, earlier.number)
                trial.set_user_attr(HISTORY, earlier.user_attrs.get(HISTORY, []))
                if earlier.state == TrialState.FAIL:
                    trial.set_user_attr(FAILURE, earlier.user_attrs[FAILURE])
                for step, value in earlier.intermediate_values.items():
                    trial.report(value, step)
                values = earlier.values if earlier.state == TrialState.COMPLETE else None
                self.optuna.tell(trial, values, earlier.state)
                return True
        return False

    def report(self, trial: Trial, epoch: Epoch) -> bool:
        """Tell the pruner of an epoch; False where the trial should end."""
        if len(self.optuna.directions) > 1:  # Optuna prunes no study of several objectives
            return True
        trial.report(1 - epoch.validation_accuracy, epoch.epoch)
        return epoch.epoch == self.params.tune.epochs or not trial.should_prune()

    def finish(self, trial: Trial, params: Params, history: Sequence[Epoch], pruned: bool) -> None:
        """End a trial that came to its end, or was pruned before."""
        trial.set_user_attr(HISTORY, [asdict(epoch) for epoch in history])
        if pruned:
            self.optuna.tell(trial, state=TrialState.PRUNED)
            return
        layers, scores = architecture(params, self.dataset), [1 - history[-1].validation_accuracy]
        match self.params.tune.second_objective:
            case "parameters":
                scores.append(parameter_count(layers))
            case "multiply_adds":
                scores.append(multiply_adds(layers))
        self.optuna.tell(trial, scores)

    def fail(self, trial: Trial, history: Sequence[Epoch], reason: str) -> None:
        """End a trial that would fail again."""
        trial.set_user_attr(HISTORY, [asdict(epoch) for epoch in history])
        trial.set_user_attr(FAILURE, reason)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def requeue(self, trial: Trial | FrozenTrial, blamed: bool = False) -> None:
        """End a trial that its process did not. The same values wait to be tried again.

        ``blamed`` where they may be why their worker died; then they are not tried for ever.
        """
        stored = self.trials()[trial.number]
        if not stored.state.is_finished():  # as it is where another process has given it up
            # Optuna writes a trial's values one by one; those that it was given before it began are there at once.
            values = stored.system_attrs.get("fixed_params", {}) | stored.params
            self.optuna.enqueue_trial(values, user_attrs={RETRIES: retries_of(stored) + blamed})
            self.optuna.tell(trial.number, state=TrialState.FAIL)

    def requeue_all(self, trials: Iterable[Trial]) -> None:
        """Lose these, and one that was begun and interrupted before anybody knew of it."""
        if self._in_journal:
            # An interrupt can come between any two steps of Optuna: its lock may be left, for which it would wait half
            # a minute, and the journal be half read. So it is opened as after a kill.
            self.optuna = optuna.load_study(study_name=self.optuna.study_name, storage=open_storage())
        for trial in trials:
            self.requeue(trial)
        self._requeue_unfinished()

    def heartbeat(self, trials: Iterable[Trial]) -> None:
        """Where others can be at the same study: say that these trials are alive, and give up those that are not."""
        storage = self.optuna._storage
        if isinstance(storage, BaseHeartbeat) and time.monotonic() - self._last_heartbeat > HEARTBEAT:
            # One whose process died before the first sign of life would never be given up, so each gets one from here.
            unknown = {trial._trial_id for trial in self.trials(TrialState.RUNNING)} - self._seen
            for identifier in unknown.union(trial._trial_id for trial in trials):
                storage.record_heartbeat(identifier)
            self._seen |= unknown
            with as_it_is():
                optuna.storages.fail_stale_trials(self.optuna)
            self._last_heartbeat = time.monotonic()

    def has_accuracy(self, values: Mapping[str, object], seed: int) -> bool:
        """Whether these values have been trained with another seed."""
        return _accuracy_name(values, seed) in self.optuna.user_attrs

    def accuracy(self, values: Mapping[str, object], seed: int) -> float:
        """The validation accuracy that they reached."""
        return float(self.optuna.user_attrs[_accuracy_name(values, seed)])

    def keep_accuracy(self, values: Mapping[str, object], seed: int, validation_accuracy: float) -> None:
        """Remember it."""
        self.optuna.set_user_attr(_accuracy_name(values, seed), validation_accuracy)

    def _requeue_unfinished(self) -> None:
        """In a journal no other process can be at a trial, so those that seem to be at work were killed.

        In a database others may be; there a trial without a heartbeat is given up.
        """
        for trial in self.trials(TrialState.RUNNING) if self._in_journal else ():
            self.requeue(trial)

    @property
    def _in_journal(self) -> bool:
        return isinstance(self.optuna._storage, JournalStorage)


def _accuracy_name(values: Mapping[str, object], seed: int) -> str:
    return f"seed {seed}: {json.dumps(values, sort_keys=True)}"


def knobs_of(trial: Trial | FrozenTrial) -> dict[str, object]:
    """The values that a trial is trained with: 0.15 where the steps of a range add up to 0.15000000000000002."""
    return {path: float(f"{value:.12g}") if isinstance(value, float) else value for path, value in trial.params.items()}


def retries_of(trial: Trial | FrozenTrial) -> int:
    """How often a worker has died at these values."""
    return int(trial.user_attrs.get(RETRIES, 0))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial has been done, so that it is one of those that were asked for."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and FAILURE in trial.user_attrs
    )


def _pruner(params: Params) -> BasePruner:
    return NopPruner() if params.tune.second_objective else MedianPruner(n_startup_trials=STARTUP_TRIALS)


def _identity(params: Params, dataset: Dataset) -> dict[str, object]:
    """What must not change while a study goes on, as JSON gives it back."""
    tune = params.tune
    free = {*tune.space, "train.epochs", *(f"train.{knob}" for knob in MACHINE_PARAMETERS)}
    fixed = {
        path: value for path, value in params.by_path().items() if path.split(".")[0] in ("seed", "model", "train")
    }
    return {
        "data.sha256": dataset.sha256,
        "tune.epochs": tune.epochs,
        "tune.second_objective": tune.second_objective,
        **{f"tune.space.{path}": space.model_dump(exclude_defaults=True) for path, space in tune.space.items()},
        **{path: value for path, value in fixed.items() if path not in free},
    }
