"""How many trials per hour the tuning study runs, compared with a plain Optuna study: `make bench-tuning`.

    python -m bench.tuning

The studies take turns and train the same networks for the same number of epochs. The time is from the start of the
first trial to the end of the last. In the first round the plain study also runs with its memory kept (KEEP_MEMORY in
bench/rounds.py), for information only. Nothing else should run. Writes bench/tuning.json; exits 1 where a figure falls
short of its bound.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage

from bench import rounds, stages
from bench.measurement import Bound, conclude, origin
from pipeline import files
from pipeline.errors import run_command
from pipeline.tuning.storage import JOURNAL, Journal

RESULTS = Path("bench/tuning.json")
ROUNDS, TRIALS, EPOCHS = 3, 8, 2
PLAIN, KEPT = "plain study", "plain study, memory kept"
OURS = {"convtrack, 2 workers": 2, "convtrack, 1 worker": 1}
Values = Mapping[str, object]


def main() -> None:
    """Run the studies in turn; print, write, and exit 1 where a bound is not reached."""
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "images.npz"
        rounds.write_images(data, *rounds.read_images())
        for turn in range(1, ROUNDS + 1):
            values: Sequence[Values] = ()
            for name, workers in list(OURS.items())[:: 1 if turn % 2 else -1]:  # neither is always first
                seconds, tried = our_study(folder / f"{turn} {workers}", workers)
                assert not values or tried == values
                rates[name].append(3600 * TRIALS / seconds)
                values = tried
            rates[PLAIN].append(3600 * TRIALS / plain_study(data, values))
            if turn == 1:
                rates[KEPT].append(3600 * TRIALS / plain_study(data, values, **rounds.KEEP_MEMORY))
            print(f"round {turn}  " + ", ".join(f"{name}: {each[-1]:.0f}" for name, each in rates.items()), flush=True)
    bounds = bounds_of(rates)
    facts = origin() | {"trials": TRIALS, "epochs": EPOCHS, "trials_an_hour": rates}
    files.write_json(RESULTS, facts | {"bounds": [each.as_row() for each in bounds]})
    conclude(bounds)


def our_study(folder: Path, workers: int) -> tuple[float, list[Values]]:
    """Seconds from the start of the first trial to the end of the last, and the values of the trials."""
    # The sampler chooses so few trials before it looks at any result: all studies try the same values.
    overrides = {"tune.epochs": EPOCHS, "tune.finalists": 1, "tune.seeds": 2}
    stages.workspace(folder, overrides)
    stages.in_folder(folder, "-m", "pipeline.tune", "--trials", str(TRIALS), "--workers", str(workers))
    storage = JournalStorage(Journal(str((folder / JOURNAL).resolve())))
    done = optuna.load_study(study_name="convtrack", storage=storage).get_trials()
    started = min(trial.datetime_start for trial in done if trial.datetime_start)
    ended = max(trial.datetime_complete for trial in done if trial.datetime_complete)
    return (ended - started).total_seconds(), [trial.params for trial in done]


def plain_study(data: Path, values: Sequence[Values], **environment: str) -> float:
    """Seconds of its trials, one after the other."""
    done = rounds.usual("optuna_study", json.dumps(values), **environment).run(data, EPOCHS)
    return sum(trial["seconds"] for trial in done.rows)


def bounds_of(rates: Mapping[str, Sequence[float]]) -> list[Bound]:
    """Ratios, each of one round."""
    two, one = (rates[name] for name in OURS)

    def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
        return tuple(x / y for x, y in zip(a, b, strict=True))

    return [
        Bound("trials an hour, against a plain Optuna study", ratios(two, rates[PLAIN]), 6, 10, "x"),
        Bound("trials an hour, two workers against one", ratios(two, one), 1.1, 1.25, "x"),
    ]


if __name__ == "__main__":
    run_command(main)
