"""Pictures -> images of the network, in processes of their own with limits of time and memory.

What a picture does to a decoder in C (a crash, an endless loop, all memory) ends such a process and not this one: the
picture is named, and another process is started. They hold neither PyTorch nor MLflow, and use all cores, which threads
of Python do not. ``Decoder`` and ``Decoders`` are this side, ``serve`` is the process.
"""

import fcntl
import gc
import hashlib
import io
import itertools
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.data import image_files
from pipeline.data.image_files import Facts, File, Preprocessing
from pipeline.errors import Fault, UserError

ROOT = Path(__file__).parents[2]
SECONDS = 600.0  # within which a picture must be decoded, with the time that a large one waits for its turn
START_SECONDS = 60.0  # within which the process must be ready
MEMORY = 3_000_000_000  # bytes that a process may have: image_files.MAX_MEMORY, the file from a .zip, and the libraries
MAX_REASON = 10_000  # bytes
DIGEST = 32  # bytes of an SHA-256
TASK = 100  # pictures that a process is asked for at once, at most: a message costs as much as a small picture
SMALLEST_TASK = 10
YES, NO = b"yes", b"no"
GOOD, BAD = b"+", b"-"  # before an answer, and before the reason why there is none
Source = str | memoryview | Callable[[], memoryview]  # a path, the content, or what reads it and may raise UserError
Answer = bytes | UserError


class Request(NamedTuple):
    """A picture, by its name for messages and its file, and further arguments of the function."""

    name: str
    source: Source
    arguments: tuple[Any, ...] = ()


def digest(file: File, name: str) -> bytes:
    """The SHA-256 of a file's content."""
    found = hashlib.sha256()
    with image_files.opened(file, name) as content:
        while part := content.read(1 << 20):
            found.update(part)
    return found.hexdigest().encode()


def facts(file: File, name: str) -> bytes:
    """What image_files.inspect says of a picture; `facts_from` reads it."""
    return json.dumps(image_files.inspect(file, name)).encode()


def facts_from(answers: Iterable[bytes]) -> list[Facts]:
    """The Facts in answers of `facts`."""
    found = json.loads(f"[{b','.join(answers).decode()}]")
    return [Facts(form, (width, height), *others) for form, (width, height), *others in found]


def has_colour(file: File, name: str) -> bytes:
    """YES or NO: whether a pixel is not grey."""
    return YES if image_files.has_colour(file, name) else NO


def image(file: File, name: str, preprocessing: Preprocessing) -> bytes:
    """The pixels (H, W, C) of image_files.read."""
    return image_files.read(file, name, preprocessing).image.tobytes()


def pixel_digest(file: File, name: str, preprocessing: Preprocessing) -> bytes:
    """The SHA-256, as bytes, of the pixels that `image` gives."""
    return hashlib.sha256(image(file, name, preprocessing)).digest()


def digest_and_image(file: File, name: str, preprocessing: Preprocessing) -> bytes:
    """`pixel_digest`, DIGEST bytes, and after it `image`."""
    pixels = image(file, name, preprocessing)
    return hashlib.sha256(pixels).digest() + pixels


Function = Callable[..., bytes]


class _EndedError(Exception):
    """The process ended before it answered, or was ended since it took too long."""

    def __init__(self, reason: str, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late


class Decoder:
    """A process that decodes pictures. It is started at once, ends with this process, and is for one thread at a time.

    ``turn`` is a file that several decoders have in common: one at a time decodes a large picture. Raises Fault where
    the process cannot be started.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY, turn: IO[bytes] | None = None) -> None:
        self._seconds, self._memory, self._turn = seconds, memory, turn
        self._is_closed = False
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing. Another thread that waits for its answer gets a Fault."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()

    def ask(
        self,
        function: Function,
        requests: Sequence[Request],
        seconds: float | None = None,
        largest_answer: int = 1 << 30,
    ) -> list[Answer]:
        """What ``function``, one of this module, answers for each picture, or why it cannot be read.

        It has ``seconds`` for each, and ``largest_answer`` bytes. Raises Fault where the process cannot be started.
        """
        answers, ended_at = list[Answer](), -1
        while len(answers) < len(requests):
            self._wait_until_ready()
            try:
                rest = requests[len(answers) :]
                self._ask(function, rest, answers, seconds or self._seconds, largest_answer + MAX_REASON)
            except _EndedError as ended:
                self._start_again()
                if ended.is_late or ended_at == len(answers):  # at first somebody else may have ended it
                    answers.append(UserError(f"{requests[len(answers)].name} cannot be read: {ended}"))
                else:
                    ended_at = len(answers)
            except BaseException:
                self._connection.close()  # what it would still answer is not for the next request
                raise
        return answers

    def image(
        self, name: str, source: Source, preprocessing: Preprocessing, seconds: float | None = None
    ) -> NDArray[np.uint8]:
        """A picture as an image (H, W, C), within ``seconds``. Raises UserError where it cannot be read."""
        shape = preprocessing.image_shape
        (answer,) = self.ask(image, [Request(name, source, (preprocessing,))], seconds, math.prod(shape))
        if isinstance(answer, UserError):
            raise answer
        return np.frombuffer(answer, np.uint8).reshape(shape)

    def _ask(
        self, function: Function, requests: Sequence[Request], answers: list[Answer], seconds: float, most: int
    ) -> None:
        """Append the answers one by one. Raises _EndedError where the process ends before the last."""
        sources = [request.source if isinstance(request.source, str) else None for request in requests]
        message = [(name, source, rest) for (name, _, rest), source in zip(requests, sources, strict=True)]
        self._send(partial(self._connection.send, (function, message)), seconds)
        for request in requests:
            problem: UserError | None = None
            if not isinstance(request.source, str):
                try:
                    content = request.source if isinstance(request.source, memoryview) else request.source()
                except UserError as error:
                    problem, content = error, memoryview(b"")
                self._send(partial(self._connection.send_bytes, content), seconds)
            answer = self._received(seconds, most)
            answers.append(problem or (answer[1:] if answer[:1] == GOOD else UserError(answer[1:].decode())))

    def _send(self, send: Callable[[], None], seconds: float) -> None:
        """Send something. The process is ended if it does not take it. Raises _EndedError."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            send()
        except OSError:
            raise self._ended(is_late=timer.finished.is_set()) from None
        finally:
            timer.cancel()

    def _received(self, seconds: float, most: int) -> bytes:
        """What the process answers, at most so many bytes. Raises _EndedError."""
        try:
            if not self._answers.poll(1000 * seconds):
                self._process.kill()
                raise self._ended(is_late=True)
            return self._connection.recv_bytes(most)
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self, is_late: bool = False) -> _EndedError:
        """Why the process does not answer."""
        if is_late:
            return _EndedError(f"decoding took more than {self._seconds:.0f} s", is_late)
        self._connection.close()
        try:
            code = self._process.wait(1)  # it is ending by itself, if it can: only then the code says why
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return _EndedError(f"the process that decodes it {how}")

    def _start(self) -> None:
        self._is_ready = False
        try:
            self._connection, theirs = Pipe()
            with theirs:
                self._process = self._process_with(theirs.fileno())
        except OSError as error:
            raise Fault(f"no picture can be decoded: no process can be started for it ({error.strerror})") from error
        self._answers = select.poll()
        self._answers.register(self._connection.fileno(), select.POLLIN)

    def _start_again(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        if self._is_closed:
            raise Fault("no picture can be decoded: the command ends")
        self._start()

    def _process_with(self, descriptor: int) -> subprocess.Popen[bytes]:
        # Not by multiprocessing, which would import the command, with MLflow and PyTorch, into it.
        code = "import gc, sys; gc.disable(); from pipeline.data import decoder; decoder.serve(*map(int, sys.argv[1:]))"
        turn = [self._turn.fileno()] if self._turn else []
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (descriptor, self._memory, int(self._seconds), *turn))],
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor, *turn],
            start_new_session=True,  # an interrupt in the terminal reaches the command alone
            # PYTHONPATH, since this process may have found its modules in another way; threads take memory, unused.
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OPENBLAS_NUM_THREADS": "1"},
        )

    def _wait_until_ready(self) -> None:
        """Where it ends meanwhile, another one is started, once. Raises Fault."""
        for is_last in (False, True):
            if self._is_ready:
                return
            try:
                self._received(START_SECONDS, most=0)
                self._is_ready = True
            except _EndedError as ended:
                if ended.is_late:
                    took = f"its process took more than {START_SECONDS:.0f} s to start"
                    raise Fault(f"no picture can be decoded: {took}") from None
                if is_last:
                    raise Fault(f"no picture can be decoded: {ended}") from None
                self._start_again()


class Decoders:
    """A decoder for each core, for one thread and a ``with``. None is started before there is something to do."""

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._turn = self._open.enter_context(tempfile.TemporaryFile())
        self._threads = self._open.enter_context(ThreadPoolExecutor(os.cpu_count()))
        self._all, self._idle, self._is_closed = list[Decoder](), list[Decoder](), False
        return self

    def __exit__(self, *_: object) -> None:
        """The processes end, whatever they are doing."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._all:
            decoder.close()
        self._open.close()  # waits for the threads

    def ask(self, function: Function, requests: Sequence[Request]) -> Iterator[Answer]:
        """The answers of Decoder.ask, in order."""
        size = max(SMALLEST_TASK, min(TASK, len(requests) // (2 * (os.cpu_count() or 1))))
        tasks = (requests[start : start + size] for start in range(0, len(requests), size))
        return itertools.chain.from_iterable(self._threads.map(partial(self._ask, function), tasks))

    def _ask(self, function: Function, requests: Sequence[Request]) -> list[Answer]:
        try:
            decoder = self._idle.pop()
        except IndexError:
            decoder = self._started()
        answers = decoder.ask(function, requests)
        self._idle.append(decoder)
        return answers

    def _started(self) -> Decoder:
        decoder = Decoder(turn=self._turn)
        self._all.append(decoder)
        if self._is_closed:  # meanwhile: nobody else would end it
            decoder.close()
        return decoder


def serve(descriptor: int, memory: int, seconds: int, turn: int | None = None) -> None:
    """The process: answer until the other side ends."""
    gc.enable()  # while the libraries were imported it took a fifth of the time
    if sys.platform == "linux":  # elsewhere the limit is not kept, or refused
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if turn is not None:
        image_files.large_pictures = partial(_locked, turn)
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        connection.send_bytes(b"")  # ready
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what pictures make a library say must not fill a log
        while True:
            function, requests = connection.recv()
            for name, path, arguments in requests:
                file = io.BytesIO(connection.recv_bytes()) if path is None else path
                signal.alarm(seconds + 1)  # ends this process where the other side has been killed meanwhile
                answer = _answer(function, file, name, *arguments)
                signal.alarm(0)
                connection.send_bytes(answer)


def _answer(function: Function, file: File, name: str, *arguments: object) -> bytes:
    try:
        return GOOD + function(file, name, *arguments)
    except UserError as error:
        return BAD + str(error).encode()
    except OSError as error:  # of the disk
        return BAD + f"{name} cannot be read: {error.strerror or error}".encode()


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """The turn of this process, among those with the same file. It is over when the process ends, too."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
