"""Where a store keeps its files: after its repository was moved or copied, and when it is outside the repository."""

import itertools
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as tracking_utils

from pipeline import doctor, files, ui
from pipeline.errors import Fault, UserError
from pipeline.tracking import addresses, promotion, registry, runs, sqlite_files, store
from tests.conftest import OWN_MOUNTS, REPOSITORY, free_port, make_ui, needs_namespaces
from tests.drawn import drawn
from tests.tracking.registering import NAME


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process that is started in ``folder``: mlflow remembers where a run has its files."""
    tracking_utils._artifact_repos_cache.clear()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def locations(folder: Path) -> set[str]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        columns = [database.execute(f"SELECT {column} FROM {table}") for table, column in sqlite_files.LOCATIONS]
        found = {str(location) for rows in columns for (location,) in rows if location}
    return {location for location in found if not location.endswith("/mlruns/0")}  # that of the copied database


def log_a_file() -> Path:
    """In a new run: where it lies."""
    with mlflow.start_run() as run:
        mlflow.log_text("text", "a.txt")
    (path,) = Path.cwd().rglob(f"{run.info.run_id}/artifacts/a.txt")
    return path


@pytest.mark.faults
def test_fault_48_a_copied_and_then_moved_repository_keeps_its_runs_and_writes_into_no_other_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    copied, moved = tmp_path / "a copy", tmp_path / "100%25 moved?"
    shutil.copytree(finished, copied)
    enter(copied, monkeypatch)
    store.connect()
    assert capsys.readouterr().err == (
        f"this repository was copied from {finished}, which keeps its own: the locations in mlflow.db are now those of "
        f"{copied}; the database as it was is in mlflow.db.before-move\n"
    )
    assert (copied / "mlflow.db.before-move").exists()
    log_a_file()
    store.connect()
    assert capsys.readouterr().err == ""
    assert contents(finished) == before

    copied.rename(moved)
    enter(moved, monkeypatch)
    store.connect()
    assert f"this repository was moved from {copied}: the locations" in capsys.readouterr().err
    log_a_file()
    for place in locations(moved):
        assert place.startswith(((moved / "mlruns").as_uri(), "models:/")), place
    champion = registry.find("champion")
    assert registry.load(champion).preprocessing.resize == "strokes"
    assert promotion._logged_predictions(champion, champion.tags["predictions.sha256"]) is not None
    runs.log_files(str(champion.run_id), [moved / files.METRICS], "again")
    assert (moved / f"mlruns/{champion.run_id}/artifacts/again/metrics.json").exists()
    assert not copied.exists()
    assert contents(finished) == before


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository, in which commands are started from here on."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    enter(folder, monkeypatch)
    return folder


@pytest.mark.faults
def test_fault_48_doctor_finds_the_champion_of_a_copied_repository(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = doctor._registry()
    assert line == f"{NAME} version 1 is the champion"
    assert "this repository was copied from" in capsys.readouterr().err
    assert not [place for place in locations(copied) if str(finished) in place]


@pytest.mark.faults
def test_fault_48_locations_that_cannot_be_updated_are_one_line_and_stay(copied: Path) -> None:
    (copied / "mlflow.db.before-move").mkdir()
    before = locations(copied)
    with pytest.raises(Fault, match=r"the locations in .* are those of .*, and cannot be updated .*: make its folder"):
        store.connect()
    assert locations(copied) == before


READ_ONLY = 'mount --bind "$PWD" "$PWD" && mount -o remount,ro,bind "$PWD" && cd "$PWD" && exec "$@"'


def on_a_read_only_disk(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """`python -m pipeline.<command>` in ``folder``, which nobody can write, not even root."""
    return subprocess.Popen(
        [*OWN_MOUNTS, "sh", "-c", READ_ONLY, "sh", sys.executable, "-m", f"pipeline.{command[0]}", *command[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_namespaces
@pytest.mark.faults
@pytest.mark.slow
def test_fault_35_the_champion_of_a_store_that_can_only_be_read_is_used(good: Path, tmp_path: Path) -> None:
    drawn(7, 20).save(tmp_path / "7.png")
    before = contents(good)
    for command in (
        ("predict", str(tmp_path / "7.png")),
        ("models",),
        ("models", "--history"),
        ("export", "--format", "pt2", "--out", str(tmp_path / "model.pt2")),
    ):
        with on_a_read_only_disk(good, *command) as process:
            _, errors = process.communicate()
        assert (process.returncode, errors) == (0, ""), command
    with on_a_read_only_disk(good, "serve", "--port", str(free_port())) as process:
        assert process.stdout is not None
        assert "is served at" in "".join(itertools.islice(process.stdout, 2))
        process.terminate()
    assert contents(good) == before


@needs_namespaces
@pytest.mark.faults
@pytest.mark.slow
def test_fault_48_a_copy_that_can_only_be_read_says_what_it_lacks(good: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(good, copied)
    with on_a_read_only_disk(copied, "models") as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith(
        f"error: the locations in {copied / 'mlflow.db'} are those of {good}, and cannot be updated ("
    )


@pytest.mark.faults
@pytest.mark.parametrize("given", ["sqlite:///team.db", "sqlite:///sub/../team.db?timeout=20"])
def test_fault_49_a_relative_store_is_in_the_repository_and_not_in_a_temporary_copy(
    workspace: Path, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """`dvc exp run --temp` and `--queue` run the stages in a copy that is deleted, and set DVC_ROOT."""
    (workspace / "sub").mkdir()
    shutil.copy(migrated_database, workspace / "team.db")
    temporary = tmp_path / "temporary copy"
    temporary.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.chdir(temporary)
    store.connect()
    with mlflow.start_run() as run:
        mlflow.log_text("text", "a.txt")
    assert list(temporary.iterdir()) == []
    assert sqlite_files.finds_row(workspace / "team.db", "SELECT 1 FROM runs WHERE run_uuid = ?", run.info.run_id)
    assert (workspace / f"mlruns/{run.info.run_id}/artifacts/a.txt").exists()


@pytest.mark.faults
def test_fault_49_two_clones_keep_the_files_of_a_common_database_beside_it(
    workspace: Path, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.copy(migrated_database, shared / "team.db")
    for name in ("one", "other"):
        shutil.copytree(workspace, tmp_path / name)
        enter(tmp_path / name, monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses.sqlite_address(shared / "team.db"))
        store.connect()
        with mlflow.start_run() as run:
            mlflow.log_text("text", "a.txt")
        assert (shared / f"mlruns/{run.info.run_id}/artifacts/a.txt").exists()
        assert not (tmp_path / name / "mlruns").exists()


@pytest.fixture
def team_store(workspace: Path, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SQLite store outside the repository, the one in use."""
    database = tmp_path / "shared/team.db"
    database.parent.mkdir()
    shutil.copy(migrated_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses.sqlite_address(database))
    return database


def begin_experiment(database: Path, location: str, has_runs: bool = True) -> None:
    """The experiment as earlier releases made it, elsewhere, with a run or without."""
    client = MlflowClient(addresses.sqlite_address(database))
    number = client.create_experiment(store.EXPERIMENT)
    sqlite_files.set_location(database, store.EXPERIMENT, location)
    if has_runs:
        client.set_terminated(client.create_run(number).info.run_id)


def location_of_runs(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as found:
        return [uri for (uri,) in found.execute("SELECT artifact_uri FROM runs ORDER BY rowid")]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("{tmp}/deleted/mlruns", "which does not exist any more"),
        ("file://{tmp}/deleted/mlruns/1", "which does not exist any more"),
        ("{tmp}/clone/.dvc/tmp/exps/tmpx/mlruns", "which DVC deletes"),
        ("{tmp}/other/mlruns/1", "which belongs to one of its clones"),
        ("./mlruns/1", "which depends on where a command is started"),
        ("file:mlruns", "which depends on where a command is started"),
    ],
)
def test_fault_49_new_runs_of_a_store_whose_files_would_get_lost_have_theirs_beside_it(
    team_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], location: str, reason: str
) -> None:
    location = location.format(tmp=tmp_path)
    (tmp_path / "clone/.dvc/tmp/exps/tmpx/mlruns").mkdir(parents=True)
    (tmp_path / "other/mlruns").mkdir(parents=True)
    (tmp_path / "other/dvc.yaml").touch()
    begin_experiment(team_store, location)
    before = location_of_runs(team_store)
    capsys.readouterr()
    store.connect()
    assert capsys.readouterr().err == (
        f"{team_store} has the files of the experiment convtrack in {location}, {reason}: those of new runs will be in "
        f"{(team_store.parent / 'mlruns').as_uri()}; the database as it was is in team.db.before-move\n"
    )
    store.connect()
    assert capsys.readouterr().err == ""
    with mlflow.start_run() as run:
        mlflow.log_text("text", "a.txt")
    assert (team_store.parent / f"mlruns/{run.info.run_id}/artifacts/a.txt").exists()
    assert location_of_runs(team_store)[:-1] == before == location_of_runs(Path(f"{team_store}.before-move"))


@pytest.mark.faults
@pytest.mark.parametrize("stays", [False, True], ids=["the folder", "what is in it"])
def test_fault_49_a_store_that_is_moved_with_its_files_finds_them_and_adds_to_them_there(
    workspace: Path,
    team_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stays: bool,
) -> None:
    store.connect()
    with mlflow.start_run() as old:
        mlflow.log_text("text", "a.txt")
    with mlflow.start_run() as without_files:
        pass
    before, moved = team_store.parent, tmp_path / "moved"
    before.rename(moved)
    if stays:
        before.mkdir()
    enter(workspace, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses.sqlite_address(moved / "team.db"))
    capsys.readouterr()
    store.connect()
    assert capsys.readouterr().err == (
        f"{moved}/team.db was moved from {before}: the locations in team.db are now those of {moved}; the database as "
        "it was is in team.db.before-move\n"
    )
    store.connect()
    assert capsys.readouterr().err == ""
    for run in (old, without_files):
        runs.log_files(run.info.run_id, [workspace / "params.yaml"], "later")
        assert (moved / f"mlruns/{run.info.run_id}/artifacts/later/params.yaml").exists()
    assert mlflow.artifacts.load_text(f"runs:/{old.info.run_id}/a.txt") == "text"
    assert not [path for path in before.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("location", "has_runs"),
    [("{tmp}/a disk/artifacts", True), ("{tmp}/not yet/mlruns", False), ("s3://bucket/mlruns", True)],
)
def test_an_experiment_whose_files_somebody_wants_elsewhere_keeps_them_there(
    team_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], location: str, has_runs: bool
) -> None:
    (tmp_path / "a disk").mkdir()
    location = location.format(tmp=tmp_path)
    begin_experiment(team_store, location, has_runs)
    capsys.readouterr()
    store.connect()
    assert capsys.readouterr().err == ""
    assert MlflowClient().get_experiment(store.experiment_id()).artifact_location == location
    assert not Path(f"{team_store}.before-move").exists()


@pytest.mark.faults
def test_fault_49_a_store_that_cannot_be_changed_is_read_with_a_warning(
    team_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_experiment(team_store, f"{tmp_path}/deleted/mlruns")
    Path(f"{team_store}.before-move").mkdir()
    capsys.readouterr()
    store.connect()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {team_store} has the files of the experiment convtrack in {tmp_path}/deleted/")
    assert "which does not exist any more, and that cannot be changed (" in said
    assert said.endswith("): make its folder writable\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["100%25", "q'u\"o", "what?", "#1", "ü \u6f22"])
def test_an_address_names_the_file_that_it_was_made_of(name: str, tmp_path: Path, migrated_database: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    address = addresses.sqlite_address(folder / "mlflow.db")
    assert addresses.sqlite_path(address) == folder / "mlflow.db"
    client = MlflowClient(address)
    client.create_experiment("here")
    assert sqlite_files.finds_row(folder / "mlflow.db", "SELECT 1 FROM experiments WHERE name = ?", "here")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("value", ["plain", "q'u", 'q"u', "q'u\"o", "' or name != '", "100%", "a\\b"])
@pytest.mark.usefixtures("workspace")
def test_a_search_finds_the_text_whatever_quotes_are_in_it(value: str) -> None:
    store.connect()
    client = MlflowClient()
    for each in (value, "another"):
        client.create_run(store.experiment_id(), tags={"a.tag": each})
        client.create_registered_model(each)
        client.create_model_version(each, "source")
    (found,) = client.search_runs([store.experiment_id()], store.equals("tags.`a.tag`", value))
    assert found.data.tags["a.tag"] == value
    (version,) = registry.versions(value)
    assert version.name == value


@pytest.mark.slow
@pytest.mark.faults
def test_fault_48_the_page_of_a_copied_repository_shows_the_files_of_its_runs(finished: Path, copied: Path) -> None:
    with make_ui(copied, os.environ) as port:
        champion = MlflowClient(f"http://127.0.0.1:{port}").get_model_version_by_alias(NAME, "champion")
        page = f"http://127.0.0.1:{port}/get-artifact"
        asked = {"path": "figures/learning_curves.png", "run_uuid": str(champion.run_id)}
        found = requests.get(page, asked, timeout=30).content
    assert found == (copied / files.FIGURES / "learning_curves.png").read_bytes()
    assert not [place for place in locations(copied) if str(finished) in place]


def test_the_page_is_refused_before_anything_is_started(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["ui", "--port", str(port)])
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be listened at .*: choose another --port"):
            ui.main()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    with pytest.raises(UserError, match=r"a server, which has these pages itself: open http://mlflow.example:5000"):
        ui.main()
