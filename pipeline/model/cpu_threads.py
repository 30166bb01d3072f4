"""Data parallelism over threads: each computes a chunk of a batch."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_CHUNK = 64  # images; what is being computed then stays near its core
MAX_VALUES = 1 << 21  # of a layer's output, for the same reason, and since larger memory is asked of the system anew
MIN_CHUNK = 16  # images; with fewer the operations' own overhead takes over
MAX_CHUNKS = 1024  # of one batch
Result = TypeVar("Result")
_here = threading.local()  # `chunk`: what this thread computes


class Chunk:
    """A chunk of a batch whose chunks wait for each other, such as to compute the batch's mean."""

    def __init__(self, number: int, batch: "_Batch") -> None:
        self.number, self._batch, self._gathered = number, batch, 0

    def gather(self, values: Tensor) -> Tensor:
        """What each of the chunks gives, in their order: (chunks, *values.shape).

        Every chunk must come here as often, with values of the same shape. Raises BrokenBarrierError where the
        computation of another one has failed.
        """
        # Two lists in turn: nobody is at the list after the next before all have read this one.
        given = self._batch.given[self._gathered % 2]
        self._gathered += 1
        given[self.number] = values
        self._batch.turns.release()
        try:
            self._batch.barrier.wait()
        finally:
            self._batch.turns.acquire()
        return torch.stack(given)


class _Batch:
    """The chunks of a batch. Each has a thread of its own, of which ``count`` compute and the others wait."""

    def __init__(self, chunks: int, count: int) -> None:
        self.barrier, self.turns = threading.Barrier(chunks), threading.Semaphore(count)
        self.given = [[torch.empty(0)] * chunks for _ in range(2)]

    def run(self, number: int, function: Callable[..., Result], call: tuple[Any, ...]) -> Result:
        try:
            with self.turns:
                _here.chunk = Chunk(number, self)
                return function(*call)
        except BaseException:
            self.barrier.abort()
            raise
        finally:
            _here.chunk = None


def current_chunk() -> Chunk | None:
    """The chunk that this thread computes, if it is of a batch whose chunks wait for each other."""
    chunk: Chunk | None = getattr(_here, "chunk", None)
    return chunk


class ThreadPool:
    """Threads that each take a chunk of a batch, and compute every operation on one thread.

    PyTorch instead splits each operation among all threads, which then synchronise some fifty times per step.
    ``together``: the chunks of a batch may wait for each other (see Chunk).
    """

    def __init__(self, count: int, others: ThreadPoolExecutor | None, together: bool = False) -> None:
        self.count, self._others, self._together = count, others, together

    def chunk(self, batch_size: int, values: int) -> int:
        """How many images of a batch make a chunk, if the largest output of a layer has ``values`` for each image.

        All of them where a batch cannot be split. The number of threads does not change the result as long as every
        thread has a chunk of the maximum size.
        """
        if self._others is None:
            return batch_size
        most = min(MAX_CHUNK, max(1, MAX_VALUES // values))
        return min(most, max(MIN_CHUNK, math.ceil(batch_size / self.count)))

    def map(self, function: Callable[..., Result], *chunks: Iterable[Any]) -> Iterator[Result]:
        """The function's results for the chunks, in their order. Settings such as no_grad do not reach the function.

        No more chunks are started than there are threads. Ends with the shortest of ``chunks``, as Python's map does.
        """
        calls = list(zip(*chunks, strict=False))
        if self._together:
            yield from self._map_together(function, calls)
            return
        for start in range(0, len(calls), self.count):
            own, *others = calls[start : start + self.count]
            futures = [self._others.submit(function, *call) for call in others] if self._others else []
            yield function(*own)  # the calling thread takes its share instead of waiting
            yield from (future.result() for future in futures)

    def _map_together(self, function: Callable[..., Result], calls: Sequence[tuple[Any, ...]]) -> list[Result]:
        assert self._others is not None
        batch = _Batch(len(calls), self.count)
        futures = list[Future[Result]]()
        try:
            futures += (self._others.submit(batch.run, number, function, call) for number, call in enumerate(calls))
            wait(futures)
        except BaseException:  # such as KeyboardInterrupt: none may wait for others that never come
            batch.barrier.abort()
            raise
        failed = [error for error in (future.exception() for future in futures) if error]
        for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # the cause, if the others only waited for that chunk
        return [future.result() for future in futures]


@contextmanager
def thread_pool(network: nn.Module, device: torch.device) -> Iterator[ThreadPool]:
    """As many threads as torch has; a single one if a batch cannot be split.

    That is the case on a GPU, and in training with a batch normalisation that does not ask the other chunks: it needs
    the mean and the variance of the whole batch. One that does has the attribute ``gathers``.
    """
    normalisations = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and network.training]
    if device.type != "cpu" or not all(hasattr(layer, "gathers") for layer in normalisations):
        yield ThreadPool(1, None)
        return
    threads, together = torch.get_num_threads(), bool(normalisations)
    with single_thread(), ThreadPoolExecutor(MAX_CHUNKS if together else threads) as others:
        yield ThreadPool(threads, others, together)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for each operation, whose sums then do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
