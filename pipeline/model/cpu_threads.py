"""Data parallelism over threads: each computes a chunk of a batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_CHUNK = 64  # images; what is being computed then stays near its core
MIN_CHUNK = 16  # images; with fewer the operations' own overhead takes over
Result = TypeVar("Result")


class ThreadPool:
    """Threads that each take a chunk of a batch, and compute every operation on one thread.

    PyTorch instead splits each operation among all threads, which then synchronise some fifty times per step.
    """

    def __init__(self, count: int, others: ThreadPoolExecutor | None) -> None:
        self.count, self._others = count, others

    def chunk(self, batch_size: int) -> int:
        """How many images of a batch make a chunk; all of them where a batch cannot be split.

        The number of threads does not change the result as long as every thread has a chunk of the maximum size.
        """
        if self._others is None:
            return batch_size
        return min(MAX_CHUNK, max(MIN_CHUNK, math.ceil(batch_size / self.count)))

    def map(self, function: Callable[..., Result], *chunks: Iterable[Any]) -> Iterator[Result]:
        """The function's results for the chunks, in their order. Settings such as no_grad do not reach the function.

        No more chunks are started than there are threads. Ends with the shortest of ``chunks``, as Python's map does.
        """
        calls = list(zip(*chunks, strict=False))
        for start in range(0, len(calls), self.count):
            own, *others = calls[start : start + self.count]
            futures = [self._others.submit(function, *call) for call in others] if self._others else []
            yield function(*own)  # the calling thread takes its share instead of waiting
            yield from (future.result() for future in futures)


@contextmanager
def thread_pool(network: nn.Module, device: torch.device) -> Iterator[ThreadPool]:
    """As many threads as torch has; a single one if a batch cannot be split.

    That is the case on a GPU, and in training with batch normalisation, which needs the whole batch.
    """
    threads = torch.get_num_threads()
    normalises = network.training and any(isinstance(layer, _BatchNorm) for layer in network.modules())
    if device.type != "cpu" or normalises:
        yield ThreadPool(1, None)
        return
    with single_thread(), ThreadPoolExecutor(threads) as others:
        yield ThreadPool(threads, others)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for each operation, whose sums then do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
