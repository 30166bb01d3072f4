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
    ("threads", "batch_size", "images", "pieces"),
    [
        (1, 128, 128, [64, 64]),
        (2, 128, 128, [64, 64]),
        (2, 128, 112, [64, 48]),
        (3, 128, 128, [43, 43, 42]),
        (2, 100, 100, [50, 50]),
        (2, 100, 1, [1]),
        (64, 128, 128, [16] * 8),
        (4, 200, 200, [50] * 4),
    ],
)
def test_a_batch_is_parted_among_the_threads(threads: int, batch_size: int, images: int, pieces: list[int]) -> None:
    torch.set_num_threads(threads)
    with workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU, batch_size) as team:
        assert torch.get_num_threads() == 1
        parted = team.split(torch.arange(images))
        assert [len(piece) for piece in parted] == pieces
        assert torch.equal(torch.cat(parted), torch.arange(images))
    assert torch.get_num_threads() == threads


def test_every_thread_works_and_the_answers_come_in_order() -> None:
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)  # passed only when three threads are at work at once

    def square(number: int) -> tuple[int, int]:
        together.wait()
        assert torch.get_num_threads() == 1
        return number**2, threading.get_ident()

    with workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU, 9) as team:
        squares, threads = zip(*team.map(square, range(9)), strict=True)
    assert squares == tuple(number**2 for number in range(9))
    assert len(set(threads)) == 3
    assert threading.get_ident() in threads


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    torch.set_num_threads(2)
    with (
        pytest.raises(ZeroDivisionError),
        workers.hired(CNN(ARCHITECTURE, torch.Generator()), CPU, 9) as team,
    ):
        list(team.map(lambda number: 1 // number, [1, 0]))
    assert torch.get_num_threads() == 2


def test_a_batch_that_is_normalised_stays_whole_while_training() -> None:
    torch.set_num_threads(2)
    cnn = CNN(replace(ARCHITECTURE, batch_norm=True), torch.Generator())
    for training, pieces in ((True, 1), (False, 2)):
        with workers.hired(cnn.train(training), CPU, 128) as team:
            assert len(team.split(torch.arange(128))) == pieces
            assert list(team.map(abs, [-1, 2])) == [1, 2]
