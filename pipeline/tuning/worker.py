"""A worker of the study: a process that trains one trial after the other.

    python -m pipeline.tuning.worker FILE_DESCRIPTOR

``pipeline.tuning.workers`` starts it and has the protocol. It imports neither Optuna nor MLflow, and never reads the
test images. It ends when the coordinator does, at the latest after the current epoch.
"""

import sys
from multiprocessing.connection import Connection
from typing import Any

from pipeline import recipe
from pipeline.data.splits import TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import UserError, run_command
from pipeline.model.training import DivergedError, set_up
from pipeline.params import Params, read_params
from pipeline.tuning.workers import Done, Failed, Message


def main() -> None:
    """Train with the parameters that arrive, until the coordinator ends."""
    dataset = read_dataset()
    limit = read_params().data.memory_limit
    train, validation = (read_split(dataset, split, memory_limit=limit) for split in (TRAIN, VALIDATION))
    set_up("auto", None, "float32")  # its imports take most of a second, which the first trial need not wait for
    with Connection(int(sys.argv[1])) as coordinator:
        try:
            coordinator.send(None)  # ready
            while True:
                params = coordinator.recv()
                coordinator.send(_train(coordinator, params, dataset, train, validation))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            sys.exit(1)  # the coordinator is gone


def _train(
    coordinator: "Connection[Any, Any]",
    params: Params,
    dataset: Dataset,
    train: LabelledImages,
    validation: LabelledImages,
) -> Message:
    """Train a trial, with a message to the coordinator after each epoch; how it ended."""
    try:
        device = recipe.device_for(params)
        cnn = recipe.build(params, dataset)
        for epoch in recipe.fit(cnn, train.to(device), validation.to(device), params):
            coordinator.send(epoch)
            if not coordinator.recv():
                break
    except (UserError, DivergedError) as error:
        return Failed(f"{type(error).__name__}: {error}")
    except (RuntimeError, MemoryError) as error:  # PyTorch raises both where there is no memory, or no thread
        return Failed(f"{type(error).__name__}: {error}", retry=True)
    return Done()


if __name__ == "__main__":
    run_command(main)
