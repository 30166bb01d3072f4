"""uvicorn with limits: slow and silent clients stop no other, and fill no log.

uvicorn waits without end for the head of a request, and takes more connections than the process may have files: asyncio
then logs thousands of tracebacks a second.
"""

import asyncio
import logging
import resource
import socket
import time
from typing import cast

import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import UserError

HEAD_TIMEOUT = 10.0  # seconds within which a connection must have sent the head of a request
SHUTDOWN_TIMEOUT = 5  # seconds for the requests that are being answered when the server is stopped
MAX_CONNECTIONS = 512
MAX_FILES = 4096  # what this process may open, if its limit can be raised that far
LOG_PAUSE = 60.0  # seconds until a line of code may log again


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; who connects waits until `run`. Raises UserError where another server listens."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen()
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened at ({error.strerror}): choose another --port") from error
    return opened


def run(application: ASGIApp, listening: socket.socket) -> None:
    """Serve until the process is interrupted."""
    server(application).run(sockets=[listening])


def server(application: ASGIApp) -> uvicorn.Server:
    """uvicorn with these limits."""
    spare = _spare_files()
    config = uvicorn.Config(
        application,
        http=_Protocol,
        log_level="warning",
        limit_concurrency=2 * min(MAX_CONNECTIONS, spare // 4),  # where uvicorn answers 503; _Protocol begins at half
        backlog=max(1, spare // 8),  # so many connections are taken in one go
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_Sparse())
    return uvicorn.Server(config)


def _spare_files() -> int:
    """How many more files this process may open. A request needs two: its connection, and a large body's file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(8, soft - int(psutil.Process().num_fds()))


class _Protocol(H11Protocol):
    """A connection, which is closed if it sends no request.

    When there are too many, the oldest of those is closed that have not sent a whole request.
    """

    _timer: asyncio.TimerHandle | None = None
    _waits_since = 0.0

    @property
    def _waits(self) -> bool:
        """Whether it has sent no request, or its requests are answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_unfinished(self) -> bool:
        """Whether it waits, or has sent a part of a request."""
        return self._waits or self.cycle.more_body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))  # what TCP has
        self._wait_for_head()
        assert self.limit_concurrency is not None
        there = [each for each in self.connections if isinstance(each, _Protocol) and not each.transport.is_closing()]
        if len(there) > self.limit_concurrency // 2:
            unfinished = [each for each in there if each._is_unfinished]
            min(unfinished, key=lambda each: each._waits_since).transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _wait_for_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._close_if_it_waits)

    def _close_if_it_waits(self) -> None:
        if self._waits:
            self.transport.abort()


class _Sparse(logging.Filter):
    """Lets a line of code log once a minute: what clients do must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._last.get(place, -LOG_PAUSE) < LOG_PAUSE:
            return False
        self._last[place] = now
        return True
