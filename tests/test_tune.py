"""The tuning study as its users meet it: on real digits, with a real storage, real workers and a real MLflow."""

import itertools
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline import tune
from pipeline.data.splits import LabelledImages, read_dataset
from pipeline.errors import Fault, UserError
from pipeline.model.training import Epoch
from pipeline.params import read_params, with_values
from pipeline.tracking import store, studies
from pipeline.tuning.finalists import Finalist, Outcome, Verdict, judge, open_finalists
from pipeline.tuning.progress import Progress
from pipeline.tuning.storage import JOURNAL, Journal, open_storage
from pipeline.tuning.study import STARTUP_TRIALS, Study, counts, open_study
from tests import forked
from tests.conftest import QUICK, REPOSITORY, change_training_images, run_command, write_params
from tests.rare_class import RECIPE, write_imbalanced

SMALL: dict[str, Any] = QUICK | {
    "model.filters.0": 8,
    "model.filters.1": 8,
    "train.batch_size": 600,
    "tune.epochs": 2,
    "tune.trials": 4,
    "tune.seeds": 2,
    "tune.finalists": 1,
    "tune.space": {
        "model.filters.0": {"low": 4, "high": 12, "step": 4},
        "model.filters.1": {"low": 4, "high": 12, "step": 4},
        "model.dropout": {"low": 0.0, "high": 0.6, "step": 0.05},
    },
}


PRESENT = {"model.filters.0": 8, "model.filters.1": 8, "model.dropout": 0.5}


@pytest.fixture
def study_folder(workspace: Path) -> Path:
    """The current folder, with a small study in its params.yaml."""
    write_params(workspace, SMALL)
    return workspace


def run(*arguments: str, **environment: str) -> str:
    """`python -m pipeline.tune` in the current folder; what it printed."""
    done = run_command("tune", *arguments, folder=Path.cwd(), stdin=b"", **environment_tags(**environment))
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    return done.stdout.decode()


def refused(*arguments: str, code: int = 2, **environment: str) -> str:
    """The one line with which it refuses."""
    done = run_command("tune", *arguments, folder=Path.cwd(), stdin=b"", **environment_tags(**environment))
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.decode().splitlines()
    return line.removeprefix("error: ")


def command(*arguments: str) -> list[str]:
    return [forked.python(), "-m", "pipeline.tune", *arguments]


def environment_tags(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY)} | more


def trials(name: str = "convtrack") -> list[FrozenTrial]:
    storage = JournalStorage(Journal(str(JOURNAL.resolve())))
    return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)


def finalist_trials() -> list[tuple[str, ...]]:
    """The state and the values of each trial of the finalists, as text."""
    return [
        (trial.state.name, json.dumps(trial.system_attrs["fixed_params"], sort_keys=True))
        for trial in trials("convtrack finalists")
    ]


def children() -> list[Run]:
    store.connect()
    client = MlflowClient()
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    return [run for run in client.search_runs([experiment.experiment_id]) if "trial.number" in run.data.tags]


def parent() -> Run:
    store.connect()
    client = MlflowClient()
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.`study.id` != ''")
    return found


def test_a_study_from_its_first_trial_to_params_yaml(study_folder: Path) -> None:
    (study_folder / "data/prepared/test.safetensors").unlink()  # it decides nothing, so it is not missed
    write_params(study_folder, SMALL | {"data.memory_limit": 1e-6})  # the splits stay on the disk
    before = Path("params.yaml").read_text()
    printed = run()
    assert Path("params.yaml").read_text() == before
    found = trials()
    assert [trial.number for trial in found] == [0, 1, 2, 3]
    assert found[0].params == PRESENT
    lines = printed.splitlines()
    assert lines[0] == "0/4 trials"
    assert any(re.match(r"4/4 trials.*, best validation accuracy \d\d\.\d\d% \(trial \d\)$", line) for line in lines)
    summary = json.loads((study_folder / "tuning/summary.json").read_text())
    assert summary["trials"] == 4
    assert [each["validation_accuracy"]["n"] for each in summary["finalists"]] == [2, 2]
    assert {each["name"] for each in summary["finalists"]} >= {"current"}
    pictures = {path.stem for path in (study_folder / "tuning/figures").glob("*.png")}
    assert pictures == {"history", "importances", "slice", "parallel_coordinates", "accuracy_against_size"}

    assert parent().info.status == "FINISHED"
    points = MlflowClient().get_metric_history(parent().info.run_id, "best_trial_validation_accuracy")
    assert [point.step for point in points] == [1, 2, 3, 4]
    so_far = [point.value for point in points]
    assert so_far == sorted(so_far)
    assert so_far[-1] == pytest.approx(1 - min(trial.value for trial in found if trial.value is not None))
    best = max(summary["finalists"], key=lambda each: float(each["validation_accuracy"]["mean"]))
    kept = {f"best_of_4/{path}": str(value) for path, value in best["values"].items()}
    assert kept.items() <= parent().data.params.items()
    for folder, names in {"figures": {f"{name}.png" for name in pictures}, "study": {"summary.json"}}.items():
        there = MlflowClient().list_artifacts(parent().info.run_id, folder)
        assert {Path(each.path).name for each in there} == names
    assert {run.data.tags["trial.number"] for run in children()} == {"0", "1", "2", "3"}
    recipes = [child.data.tags["params.sha256"] for child in children()]
    assert len(set(recipes)) == 4
    present = read_params().changed({"train.epochs": read_params().tune.epochs})
    assert present.sha256 in recipes
    for child in children():
        trial = found[int(child.data.tags["trial.number"])]
        assert child.data.tags["mlflow.parentRunId"] == parent().info.run_id
        assert child.data.tags["data.sha256"] == read_dataset().sha256
        assert child.data.tags["torch.version"] == torch.__version__
        assert child.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[trial.state.name]
        assert child.data.params["model.filters.0"] == str(trial.params["model.filters.0"])
        curve = MlflowClient().get_metric_history(child.info.run_id, "validation_accuracy")
        assert [1 - point.value for point in curve] == pytest.approx(list(trial.intermediate_values.values()))

    trained = finalist_trials()
    assert [state for state, _ in trained] == ["COMPLETE"] * 4  # two finalists, each with two seeds
    seeds = [read_params().seed + 1, read_params().seed + 2]
    assert sorted(json.loads(values)["seed"] for _, values in trained) == sorted(2 * seeds)
    assert "0/4 trainings" in lines
    assert "4/4 trainings" in lines
    assert len(set(trained)) == 4

    # Going on adds to the same study and the same parent, and trains no finalist twice with the same seed.
    again = run("--trials", "6", "--apply", "--force")
    assert len(trials()) == 6
    assert len(children()) == 6
    assert parent().data.tags["mlflow.runName"] == "tuning convtrack"
    assert finalist_trials()[:4] == trained
    assert len(set(finalist_trials())) == len(finalist_trials()) <= 6
    after = Path("params.yaml").read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    winner = json.loads((study_folder / "tuning/summary.json").read_text())["winner"]
    if winner == "current":
        assert after == before
    else:
        assert 1 <= len(changed) <= 2
        assert all(f"+{line}" in again for line in changed)
        assert parent().data.tags["applied.trial"] == winner.removeprefix("trial ")


def concluded(*accuracies: tuple[int | None, float, float]) -> Verdict:
    """What comes of finalists: the numbers of their trials, and their validation accuracies with two seeds."""
    return judge([Outcome(Finalist(trial, {"model.dropout": 0.1}, 1), (a, b)) for trial, a, b in accuracies])


@pytest.mark.parametrize(
    ("finalists", "force", "written", "line"),
    [
        ([(None, 0.98, 0.99), (3, 0.97, 0.98)], True, False, "params.yaml is unchanged\n"),
        ([(None, 0.98, 0.98), (3, 0.98, 0.99)], False, False, "is unchanged; --force writes the winner's values\n"),
        ([(None, 0.98, 0.98), (3, 0.98, 0.99)], True, True, "params.yaml has the values of trial 3: "),
        ([(None, 0.97, 0.98), (3, 0.98, 0.9901)], False, True, "-  dropout: 0.5"),
    ],
)
def test_only_a_real_gain_is_applied_unless_it_is_forced(
    study_folder: Path,
    capsys: pytest.CaptureFixture[str],
    finalists: list[tuple[int | None, float, float]],
    force: bool,
    written: bool,
    line: str,
) -> None:
    study, before = small_study(), Path("params.yaml").read_text()
    store.connect()
    with studies.study_run(study.id, "tuning", study.params, study.dataset) as opened:
        tune._apply(study, concluded(*finalists), opened, force)
    assert line in capsys.readouterr().out
    after = Path("params.yaml").read_text()
    assert (after != before) == written
    assert (read_params().model.dropout == 0.1) == written
    assert (parent().data.tags.get("applied.trial") == "3") == written
    assert len(after.splitlines()) == len(before.splitlines())


def test_another_winner_of_the_same_trials_is_kept_beside_the_first(study_folder: Path) -> None:
    study = small_study()
    store.connect()
    for dropout in (0.1, 0.2, 0.1):
        with studies.study_run(study.id, "tuning", study.params, study.dataset) as opened:
            opened.log_best(4, {"model.dropout": dropout}, {"best_validation_accuracy": 0.9})
    best = {key: value for key, value in parent().data.params.items() if key.startswith("best")}
    assert best == {"best_of_4/model.dropout": "0.1", "best_of_4.2/model.dropout": "0.2"}


@pytest.mark.slow
def test_trials_that_fall_behind_are_pruned(study_folder: Path) -> None:
    printed = run("--trials", "24", "--workers", "1")
    pruned = {trial.number for trial in trials() if trial.state == TrialState.PRUNED}
    assert pruned
    assert min(pruned) >= STARTUP_TRIALS
    assert f"24/24 trials, {len(pruned)} pruned, " in printed
    for child in children():
        is_pruned = int(child.data.tags["trial.number"]) in pruned
        assert child.info.status == ("KILLED" if is_pruned else "FINISHED")
        curve = MlflowClient().get_metric_history(child.info.run_id, "validation_accuracy")
        assert len(curve) == (1 if is_pruned else 2)  # the network was not trained any further


@pytest.mark.slow
def test_the_same_seed_and_one_worker_give_the_same_trials_also_in_two_goes(study_folder: Path) -> None:
    write_params(study_folder, SMALL | {"tune.epochs": 1})
    for name, goes in {"once": ["14"], "again": ["14"], "in two goes": ["6", "14"]}.items():
        for total in goes:  # more than the sampler draws without looking at what came of the others
            run("--study", name, "--workers", "1", "--trials", total)
    once, again, in_two = (
        [(trial.params, trial.value, trial.intermediate_values, trial.state) for trial in trials(name)]
        for name in ("once", "again", "in two goes")
    )
    assert once == again == in_two
    assert len({json.dumps(params) for params, *_ in once}) > 10
    write_params(study_folder, SMALL | {"tune.epochs": 1, "seed": 1})
    run("--study", "other seed", "--workers", "1", "--trials", "5")
    assert [trial.params for trial in trials("other seed")] != [params for params, *_ in once]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"train.learning_rate": 0.002}, "train.learning_rate = 0.001, and now it is 0.002"),
        ({"tune.epochs": 3}, "tune.epochs = 2, and now it is 3"),
        (
            {"tune.space": SMALL["tune.space"] | {"model.dropout": {"low": 0.1, "high": 0.6}}},
            "tune.space.model.dropout = {'low': 0.0, 'high': 0.6, 'step': 0.05}, and now it is {'low': 0.1,",
        ),
        (
            {"tune.space": SMALL["tune.space"] | {"model.batch_norm": {"choices": [False, True]}}},
            "tune.space.model.batch_norm = none, and now it is {'choices': [False, True]}",
        ),
    ],
)
def test_fault_18_a_study_is_not_resumed_with_other_settings(
    study_folder: Path, changed: dict[str, object], line: str
) -> None:
    small_study()
    write_params(study_folder, SMALL | changed)
    with pytest.raises(UserError) as refusal:
        small_study()
    assert line in str(refusal.value)
    assert "start another study with --study NAME" in str(refusal.value)
    small_study("another")


@pytest.mark.faults
def test_fault_18_a_study_of_an_earlier_release_goes_on_where_new_parameters_have_their_defaults(
    study_folder: Path,
) -> None:
    made_for = dict(small_study().optuna.user_attrs["made_for"])
    for parameter in ("train.class_weights", "evaluate.metric"):
        del made_for[parameter]
    small_study().optuna.set_user_attr("made_for", made_for)
    small_study()
    for parameter, value, default in (
        ("train.class_weights", "balanced", "none"),
        ("evaluate.metric", "balanced_accuracy", "accuracy"),
    ):
        write_params(study_folder, SMALL | {parameter: value})
        with pytest.raises(UserError, match=f"was created with {parameter} = {default}, and now it is {value}: "):
            small_study()


@pytest.mark.slow
def test_a_study_by_balanced_accuracy_finds_the_class_weights_that_accuracy_would_not(
    study_folder: Path, digits: dict[str, LabelledImages]
) -> None:
    write_imbalanced(digits)
    space = {"train.class_weights": {"choices": ["none", "balanced"]}}
    write_params(
        study_folder, SMALL | RECIPE | {"evaluate.metric": "balanced_accuracy", "tune.epochs": 4, "tune.space": space}
    )
    printed = run("--apply")
    assert re.search(r"4/4 trials, best validation balanced accuracy \d\d\.\d\d% \(trial \d\)$", printed, re.MULTILINE)
    assert re.search(r"^ +validation balanced accuracy +n +parameters  values$", printed, re.MULTILINE)
    found = {trial.params["train.class_weights"]: trial for trial in trials()}
    errors = {name: trial.values[0] for name, trial in found.items()}
    for name, trial in found.items():
        curve = [1 - epoch["validation_balanced_accuracy"] for epoch in trial.user_attrs["history"]]
        assert errors[name] == curve[-1]
        assert list(trial.intermediate_values.values()) == curve
    assert errors["balanced"] < errors["none"]
    accuracies = {name: trial.user_attrs["history"][-1]["validation_accuracy"] for name, trial in found.items()}
    assert accuracies["balanced"] < accuracies["none"]
    assert read_params().train.class_weights == "balanced"
    summary = json.loads((study_folder / "tuning/summary.json").read_text())
    assert [each["validation_balanced_accuracy"]["n"] for each in summary["finalists"]] == [2, 2]
    assert "gain" in summary
    best = max(each["validation_balanced_accuracy"]["mean"] for each in summary["finalists"])
    assert parent().data.metrics["best_validation_balanced_accuracy"] == best
    assert parent().data.metrics["best_trial_validation_balanced_accuracy"] == 1 - errors["balanced"]
    assert {child.data.metrics["validation_balanced_error"] for child in children()} == set(errors.values())


def test_the_tuned_values_may_change_and_the_study_goes_on(study_folder: Path) -> None:
    small_study()
    write_params(
        study_folder, SMALL | {"model.filters.0": 4, "model.filters.1": 12, "model.dropout": 0.1, "train.epochs": 3}
    )
    small_study()


@pytest.mark.faults
def test_fault_18_other_images_make_another_study(study_folder: Path) -> None:
    small_study()
    change_training_images()
    with pytest.raises(UserError, match=r"was created with data\.sha256 = [0-9a-f]{64}, and now it is [0-9a-f]{64}"):
        small_study()


def test_the_time_left_is_that_of_the_trials_so_far(study_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study()
    progress = Progress(study)
    for seconds, trials_done, left in ((20, 1, "60 s left"), (400, 2, "7 min left")):
        trial = study.next()
        assert trial is not None
        study.finish(trial, [Epoch(1, 1.0, 0.1, 1.0, 0.1, 0.0, 0.0, 0.1)], pruned=False)
        progress._started = time.monotonic() - seconds
        progress.show()
        shown = capsys.readouterr().out
        assert shown.startswith(f"{trials_done}/4 trials, ")
        assert shown.endswith(f", {left}\n")


def small_study(name: str = "convtrack") -> Study:
    return open_study(open_storage(), name, read_params(), read_dataset(), total=4)


@pytest.mark.faults
def test_fault_16_an_interrupt_at_any_step_of_writing_the_journal_is_the_error_that_arrives(study_folder: Path) -> None:
    study = small_study()
    for step in itertools.count(1):
        trial = study.next()
        assert trial is not None
        interrupted = False
        with suppress(KeyboardInterrupt), interrupt_at(step):
            interrupted = True
            trial.set_user_attr("step", step)
            interrupted = False
        started = time.monotonic()
        study.requeue_all([trial])
        assert time.monotonic() - started < 5
        assert not any(each.state == TrialState.RUNNING for each in trials())
        if not interrupted:
            break
    assert step > 20


@contextmanager
def interrupt_at(step: int) -> Iterator[None]:
    """As by Ctrl-C before this line, counted from 1, of those that Optuna and `Journal` run to write the journal."""
    left = step

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if "optuna/storages/journal" not in name and not name.endswith("tuning/storage.py"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


RULE = {"blocks": 2, "width": 4, "growth": 2.0}
DEPTHS: dict[str, dict[str, Any]] = {
    "rule": {
        "model.filters": RULE,
        "tune.space": {
            "model.filters.blocks": {"low": 1, "high": 3},
            "model.filters.width": {"low": 4, "high": 8, "log": True},
            "model.filters.growth": {"low": 1.0, "high": 2.0, "step": 0.5},
        },
    },
    "lists": {
        "model.filters": [4, 8],
        "tune.space": {
            "model.filters": {"choices": [[4], [4, 8], [8, 4, 4]]},
            "model.padding": {"choices": [0, "same"]},
            "model.dense": {"choices": [None, 8]},
        },
    },
}
each_depth = pytest.mark.parametrize("kind", DEPTHS)
SHALLOW = {key: value for key, value in SMALL.items() if not key.startswith("model.filters")}


@each_depth
def test_a_study_chooses_how_many_blocks_there_are(
    kind: str, study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SQLite, whose trials come back as JSON."""
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///study.db")
    write_params(study_folder, SHALLOW | DEPTHS[kind])
    opened = open_storage(), "convtrack", read_params(), read_dataset()
    study, tried = open_study(*opened, total=8), dict[int, dict[str, object]]()
    present = {path: study.params.value(path) for path in DEPTHS[kind]["tune.space"]}
    depths = dict[int, int]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna's of a choice that a database cannot keep
        while study.needs_another_trial():
            if (trial := study.next()) is not None:  # None: these values have been tried
                tried[trial.number], params = study.values_of(trial), study.params_of(trial)
                assert {path: params.value(path) for path in present} == tried[trial.number]
                depths[trial.number] = len(params.model.filter_counts())
                accuracy = depths[trial.number] / 10
                study.finish(trial, [Epoch(1, 1.0, 0.1, 1.0, accuracy, 0.0, 0.0, accuracy)], pruned=False)
    assert tried[0] == present
    assert len(set(depths.values())) > 1
    again = small_study()
    ended = {trial.number: trial.values for trial in again.ended()}
    assert {number: ended[number] for number in tried} == tried
    best = max(tried, key=lambda number: depths[number])
    assert again.best(1)[0].values == tried[best]
    assert again.best(1)[0].sizes == again.sizes(tried[best])
    with (study_folder / "params.yaml").open("rb") as file:
        written = with_values(file.read(), tried[best])
    (study_folder / "params.yaml").write_bytes(written)
    assert {path: read_params().value(path) for path in present} == tried[best]
    small_study()  # goes on, though params.yaml has other values now


@pytest.mark.slow
@each_depth
def test_a_study_of_depths_from_its_first_trial_to_params_yaml(kind: str, study_folder: Path) -> None:
    write_params(study_folder, SHALLOW | DEPTHS[kind])
    printed = run("--trials", "6", "--workers", "1", "--apply", "--force")
    assert "6/6 trials" in printed
    summary = json.loads((study_folder / "tuning/summary.json").read_text())
    best = max(summary["finalists"], key=lambda each: float(each["validation_accuracy"]["mean"]))
    assert {path: read_params().value(path) for path in best["values"]} == best["values"]
    assert {len(read_params().changed(each["values"]).model.filter_counts()) for each in summary["finalists"]} <= {
        1,
        2,
        3,
    }
    assert {path.stem for path in (study_folder / "tuning/figures").glob("*.png")} >= {"slice", "parallel_coordinates"}
    run("--trials", "7", "--workers", "1")  # it is resumed with the values that it has written
    assert len(trials()) == 7


@pytest.mark.slow
def test_a_trial_whose_filters_grow_too_far_fails_and_the_study_goes_on(study_folder: Path) -> None:
    space = {"model.filters.width": {"choices": [4, 1024]}}
    write_params(study_folder, SHALLOW | {"model.filters": RULE, "tune.space": space, "tune.trials": 6})
    run("--workers", "1")
    failed = [trial for trial in trials() if trial.state == TrialState.FAIL]
    assert failed
    reasons = {trial.user_attrs["failure"] for trial in failed}
    assert reasons == {"UserError: params.yaml: model: filters gives block 2 2,048 of them; allowed: 1 to 1,024"}


@pytest.mark.slow
def test_repeated_values_reuse_the_earlier_result(study_folder: Path) -> None:
    write_params(study_folder, SMALL | {"tune.space": {"model.filters.0": {"choices": [4, 8]}}})
    run("--trials", "6", "--workers", "1")
    found = trials()
    assert len(found) == 6
    answered = [trial for trial in found if "same_as" in trial.user_attrs]
    assert len(answered) == 4
    for trial in answered:
        earlier = found[trial.user_attrs["same_as"]]
        assert (trial.params, trial.value, trial.state) == (earlier.params, earlier.value, earlier.state)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("parameter", "choices", "part"),
    [
        ("model.kernel_size", [14, 15], "block 2 does not fit"),
        ("train.learning_rate", [1e6, 1e7], "the training loss is"),
    ],
)
def test_fault_17_when_every_trial_fails_nothing_is_applied(
    study_folder: Path, parameter: str, choices: list[float], part: str
) -> None:
    present = {"train.learning_rate": choices[0]} if parameter == "train.learning_rate" else {}  # it is tried first
    write_params(study_folder, SMALL | present | {"tune.space": {parameter: {"choices": choices}}})
    before = Path("params.yaml").read_bytes()
    line = refused("--apply", "--force", code=1)
    assert line.startswith("no trial of the study was completed; the last one: ")
    assert part in line
    assert Path("params.yaml").read_bytes() == before
    assert [trial.state.name for trial in trials()] == ["FAIL"] * 4
    assert parent().info.status == "FAILED"
    assert [child.info.status for child in children()] == ["FAILED"] * 4
    assert part in children()[0].data.tags["failure"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "of_present"),
    [
        ("parameters", 8 * 10 + 8 * (8 * 9 + 1) + (5 * 5 * 8 + 1) * 10),
        ("multiply_adds", 26 * 26 * 8 * 9 + 11 * 11 * 8 * 8 * 9 + 5 * 5 * 8 * 10),
    ],
)
def test_a_front_of_accuracy_and_size_is_not_pruned(study_folder: Path, objective: str, of_present: int) -> None:
    write_params(study_folder, SMALL | {"tune.second_objective": objective})
    printed = run()
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 4
    assert trials()[0].values[1] == of_present
    sizes = {child.data.tags["trial.number"]: int(child.data.params[objective]) for child in children()}
    assert sizes == {str(trial.number): trial.values[1] for trial in trials()}
    found = {trial.number: trial.values for trial in trials()}

    def is_beaten(number: int) -> bool:
        error, size = found[number]
        return any(e <= error and s <= size and (e, s) != (error, size) for e, s in found.values())

    front = json.loads((study_folder / "tuning/summary.json").read_text())["front"]
    assert {each["trial"] for each in front} == {number for number in found if not is_beaten(number)}
    for each in front:
        assert [1 - each["validation_accuracy"], each[objective]] == pytest.approx(found[each["trial"]])
        assert re.search(rf"^trial {each['trial']} +\d\d\.\d+% +{each[objective]:,} ", printed, flags=re.MULTILINE)


@pytest.mark.faults
@pytest.mark.slow
def test_fault_28_a_study_may_have_any_name(study_folder: Path) -> None:
    name = """../../'"$(touch PWNED)<script>alert(1)</script>"""
    there = {path.name for path in (*study_folder.iterdir(), *study_folder.parent.iterdir())}
    run("--study", name)
    (results,) = (study_folder / "tuning/studies").iterdir()
    assert {path.name for path in results.iterdir()} == {"summary.json", "figures"}
    assert not (study_folder / "tuning/summary.json").exists()
    assert len(trials(name)) == 4
    assert parent().info.run_name == f"tuning {name}"
    assert parent().info.status == "FINISHED"
    now = {path.name for path in (*study_folder.iterdir(), *study_folder.parent.iterdir())}
    assert now - there <= {"tuning", "mlruns", "mlflow.db-wal", "mlflow.db-shm"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--workers", "1000"], "--workers is 1000; allowed: 1 to"),
        (["--trials", "0"], "argument --trials: 0 is not a positive whole number"),
        (["--force"], "--force needs --apply"),
        (["--study", "two\nlines"], "argument --study: a study's name has 1 to 100 characters, all on one line"),
        (["--study", "x" * 10_000], "argument --study: a study's name has 1 to 100 characters, all on one line"),
    ],
)
def test_fault_28_arguments_that_make_no_sense_are_refused(
    study_folder: Path,
    arguments: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    with pytest.raises((SystemExit, UserError)) as refusal:
        tune.main()
    assert line in (capsys.readouterr().err or str(refusal.value))
    assert not JOURNAL.exists()


@pytest.mark.parametrize("fault", ["no GPU", "no images"])
def test_missing_inputs_are_reported_before_the_first_trial(study_folder: Path, fault: str) -> None:
    if fault == "no GPU":
        write_params(study_folder, SMALL | {"train.device": "cuda"})
        line = refused(CUDA_VISIBLE_DEVICES="")
        assert line == "params.yaml: train.device is cuda, but torch finds no GPU; allowed here: auto | cpu"
    else:
        (study_folder / "data/prepared/validation.safetensors").unlink()
        line = refused()
        assert "validation.safetensors" in line
    assert not JOURNAL.exists()


def test_a_missing_storage_is_reported_in_one_line(study_folder: Path) -> None:
    line = refused(code=1, OPTUNA_STORAGE="sqlite:////nowhere/study.db")
    assert line == "the study's storage failed: unable to open database file"


@pytest.mark.slow
def test_two_studies_at_once_in_one_folder_are_refused(study_folder: Path) -> None:
    with start() as first:
        wait_for_trials(1)
        first.send_signal(signal.SIGSTOP)  # else it may have ended before the second has begun, on a busy machine
        assert refused() == "another study is running in this folder: wait for it, or stop it"
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert len(trials()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_is_resumed(study_folder: Path, sent: signal.Signals) -> None:
    write_params(study_folder, SMALL | {"tune.epochs": 8})
    with start() as interrupted:
        wait_for_trials(3)
        interrupted.send_signal(sent)
        assert interrupted.wait(30) == 128 + sent
    assert parent().info.status == "KILLED"
    assert {child.info.status for child in children()} <= {"FINISHED", "KILLED", "FAILED"}
    assert not any(trial.state == TrialState.RUNNING for trial in trials())
    done = [trial for trial in trials() if counts(trial)]
    run()
    check_that_nothing_is_lost(done, total=4)
    assert parent().info.status == "FINISHED"


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 2, 4, 7, 11, 16, 21, 26, 31, 36])
@pytest.mark.parametrize("killed", ["study", "worker"])
def test_fault_14_what_is_killed_loses_no_trial(study_folder: Path, killed: str, lines: int) -> None:
    with start() as study:
        wait_for_lines(lines)
        done = [trial for trial in trials() if counts(trial)] if lines > 2 else []
        if killed == "worker":
            everyone = psutil.Process(study.pid).children()
            workers = [each for each in everyone if "pipeline.tuning.worker" in each.cmdline()]
            for worker in workers[:1]:  # there may be none any more
                worker.kill()
            assert study.wait(120) == 0
        else:
            study.kill()
    run()
    check_that_nothing_is_lost(done, total=4)
    assert parent().info.status == "FINISHED"


@pytest.mark.faults
@pytest.mark.slow
def test_fault_14_a_worker_that_is_killed_at_a_trial_has_it_tried_again(study_folder: Path) -> None:
    write_params(study_folder, SMALL | {"tune.epochs": 6})
    with start() as study:
        wait_for_epochs(3)
        for worker in psutil.Process(study.pid).children():
            worker.kill()
        assert study.wait(120) == 0
    lost = [trial for trial in trials() if not counts(trial)]
    assert lost
    assert all(trial.state == TrialState.FAIL for trial in lost)
    check_that_nothing_is_lost([], total=4)


@pytest.mark.faults
@pytest.mark.slow
def test_fault_16_half_a_line_in_the_journal_is_cut_off_and_a_stale_lock_is_not_waited_for(study_folder: Path) -> None:
    run("--trials", "2")
    done = trials()
    with JOURNAL.open("a") as journal:
        journal.write('{"op_code":4,"worker_id":"x","stu')
    JOURNAL.with_name(JOURNAL.name + ".lock").symlink_to(JOURNAL)  # as Optuna makes it
    run()
    check_that_nothing_is_lost(done, total=4)


@pytest.mark.faults
@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"garbage", b"[1]", b"\xff"])
def test_fault_16_a_damaged_line_of_the_journal_is_named(study_folder: Path, damage: bytes) -> None:
    small_study()
    content = JOURNAL.read_bytes()
    first, rest = content.split(b"\n", 1)
    for lines in (first + b"\n" + damage + b"\n" + rest, first + b"\n" + damage + b"\n"):
        JOURNAL.write_bytes(lines)
        with pytest.raises(Fault, match=r"tuning/study\.journal: line 2 is damaged \(.*\): restore a copy of the file"):
            open_storage()


def test_an_empty_journal_is_said(study_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    JOURNAL.parent.mkdir()
    JOURNAL.touch()
    open_storage()
    assert capsys.readouterr().out == "tuning/study.journal is empty: the study begins anew\n"


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(study_folder: Path) -> None:
    with start(stderr=subprocess.PIPE) as study:
        wait_for_trials(2)
        done = [trial for trial in trials() if counts(trial)]
        room = JOURNAL.stat().st_size + 10  # half a line
        resource.prlimit(study.pid, resource.RLIMIT_FSIZE, (room, room))
        _, complaint = study.communicate(timeout=120)
    (line,) = complaint.decode().splitlines()
    assert study.returncode == 1
    assert "failed: " in line
    run()
    check_that_nothing_is_lost(done, total=4)


@pytest.mark.slow
def test_a_locked_database_is_reported_in_one_line_and_loses_nothing(study_folder: Path) -> None:
    url = f"sqlite:///{study_folder / 'study.db'}"
    run("--trials", "2", OPTUNA_STORAGE=url)
    with sqlite3.connect("study.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        line = refused(code=1, OPTUNA_STORAGE=url)
        other.rollback()
    assert line == "the study's storage failed: database is locked"
    run("--trials", "3", OPTUNA_STORAGE=url)
    assert len(optuna.load_study(study_name="convtrack", storage=url).trials) == 3


def test_a_storage_without_its_driver_is_reported_in_one_line(study_folder: Path) -> None:
    line = refused(OPTUNA_STORAGE="postgresql+pg8000://host/study")
    assert line == (
        "OPTUNA_STORAGE needs the package pg8000, which is not installed; "
        "for PostgreSQL: pip install 'psycopg[binary]', and a URL that begins with postgresql+psycopg://"
    )


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["study", "worker", "interrupted"])
def test_finalists_resume_after_a_kill_and_none_is_trained_twice(study_folder: Path, killed: str) -> None:
    write_params(study_folder, SMALL | {"tune.trials": 2, "tune.seeds": 4, "tune.epochs": 5})
    with start() as study:
        wait_for_finalists(2)
        before = [trial for trial in finalist_trials() if trial[0] == "COMPLETE"]
        if killed == "worker":
            for worker in psutil.Process(study.pid).children():
                worker.kill()
        else:
            study.send_signal(signal.SIGINT if killed == "interrupted" else signal.SIGKILL)
        assert (study.wait(120) == 0) == (killed == "worker")
    run()
    complete = [trial for trial in finalist_trials() if trial[0] == "COMPLETE"]
    assert complete[: len(before)] == before
    assert len(complete) == len(set(complete)) == 8
    assert {state for state, _ in finalist_trials()} == {"COMPLETE", "FAIL"}  # those that were interrupted


@pytest.mark.slow
def test_a_finalist_that_fails_ends_the_command_and_is_tried_again(study_folder: Path) -> None:
    space = {"train.learning_rate": {"choices": [0.001, 1e6]}}
    write_params(study_folder, SMALL | {"train.learning_rate": 1e6, "tune.space": space})
    for _ in range(2):
        line = refused("--workers", "1", code=1)
        assert re.match(r"current with seed \d+ failed: DivergedError: the training loss is", line)
    assert [state for state, _ in finalist_trials()] == ["FAIL", "FAIL"]
    assert parent().info.status == "FAILED"


def test_finalists_that_are_no_longer_wanted_are_not_trained(study_folder: Path) -> None:
    search = small_study()
    earlier, present = Finalist(3, {"model.dropout": 0.1}, 1), Finalist(None, {"model.dropout": 0.5}, 1)
    first = open_finalists(search, [earlier])
    trial = first.next()
    assert trial is not None
    first.requeue(trial)
    now = open_finalists(search, [present])
    started = [trial for trial in (now.next(), now.next(), now.next(), now.next()) if trial is not None]
    assert [now.values_of(trial)["model.dropout"] for trial in started] == [0.5, 0.5]
    assert not now.needs_another_trial()
    assert not now.is_done()


def test_a_study_may_not_take_the_name_of_the_finalists(study_folder: Path) -> None:
    open_finalists(small_study(), [])
    with pytest.raises(UserError, match="the study convtrack finalists was created with"):
        small_study("convtrack finalists")


def check_that_nothing_is_lost(done: list[FrozenTrial], total: int) -> None:
    """Those that had ended are as they were; as many as were asked for count; MLflow has all, none of them running."""
    after = trials()
    assert [after[trial.number] for trial in done] == done
    assert sum(map(counts, after)) == total
    assert any(trial.params == PRESENT and counts(trial) for trial in after)
    assert not any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in after)
    assert sorted(int(child.data.tags["trial.number"]) for child in children()) == list(range(len(after)))
    assert not any(child.info.status == "RUNNING" for child in children())


def start(stderr: int | None = None) -> "subprocess.Popen[bytes]":
    return forked.Popen(command(), env=environment_tags(), stdout=subprocess.DEVNULL, stderr=stderr)


def wait_for_lines(count: int) -> None:
    """Until the journal has ``count`` lines."""
    wait_until(lambda: JOURNAL.read_bytes().count(b"\n") >= count)


def wait_for_epochs(count: int) -> None:
    """Until the trials have been trained for ``count`` epochs in all."""
    wait_until(lambda: sum(len(trial.intermediate_values) for trial in trials()) >= count)


def wait_for_finalists(count: int) -> None:
    """Until ``count`` trainings of finalists have been started."""
    wait_until(lambda: len(finalist_trials()) >= count)


def wait_for_trials(count: int) -> None:
    """Until ``count`` trials have been started."""
    wait_until(lambda: JOURNAL.read_text().count('"op_code":4') >= count + 1)


def wait_until(reached: Callable[[], bool]) -> None:
    """Fails after five minutes; a busy machine takes one to start a study and its workers."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, KeyError):  # no journal yet, no such study in it yet
            if reached():
                return
        time.sleep(0.01)
    raise AssertionError("the study has not come so far")
