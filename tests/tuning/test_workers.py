"""The workers: what they send, that one alone dies when it is killed, and that they end with the coordinator."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, closing
from pathlib import Path

import psutil
import pytest

from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.params import read_params
from pipeline.tuning.workers import Done, Failed, Message, Workers
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _workers_find_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the tests run in other folders


@pytest.fixture
def one(workspace: Path) -> Iterator[Workers]:
    """A worker that is ready."""
    with closing(started(1)) as workers:
        yield workers


def started(count: int) -> Workers:
    workers = Workers(count, threads=1)
    wait_until_idle(workers, count)
    return workers


def wait_until_idle(workers: Workers, count: int = 1) -> None:
    for _ in range(600):
        if sum(worker.is_idle for worker in workers._workers) == count:
            return
        assert workers.messages(0.1) == []
    raise AssertionError("a worker is not ready")


def until_ended(workers: Workers, proceed: bool = True) -> list[tuple[int, Message]]:
    """All messages until each trial has ended."""
    received = []
    while workers.trials:
        for trial, message in workers.messages(1):
            received.append((trial, message))
            if isinstance(message, Epoch):
                workers.reply(trial, proceed)
    return received


def accuracies(received: list[tuple[int, Message]], trial: int) -> list[float]:
    return [each.validation_accuracy for number, each in received if number == trial and isinstance(each, Epoch)]


def test_two_workers_train_and_send_each_epoch(workspace: Path) -> None:
    params = read_params()
    with closing(started(2)) as workers:
        workers.assign(1, params)
        workers.assign(2, params.changed({"seed": 1}))
        assert not workers.has_idle
        both = until_ended(workers)
        assert workers.has_idle
        workers.assign(3, params)
        again = until_ended(workers)
    assert sorted(trial for trial, message in both if isinstance(message, Epoch)) == [1, 1, 2, 2]
    assert [both.count((trial, Done())) for trial in (1, 2)] == [1, 1]
    assert accuracies(both, 1) == accuracies(again, 3) != accuracies(both, 2)


def test_a_trial_that_is_stopped_trains_no_further(one: Workers) -> None:
    one.assign(1, read_params())
    assert [type(message).__name__ for _, message in until_ended(one, proceed=False)] == ["Epoch", "Done"]


def test_a_network_that_does_not_fit_is_not_tried_again(one: Workers) -> None:
    one.assign(1, read_params().changed({"model.kernel_size": 15}))
    ((trial, message),) = until_ended(one)
    assert trial == 1
    assert isinstance(message, Failed)
    assert "block 2 does not fit the 7 x 7 pixels" in message.reason
    assert not message.retry


def test_a_worker_that_is_killed_in_a_trial_is_reported_and_replaced(one: Workers) -> None:
    one.assign(1, read_params().changed({"train.epochs": 1000}))
    one.messages(60)
    (killed,) = workers_of(os.getpid())
    os.kill(killed, signal.SIGKILL)
    *_, last = until_ended(one)
    assert last == (1, Failed("its worker was killed by signal 9", retry=True))
    wait_until_idle(one)
    one.assign(2, read_params())
    assert until_ended(one)[-1] == (2, Done())
    one.close()
    assert workers_of(os.getpid()) == []


def test_a_worker_that_is_killed_between_two_trials_is_replaced(one: Workers) -> None:
    (killed,) = workers_of(os.getpid())
    os.kill(killed, signal.SIGKILL)
    assert one.messages(60) == []
    wait_until_idle(one)
    assert workers_of(os.getpid()) != [killed]
    one.assign(1, read_params())
    assert until_ended(one)[-1] == (1, Done())


def test_a_worker_that_cannot_start_ends_the_study_with_one_error(tmp_path: Path) -> None:
    with (
        chdir(tmp_path),
        closing(Workers(1, threads=1)) as workers,
        pytest.raises(Fault, match=r"a worker could not start: it ended with exit code 2"),
    ):
        wait_until_idle(workers)


def test_workers_that_are_killed_at_their_start_are_not_replaced_for_ever(workspace: Path) -> None:
    with (
        closing(Workers(1, threads=1)) as workers,
        pytest.raises(Fault, match=r"a worker could not start: it was killed by signal 9"),
    ):
        for _ in range(10):
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)
            assert workers.messages(60) == []


def test_workers_end_when_the_coordinator_is_killed(workspace: Path) -> None:
    code = (
        "from pipeline.tuning.workers import Workers; from pipeline.params import read_params\n"
        "workers = Workers(1, 1)\n"
        "while not workers.has_idle: workers.messages(1)\n"
        "workers.assign(1, read_params().changed({'train.epochs': 1000})); workers.messages(60)\n"
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
