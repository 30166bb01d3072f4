"""A registered model behind HTTP: MLflow's own scoring server, and before it a guard against what that answers badly.

MLflow's server takes a body of any size, cuts fractions off (a picture in 0 ... 1 becomes black), reads text as
numbers, and answers 500 to a request without a content type. Memory must not depend on who asks, and a wrong answer is
worse than none.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.pyfunc import scoring_server
from starlette.responses import JSONResponse

from pipeline.network.cnn import MOST_IMAGES
from pipeline.tracking import models, registry
from pipeline.tracking.runs import store_faults

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

INVOCATIONS = "/invocations"
KEYS = ("inputs", "instances")
BYTES_A_PIXEL = 8  # "[255], " and one more


class RefusedError(Exception):
    """Why a request is not answered, and the status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@store_faults()
def application(version: ModelVersion) -> App:
    """The ASGI application that answers for a registered model. Raises Fault for one that models.read refuses."""
    with TemporaryDirectory(prefix="convtrack-") as folder:
        files = registry.fetched(version, Path(folder))
        image_shape = models.read(files, f"{version.name} version {version.version}").image_shape
        with models.no_pickle():
            served = scoring_server.init(mlflow.pyfunc.load_model(str(files)))
    return Guard(served, image_shape)


@dataclass(frozen=True)
class Guard:
    """Lets through to ``app`` only what it can answer: 1 to MOST_IMAGES images of whole numbers from 0 to 255."""

    app: App
    image_shape: tuple[int, int, int]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] != INVOCATIONS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            _check_content_type(dict(scope["headers"]).get(b"content-type", b""))
            body = await _body(receive, BYTES_A_PIXEL * MOST_IMAGES * int(np.prod(self.image_shape)))
            await asyncio.to_thread(check, body, self.image_shape)
        except RefusedError as refused:
            await JSONResponse({"error": str(refused)}, refused.status)(scope, receive, send)
            return
        await self.app(scope, _again(body, receive), send)


def _check_content_type(given: bytes) -> None:
    if given.split(b";")[0].strip().lower() != b"application/json":
        raise RefusedError(415, "the content type must be application/json")


async def _body(receive: Receive, most: int) -> bytes:
    parts, length, more = [], 0, True
    while more:
        message = await receive()
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
        images = np.asarray(next(iter(content.values())))
    except (ValueError, OverflowError) as error:
        raise RefusedError(400, f"the images are not all of the same shape: {error}") from error
    if images.shape[1:] != image_shape or not 1 <= len(images) <= MOST_IMAGES:
        wanted = ", ".join(map(str, image_shape))
        raise RefusedError(
            400, f"images of the shape {images.shape}; wanted: (N, {wanted}), N from 1 to {MOST_IMAGES:,}"
        )
    if images.dtype.kind not in "iu" or images.min() < 0 or images.max() > 255:
        raise RefusedError(400, "pixels are whole numbers from 0 (black) to 255 (white)")
