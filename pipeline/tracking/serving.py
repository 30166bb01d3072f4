"""A registered model behind HTTP, with the routes and answers of MLflow's own scoring server, and for pictures too.

That server accepts a body of any size, truncates fractions (an image in 0 ... 1 becomes black), reads text as numbers,
and returns 500 for a request without a content type. Here the memory is bounded, and invalid input is refused with the
reason.
"""

import asyncio
import json
import mmap
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline import multipart
from pipeline.data.decoder import Decoder
from pipeline.errors import Fault, UserError, printable
from pipeline.model.cnn import MAX_IMAGES
from pipeline.tracking import registry
from pipeline.tracking.registry import Answers, Loaded
from pipeline.tracking.store import store_faults

ALL_ADDRESSES = ("0.0.0.0", "::")  # listens on every address of the machine, under any host name
KEYS = ("inputs", "instances")
BYTES_PER_PIXEL = 8  # "[255], " and one more
MAX_PICTURES_BYTES = 100_000_000  # of all pictures in a request
ARRAYS, PICTURES = "application/json", "multipart/form-data"  # and image/...
MAX_CONCURRENT_REQUESTS = 4  # requests that are processed; the others wait
BODY_IN_MEMORY = 1 << 16  # bytes; the rest of a body waits in a file, since slow clients may send many at once
DECODING_TIMEOUT = 30.0  # seconds within which the pictures of one request must be decoded
DECODING_MEMORY = 2_000_000_000  # bytes: image_files.MAX_MEMORY, MAX_PICTURES_BYTES, and the libraries
BODY_TIMEOUT = 30.0  # seconds within which a body must be complete


class RefusedError(Exception):
    """Why a request is refused, and the HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@store_faults()
def application(version: ModelVersion, host: str) -> Starlette:
    """The ASGI application that serves a registered model to requests whose host name is ``host`` or localhost.

    Raises Fault for a version that models.read refuses, and for one whose answer is not a number.
    """
    loaded = registry.load(version)
    predictor = Predictor(loaded, Decoder(DECODING_TIMEOUT, DECODING_MEMORY))
    predictor.classify(np.zeros((1, *predictor.loaded.image_shape), np.uint8))  # compiles what the first request needs
    routes = [
        Route("/ping", _health),
        Route("/health", _health),
        Route("/version", _version),
        Route("/invocations", predictor.answer, methods=["POST"]),
    ]
    # Against DNS rebinding: a web page could reach this server under a host name of its own.
    names = ["*"] if host in ALL_ADDRESSES else ["localhost", "127.0.0.1", "[::1]", host]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], lifespan=predictor.lifespan)


def _health(request: Request) -> Response:
    return Response("\n", media_type="application/json")


def _version(request: Request) -> Response:
    return Response(mlflow.__version__, media_type="application/json")


@dataclass(frozen=True)
class Predictor:
    """Answers POST /invocations: 1 to MAX_IMAGES images of whole numbers from 0 to 255, or pictures.

    However many clients there are, the memory is that of MAX_CONCURRENT_REQUESTS requests.
    """

    loaded: Loaded
    decoder: Decoder
    slots: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, MAX_CONCURRENT_REQUESTS))
    cnn_lock: threading.Lock = field(default_factory=threading.Lock)
    decoder_lock: threading.Lock = field(default_factory=threading.Lock)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Decoding does not delay the end of the server."""
        with self.decoder:
            yield

    async def answer(self, request: Request) -> Response:
        """The answer for each image or picture, or the reason for refusing the request."""
        try:
            _check_origin(request)
            content_type = _content_type(request.headers.getlist("content-type"))
            is_array = content_type.get_content_type() == ARRAYS
            of_arrays = BYTES_PER_PIXEL * MAX_IMAGES * int(np.prod(self.loaded.image_shape))
            with SpooledTemporaryFile(BODY_IN_MEMORY) as body:
                await _receive(request, body, of_arrays if is_array else MAX_PICTURES_BYTES)
                async with self.slots:
                    if is_array:
                        return await asyncio.to_thread(self._of_arrays, body)
                    return await asyncio.to_thread(self._of_pictures, body, content_type)
        except OSError as error:
            return JSONResponse({"error": f"the server cannot keep the request: {error.strerror}"}, 507)
        except RefusedError as refused:
            return JSONResponse({"error": str(refused)}, refused.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Fault as fault:
            return JSONResponse({"error": str(fault)}, 500)

    def _of_arrays(self, body: IO[bytes]) -> Response:
        body.seek(0)
        answers = self.classify(images_from(body.read(), self.loaded.image_shape))
        return JSONResponse({"predictions": answers.probabilities.tolist(), "unlike_training": answers.unlike_training})

    def _of_pictures(self, body: IO[bytes], content_type: Message) -> Response:
        names, named = pictures_from(_mapped(body), content_type)
        answers = self.classify(self._decoded(named))
        classes = self.loaded.class_names
        predictions = [
            registry.described(name, dict(zip(classes, probabilities.tolist(), strict=True)), unlike)
            for name, probabilities, unlike in zip(names, *answers, strict=True)
        ]
        return JSONResponse({"predictions": predictions})

    def _decoded(self, pictures: Sequence[tuple[str, memoryview]]) -> NDArray[np.uint8]:
        """The pictures of one request at a time. Raises UserError for the first that cannot be read."""
        with self.decoder_lock:
            end = time.monotonic() + DECODING_TIMEOUT
            return np.stack(
                [
                    self.decoder.image(name, content, self.loaded.preprocessing, max(end - time.monotonic(), 0.01))
                    for name, content in pictures
                ]
            )

    def classify(self, images: NDArray[np.uint8]) -> Answers:
        """One batch at a time, on all cores: a CNN cannot score two at once."""
        with self.cnn_lock:
            return self.loaded.classify(images)


def _check_origin(request: Request) -> None:
    """A browser lets any page send forms, to this machine too, and says where the page comes from."""
    origin = request.headers.get("origin")
    if origin and origin.partition("://")[2] != request.headers.get("host"):
        raise RefusedError(403, f"a web page of {printable(origin)} may not use this server")


def _content_type(given: list[str]) -> Message:
    """The content type of a request."""
    header = Message()
    header["content-type"] = given[0] if len(given) == 1 else ""
    if header.get_content_type() not in (ARRAYS, PICTURES) and header.get_content_maintype() != "image":
        allowed = f"{ARRAYS} (arrays), image/... (a picture) or {PICTURES} (several pictures)"
        raise RefusedError(415, f"the content type must be {allowed}")
    return header


def _mapped(body: IO[bytes]) -> bytes | mmap.mmap:
    """The content of a body without a copy of it in memory."""
    size, descriptor = body.tell(), body.fileno()
    body.flush()
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b""


def pictures_from(
    body: bytes | mmap.mmap, content_type: Message
) -> tuple[Sequence[str | None], Sequence[tuple[str, memoryview]]]:
    """The names of the files in a body, and the pictures, each with how messages name it.

    Raises RefusedError if it has none or too many, or is not well-formed.
    """
    if content_type.get_content_type() != PICTURES:
        return [None], [("the body", memoryview(body))]
    try:
        parts = multipart.parts(body, content_type, MAX_IMAGES)
    except ValueError as error:
        raise RefusedError(400, str(error)) from error
    if not 1 <= len(parts) <= MAX_IMAGES:
        raise RefusedError(413 if parts else 400, f"1 to {MAX_IMAGES:,} pictures at a time")
    named = [(f"part {number} ({printable(part.name)})", part.content) for number, part in enumerate(parts, start=1)]
    return [part.name for part in parts], named


async def _receive(request: Request, body: IO[bytes], most: int) -> None:
    """Write the body of a request, of at most ``most`` bytes, into ``body``."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.stream():
                body.write(part)
                if body.tell() > most:
                    raise RefusedError(413, f"more than {most:,} bytes; at most {MAX_IMAGES:,} images at a time")
    except TimeoutError:
        raise RefusedError(408, f"the request was not complete within {BODY_TIMEOUT:.0f} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "the request was cut off") from None


def images_from(body: bytes, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The images (N, H, W, C) in a body. Raises RefusedError if it is not JSON of such images."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"not JSON: {error}") from error
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KEYS:
        raise RefusedError(400, 'the body must be an object with one key: {"inputs": [images]}')
    try:
        # As objects: an array of text would take the length of its longest string for each of them.
        images = np.asarray(next(iter(content.values())), dtype=object)
    except ValueError as error:
        raise RefusedError(400, f"the images are not all of the same shape: {error}") from error
    if images.shape[1:] != image_shape or not 1 <= len(images) <= MAX_IMAGES:
        wanted = ", ".join(map(str, image_shape))
        raise RefusedError(400, f"images of shape {images.shape}; expected: (N, {wanted}), N from 1 to {MAX_IMAGES:,}")
    pixels = images.ravel().tolist()
    if set(map(type, pixels)) != {int} or min(pixels) < 0 or max(pixels) > 255:
        raise RefusedError(400, "pixels are whole numbers from 0 (black) to 255 (white)")
    return images.astype(np.uint8)
