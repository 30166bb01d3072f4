"""This project's training of the published network.

    python -m bench.contenders.convtrack_fit EPOCHS COPIES [knob=value ...]

COPIES: so many times the training images.
"""

import sys

import torch

from bench import recipes
from bench.contenders import reporting
from pipeline.images.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.network import training
from pipeline.train import build


def main() -> None:
    """Fit the network to the prepared images."""
    epochs, copies, *words = sys.argv[1:]
    knobs = recipes.from_words(words) | {"train.epochs": int(epochs)}
    params = recipes.changed(recipes.published(), knobs)
    training.set_up(params.train.device, params.train.threads, params.train.precision)
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    for epoch in training.fit(
        build(params, dataset),
        (train.images.repeat(int(copies), 1, 1, 1), train.labels.repeat(int(copies))),
        (validation.images, validation.labels),
        generator=torch.Generator().manual_seed(params.seed),
        **params.train.model_dump(exclude={"device", "threads"}),
    ):
        reporting.report(seconds=epoch.seconds, validation_accuracy=epoch.validation_accuracy)
    reporting.report_memory()


if __name__ == "__main__":
    main()
