"""Exit codes and the one line that goes with them."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Fault, UserError, run_command, without_password


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
