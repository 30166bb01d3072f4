"""The images that all contenders train on."""

from pathlib import Path

import numpy as np

from pipeline.data.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split
from pipeline.errors import UserError


def read() -> tuple[LabelledImages, LabelledImages]:
    """The training and validation images, if they are those that the bounds were set for."""
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    if dataset.name != "mnist" or (len(train), len(validation)) != (54_000, 6_000):
        raise UserError(f"the prepared images are {dataset.label}; the bounds are those of mnist")
    return train, validation


def write(path: Path, train: LabelledImages, validation: LabelledImages) -> None:
    """The images as NumPy arrays, which every contender can read."""
    np.savez(
        path,
        train_images=train.images.numpy(),
        train_labels=train.labels.numpy(),
        validation_images=validation.images.numpy(),
        validation_labels=validation.labels.numpy(),
    )
