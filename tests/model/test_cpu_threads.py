"""Images dealt out to threads."""

import threading
import time
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch

from pipeline.model import cpu_threads
from pipeline.model.cnn import CNN, Architecture
from pipeline.model.cpu_threads import ThreadPool

ARCHITECTURE = Architecture((28, 28, 1), tuple("0123456789"), (16,))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "batch_size", "values", "chunk"),
    [
        *((1, 128, 26 * 26 * 32, 64), (2, 128, 1, 64), (3, 128, 1, 43), (2, 100, 1, 50), (2, 20, 1, 16)),
        *((4, 200, 1, 50), (64, 128, 1, 16), (2, 128, 64 * 64 * 32, 16), (2, 128, 2048 * 2048 * 8, 1)),
    ],
)
def test_a_batch_is_parted_among_the_threads(threads: int, batch_size: int, values: int, chunk: int) -> None:
    torch.set_num_threads(threads)
    with cpu_threads.thread_pool(CNN(ARCHITECTURE, torch.Generator()), CPU) as pool:
        assert torch.get_num_threads() == 1
        assert pool.chunk(batch_size, values) == chunk
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


def normalising_pool() -> AbstractContextManager[ThreadPool]:
    return cpu_threads.thread_pool(CNN(replace(ARCHITECTURE, batch_norm=True), torch.Generator()).train(), CPU)


@pytest.mark.parametrize(("threads", "chunks"), [(1, 1), (1, 5), (2, 2), (3, 20)])
def test_chunks_of_a_batch_that_is_normalised_learn_what_the_others_have(threads: int, chunks: int) -> None:
    torch.set_num_threads(threads)

    def work(number: int) -> list[list[float]]:
        chunk = cpu_threads.current_chunk()
        assert chunk is not None
        time.sleep(0.01 * (number % 3))  # they come in another order each time
        return [chunk.gather(torch.tensor(float(number * step))).tolist() for step in range(1, 6)]

    expected = [[float(number * step) for number in range(chunks)] for step in range(1, 6)]
    with normalising_pool() as pool:
        for _ in range(3):
            assert list(pool.map(work, range(chunks))) == [expected] * chunks
    assert cpu_threads.current_chunk() is None


def test_no_more_chunks_are_computed_at_a_time_than_there_are_threads() -> None:
    torch.set_num_threads(2)
    counts, lock = [0, 0], threading.Lock()

    def work(number: int) -> None:
        for _ in range(3):
            with lock:
                counts[0] += 1
                counts[1] = max(counts)
            time.sleep(0.01)
            with lock:
                counts[0] -= 1
            chunk = cpu_threads.current_chunk()
            assert chunk is not None
            chunk.gather(torch.tensor(number))

    with normalising_pool() as pool:
        list(pool.map(work, range(9)))
    assert counts == [0, 2]


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_in_a_chunk_ends_those_that_wait_for_it(failing: int) -> None:
    def work(number: int) -> int:
        chunk = cpu_threads.current_chunk()
        assert chunk is not None
        chunk.gather(torch.tensor(number))
        if number == failing:
            raise ZeroDivisionError
        chunk.gather(torch.tensor(number))
        return number

    torch.set_num_threads(2)
    with normalising_pool() as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(work, range(3)))


def test_chunks_wait_for_each_other_only_while_a_batch_is_normalised() -> None:
    torch.set_num_threads(2)
    for normalised, train, waits in ((True, True, True), (True, False, False), (False, True, False)):
        cnn = CNN(replace(ARCHITECTURE, batch_norm=normalised), torch.Generator()).train(train)
        with cpu_threads.thread_pool(cnn, CPU) as pool:
            assert pool.chunk(128, 1) == 64
            found = list(pool.map(lambda number: cpu_threads.current_chunk() is not None, range(2)))
        assert found == [waits] * 2


def test_a_batch_stays_whole_for_a_normalisation_that_knows_its_chunk_alone() -> None:
    torch.set_num_threads(2)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    for training, chunk in ((True, 128), (False, 64)):
        with cpu_threads.thread_pool(network.train(training), CPU) as pool:
            assert pool.chunk(128, 1) == chunk
            assert list(pool.map(abs, [-1, 2])) == [1, 2]
