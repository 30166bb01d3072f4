"""The best trials and the current values, trained again with other seeds, and which of them wins."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.tuning.storage import database_lock, expected_warnings, storage_faults
from pipeline.tuning.study import HISTORY, Study, load_or_create

Values = Mapping[str, object]


@dataclass(frozen=True)
class Finalist:
    """A set of values for the tuned parameters. ``trial`` is None for the current ones."""

    trial: int | None
    values: Values
    parameters: int

    @property
    def name(self) -> str:
        """Its name in the table."""
        return "current" if self.trial is None else f"trial {self.trial}"


@dataclass(frozen=True)
class Outcome:
    """The validation scores of a finalist by evaluate.metric, one for each seed, in the order of the seeds."""

    finalist: Finalist
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds."""
        return statistics.stdev(self.scores)


def choose(study: Study) -> list[Finalist]:
    """The current values, and the best trials with other values."""
    present = {path: study.params.value(path) for path in study.space}
    best = study.best(study.params.tune.finalists + 1)
    chosen = [(None, present), *((trial.number, trial.values) for trial in best if trial.values != present)]
    return [
        Finalist(number, values, study.sizes(values)["parameters"])
        for number, values in chosen[: study.params.tune.finalists + 1]
    ]


class FinalistStudy(Study):
    """A study in the same storage whose trials are given: each finalist with each seed, none of them pruned.

    A pair that is complete is not trained again, whoever trained it. One that failed is tried at each call.
    """

    def __init__(self, search: Study, study: optuna.Study, finalists: Sequence[Finalist]) -> None:
        params = search.params
        self.finalists = finalists
        self.seeds = [(params.seed + 1 + number) % 2**32 for number in range(params.tune.seeds)]  # not the trials' seed
        self._pairs = [{**each.values, "seed": seed} for seed in self.seeds for each in finalists]
        super().__init__(study, params, search.dataset, len(self._pairs))

    def counted(self) -> int:
        """How many pairs are complete."""
        return self.total - len(self._pairs_without(TrialState.COMPLETE))

    def remarks(self) -> list[str]:
        """None: which of the finalists is the best is known once all are trained."""
        return []

    def needs_another_trial(self) -> bool:
        """Whether there is a pair that is neither complete nor running."""
        return bool(self._pairs_without(TrialState.COMPLETE, TrialState.RUNNING))

    def _pairs_without(self, *states: TrialState) -> list[dict[str, object]]:
        """The pairs that no trial in one of these states has."""
        found = [self.values_of(trial) for trial in self.trials(*states)]
        return [pair for pair in self._pairs if pair not in found]

    def _start(self) -> Trial | None:
        """Start the next pair; None if it is no longer wanted."""
        missing = self._pairs_without(TrialState.COMPLETE, TrialState.RUNNING)
        if not self.trials(TrialState.WAITING):  # those to be tried again come first
            self.optuna.enqueue_trial(missing[0])
        with expected_warnings():
            trial = self.optuna.ask()
        if self.values_of(trial) not in missing:  # it was requeued twice, or the finalists have changed
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            return None
        self.asked.add(trial.number)
        return trial

    def values_of(self, trial: Trial | FrozenTrial) -> dict[str, object]:
        """As they were enqueued: the current values may lie outside the space."""
        return dict(self.trials()[trial.number].system_attrs["fixed_params"])

    def fail(self, trial: Trial, history: Sequence[Epoch], reason: str) -> None:
        """End a trial that would fail again. Raises Fault, since the finalists cannot be compared without it."""
        super().fail(trial, history, reason)
        values = self.values_of(trial)
        for each in self.finalists:
            if values == {**each.values, "seed": values["seed"]}:
                raise Fault(f"{each.name} with seed {values['seed']} failed: {reason}")

    def outcomes(self) -> list[Outcome]:
        """The scores of each finalist, once the study is done."""
        complete = self.trials(TrialState.COMPLETE)
        found = [(self.values_of(trial), trial.user_attrs[HISTORY][-1][self.score]) for trial in complete]

        def score(finalist: Finalist, seed: int) -> float:
            return next(float(value) for values, value in found if values == {**finalist.values, "seed": seed})

        return [Outcome(each, tuple(score(each, seed) for seed in self.seeds)) for each in self.finalists]


@storage_faults()
def open_finalists(search: Study, finalists: Sequence[Finalist]) -> FinalistStudy:
    """The study of the finalists, created if it does not exist."""
    name, storage = f"{search.optuna.study_name} finalists", search.optuna._storage
    with database_lock():
        study = load_or_create(storage, name, search.params, {"finalists of": search.id}, NopPruner())
    opened = FinalistStudy(search, study, finalists)
    opened.requeue_unfinished()
    return opened


def winner(outcomes: Iterable[Outcome]) -> Outcome:
    """The highest mean; of equal ones that with the fewest parameters."""
    return max(outcomes, key=lambda outcome: (outcome.mean, -outcome.finalist.parameters))


def gain(best: Outcome, present: Outcome) -> tuple[float, float]:
    """By how much the score of ``best`` is higher, seed by seed, and the standard error of that mean difference."""
    differences = [a - b for a, b in zip(best.scores, present.scores, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


@dataclass(frozen=True)
class Verdict:
    """The winner and its gain over the current values: mean and standard error of the paired differences."""

    best: Outcome
    gain: float
    error: float

    @property
    def is_real(self) -> bool:
        """Whether the gain is above two standard errors, more than chance would give."""
        return self.gain > 2 * self.error

    def __str__(self) -> str:
        if self.best.finalist.trial is None:
            return "the current values are the best"
        meaning = "a real gain" if self.is_real else "within two standard errors: it may be chance"
        return f"{self.best.finalist.name} against the current values: {self.gain:+.3%} +- {self.error:.3%}, {meaning}"


def judge(outcomes: Sequence[Outcome]) -> Verdict:
    """Which of the finalists, the current values among them, is the best."""
    best = winner(outcomes)
    (present,) = (outcome for outcome in outcomes if outcome.finalist.trial is None)
    return Verdict(best, *gain(best, present))


def summary(outcomes: Sequence[Outcome], verdict: Verdict, score: str) -> dict[str, object]:
    """The winner, its gain and all finalists as JSON, the best first; ``score`` is as in "validation_accuracy"."""
    return {
        "winner": verdict.best.finalist.name,
        "gain": {"mean": verdict.gain, "standard_error": verdict.error, "real": verdict.is_real},
        "finalists": [
            {
                "name": each.finalist.name,
                "values": dict(each.finalist.values),
                "parameters": each.finalist.parameters,
                score: {"mean": each.mean, "deviation": each.deviation, "n": len(each.scores)},
            }
            for each in sorted(outcomes, key=lambda outcome: -outcome.mean)
        ],
    }


def table(outcomes: Sequence[Outcome], score: str) -> str:
    """One row for each finalist, the best first; ``score`` is as in "validation accuracy"."""
    width = max(24, len(score) + 2)
    rows = [f"{'':<12}{score:<{width}}{'n':>3}{'parameters':>12}  values"]
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.mean):
        values, reached = in_words(outcome.finalist.values), f"{outcome.mean:.3%} +- {outcome.deviation:.3%}"
        count, size = len(outcome.scores), outcome.finalist.parameters
        rows.append(f"{outcome.finalist.name:<12}{reached:<{width}}{count:>3}{size:>12,}  {values}")
    return "\n".join(rows)


def in_words(values: Values) -> str:
    """As in ``model.dropout=0.5  model.filters.0=32``."""
    return "  ".join(f"{path}={_short(value)}" for path, value in values.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
