"""The champion gate while others are at it, and when it is killed: real processes on a real registry."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import evaluate, files
from pipeline.model import model_file
from pipeline.tracking import promotion, registry, store
from tests import forked
from tests.conftest import QUICK, REPOSITORY, write_params
from tests.tracking.evaluating import change_model, kill

NAME = "mnist-5k-cnn"
NEEDED = {
    "model.sha256",
    "data.sha256",
    "params.sha256",
    "test.sha256",
    "predictions.sha256",
    "gate.decision",
    "recipe",
}
ROUNDS = 50


def start(*arguments: str, folder: Path, root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tracking.evaluating", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def versions() -> dict[str, ModelVersion]:
    """By number, each with all its tags and its card."""
    store.connect()
    found = {str(each.version): each for each in MlflowClient().search_model_versions(f"name = '{NAME}'")}
    for each in found.values():
        assert set(each.tags) >= NEEDED
        assert "## Metrics on the " in str(each.description)
    return found


def champion() -> str:
    return aliases()["champion"]


def aliases() -> dict[str, str]:
    """The version of each; none where nothing is registered yet."""
    found = MlflowClient().search_registered_models(f"name = '{NAME}'")
    return {alias: str(number) for model in found for alias, number in model.aliases.items()}


@pytest.mark.faults
@pytest.mark.slow
def test_fault_23_two_that_evaluate_at_once_leave_one_champion_and_lose_none(
    finished_copy: Path, tmp_path: Path
) -> None:
    meeting_point = tmp_path / "meeting point"
    meeting_point.mkdir()
    sides = []
    for side in range(2):
        shutil.copytree(finished_copy, tmp_path / str(side))
        arguments = (str(meeting_point), str(side), str(ROUNDS))
        sides.append(start(*arguments, folder=tmp_path / str(side), root=finished_copy))
    for process in sides:
        _, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors.decode()
    found = versions()
    assert len(found) == 2 * ROUNDS
    errors_of = {number: int(each.tags["test.error_count"]) for number, each in found.items()}
    assert errors_of[champion()] == min(errors_of.values())
    records = [record.version for record in promotion.history(NAME)]
    assert records[-1] == champion()
    assert len(records) > 5  # the models get better, from round to round
    for before, after in itertools.pairwise(records):  # each took over from the one before, and nobody else
        assert found[after].tags["gate.against"] == f"version {before}"
        assert errors_of[after] < errors_of[before]
    promoted = {number for number, each in found.items() if each.tags["gate.decision"] == "champion"}
    assert promoted == set(records)


NOTHING_PASSES = QUICK | {"evaluate.promotion.max_parameters": 1}


def _the_first(better: bytes, worse: bytes) -> None:
    files.write(files.MODEL, better)


def _a_better_one(better: bytes, worse: bytes) -> None:
    files.write(files.MODEL, worse)
    evaluate.main()
    files.write(files.MODEL, better)


def _a_worse_one(better: bytes, worse: bytes) -> None:
    files.write(files.MODEL, better)
    evaluate.main()
    files.write(files.MODEL, worse)


def _a_challenger_that_now_passes(better: bytes, worse: bytes) -> None:
    files.write(files.MODEL, better)
    write_params(Path.cwd(), NOTHING_PASSES)
    evaluate.main()
    write_params(Path.cwd(), QUICK)


def _a_way_back(better: bytes, worse: bytes) -> None:
    _a_better_one(better, worse)
    evaluate.main()


def _log_without_the_gate() -> None:
    """Log the model that is here to its run, which each step would otherwise do once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion, "register", _end)
        with suppress(KeyboardInterrupt):
            evaluate.main()


def _end(*_: object) -> None:
    raise KeyboardInterrupt


SITUATIONS: dict[
    Callable[[bytes, bytes], None], tuple[dict[str, str], dict[str, str], list[str]]
] = {  # how it comes to it; who has the alias before and after; the history after
    _the_first: ({}, {"champion": "1"}, ["1"]),
    _a_better_one: ({"champion": "1"}, {"champion": "2"}, ["1", "2"]),
    _a_worse_one: ({"champion": "1"}, {"champion": "1", "challenger": "2"}, ["1"]),
    _a_challenger_that_now_passes: ({"challenger": "1"}, {"champion": "1"}, ["1"]),
    _a_way_back: ({"champion": "2"}, {"champion": "1"}, ["1", "2", "1"]),
}


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_fault_23_a_gate_that_is_killed_at_any_step_is_completed_by_the_next(
    finished_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    situation: Callable[[bytes, bytes], None],
) -> None:
    better = files.MODEL.read_bytes()
    change_model(model_file.from_bytes(better), seed=3)
    situation(better, files.MODEL.read_bytes())
    before, after, records = SITUATIONS[situation]
    what = "back" if situation is _a_way_back else "evaluate"
    _log_without_the_gate()
    step = 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(finished_copy, folder)
        monkeypatch.setenv("DVC_ROOT", str(folder))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow left that of the step before
        monkeypatch.chdir(folder)
        code = forked.call(kill, what, step, when, folder=folder, seconds=300)
        found = versions()  # with all their tags
        if code == 0:
            break
        assert code == -signal.SIGKILL
        held = aliases()
        assert held.get("champion") in (before.get("champion"), after["champion"])
        if held:
            assert registry.load(found[next(iter(held.values()))])
        if what == "evaluate":
            evaluate.main()
        elif held != after:
            promotion.roll_back(None)
        assert aliases() == after
        assert len(versions()) == max(map(int, [*before.values(), *after.values()]))
        assert [record.version for record in promotion.history(NAME)] == records
    assert aliases() == after
    assert step > 3
