"""Commands as processes of their own, without the three seconds in which each imports its libraries.

Such a process is forked from one that has imported them and done nothing else. Tests of what happens before or while a
command imports, and of how it ends at a signal, start `python -m pipeline.<name>` instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

# Not the commands themselves, which are run as `python -m` does: as a module that nobody has imported.
LIBRARIES = [
    *("pipeline.explain.report", "pipeline.data.sources", "pipeline.recipe", "pipeline.tuning.plots"),
    *("pipeline.tracking.registry", "pipeline.tracking.serving", "mlflow.store.tracking.sqlalchemy_store"),
    *("git", "mlflow.pyfunc.model", "mlflow.pytorch", "mlxtend.data", "opentelemetry.sdk.trace"),
    *("torch._dynamo", "torch._functorch.partitioners", "torch.export._trace", "tests.preloaded"),
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, *LIBRARIES])


def run(
    name: str, arguments: tuple[str, ...], folder: Path, stdin: bytes, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """`python -m pipeline.<name>` in ``folder``: its exit code and what it wrote. Raises TimeoutError."""
    with chdir(Path(__file__).parents[1]):  # from where the libraries are imported, the first time
        forkserver.ensure_running()
    with TemporaryDirectory() as exchanged:
        streams = [Path(exchanged) / each for each in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(stdin)
        process = _FORKS.Process(target=_become, args=(name, arguments, folder, streams, dict(environment)))
        process.start()
        code = ended(process, seconds)
        written = [stream.read_bytes() for stream in streams[1:]]
    return subprocess.CompletedProcess([name, *arguments], code, *written)


def call(function: Callable[..., None], *arguments: object, folder: Path, seconds: float) -> int:
    """``function`` in ``folder``, as a process of its own: its exit code, minus the number of a signal that ends it."""
    return ended(start(function, *arguments, folder=folder), seconds)


def start(function: Callable[..., None], *arguments: object, folder: Path) -> BaseProcess:
    """As `call`, without waiting for its end."""
    with chdir(Path(__file__).parents[1]):
        forkserver.ensure_running()
    process = _FORKS.Process(target=_call, args=(function, arguments, folder, dict(os.environ)))
    process.start()
    return process


def ended(process: BaseProcess, seconds: float) -> int:
    """The exit code of the process, once it has ended. Raises TimeoutError."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process.name} is still at work after {seconds:.0f} s")
    return process.exitcode


def _call(
    function: Callable[..., None], arguments: tuple[object, ...], folder: Path, environment: dict[str, str]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _become(
    name: str, arguments: tuple[str, ...], folder: Path, streams: list[Path], environment: dict[str, str]
) -> None:
    assert set(LIBRARIES) < set(sys.modules), "Python does not say why it could not import them"
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0)
    sys.argv = [name, *arguments]
    runpy.run_module(f"pipeline.{name}", run_name="__main__", alter_sys=True)
