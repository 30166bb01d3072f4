"""Images dealt out to threads."""

import threading
from dataclasses import replace

import pytest
import torch

from pipeline.model import cpu_threads
from pipeline.model.cnn import CNN, Architecture

ARCHITECTURE = Architecture((28, 28, 1), tuple("0123456789"), (16,))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "batch_size", "chunk"),
    [(1, 128, 64), (2, 128, 64), (3, 128, 43), (2, 100, 50), (2, 20, 16), (4, 200, 50), (64, 128, 16)],
)
def test_a_batch_is_parted_among_the_threads(threads: int, batch_size: int, chunk: int) -> None:
    torch.set_num_threads(threads)
    with cpu_threads.thread_pool(CNN(ARCHITECTURE, torch.Generator()), CPU) as pool:
        assert torch.get_num_threads() == 1
        assert pool.chunk(batch_size) == chunk
    assert torch.get_num_threads() == threads


def test_every_thread_works_and_the_answers_come_in_order() -> None:
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)  # passed only when three threads are at work at once

    def square(number: int) -> tuple[int, int]:
        together.wait()
        assert torch.get_num_threads() == 1
        return number**2, threading.get_ident()

    with cpu_threads.thread_pool(CNN(ARCHITECTURE, torch.Generator()), CPU) as pool:
        squares, threads = zip(*pool.map(square, range(9)), strict=True)
    assert squares == tuple(number**2 for number in range(9))
    assert len(set(threads)) == 3
    assert threading.get_ident() in threads


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    torch.set_num_threads(2)
    with (
        pytest.raises(ZeroDivisionError),
        cpu_threads.thread_pool(CNN(ARCHITECTURE, torch.Generator()), CPU) as pool,
    ):
        list(pool.map(lambda number: 1 // number, [1, 0]))
    assert torch.get_num_threads() == 2


def test_a_batch_that_is_normalised_stays_whole_while_training() -> None:
    torch.set_num_threads(2)
    cnn = CNN(replace(ARCHITECTURE, batch_norm=True), torch.Generator())
    for training, chunk in ((True, 128), (False, 64)):
        with cpu_threads.thread_pool(cnn.train(training), CPU) as pool:
            assert pool.chunk(128) == chunk
            assert list(pool.map(abs, [-1, 2])) == [1, 2]
