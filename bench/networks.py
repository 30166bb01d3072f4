"""How fast networks of several kinds are trained, compared with a plain loop in PyTorch: `make bench-networks`.

    python -m bench.networks [--rounds 3] [NETWORK ...]

Each turn is a process of its own, this project's and the plain loop's one after the other, round after round. Nothing
else should run. Writes bench/networks.json; exits 1 where a bound is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measurement, rounds
from bench.measurement import Bound, conclude
from pipeline import files
from pipeline.data.splits import TRAIN, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.params import Model

RESULTS = Path("bench/networks.json")
EPOCHS = 3  # of a turn; the first warms up
OURS, PLAIN = "convtrack", "plain loop"


@dataclass(frozen=True)
class Network:
    """A network, and how many images of which shape (H, W, C) an epoch has."""

    model: Model
    image_shape: tuple[int, int, int] = (28, 28, 1)
    count: int = 6400
    classes: int = 10

    def images(self) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, C) uint8 and labels (N,): MNIST's digits where they fit, else smooth random colours."""
        if self.image_shape == (28, 28, 1):
            some = read_split(read_dataset(), TRAIN)[: self.count]
            return some.images.clone(), some.labels.clone()
        height, width, channels = self.image_shape
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(self.classes, (self.count,), generator=generator)
        coarse = torch.randint(256, (self.count, channels, 8, 8), generator=generator).float()
        smooth = F.interpolate(coarse, (height, width), mode="bilinear")
        return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), labels


NETWORKS = {
    "default": Network(Model()),
    "batch norm": Network(Model(batch_norm=True)),
    "mean pooling": Network(Model(pool="mean")),
    "padding 1": Network(Model(padding=1)),
    "stride 2, no pooling": Network(Model(stride=2, pool_size=1)),
    "kernel 5": Network(Model(kernel_size=5)),
    "32 x 32 x 3": Network(Model(filters=(32, 64, 128), padding=1), (32, 32, 3), 3200),
    "32 x 32 x 3, batch norm": Network(Model(filters=(32, 64, 128), padding=1, batch_norm=True), (32, 32, 3), 3200),
    "64 x 64 x 3": Network(Model(filters=(32, 64, 128, 256), padding=1), (64, 64, 3), 1280),
    "64 x 64 x 3, batch norm": Network(
        Model(filters=(32, 64, 128, 256), padding=1, batch_norm=True), (64, 64, 3), 1280
    ),
}


def main() -> None:
    """Take the turns, print and write the seconds, and exit 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description="Compare networks of several kinds with a plain loop in PyTorch.")
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all if none is given"
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    names = given.networks or list(NETWORKS)
    turns: dict[str, dict[str, list[float]]] = {name: {OURS: [], PLAIN: []} for name in names}
    for number in range(1, given.rounds + 1):
        for name, seconds in turns.items():
            for who, program in (
                (OURS, "bench.contenders.convtrack_network"),
                (PLAIN, "bench.contenders.in_memory_loop"),
            ):
                seconds[who].append(take_turn(program, name))
            print(
                f"round {number}  {name:<26}{seconds[OURS][-1]:6.2f} s, plain {seconds[PLAIN][-1]:6.2f} s", flush=True
            )
    bounds = bounds_of(turns)
    if names == list(NETWORKS):
        found = {**measurement.origin(), "turns": turns, "bounds": [each.as_row() for each in bounds]}
        files.write_json(RESULTS, found)
    conclude(bounds)


def take_turn(program: str, name: str) -> float:
    """The median seconds of an epoch, without the first."""
    command = [sys.executable, "-m", program, name, str(EPOCHS)]
    done = measurement.run(command, Path.cwd(), **rounds.KEEP_MEMORY)
    return statistics.median(row["seconds"] for row in done.rows[1:])


def bounds_of(turns: Mapping[str, Mapping[str, list[float]]]) -> list[Bound]:
    """How much longer the plain loop takes: for each network, and the geometric mean of each round."""
    ratios = {
        name: tuple(plain / ours for plain, ours in zip(seconds[PLAIN], seconds[OURS], strict=True))
        for name, seconds in turns.items()
    }
    means = tuple(statistics.geometric_mean(of_round) for of_round in zip(*ratios.values(), strict=True))
    rows = [Bound(f"plain loop against convtrack: {name}", each, 1.1, 1.4, "x") for name, each in ratios.items()]
    return [*rows, Bound("geometric mean", means, 1.6, 2.2, "x")]


if __name__ == "__main__":
    run_command(main)
