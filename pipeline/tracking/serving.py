"""A registered model behind HTTP: MLflow's own scoring server, and before it a guard against what that answers badly.

MLflow's server takes a body of any size, cuts fractions off (a picture in 0 ... 1 becomes black), reads text as
numbers, and answers 500 to a request without a content type. Memory must not depend on who asks, and a wrong answer is
worse than none.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.pyfunc import scoring_server
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse

from pipeline.model.cnn import MOST_IMAGES
from pipeline.tracking import models, registry
from pipeline.tracking.store import store_faults

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

INVOCATIONS = "/invocations"
ANYWHERE = ("0.0.0.0", "::")  # to listen at every address of the machine, whatever its names are
KEYS = ("inputs", "instances")
BYTES_A_PIXEL = 8  # "[255], " and one more
AT_A_TIME = 4  # requests that are read and answered; others wait, with what they send still on their side
PATIENCE = 30.0  # seconds in which a body must have come


class RefusedError(Exception):
    """Why a request is not answered, and the status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@store_faults()
def application(version: ModelVersion, host: str) -> App:
    """The ASGI application that answers for a registered model, where it is asked for under the name of ``host``.

    Raises Fault for a version that models.read refuses.
    """
    loaded = registry.load(version)
    guard = Guard(scoring_server.init(models.as_served(loaded.cnn)), loaded.image_shape)
    # Else any page in a browser on this machine could ask, under a name of its own that leads here.
    names = ["localhost", "127.0.0.1", "[::1]", host]
    return TrustedHostMiddleware(guard, ["*"] if host in ANYWHERE else names, www_redirect=False)


@dataclass(frozen=True)
class Guard:
    """Lets through to ``app`` only what it can answer: 1 to MOST_IMAGES images of whole numbers from 0 to 255.

    However many ask at once, the memory is that of AT_A_TIME requests.
    """

    app: App
    image_shape: tuple[int, int, int]
    turns: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, AT_A_TIME))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] != INVOCATIONS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            _check_content_type([value for name, value in scope["headers"] if name == b"content-type"])
            async with self.turns:
                body = await _body(receive, BYTES_A_PIXEL * MOST_IMAGES * int(np.prod(self.image_shape)))
                await asyncio.to_thread(check, body, self.image_shape)
                await self.app(scope, _again(body, receive), send)
        except RefusedError as refused:
            await JSONResponse({"error": str(refused)}, refused.status)(scope, receive, send)


def _check_content_type(given: list[bytes]) -> None:
    if [value.split(b";")[0].strip().lower() for value in given] != [b"application/json"]:
        raise RefusedError(415, "the content type must be application/json")


async def _body(receive: Receive, most: int) -> bytes:
    parts, length, more = [], 0, True
    until = asyncio.get_running_loop().time() + PATIENCE
    while more:
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise RefusedError(408, f"the request did not come within {PATIENCE:.0f} s") from None
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the request broke off")
        parts.append(message.get("body", b""))
        length, more = length + len(parts[-1]), message.get("more_body", False)
        if length > most:
            raise RefusedError(413, f"more than {most:,} bytes; at most {MOST_IMAGES:,} images at a time")
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What was received once, for who comes next."""
    waiting = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return replay


def check(body: bytes, image_shape: tuple[int, int, int]) -> None:
    """Raises RefusedError for a body that is no JSON of images (N, H, W, C)."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"no JSON: {error}") from error
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KEYS:
        raise RefusedError(400, 'the body must be an object with one key: {"inputs": [images]}')
    try:
        # As they are: converted, text of a million letters would take a million letters' room for each pixel.
        images = np.asarray(next(iter(content.values())), dtype=object)
    except ValueError as error:
        raise RefusedError(400, f"the images are not all of the same shape: {error}") from error
    if images.shape[1:] != image_shape or not 1 <= len(images) <= MOST_IMAGES:
        wanted = ", ".join(map(str, image_shape))
        raise RefusedError(
            400, f"images of the shape {images.shape}; wanted: (N, {wanted}), N from 1 to {MOST_IMAGES:,}"
        )
    pixels = images.ravel().tolist()
    if set(map(type, pixels)) != {int} or min(pixels) < 0 or max(pixels) > 255:
        raise RefusedError(400, "pixels are whole numbers from 0 (black) to 255 (white)")
