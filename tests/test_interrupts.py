"""Ctrl-C and SIGTERM: every command ends with the same exit codes and one line, and leaves nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import REPOSITORY

STAGES = ("prepare", "train", "evaluate", "visualize")
OTHERS = ("tune", "predict x.png", "export --format onnx --out x", "serve", "models")
BRIEF = ("results", "verify", "doctor")  # they open few files before they end here
# It waits where it opens its so manieth file after it has begun: the libraries are there, the command is at work. Only
# what the main thread opens counts: that is the one which a signal wakes.
PROGRAM = """
import itertools, sys, threading, time
from pipeline import {command}
from pipeline.errors import run_command
opened = itertools.count(1)
def wait(event, arguments):
    if event == "open" and threading.current_thread() is threading.main_thread() and next(opened) == {file}:
        print("waits", flush=True)
        for _ in range(600):  # a signal that comes between two calls is heeded after the next one
            time.sleep(0.1)
sys.addaudithook(wait)
run_command({command}.main)
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("command", "file"), [*((name, file) for name in (*STAGES, *OTHERS) for file in (1, 12)), *((n, 1) for n in BRIEF)]
)
def test_fault_2_every_command_ends_alike(finished_copy: Path, command: str, sent: str, file: int) -> None:
    name, *arguments = command.split()
    there = {path: path.stat().st_mtime_ns for path in finished_copy.rglob("*") if path.is_file()}
    process = forked.Popen(
        [sys.executable, "-c", PROGRAM.format(command=name, file=file), *arguments],
        cwd=finished_copy,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(finished_copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "waits\n" in iter(process.stdout.readline, ""), process.communicate()
    process.send_signal(getattr(signal, sent))
    _, errors = process.communicate(timeout=30)
    code, lines = {"SIGINT": (130, "interrupted\n"), "SIGTERM": (143, "")}[sent]
    assert (process.returncode, errors) == (code, lines)
    outputs = [path for path in there if "mlflow.db" not in path.name]
    assert {path: path.stat().st_mtime_ns for path in outputs} == {path: there[path] for path in outputs}


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu", "_pydantic_core"])
@pytest.mark.parametrize("command", ["train", "models"])
def test_fault_2_ctrl_c_while_the_libraries_are_loaded_is_one_line(
    finished_copy: Path, command: str, library: str
) -> None:
    """From the moment on in which this one is there: each comes a second or so after the one before."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"pipeline.{command}"],
        cwd=finished_copy,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(finished_copy)},
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
