"""--help, wrong arguments and a closed pipe, at every command, as a person types it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import command_line, export
from tests.conftest import REPOSITORY

each_command = pytest.mark.parametrize("command", command_line.DESCRIPTIONS)


def start(command: str, *arguments: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", f"pipeline.{command}", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_command_has_its_arguments_here() -> None:
    files = (REPOSITORY / "pipeline").glob("*.py")
    assert {file.stem for file in files if "__main__" in file.read_text()} == set(command_line.DESCRIPTIONS)


def test_the_formats_are_those_that_can_be_written() -> None:
    assert tuple(export.WRITERS) == command_line.FORMATS


@pytest.mark.faults
@each_command
def test_fault_39_help_is_shown_before_anything_is_loaded_or_written(command: str, tmp_path: Path) -> None:
    before = os.times().children_user
    process = start(command, "--help", folder=tmp_path)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith(f"usage: python -m pipeline.{command} ")
    assert command_line.DESCRIPTIONS[command] in " ".join(printed.split())
    assert os.times().children_user - before < 0.3  # importing torch alone takes two seconds of this
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@each_command
def test_fault_39_an_argument_that_a_command_does_not_take_is_refused(command: str, tmp_path: Path) -> None:
    process = start(command, "--wrong", folder=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"python -m pipeline.{command}: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_fault_39_a_picture_is_no_argument_of_visualize(tmp_path: Path) -> None:
    process = start("visualize", "my.png", folder=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.endswith("error: unrecognized arguments: my.png\n")


@pytest.mark.faults
def test_fault_39_a_reader_that_goes_away_is_not_an_error(finished: Path) -> None:
    process = start("models", folder=finished)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before it has printed anything
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("before", "line"),
    [
        ("sys.platform = 'win32'", "error: this project needs Linux or another Unix; on Windows, run it in WSL\n"),
        (
            "os.environ['NUMBA_DISABLE_JIT'] = '1'",
            "error: NUMBA_DISABLE_JIT is set, and the loops of this project need",
        ),
        ("sys.warnoptions.append('error')", "error: PYTHONWARNINGS makes the warnings of libraries errors: unset it\n"),
    ],
)
def test_what_no_command_can_run_with_is_said_before_anything_is_loaded(before: str, line: str, tmp_path: Path) -> None:
    code = f"import os, sys; {before}; sys.argv = ['-m']; import pipeline"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("PYTHONOPTIMIZE", "2", "error: PYTHONOPTIMIZE is 2, and MLflow does not work without docstrings: "),
        ("PYTHONWARNINGS", "error", "error: PYTHONWARNINGS makes the warnings of libraries errors: "),
    ],
)
def test_settings_of_python_that_libraries_do_not_survive_are_refused(name: str, value: str, line: str) -> None:
    environment = os.environ | {name: value}
    command = [sys.executable, "-m", "pipeline.results"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.faults
def test_code_that_pip_has_installed_writes_nothing_beside_itself(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "pipeline", tmp_path / "site-packages/pipeline")
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.models"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "site-packages")},
        capture_output=True,
        text=True,
        check=False,
    )
    installed = tmp_path / "site-packages"
    assert done.stderr == f"error: {installed} is not a repository of this project: run the command in a clone of it\n"
    assert done.returncode == 2
    assert [path.name for path in installed.iterdir()] == ["pipeline"]


def test_make_says_that_a_source_archive_is_no_repository_before_it_installs_anything(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    done = subprocess.run(["make", "repro"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a Git repository" in done.stderr
    assert not (tmp_path / ".venv").exists()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    assert subprocess.run(["make", "repository"], cwd=tmp_path, check=False).returncode == 0
