"""The program of tests/forked.py that stands in for Python: a command that it forks behaves as one of Python's own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import forked

COMMAND = """
import os, sys, time
print(os.getpid(), os.getcwd(), os.environ["GIVEN"], os.read(int(sys.argv[1]), 9), sys.argv[2:], input(), flush=True)
if "sleep" in sys.argv:
    time.sleep(60)
sys.exit(3)
"""


def start(python: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    (folder / "command.py").write_text(COMMAND)
    ours, theirs = os.pipe()
    os.write(theirs, b"piped")
    os.close(theirs)
    process = subprocess.Popen(
        [python, "-m", "command", str(ours), *arguments],
        cwd=folder,
        env=os.environ | {"GIVEN": "ü"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[ours],
    )
    os.close(ours)
    return process


def test_it_gets_what_python_gets_and_ends_with_its_own_code(tmp_path: Path) -> None:
    said = []
    for python in (forked.python(), sys.executable):
        with start(python, tmp_path, "a b", "") as process:
            printed, _ = process.communicate("typed\n", timeout=60)
        assert process.returncode == 3
        said.append(printed.partition(" ")[2])
    assert said[0] == said[1]
    assert "b'piped' ['a b', ''] typed" in said[0]


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGKILL"])
def test_it_ends_with_a_signal_to_the_program(tmp_path: Path, sent: str) -> None:
    number = getattr(signal, sent)
    with start(forked.python(), tmp_path, "sleep") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        command = psutil.Process(int(process.stdout.readline().split()[0]))
        process.send_signal(number)
        assert process.wait(30) == -number
        command.wait(30)
