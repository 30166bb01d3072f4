"""All cores for one batch: its images are dealt out to threads, piece by piece."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.network.cnn import CNN

LARGEST_PIECE = 64  # images; what is in work then stays near its core
Result = TypeVar("Result")


class Workers:
    """Threads among which images are dealt out, and the pieces that they get.

    One thread for each piece, and each operation on one thread. PyTorch's own way, all threads at each operation, has
    them wait for each other some fifty times a step.
    """

    def __init__(self, piece: int, count: int, others: ThreadPoolExecutor | None) -> None:
        self._piece, self._count, self._others = piece, count, others

    def split(self, images: Tensor) -> tuple[Tensor, ...]:
        """The images of a batch (N, ...), or what belongs to them, in pieces."""
        return torch.split(images, self._piece)

    def map(self, function: Callable[..., Result], *pieces: Iterable[Any]) -> list[Result]:
        """What the function gives for each piece, in their order. Settings such as no_grad do not reach it.

        Ends with the shortest of ``pieces``, as Python's own map does.
        """
        calls = list(zip(*pieces, strict=False))
        if self._others is None:
            return [function(*call) for call in calls]
        submit = self._others.submit
        others = {at: submit(function, *call) for at, call in enumerate(calls) if at % self._count}
        # The calling thread takes its share instead of waiting.
        own = {at: function(*call) for at, call in enumerate(calls) if at not in others}
        return [others[at].result() if at in others else own[at] for at in range(len(calls))]


@contextmanager
def hired(cnn: CNN, device: torch.device, batch_size: int) -> Iterator[Workers]:
    """As many workers as torch has threads; one that takes a batch whole where it cannot be parted.

    That is on a GPU, and while batch normalisation is trained, which looks at the whole batch. As long as there are
    enough pieces of the largest size for all threads, their number does not change a bit of the result.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or (cnn.architecture.batch_norm and cnn.training):
        yield Workers(batch_size, 1, None)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(threads - 1, 1)) as others:
            yield Workers(min(LARGEST_PIECE, math.ceil(batch_size / threads)), threads, others)
    finally:
        torch.set_num_threads(threads)
