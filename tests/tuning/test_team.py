"""The workers: what they say, that they die alone, and that they do not outlive who they work for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable
from pathlib import Path

import psutil
import pytest

from pipeline.network.training import Epoch
from pipeline.params import read_params
from pipeline.tuning.messages import Done, Failed, Lost, Message
from pipeline.tuning.team import Team, team
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _workers_find_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the tests run in other folders


def said(hired: Team, answers: bool = True) -> list[tuple[Hashable, Message]]:
    """All that the workers say until each has said its last word."""
    heard = []
    while hired.tasks:
        for task, message in hired.messages(1):
            heard.append((task, message))
            if not isinstance(message, Done | Failed | Lost):
                hired.answer(task, answers)
    return heard


def test_two_workers_train_and_say_each_epoch(workspace: Path) -> None:
    params = read_params().changed({"train.threads": 1})
    with team(2) as hired:
        hired.give("a", params)
        hired.give("b", params.changed({"seed": 1}))
        assert not hired.has_idle
        heard = said(hired)
        assert hired.has_idle
        hired.give("again", params)
        again = said(hired)
        hired.give("stopped", params)
        stopped = said(hired, answers=False)
        hired.give("does not fit", params.changed({"model.kernel_size": 15}))
        failed = said(hired)
    assert sorted(str(task) for task, _ in heard) == ["a", "a", "a", "b", "b", "b"]
    accuracies = {
        task: [
            message.validation_accuracy
            for name, message in heard + again
            if name == task and isinstance(message, Epoch)
        ]
        for task in ("a", "b", "again")
    }
    assert accuracies["a"] == accuracies["again"] != accuracies["b"]
    assert [type(message).__name__ for _, message in stopped] == ["Epoch", "Done"]
    ((task, message),) = failed
    assert task == "does not fit"
    assert isinstance(message, Failed)
    assert "block 2's filter (15 x 15) is larger than" in message.reason


def test_a_worker_that_is_killed_is_told_of_and_replaced(workspace: Path) -> None:
    params = read_params().changed({"train.threads": 1})
    with team(1) as hired:
        hired.give("a", params.changed({"train.epochs": 1000}))
        hired.messages(60)
        (worker,) = workers_of(os.getpid())
        os.kill(worker, signal.SIGKILL)
        (heard,) = [message for message in said(hired) if isinstance(message[1], Lost)]
        assert heard == ("a", Lost("its worker was killed by signal 9"))
        hired.give("b", params)
        assert isinstance(said(hired)[-1][1], Done)
    assert workers_of(os.getpid()) == []


def test_workers_end_when_nobody_is_left_to_hear_them(workspace: Path) -> None:
    code = (
        "from pipeline.tuning.team import Team; from pipeline.params import read_params\n"
        "team = Team(1); team.give('a', read_params().changed({'train.epochs': 1000})); team.messages(60)\n"
        "print('ready', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as coordinator:
        assert coordinator.stdout is not None
        assert coordinator.stdout.readline() == "ready\n"
        (worker,) = workers_of(coordinator.pid)
        coordinator.kill()
    for _ in range(200):
        if not is_alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def workers_of(parent: int) -> list[int]:
    children = psutil.Process(parent).children()
    return [child.pid for child in children if "pipeline.tuning.worker" in child.cmdline()]


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
