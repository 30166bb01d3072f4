"""A function called in a process of its own gives its answer, its refusal, or how the process ended."""

import io
import os
import signal
from pathlib import Path
from typing import IO

import pytest

from pipeline.data import own_process
from pipeline.errors import UserError


def process_and_content(file: IO[bytes], name: str, suffix: str) -> tuple[int, bytes, str]:
    return os.getpid(), file.read(), name + suffix


def refuse(file: IO[bytes], name: str) -> None:
    raise UserError(f"{name} is not welcome")


def crash(file: IO[bytes], name: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("form", ["path", "file", "memory"])
def test_the_answer_is_that_of_the_function_elsewhere(tmp_path: Path, form: str) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        forms: dict[str, Path | IO[bytes]] = {"path": path, "file": file, "memory": io.BytesIO(b"content")}
        process, content, text = own_process.call(process_and_content, forms[form], "it", " is here")
    assert process != os.getpid()
    assert (content, text) == (b"content", "it is here")


def test_a_refusal_is_the_same_and_a_crash_is_named() -> None:
    with pytest.raises(UserError, match=r"^it is not welcome$"):
        own_process.call(refuse, io.BytesIO(), "it")
    with pytest.raises(UserError, match=r"^it cannot be read: decoding it ended with SIGSEGV$"):
        own_process.call(crash, io.BytesIO(), "it")
