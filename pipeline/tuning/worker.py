"""A worker of the study: a process that trains what it is told and says after each epoch how it went.

    python -m pipeline.tuning.worker FILE_DESCRIPTOR

``pipeline.tuning.team`` starts it. It knows neither Optuna nor MLflow, and never reads the test images. It ends when
the process at the other end of the connection does, at the latest after the epoch that it is in.
"""

import sys
from multiprocessing.connection import Connection
from typing import Any

from pipeline import recipe
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import UserError, run_command
from pipeline.model.training import DivergedError, Step, set_up
from pipeline.params import Params
from pipeline.tuning.messages import STOP, Done, Failed, Lost, Ready, Threads


def main() -> None:
    """Take parameters to train with, until there are no more."""
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    set_up("auto", None, "float32")  # imports, for most of a second, what the first training would have to wait for
    with Connection(int(sys.argv[1])) as coordinator:
        try:
            coordinator.send(Ready())
            while True:
                _train(coordinator, dataset, train, validation)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            sys.exit(1)  # nobody is left who could be told


def _train(
    coordinator: "Connection[Any, Any]", dataset: Dataset, train: LabelledImages, validation: LabelledImages
) -> None:
    params = _told(coordinator)
    assert isinstance(params, Params)

    def on_step(step: Step) -> None:
        while coordinator.poll():  # nothing but this is said while a pass goes on
            coordinator.recv()

    try:
        device = recipe.device_for(params)
        cnn = recipe.build(params, dataset)
        for epoch in recipe.fit(cnn, train.to(device), validation.to(device), params, on_step):
            coordinator.send(epoch)
            if _told(coordinator) == STOP:
                break
    except (UserError, DivergedError) as error:
        coordinator.send(Failed(f"{type(error).__name__}: {error}"))
    except (RuntimeError, MemoryError) as error:  # PyTorch says so too where there is no memory, or no thread
        coordinator.send(Lost(f"{type(error).__name__}: {error}"))
    else:
        coordinator.send(Done())


def _told(coordinator: "Connection[Any, Any]") -> Params | bool:
    """What comes next, but for the number of threads, which is heard at once."""
    told: Params | Threads | bool = coordinator.recv()
    while isinstance(told, Threads):
        told = coordinator.recv()
    return told


if __name__ == "__main__":
    run_command(main)
