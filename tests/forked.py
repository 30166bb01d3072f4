"""Commands as processes of their own, without the three seconds in which each imports its libraries.

Such a process is forked from one that has imported them and done nothing else. Tests of what happens before or while a
command imports start `python -m pipeline.<name>` instead.

What a command starts itself is forked too where it is started with the program `python()`.
"""

import atexit
import fcntl
import functools
import gc
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import fork_client
from tests.fork_client import SIZE

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

    Of the other arguments it takes cwd, env, those for the streams, and text. What the command itself starts with
    sys.executable is started with this python.
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
        self._process = start(_become, args, streams, folder=cwd or Path.cwd(), environment=env)
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
    command = [python(), "-m", f"pipeline.{name}", *arguments]
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
    sys.executable, option, program, *arguments = command
    sys.argv = [option, *arguments]
    try:
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which a process that multiprocessing has started leaves out


@functools.cache
def python() -> str:
    """The path of a program `python` whose `-m` is forked by a server, which this process starts and ends."""
    folder = Path(tempfile.mkdtemp(prefix="convtrack-"))  # the address of a socket must be short
    atexit.register(shutil.rmtree, folder)
    address = folder / "socket"
    command = [sys.executable, "-I", "-S", fork_client.__file__, str(address)]
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        server = start(_serve, Connection(os.dup(listening.fileno())), folder=folder)
    atexit.register(server.kill)
    return str(program)


def _serve(listening: "Connection[Any, Any]") -> None:
    """Returns in the processes of the commands alone, once each has ended."""
    with socket.socket(fileno=os.dup(listening.fileno())) as server:
        listening.close()
        gc.freeze()  # else each command collects the garbage of all libraries again
        parent = os.getppid()
        server.settimeout(5)
        while os.getppid() == parent:  # the tests go on
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                server.close()
                return _fork(client)
            client.close()
    return None


def _fork(client: socket.socket) -> None:
    """Run the client's command in one more process, and tell the client how it ended."""
    head, files, *_ = socket.recv_fds(client, SIZE, 100)
    # Out of the way of the numbers that they are about to get.
    files = [_moved(file) for file in files]
    with client.makefile("rb") as request:
        command, folder, environment, numbers = json.loads(request.read(int.from_bytes(head)))
    process = os.fork()
    if process == 0:
        client.close()
        for file, number in zip(files, numbers, strict=True):
            os.dup2(file, number)
            os.close(file)
        return _call(_become_python, (command,), folder, environment)
    for file in files:
        os.close(file)
    client.sendall(process.to_bytes(SIZE, signed=True))
    threading.Thread(target=_kill_with, args=(client, process), daemon=True).start()
    _, status = os.waitpid(process, 0)
    client.sendall(os.waitstatus_to_exitcode(status).to_bytes(SIZE, signed=True))
    os._exit(0)


def _moved(file: int) -> int:
    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100)
    os.close(file)
    return int(moved)


def _kill_with(client: socket.socket, process: int) -> None:
    """End the command with its client."""
    with suppress(ConnectionError):
        client.recv(1)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _become_python(command: list[str]) -> None:
    """With the project's modules from where Python would find them, which may be a copy."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "pipeline":
            del sys.modules[name]
    own = str(Path(__file__).parents[1])
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path = [str(Path.cwd()), *paths, *(path for path in sys.path if path not in ("", own))]
    sys.orig_argv = [sys.executable, *command]  # from which pipeline.startup sees that this is a command
    _become(sys.orig_argv, {})
