"""Exit codes and the one line that goes with them."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import Fault, UserError, run_command


@pytest.fixture(autouse=True)
def _signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))
