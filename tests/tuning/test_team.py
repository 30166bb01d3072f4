"""The workers: what they say, that they die alone, and that they do not outlive who they work for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable
from contextlib import chdir
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from pipeline.data.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.params import Params, read_params
from pipeline.tuning import worker
from pipeline.tuning.messages import GO_ON, Done, Failed, Lost, Message, Threads
from pipeline.tuning.team import Team, team
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _workers_find_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the tests run in other folders


def said(team_of_workers: Team, answers: bool = True) -> list[tuple[Hashable, Message]]:
    """All that the workers say until each has said its last word."""
    heard = []
    while team_of_workers.tasks:
        for task, message in team_of_workers.messages(1):
            heard.append((task, message))
            if not isinstance(message, Done | Failed | Lost):
                team_of_workers.answer(task, answers)
    return heard


def test_two_workers_train_and_say_each_epoch(workspace: Path) -> None:
    params = read_params()
    with team(2, cores=2) as team_of_workers:
        team_of_workers.give("a", params)
        team_of_workers.give("b", params.changed({"seed": 1}))
        assert not team_of_workers.has_idle
        heard = said(team_of_workers)
        assert team_of_workers.has_idle
        team_of_workers.give("again", params)
        again = said(team_of_workers)
        team_of_workers.give("stopped", params)
        stopped = said(team_of_workers, answers=False)
        team_of_workers.give("does not fit", params.changed({"model.kernel_size": 15}))
        failed = said(team_of_workers)
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


@pytest.mark.parametrize(
    ("changed", "threads"),
    [
        ({"train.batch_size": 128}, [1, 2, 1, 2]),
        pytest.param({"train.batch_size": 64}, [1, 1, 1, 1], marks=pytest.mark.slow),
        pytest.param({"train.batch_size": 128, "model.batch_norm": True}, [1, 1, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_idle_cores_go_to_those_at_work_where_no_bit_changes(
    changed: dict[str, object], threads: list[int], workspace: Path
) -> None:
    params = read_params().changed({"train.epochs": 4} | changed)
    found, idle, accuracies = list[int](), list[bool](), list[float]()
    with team(2, cores=2) as team_of_workers:
        team_of_workers.give("a", params)
        team_of_workers.give("b", params.changed({"seed": 1}))
        narrow = [message for task, message in said(team_of_workers) if task == "a" and isinstance(message, Epoch)]
        team_of_workers.give("a", params)
        while team_of_workers.tasks:
            for task, message in team_of_workers.messages(1):
                if isinstance(message, Epoch):
                    accuracies.append(message.validation_accuracy)
                    team_of_workers.answer(task, go_on=True)
                    if len(found) % 2 == 1:
                        team_of_workers.spread()
                    else:
                        team_of_workers.reclaim()
                    found.append(team_of_workers.threads(task))
                    idle.append(team_of_workers.has_idle)
    assert found == threads
    assert idle == [count == 1 for count in threads]  # a worker without work must not begin on a core that is in use
    assert accuracies == [epoch.validation_accuracy for epoch in narrow]


@pytest.mark.slow
def test_two_at_work_on_two_cores_keep_one_each(workspace: Path) -> None:
    with team(2, cores=2) as team_of_workers:
        team_of_workers.give("a", read_params().changed({"train.batch_size": 128}))
        team_of_workers.give("b", read_params().changed({"train.batch_size": 128}))
        while len(team_of_workers.tasks) == 2:
            for task, message in team_of_workers.messages(1):
                if isinstance(message, Epoch):
                    team_of_workers.answer(task, go_on=True)
                    team_of_workers.spread()
                    assert sum(map(team_of_workers.threads, team_of_workers.tasks)) <= 2
                    assert team_of_workers.threads(task) == 1 or len(team_of_workers.tasks) == 1


def test_a_worker_trains_on_as_many_threads_as_it_is_told(workspace: Path, prepared: Path) -> None:
    class Line:
        """The worker's end of the connection, with what is said at the other end written down before."""

        def __init__(self) -> None:
            params = read_params().changed({"train.epochs": 3, "train.threads": 1})
            self.to_come: list[object] = [params, Threads(2), GO_ON, Threads(1), GO_ON, GO_ON]
            self.steps, self.threads = 0, list[int]()

        def recv(self) -> object:
            return self.to_come.pop(0)

        def poll(self) -> bool:
            """After some steps of each epoch, something is said."""
            self.steps += 1
            return self.steps % 20 == 0 and isinstance(self.to_come[0], Threads)

        def send(self, message: Message) -> None:
            self.threads.append(torch.get_num_threads())

    dataset, before, line = read_dataset(), torch.get_num_threads(), Line()
    worker._train(cast(Any, line), dataset, read_split(dataset, TRAIN), read_split(dataset, VALIDATION))
    torch.set_num_threads(before)
    assert line.threads == [2, 1, 1, 1]  # three epochs, each told of in its midst, and that it is done
    assert line.to_come == []


def test_a_worker_that_is_killed_is_told_of_and_replaced(workspace: Path) -> None:
    params = read_params()
    with team(1, cores=1) as team_of_workers:
        team_of_workers.give("a", params.changed({"train.epochs": 1000}))
        team_of_workers.messages(60)
        (killed,) = workers_of(os.getpid())
        os.kill(killed, signal.SIGKILL)
        (heard,) = [message for message in said(team_of_workers) if isinstance(message[1], Lost)]
        assert heard == ("a", Lost("its worker was killed by signal 9"))
        team_of_workers.give("b", params)
        assert isinstance(said(team_of_workers)[-1][1], Done)
    assert workers_of(os.getpid()) == []


def test_a_worker_that_cannot_begin_ends_the_study_and_not_one_trial_after_the_other(tmp_path: Path) -> None:
    with chdir(tmp_path), team(1, cores=1) as team_of_workers:
        team_of_workers.give("a", Params())
        with pytest.raises(Fault, match=r"a worker could not begin: it ended with exit code 2"):
            said(team_of_workers)


def test_workers_end_when_nobody_is_left_to_hear_them(workspace: Path) -> None:
    code = (
        "from pipeline.tuning.team import Team; from pipeline.params import read_params\n"
        "team = Team(1, 1); team.give('a', read_params().changed({'train.epochs': 1000})); team.messages(60)\n"
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
        (left,) = workers_of(coordinator.pid)
        coordinator.kill()
    for _ in range(200):
        if not is_alive(left):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def workers_of(parent: int) -> list[int]:
    children = psutil.Process(parent).children()
    return [child.pid for child in children if "pipeline.tuning.worker" in child.cmdline()]


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
