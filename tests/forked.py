"""Commands as processes of their own, without the three seconds in which each imports its libraries.

Such a process is forked from one that has imported them and done nothing else. Tests of what happens before or while a
command imports start `python -m pipeline.<name>` instead.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Not the commands themselves, which are run as `python -m` does: as a module that nobody has imported.
LIBRARIES = [
    *("pipeline.explain.report", "pipeline.data.sources", "pipeline.recipe", "pipeline.tuning.plots"),
    *("pipeline.tracking.registry", "pipeline.tracking.serving", "mlflow.store.tracking.sqlalchemy_store"),
    *("git", "mlflow.pyfunc.model", "mlflow.pytorch", "mlxtend.data", "opentelemetry.sdk.trace"),
    *("torch._dynamo", "torch._functorch.partitioners", "torch.export._trace", "tests.preloaded"),
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, *LIBRARIES])


class Popen(subprocess.Popen[Any]):
    """A subprocess.Popen of [python, "-m", module, *arguments] or [python, "-c", code, *arguments].

    Of the other arguments it takes cwd, env, those for the streams, and text.
    """

    _close_pipe_fds: Callable[..., None]  # subprocess's own, of which mypy does not know

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        *others: Any,
    ) -> None:
        _, _, _, *pipes = others[:9]
        streams = {}
        for number, own in enumerate((pipes[0], pipes[3], pipes[5])):
            if own != -1:
                streams[number] = Connection(os.dup(own), readable=number == 0, writable=number > 0)
        self._process = start(_become, args[1:], streams, folder=cwd or Path.cwd(), environment=env)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._child_created = True
        for own in streams.values():
            own.close()
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def run(
    name: str, arguments: tuple[str, ...], folder: Path, stdin: bytes, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """`python -m pipeline.<name>` in ``folder``: its exit code and what it wrote. Raises TimeoutExpired."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", f"pipeline.{name}", *arguments]
    with Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            written = process.communicate(stdin, timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *written)


def call(function: Callable[..., None], *arguments: object, folder: Path, seconds: float) -> int:
    """``function`` in ``folder``, as a process of its own: its exit code, minus the number of a signal that ends it."""
    return ended(start(function, *arguments, folder=folder), seconds)


def start(
    function: Callable[..., None], *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """As `call`, without waiting for its end."""
    with chdir(Path(__file__).parents[1]):  # from where the libraries are imported, the first time
        forkserver.ensure_running()
    process = _FORKS.Process(target=_call, args=(function, arguments, folder, dict(environment or os.environ)))
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
    assert set(LIBRARIES) < set(sys.modules), "Python does not say why it could not import them"
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _become(command: list[str], streams: "dict[int, Connection[Any, Any]]") -> None:
    for number, stream in streams.items():
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = os.fdopen(0)
    option, program, *arguments = command
    sys.argv = [program, *arguments]
    try:
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which a process that multiprocessing has started leaves out
