"""Pictures from strangers -> images of the network, in a process of its own with limits of time and memory.

What a picture does to a decoder in C (a crash, an endless loop, all memory) ends that process and not the server, and
another one is started. ``Decoder`` is the server's side, ``serve`` the process; they send each other bytes.
"""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.data import image_files
from pipeline.data.image_files import Preprocessing
from pipeline.errors import Fault, UserError

SECONDS = 30.0  # within which the pictures of one request must be decoded
START_SECONDS = 60.0  # within which the process must be ready
MEMORY = 2_000_000_000  # bytes that the process may have: image_files.MAX_MEMORY, the file, and the libraries
GOOD, BAD = b"+", b"-"  # before an image, and before the reason why there is none
MAX_REASON = 10_000  # bytes


class _EndedError(Exception):
    """The process ended before it answered for the picture of this name."""


class Decoder:
    """The process that decodes pictures, one request's at a time. It is started at once, and ends with this process.

    The images are those of image_files.read. Raises Fault where the process cannot be started.
    """

    def __init__(self, preprocessing: Preprocessing, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._preprocessing, self._seconds, self._memory = preprocessing, seconds, memory
        self._one_at_a_time = threading.Lock()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def images(self, pictures: Sequence[tuple[str, memoryview]]) -> list[NDArray[np.uint8]]:
        """The images (H, W, C) of pictures, given as names for messages and contents of files.

        Raises UserError for the first that cannot be read, Fault where the process cannot be started.
        """
        with self._one_at_a_time:
            return self._images(pictures, retry=True)

    def _images(self, pictures: Sequence[tuple[str, memoryview]], retry: bool) -> list[NDArray[np.uint8]]:
        self._is_late = False  # of the request before, whose answer may have come while its time ended
        if not self._is_ready:
            self._wait_until_ready()
        try:
            with self._ended_after(self._seconds):
                return [self._image(name, content) for name, content in pictures]
        except _EndedError as ended:
            is_late = self._is_late
            reason = f"{ended} cannot be read: {self._start_again()}"
            if is_late or not retry:
                raise UserError(reason) from None
        return self._images(pictures, retry=False)  # the picture need not be what ended it

    def _image(self, name: str, content: memoryview) -> NDArray[np.uint8]:
        try:
            self._connection.send_bytes(name.encode())
            self._connection.send_bytes(content)
            answer = self._connection.recv_bytes(math.prod(self._preprocessing.image_shape) + MAX_REASON)
        except (EOFError, OSError):
            raise _EndedError(name) from None
        if answer[:1] != GOOD:
            raise UserError(answer[1:].decode())
        return np.frombuffer(answer, np.uint8, offset=1).reshape(self._preprocessing.image_shape)

    def _start(self) -> None:
        self._is_ready = self._is_late = False
        try:
            self._connection, theirs = Pipe()
            with theirs:
                self._process = self._process_with(theirs.fileno())
        except OSError as error:
            raise Fault(f"no picture can be decoded: no process can be started for it ({error.strerror})") from error

    def _process_with(self, descriptor: int) -> subprocess.Popen[bytes]:
        # Not by multiprocessing, which would import the server, with MLflow and PyTorch, into it.
        code = "import sys; from pipeline.tracking import decoder; decoder.serve(*sys.argv[1:])"
        arguments = str(descriptor), json.dumps(asdict(self._preprocessing)), str(self._memory), str(self._seconds)
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            pass_fds=[descriptor],
            start_new_session=True,  # an interrupt in the terminal reaches the server alone
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each takes memory, and none is used
        )

    def _wait_until_ready(self) -> None:
        try:
            with self._ended_after(START_SECONDS):
                self._connection.recv_bytes()
        except (EOFError, OSError):
            raise Fault(f"no picture can be decoded: {self._start_again()}") from None
        self._is_ready = True

    @contextmanager
    def _ended_after(self, seconds: float) -> Iterator[None]:
        """The process is killed if it takes longer, also where it does not even take what is sent to it."""

        def end() -> None:
            self._is_late = True
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _start_again(self) -> str:
        """Start another process in place of one that does not answer; why that was."""
        code, is_late = self._end(), self._is_late
        self._start()
        if is_late:
            return f"decoding took more than {self._seconds:.0f} s"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that decodes it {how}"

    def _end(self) -> int:
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)  # it is ending by itself, if it can: only then the code says why
        self._process.kill()
        return self._process.wait()


def serve(descriptor: str, preprocessing: str, memory: str, seconds: str) -> None:
    """The process: decode what arrives until the server ends."""
    how = Preprocessing.from_facts(json.loads(preprocessing))
    if sys.platform == "linux":  # elsewhere the limit is not kept, or refused
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(int(descriptor)) as server, suppress(EOFError, ConnectionError):
        server.send_bytes(b"")  # ready
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what pictures make a library say must not fill a log
        while True:
            name = server.recv_bytes().decode()
            content = server.recv_bytes()
            signal.alarm(int(float(seconds)) + 1)  # ends this process where the server has been killed meanwhile
            answer = _answer(content, name, how)
            signal.alarm(0)
            server.send_bytes(answer)


def _answer(content: bytes, name: str, preprocessing: Preprocessing) -> bytes:
    try:
        return GOOD + image_files.read_here(io.BytesIO(content), name, preprocessing).image.tobytes()
    except UserError as error:
        return BAD + str(error).encode()
