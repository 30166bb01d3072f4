"""Images dealt out to threads."""

import threading
from dataclasses import replace

import pytest
import torch

from pipeline.network import workers
from pipeline.network.cnn import CNN, Architecture

ARCHITECTURE = Architecture((28, 28, 1), tuple("0123456789"), (16,))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "batch_size", "piece"),
    [(1, 128, 64), (2, 128, 64), (3, 128, 43), (2, 100, 50), (2, 20, 16), (4, 200, 50), (64, 128, 16)],
)
def test_a_batch_is_parted_among_the_threads(threads: int, batch_size: int, piece: int) -> None:
    torch.set_num_threads(threads)
    with workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU) as team:
        assert torch.get_num_threads() == 1
        assert team.piece(batch_size) == piece
    assert torch.get_num_threads() == threads


def test_every_thread_works_and_the_answers_come_in_order() -> None:
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)  # passed only when three threads are at work at once

    def square(number: int) -> tuple[int, int]:
        together.wait()
        assert torch.get_num_threads() == 1
        return number**2, threading.get_ident()

    with workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU) as team:
        squares, threads = zip(*team.map(square, range(9)), strict=True)
    assert squares == tuple(number**2 for number in range(9))
    assert len(set(threads)) == 3
    assert threading.get_ident() in threads


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    torch.set_num_threads(2)
    with (
        pytest.raises(ZeroDivisionError),
        workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU) as team,
    ):
        list(team.map(lambda number: 1 // number, [1, 0]))
    assert torch.get_num_threads() == 2


def test_a_batch_that_is_normalised_stays_whole_while_training() -> None:
    torch.set_num_threads(2)
    cnn = CNN(replace(ARCHITECTURE, batch_norm=True), torch.Generator())
    for training, piece in ((True, 128), (False, 64)):
        with workers.hired(cnn.train(training), CPU) as team:
            assert team.piece(128) == piece
            assert list(team.map(abs, [-1, 2])) == [1, 2]


def test_the_number_of_threads_may_change_between_two_batches() -> None:
    torch.set_num_threads(1)
    together = threading.Barrier(2, timeout=60)
    with workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU) as team:
        assert list(team.map(abs, [-1, 2])) == [1, 2]
        workers.use_threads(2)
        assert len(list(team.map(lambda _: together.wait(), range(4)))) == 4
        workers.use_threads(1)
        assert len(set(team.map(lambda _: threading.get_ident(), range(4)))) == 1
        workers.use_threads(2)
    assert torch.get_num_threads() == 2
    workers.use_threads(1)
    assert torch.get_num_threads() == 1
