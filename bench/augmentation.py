"""How long each augmentation takes: microseconds an image, on one thread, in chunks as a training has them.

    python -m bench.augmentation [--times 300]

Prints the table of docs/augmentation.md. Each figure is the lowest of several times, which take turns: what else runs
on the machine only adds to them.
"""

import argparse
import itertools
import math
import time

import torch

from pipeline.model.augment import GEOMETRY, augment, mixup
from pipeline.model.cpu_threads import MAX_CHUNK, single_thread
from pipeline.params import Augmentation

SHAPES = ((28, 28, 1), (32, 32, 3), (64, 64, 3))
STRENGTHS = Augmentation(
    shift=2,
    crop_padding=4,
    horizontal_flip=0.5,
    rotation=15.0,
    scale=0.1,
    shear=10.0,
    elastic=4.0,
    brightness=0.2,
    contrast=0.2,
    cutout=8,
    mixup=0.2,
).model_dump()


def main() -> None:
    """Print a row for each augmentation, one for all of GEOMETRY, and one for all."""
    parser = argparse.ArgumentParser(description="Microseconds an image of each augmentation.")
    parser.add_argument("--times", type=int, default=300, help="how often each is measured; the lowest is printed")
    times = parser.parse_args().times
    rows = {name: {name: strength} for name, strength in STRENGTHS.items() if strength}
    rows |= {" + ".join(GEOMETRY): {name: STRENGTHS[name] for name in GEOMETRY}, "all": STRENGTHS}
    found = dict.fromkeys(itertools.product(rows, SHAPES), math.inf)
    with single_thread():
        for _ in range(1 + times):  # the first compiles
            for name, shape in found:
                found[name, shape] = min(found[name, shape], microseconds(rows[name], shape))
    print(f"| augmentation | {' | '.join(' x '.join(map(str, shape)) for shape in SHAPES)} |")
    print("|---|" + "---|" * len(SHAPES))
    for name in rows:
        print(f"| {name} | {' | '.join(f'{found[name, shape]:.1f}' for shape in SHAPES)} |")


def microseconds(strengths: dict[str, float], shape: tuple[int, int, int]) -> float:
    """The time for an image (H, W, C), in a chunk of as many as a thread takes at once."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (MAX_CHUNK, *shape), dtype=torch.uint8, generator=draws)
    for _ in range(2):  # the first brings the code into the processor's cache
        started = time.perf_counter()
        changed = augment(images, strengths, draws)
        if alpha := strengths.get("mixup"):
            mixup(changed, alpha, draws)
    return (time.perf_counter() - started) / MAX_CHUNK * 1e6


if __name__ == "__main__":
    main()
