"""All cores for one batch: its images are dealt out to threads, chunk by chunk."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.model.cnn import CNN

LARGEST_CHUNK = 64  # images; what is in work then stays near its core
SMALLEST_CHUNK = 16  # images; with fewer the operations' own overhead takes over
Result = TypeVar("Result")


def most_threads(batch_size: int, batch_norm: bool) -> int:
    """On how many threads at most a training gives the same bits as on one."""
    return 1 if batch_norm else max(1, batch_size // LARGEST_CHUNK)


class ThreadPool:
    """Threads among which images are dealt out, chunk by chunk.

    One thread for each chunk, and each operation on one thread. PyTorch's own way, all threads at each operation, has
    them wait for each other some fifty times a step.
    """

    def __init__(self, count: int, others: ThreadPoolExecutor | None) -> None:
        self.count, self._others = count, others

    def chunk(self, batch_size: int) -> int:
        """How many images of such a batch make a chunk; all of them where a batch cannot be parted.

        The number of threads does not change a bit of the result as long as there is a largest chunk for each.
        """
        if self._others is None:
            return batch_size
        return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, math.ceil(batch_size / self.count)))

    def map(self, function: Callable[..., Result], *chunks: Iterable[Any]) -> Iterator[Result]:
        """What the function gives for each chunk, in their order. Settings such as no_grad do not reach it.

        No more chunks are in work or waiting to be taken than there are threads. Ends with the shortest of ``chunks``,
        as Python's own map does.
        """
        calls = list(zip(*chunks, strict=False))
        for start in range(0, len(calls), self.count):
            own, *others = calls[start : start + self.count]
            futures = [self._others.submit(function, *call) for call in others] if self._others else []
            yield function(*own)  # the calling thread takes its share instead of waiting
            yield from (future.result() for future in futures)


_now: list[ThreadPool] = []  # the open ones, the last one last


def use_threads(count: int) -> None:
    """From the next batch on take so many threads; torch.set_num_threads reaches only pools opened later.

    Up to ``most_threads`` no bit of the result changes.
    """
    if _now:
        _now[-1].count = count
    else:
        torch.set_num_threads(count)


@contextmanager
def thread_pool(cnn: CNN, device: torch.device) -> Iterator[ThreadPool]:
    """As many workers as torch has threads; one that takes a batch whole where it cannot be parted.

    That is on a GPU, and while batch normalisation is trained, which looks at the whole batch.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or (cnn.architecture.batch_norm and cnn.training):
        yield ThreadPool(1, None)
        return
    torch.set_num_threads(1)
    # Threads begin when they are first needed, so there may be as many as there will ever be.
    with ThreadPoolExecutor(max(threads, os.cpu_count() or 1)) as others:
        pool = ThreadPool(threads, others)
        _now.append(pool)
        try:
            yield pool
        finally:
            _now.pop()
            torch.set_num_threads(pool.count)
