"""The contenders, and their turns: a process each, one after the other."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import recipes, stages
from pipeline.errors import Fault

KERAS_PYTHON, LIGHTNING = Path("bench/.keras/bin/python"), Path("bench/.lightning")
KERAS_EPOCHS = 15  # of the published recipe
LEAST_ACCURACY = 0.97  # after two epochs; a contender that does not learn does not do the same work
# glibc gives memory back to the system at every step of a DataLoader loop, and asks for it again, thousands of pages,
# which makes it up to half as slow again. Keras and this project reuse theirs, and are not faster with this.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Contender:
    """Makes a command from a file of images and a number of epochs."""

    command: Callable[[Path, int], list[str | Path]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, data: Path, epochs: int) -> tuple[float, str]:
        """Seconds from the start of the process to its end, and what it printed."""
        words = list(map(str, self.command(data, epochs)))
        return stages.timed(words, Path.cwd(), PYTHONPATH=f"{Path.cwd()}:{LIGHTNING}", **self.environment)


def ours(*knobs: str, copies: int = 1) -> Contender:
    """This project, on the training images so many times."""
    program = "bench.contenders.convtrack_fit"
    return Contender(lambda _, epochs: [sys.executable, "-m", program, str(epochs), str(copies), *knobs])


def usual(program: str, argument: str, **environment: str) -> Contender:
    """One of the programs with a DataLoader. The argument is their number of workers, or the trials of a study."""
    words = [sys.executable, "-m", f"bench.contenders.{program}"]
    return Contender(lambda data, epochs: [*words, data, str(epochs), argument], environment)


# In its environment, and nothing of this one.
KERAS = Contender(lambda data, epochs: [KERAS_PYTHON, "-E", "bench/contenders/keras_fit.py", data, str(epochs)])

CONTENDERS = {  # in the order in which they take their turns
    "Keras": KERAS,
    "convtrack, float32": ours(),
    "DataLoader loop": usual("dataloader_loop", "0", **KEEP_MEMORY),
    "convtrack, bfloat16": ours("train.precision=bfloat16"),
    "DataLoader loop, 2 workers": usual("dataloader_loop", "2", **KEEP_MEMORY),
    "Lightning": usual("lightning_loop", "0", **KEEP_MEMORY),
}
RACE = {  # and the epochs of each
    "Keras, 15 epochs": (KERAS, KERAS_EPOCHS),
    "short recipe": (ours(*recipes.as_words(recipes.SHORT)), recipes.SHORT_EPOCHS[0]),
    "shortest recipe": (ours(*recipes.as_words(recipes.SHORTEST)), recipes.SHORT_EPOCHS[1]),
}


@dataclass(frozen=True)
class Turn:
    """One process: seconds of each epoch but the first, in which things are still set up, and its peak memory."""

    seconds: list[float]
    validation_accuracy: float
    peak_mb: float


def take_turn(contender: Contender, data: Path, epochs: int) -> Turn:
    """Run a contender for one epoch more than asked for. Raises Fault where it does not learn."""
    _, printed = contender.run(data, epochs + 1)
    *rows, memory = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    turn = Turn([row["seconds"] for row in rows[1:]], rows[-1]["validation_accuracy"], memory["peak_mb"])
    if turn.validation_accuracy < LEAST_ACCURACY:
        raise Fault(
            f"{contender.command(data, epochs)[2]} does not learn: validation accuracy {turn.validation_accuracy:.2%}"
        )
    return turn


def race(data: Path, rounds: int) -> Mapping[str, list[float]]:
    """Seconds from the start of a process to its end, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in RACE}
    for number in range(1, rounds + 1):
        for name, (contender, epochs) in RACE.items():
            seconds[name].append(contender.run(data, epochs)[0])
            print(f"round {number}  {name:<28}{seconds[name][-1]:.2f} s from start to end", flush=True)
    return seconds
