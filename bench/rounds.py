"""The contenders and their turns: a process each, one after the other.

A contender takes a number of epochs and, except for this project, a file of images. It does the same work as the others
(train on the training images in batches of 128, then loss and accuracy on the validation images) and prints a JSON line
for each epoch.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench import measurement, recipes
from bench.measurement import Finished
from pipeline.data.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, UserError

KERAS_PYTHON, LIGHTNING = Path("bench/.keras/bin/python"), Path("bench/.lightning")
KERAS_EPOCHS = 15  # of the published recipe
MIN_ACCURACY = 0.97  # after two epochs; one that does not learn does not do the same work
# At every step of a DataLoader loop glibc returns thousands of pages to the system and asks for them again, which costs
# up to a third of its speed. Keras and this project reuse their memory, and are not faster with this.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def read_images() -> tuple[LabelledImages, LabelledImages]:
    """The training and validation images of MNIST. Raises UserError if other images are prepared."""
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    if dataset.name != "mnist" or (len(train), len(validation)) != (54_000, 6_000):
        raise UserError(f"the prepared images are {dataset.label}; the bounds are for mnist")
    return train, validation


def write_images(path: Path, train: LabelledImages, validation: LabelledImages) -> None:
    """The images as NumPy arrays, which every contender can read."""
    np.savez(
        path,
        train_images=train.images.numpy(),
        train_labels=train.labels.numpy(),
        validation_images=validation.images.numpy(),
        validation_labels=validation.labels.numpy(),
    )


@dataclass(frozen=True)
class Contender:
    """A command, made from a file of images and a number of epochs."""

    command: Callable[[Path, int], list[str | Path]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, data: Path, epochs: int) -> Finished:
        """Run it to its end."""
        path = f"{Path.cwd()}:{LIGHTNING}"
        return measurement.run(self.command(data, epochs), Path.cwd(), PYTHONPATH=path, **self.environment)


def ours(*overrides: str, copies: int = 1) -> Contender:
    """This project; ``copies`` repeats the training images."""
    program = "bench.contenders.convtrack_fit"
    return Contender(lambda _, epochs: [sys.executable, "-m", program, str(epochs), str(copies), *overrides])


def usual(program: str, argument: str, **environment: str) -> Contender:
    """A program with a DataLoader. The argument is its number of workers, or the trials of a study as JSON."""
    words = [sys.executable, "-m", f"bench.contenders.{program}"]
    return Contender(lambda data, epochs: [*words, data, str(epochs), argument], environment)


# In an environment of its own.
KERAS = Contender(lambda data, epochs: [KERAS_PYTHON, "-E", "bench/contenders/keras_fit.py", data, str(epochs)])

CONTENDERS = {  # in the order in which they take their turns
    "Keras": KERAS,
    "convtrack, float32": ours(),
    "DataLoader loop": usual("dataloader_loop", "0", **KEEP_MEMORY),
    "convtrack, bfloat16": ours("train.precision=bfloat16"),
    "DataLoader loop, 2 workers": usual("dataloader_loop", "2", **KEEP_MEMORY),
    "Lightning": usual("lightning_loop", "0", **KEEP_MEMORY),
}
WHOLE_PROCESSES = {  # and the epochs of each
    "Keras, 15 epochs": (KERAS, KERAS_EPOCHS),
    "short recipe": (ours(*recipes.as_words(recipes.SHORT)), recipes.SHORT_EPOCHS[0]),
    "shortest recipe": (ours(*recipes.as_words(recipes.SHORTEST)), recipes.SHORT_EPOCHS[1]),
}


@dataclass(frozen=True)
class Turn:
    """One process: seconds of each epoch except the first, which includes set-up, and its peak memory."""

    seconds: list[float]
    validation_accuracy: float
    peak_mb: float


def take_turn(contender: Contender, data: Path, epochs: int) -> Turn:
    """Run a contender for one extra epoch, which is left out. Raises Fault if it does not learn."""
    done = contender.run(data, epochs + 1)
    turn = Turn([row["seconds"] for row in done.rows[1:]], done.rows[-1]["validation_accuracy"], done.peak_mb)
    if turn.validation_accuracy < MIN_ACCURACY:
        raise Fault(
            f"{contender.command(data, epochs)[2]} does not learn: validation accuracy {turn.validation_accuracy:.2%}"
        )
    return turn


def time_whole_processes(data: Path, rounds: int) -> Mapping[str, list[float]]:
    """Seconds from the start of a process to its end, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in WHOLE_PROCESSES}
    for number in range(1, rounds + 1):
        for name, (contender, epochs) in WHOLE_PROCESSES.items():
            seconds[name].append(contender.run(data, epochs).seconds)
            print(f"round {number}  {name:<28}{seconds[name][-1]:.2f} s from start to end", flush=True)
    return seconds
