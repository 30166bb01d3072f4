"""Exit codes and the one line that goes with them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Fault, UserError, counted, run_command, without_password
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _signal_handler() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        (lambda: None, 0, ""),
        (raising(UserError("fix it")), 2, "error: fix it\n"),
        (raising(Fault("it broke")), 1, "error: it broke\n"),
        (
            raising(OSError(28, "No space left on device", "models")),
            1,
            "error: [Errno 28] No space left on device: 'models'\n",
        ),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, ""),
    ],
)
def test_every_end_has_its_exit_code_and_its_line(
    capsys: pytest.CaptureFixture[str], command: Callable[[], None], code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.faults
@pytest.mark.parametrize("pause", [0.0, 0.003, 0.05])
def test_fault_2_rapid_interrupts_are_one(tmp_path: Path, pause: float) -> None:
    """It still ends in order: what it does at its end takes a moment."""
    code = """
import sys, time
from pipeline.errors import run_command
def command():
    try:
        print("waits", flush=True)
        while True:
            time.sleep(0.01)
    finally:
        time.sleep(0.5)
        open("ended", "w").close()
run_command(command)
"""
    with start(code, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        for _ in range(50):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        assert process.communicate(timeout=30)[1] == b"interrupted\n"
    assert process.returncode == 130
    assert (tmp_path / "ended").exists()


@pytest.mark.faults
def test_fault_2_an_interrupt_after_a_while_ends_what_does_not_end(tmp_path: Path) -> None:
    code = """
import time
from pipeline import errors
errors.PATIENCE = 0.2
def command():
    try:
        print("waits", flush=True)
        time.sleep(60)
    finally:
        print("cleans up", flush=True)
        time.sleep(60)
errors.run_command(command)
"""
    with start(code, tmp_path) as process:
        assert process.stdout is not None
        for line in (b"waits\n", b"cleans up\n"):
            assert process.stdout.readline() == line
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == b"interrupted\n"
    assert process.returncode == 130


def start(code: str, folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 patches"), (1, "1 patch"), (2, "2 patches"), (1200, "1,200 patches")]
)
def test_one_thing_is_named_in_the_singular(number: int, said: str) -> None:
    assert counted(number, "patch", "es") == said


# Letters of no language, so that a secret is found wherever it is left.
SECRETS = st.text(st.sampled_from("@/:#?%ß¤§"), max_size=4).map(lambda more: f"hush{more}hush")


@pytest.mark.faults
@given(
    SECRETS, st.sampled_from(["postgresql+psycopg", "http", "s3"]), st.sampled_from(["host", "host:5432", "[::1]:80"])
)
def test_fault_30_a_password_in_a_url_is_hidden_whatever_is_in_it(secret: str, scheme: str, host: str) -> None:
    line = f"error: the store '{scheme}://mary:{secret}@{host}/db' failed: {scheme}://{host}/ does not answer"
    assert "hush" not in without_password(line)
    assert without_password(line).count(f"{host}/") == 2


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("postgresql://host/db?user=u&password=hush&port=1", "postgresql://host/db?user=u&password=***&port=1"),
        ("https://host/x?sslmode=require;SSLPassword=hush", "https://host/x?sslmode=require;SSLPassword=***"),
        ("s3://b?aws_secret_access_key=hush&token=hush", "s3://b?aws_secret_access_key=***&token=***"),
        ("could not connect: host=h password='hu sh' user=u", "could not connect: host=h password=*** user=u"),
        ("http://u:hush@a, http://v:hush@b", "http://***@a, http://***@b"),
        ("https://hush@host/x", "https://***@host/x"),
        ("see http://127.0.0.1:5000/#/models/name@champion", "see http://127.0.0.1:5000/#/models/name@champion"),
        ("models:/mnist-cnn@champion", "models:/mnist-cnn@champion"),
    ],
)
def test_fault_30_only_secrets_are_hidden(line: str, shown: str) -> None:
    assert without_password(line) == shown
