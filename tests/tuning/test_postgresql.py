"""A study in PostgreSQL, which several machines share: a real server, started here, and a folder for each machine."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import psutil
import psycopg
import pytest
from mlflow import MlflowClient
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.splits import read_dataset
from pipeline.errors import Fault
from pipeline.model.training import Epoch
from pipeline.params import read_params
from pipeline.tracking import store
from pipeline.tuning import storage
from pipeline.tuning.storage import database_lock, open_storage
from pipeline.tuning.study import counts, open_study
from tests import forked
from tests.conftest import free_port, write_params
from tests.test_tune import PRESENT, SMALL, command, environment_tags
from tests.tracking.test_versions import OLDER, make_older_database

PASSWORD = "not to be seen"


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian keeps off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


PROGRAMS = programs()
# A database server is not a Python package, so `make setup` cannot install it, and the study's default storage, a file,
# needs none: a clone without it must be able to run the other tests. CI is not let through without it (.ci/run).
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAMS is None,
        reason="starts a PostgreSQL server of its own; pip cannot install its programs (initdb, pg_ctl), and they are "
        "not on this machine: apt-get install postgresql",
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The start of a URL, to which the name of a database is added."""
    assert PROGRAMS is not None
    # The server refuses to run as root, and another user may not enter pytest's folders.
    user = "nobody" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="convtrack-") as temporary:
        folder = Path(temporary)
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            shutil.chown(path, user or os.getuid())
        initdb: list[str | Path] = ["-D", folder / "data", "-U", "convtrack", "-A", "scram-sha-256"]
        run("initdb", *initdb, f"--pwfile={folder / 'password'}", user=user)
        port = free_port()
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control: list[str | Path] = ["-D", folder / "data", "-w", "-l", folder / "log"]
        run("pg_ctl", *control, "-o", options, "start", user=user)
        try:
            yield f"postgresql+psycopg://convtrack:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/"
        finally:
            run("pg_ctl", *control, "-m", "immediate", "stop", user=user)


def run(program: str, *arguments: str | Path, user: str | None) -> None:
    assert PROGRAMS is not None
    subprocess.run([PROGRAMS / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/", user=user)


@pytest.fixture
def database(server: str) -> str:
    """The URL of an empty database."""
    name = f"study_{uuid.uuid4().hex}"
    with connection(server + "postgres") as administrator:
        administrator.execute(f"CREATE DATABASE {name}".encode())
    return server + name


def connection(url: str) -> "psycopg.Connection[Any]":
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


@pytest.fixture
def machines(workspace: Path, tmp_path: Path) -> list[Path]:
    """Four folders with the same small study in their params.yaml and the same images."""
    write_params(workspace, SMALL | {"tune.trials": 6})
    return [workspace, *(shutil.copytree(workspace, tmp_path / name, symlinks=True) for name in ("b", "c", "d"))]


def start(machine: Path, database: str, python: str | None = None) -> "subprocess.Popen[str]":
    """The study; its worker is a process of ``python``, by default one that is forked."""
    forked_python, *rest = command("--workers", "1")
    return forked.Popen(
        [python or forked_python, *rest],
        cwd=machine,
        env=environment_tags(OPTUNA_STORAGE=database, DVC_ROOT=str(machine)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", seconds: float = 300) -> str:
    """What it printed, after it ended well."""
    printed, said = process.communicate(timeout=seconds)
    complaints = [line for line in said.splitlines() if not line.startswith("waiting: ")]  # for each other's lock
    assert (process.returncode, complaints) == (0, [])
    return printed


def trials(database: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="convtrack", storage=RDBStorage(database)).get_trials(deepcopy=False)


def wait_until_running(database: str) -> FrozenTrial:
    for _ in range(300):
        time.sleep(0.1)
        with connection(database) as looking:
            if looking.execute("SELECT to_regclass('version_info')").fetchone() == (None,):
                continue
            if looking.execute("SELECT count(*) FROM studies").fetchone() == (0,):
                continue
        running = [trial for trial in trials(database) if trial.state == TrialState.RUNNING]
        if running and len(running[0].params) == len(PRESENT):  # they are written one by one
            return running[0]
    raise AssertionError("no trial was begun")


def children(machine: Path) -> list[int]:
    """The numbers of the trials that the machine's own MLflow has a run of."""
    client = MlflowClient(f"sqlite:///{machine / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(store.EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert not any(run.info.status == "RUNNING" for run in found)
    assert sum("study.id" in run.data.tags for run in found) == 1
    return sorted(int(run.data.tags["trial.number"]) for run in found if "trial.number" in run.data.tags)


@pytest.mark.faults
def test_fault_18_four_machines_make_one_study_of_an_empty_database(machines: list[Path], database: str) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(start(machine, database)) for machine in machines]
        printed = [ended(process) for process in processes]
    assert optuna.get_all_study_names(storage=database) == ["convtrack", "convtrack finalists"]
    finalists = optuna.load_study(study_name="convtrack finalists", storage=RDBStorage(database)).get_trials()
    assert [trial.state for trial in finalists] == [
        TrialState.COMPLETE
    ] * 4  # two with two seeds, all machines together
    assert len({str(trial.system_attrs["fixed_params"]) for trial in finalists}) == 4
    found = trials(database)
    assert [trial.number for trial in found] == list(range(6))
    assert all(map(counts, found))
    # The current values are tried once, by whichever machine is first.
    assert [trial.number for trial in found if trial.params == PRESENT][:1] == [0]
    for machine, lines in zip(machines, printed, strict=True):
        assert "6/6 trials" in lines
        assert children(machine) == list(range(6))
        assert PASSWORD not in lines


@pytest.mark.faults
def test_fault_18_eight_machines_run_no_trial_too_many(
    workspace: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their trials end at once, so that all of them ask for the last one at the same moment, 20 times."""
    write_params(workspace, SMALL)
    monkeypatch.setenv("OPTUNA_STORAGE", database)
    with database_lock():
        open_storage()  # makes the tables
    together = [forked.start(run_without_training, 20, 3, folder=workspace) for _ in range(8)]
    assert [forked.ended(each, 300) for each in together] == [0] * 8
    for number in range(20):
        found = optuna.load_study(study_name=f"round {number}", storage=database).get_trials()
        assert [trial.number for trial in found] == list(range(3))
        assert all(map(counts, found))


def run_without_training(rounds: int, total: int) -> None:
    """The studies `round 0` and on, each to its end: a trial is complete once it is started."""
    params, dataset, opened = read_params(), read_dataset(), open_storage()
    for number in range(rounds):
        with database_lock():
            study = open_study(opened, f"round {number}", params, dataset, total)
        while not study.is_done():
            trial = study.next() if study.needs_another_trial() else None
            if trial is not None:
                study.finish(trial, [Epoch(1, 1.0, 0.1, 1.0, 0.1, 0.0, 0.0, 0.1)], pruned=False)


def test_who_holds_the_lock_is_said_after_two_seconds_of_waiting(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", database)
    monkeypatch.setattr(storage, "IDLE_TIMEOUT", 4)
    with pytest.raises(Fault, match="idle-in-transaction timeout"), database_lock():
        assert capsys.readouterr().err == ""
        with database_lock():
            pass
        said = capsys.readouterr().err
        assert said == f"waiting: process {os.getpid()} on {platform.node()} holds the lock of the study\n"


def test_a_machine_that_stands_still_while_it_starts_a_trial_stops_no_other(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", database)
    monkeypatch.setattr(storage, "IDLE_TIMEOUT", 1)
    with (
        pytest.raises(Fault, match=r"^the study's storage failed: .*idle-in-transaction timeout"),
        database_lock(),
        database_lock(),  # taken once the server has ended the transaction of the first
    ):
        pass


def test_the_trials_of_a_dead_machine_are_run_again(machines: list[Path], database: str) -> None:
    with start(machines[0], database) as dies:
        lost = wait_until_running(database)
        workers = psutil.Process(dies.pid).children()
        dies.kill()
        psutil.wait_procs(workers, timeout=60)
    with start(machines[1], database) as goes_on:
        printed = ended(goes_on)
    assert "5/6 trials, 1 running elsewhere" in printed
    found = trials(database)
    assert found[lost.number].state == TrialState.FAIL
    assert not counts(found[lost.number])
    assert sum(map(counts, found)) == 6
    assert [trial.number for trial in found if trial.params == lost.params and counts(trial)]


@pytest.mark.faults
def test_fault_15_a_machine_that_stands_still_for_too_long_gives_no_result_twice(
    machines: list[Path], database: str
) -> None:
    for machine in machines:
        write_params(machine, SMALL | {"tune.trials": 4, "tune.epochs": 6})
    with start(machines[0], database, sys.executable) as stands_still:  # a forked worker would not be stopped
        given_up = wait_until_running(database)
        coordinator = psutil.Process(stands_still.pid)
        everyone = [coordinator, *coordinator.children(recursive=True)]
        for process in everyone:
            process.suspend()
        try:
            with start(machines[1], database) as goes_on:
                ended(goes_on)
            before = [trial for trial in trials(database) if counts(trial)]
        finally:
            for process in everyone:
                process.resume()
        ended(stands_still)
    found = trials(database)
    assert found[given_up.number].state == TrialState.FAIL
    assert [trial for trial in found if counts(trial)] == before
    assert len(before) == 4
    # Both also report the abandoned trial, and nothing is reported twice.
    everything = sorted([given_up.number, *(trial.number for trial in before)])
    assert children(machines[0]) == children(machines[1]) == everything


def test_two_machines_with_one_tracking_store_write_each_trial_once(
    machines: list[Path], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{machines[0] / 'mlflow.db'}")
    with start(machines[0], database) as one, start(machines[1], database) as other:
        ended(one)
        ended(other)
    assert children(machines[0]) == list(range(6))


def test_a_trial_that_others_have_given_up_is_left_to_them(machines: list[Path], database: str) -> None:
    with start(machines[0], database) as process:
        given_up = wait_until_running(database)
        RDBStorage(database).set_trial_state_values(given_up._trial_id, TrialState.FAIL)
        ended(process)
    found = trials(database)
    assert found[given_up.number].state == TrialState.FAIL
    assert sum(map(counts, found)) == 6


def test_a_locked_table_is_reported_in_one_line(machines: list[Path], database: str) -> None:
    write_params(machines[0], SMALL | {"tune.trials": 2})
    with start(machines[0], database) as first:
        ended(first)
    write_params(machines[0], SMALL | {"tune.trials": 3})
    with connection(database) as other, other.transaction():
        other.execute("LOCK TABLE trials IN ACCESS EXCLUSIVE MODE")
        process = start(machines[0], database)
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = complaint.splitlines()
    assert line.startswith("error: the study's storage failed: ")
    assert "lock timeout" in line
    assert PASSWORD not in line
    with start(machines[0], database) as again:
        ended(again)
    assert sum(map(counts, trials(database))) == 3


@pytest.mark.faults
def test_fault_36_the_older_tracking_database_of_a_team_is_not_migrated(
    workspace: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_older_database(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    with pytest.raises(
        Fault, match="is a database of an older MLflow, which cannot read it after a migration: "
    ) as said:
        store.connect()
    assert PASSWORD not in str(said.value)
    with connection(database) as looking:
        assert looking.execute("SELECT version_num FROM alembic_version").fetchone() == (OLDER,)


@pytest.mark.faults
def test_a_server_that_goes_away_is_reported_in_one_line(machines: list[Path], database: str) -> None:
    """As when it is stopped: it closes all connections, and takes no new ones."""
    with start(machines[0], database) as process:
        wait_until_running(database)
        name = database.rpartition("/")[2]
        with connection(database.replace(name, "postgres")) as administrator:
            administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = complaint.splitlines()
    assert re.match(r"error: the study's storage failed: \w", line)
    assert PASSWORD not in line


@pytest.mark.faults
def test_fault_30_a_wrong_password_is_reported_without_printing_it(machines: list[Path], database: str) -> None:
    process = start(machines[0], database.replace("convtrack:", "convtrack:wrong%20"))
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = complaint.splitlines()
    assert line.startswith("error: the study's storage failed: ")
    assert "password authentication failed" in line
    assert "wrong" not in line
