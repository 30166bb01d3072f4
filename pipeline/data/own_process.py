"""A function that is called in a process of its own, for what takes much memory there: this one has PyTorch's too.

What ends that process, such as a fault of a C library, does not end this one.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
Answer = TypeVar("Answer")
CODE = """
import importlib, pickle, sys
module, function, file, arguments = pickle.load(sys.stdin.buffer)
from pipeline.errors import UserError
try:
    with open(file, "rb") as content:
        content.seek(0)
        answer = getattr(importlib.import_module(module), function)(content, *arguments)
except UserError as error:
    answer = error
pickle.dump(answer, sys.stdout.buffer)
"""


def call(function: Callable[..., Answer], file: Path | IO[bytes], name: str, *arguments: object) -> Answer:
    """The answer of ``function(file, name, *arguments)``, a function of a module, which gets the file at its beginning.

    Raises the UserError that it raises, or one that says how the process ended without an answer.
    """
    if isinstance(file, Path):
        with file.open("rb") as content:
            return call(function, content, name, *arguments)
    with tempfile.TemporaryFile() as copy:
        try:
            number = file.fileno()
        except OSError:  # it is in memory, as those of a zip are
            copy.write(file.getvalue() if hasattr(file, "getvalue") else file.read())
            copy.flush()
            number = copy.fileno()
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            input=pickle.dumps((function.__module__, function.__name__, number, (name, *arguments))),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[number],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            check=False,
        )
    if done.returncode:
        raise UserError(f"{name} cannot be read: decoding it ended with {_ending(done.returncode)}")
    answer: Answer | UserError = pickle.loads(done.stdout)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _ending(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
