"""The prepared splits: create, check, write and read them."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline import files
from pipeline.data import mapped_files
from pipeline.data.image_files import Preprocessing
from pipeline.errors import Fault, UserError, check_class_names, counted, printable

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
GIB = 2**30  # bytes


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, H, W, C) uint8 and their labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | torch.Tensor) -> "LabelledImages":
        return LabelledImages(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "LabelledImages":
        """The same images and labels in the memory of ``device``."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class SplitFacts:
    """One split in ``dataset.json``: its number of images, that of each class, and the SHA-256 of its file."""

    count: int
    per_class: dict[str, int]
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The content of ``dataset.json``.

    ``name`` is the data set that was actually used and ``requested`` the one that params.yaml names; they differ after
    the offline fallback. ``preprocessing`` is how other pictures become images like these. ``mean`` and ``std`` are
    those of the training pixels in [0, 1], one value per channel.
    """

    name: str
    requested: str
    source: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, SplitFacts]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.preprocessing.image_shape

    @property
    def label(self) -> str:
        """The name to show. It also shows if this is not the data set that params.yaml names."""
        return self.name if self.name == self.requested else f"{self.name}, standing in for {self.requested}"

    @property
    def tags(self) -> dict[str, str]:
        """The data set as tags of a run, a model file or a registered model."""
        return {"data.name": self.name, "data.requested": self.requested, "data.sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """One digest of all the data: the SHA-256 of the splits' digests, joined."""
        return files.sha256("".join(self.splits[name].sha256 for name in SPLITS).encode())


@dataclass(frozen=True)
class Prepared:
    """Images in their splits, and what ``dataset.json`` says of them: see Dataset."""

    splits: dict[str, LabelledImages]
    name: str
    requested: str
    source: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing


def cut(train: LabelledImages, test: LabelledImages, *, validation_fraction: float) -> dict[str, LabelledImages]:
    """The three splits of published ones. Validation is the last part of the training images, in their order.

    Raises UserError where it would have no images.
    """
    kept = len(train) - round(len(train) * validation_fraction)
    if kept == len(train):
        raise UserError(
            f"params.yaml: data.validation_fraction is {validation_fraction}, less than one image of {len(train):,}"
        )
    return {TRAIN: train[:kept], VALIDATION: train[kept:], TEST: test}


def check(splits: dict[str, LabelledImages], name: str, class_names: tuple[str, ...]) -> list[str]:
    """Warnings about classes without images, a line each.

    Raises UserError for invalid labels and class names, and for classes without images.
    """
    warnings = []
    try:
        check_class_names(class_names)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    for split, images in splits.items():
        if not len(images):
            raise UserError(
                f"{name}: the {split} split has no images: copies, or pictures of one subject, join all of them with "
                "another split"
            )
        outside = (images.labels < 0) | (images.labels >= len(class_names))
        if outside.any():
            worst = int(images.labels[outside][0])
            raise UserError(
                f"{name}: the {split} split has {counted(int(outside.sum()), 'label')} outside the classes, such as "
                f"{worst}; allowed: 0 to {len(class_names) - 1}"
            )
        for number, count in enumerate(torch.bincount(images.labels, minlength=len(class_names)).tolist()):
            if count == 0 and split == TRAIN:
                raise UserError(f"{name}: the {split} split has no image of class {class_names[number]}")
            if count == 0:
                warnings.append(f"the {split} split has no image of class {class_names[number]}")
    return warnings


def copy_warnings(splits: dict[str, LabelledImages]) -> Iterator[str]:
    """What may be wrong with equal images: that they are in several splits, or have several labels; a line each.

    Only for published data sets: own pictures are split so that copies stay together, and checked for near copies too.
    """
    labelled = {
        name: set(zip(mapped_files.digests(split.images.numpy()), split.labels.tolist(), strict=True))
        for name, split in splits.items()
    }
    seen = {name: {digest for digest, _ in pairs} for name, pairs in labelled.items()}
    for one, other in itertools.combinations(seen, 2):
        if common := seen[one] & seen[other]:
            yield f"the {one} and the {other} split share {counted(len(common), 'image')}"
    labels_of = Counter(digest for digest, _ in set().union(*labelled.values()))
    if several := sum(count > 1 for count in labels_of.values()):
        yield f"copies of {counted(several, 'image')} have different labels"


def write_splits(prepared: Prepared, folder: Path = files.PREPARED) -> Dataset:
    """Write one safetensors file per split, then ``dataset.json``. The same splits give the same bytes."""
    with ThreadPoolExecutor(1) as thread:
        mean_and_deviation = thread.submit(_mean_and_deviation, prepared.splits[TRAIN].images)
        facts = {
            split: _write_split(images, folder / f"{split}.safetensors", prepared.class_names)
            for split, images in prepared.splits.items()
        }
    mean, std = mean_and_deviation.result()
    told = {each.name: getattr(prepared, each.name) for each in fields(prepared) if each.name != "splits"}
    dataset = Dataset(**told, mean=mean, std=std, splits=facts)
    write_dataset(dataset, folder)
    return dataset


def write_dataset(dataset: Dataset, folder: Path = files.PREPARED) -> None:
    """Write ``dataset.json``, which also holds the digest of its content."""
    facts = asdict(dataset)
    files.write_json(folder / "dataset.json", facts | {"sha256": _digest(facts)})


def _digest(facts: dict[str, Any]) -> str:
    """The SHA-256 of the content of dataset.json; tuples and lists count as the same."""
    return files.sha256(json.dumps(facts, sort_keys=True).encode())


def _write_split(split: LabelledImages, path: Path, class_names: tuple[str, ...]) -> SplitFacts:
    sha256 = files.write_parts(path, _parts(split))
    counts = torch.bincount(split.labels, minlength=len(class_names)).tolist()
    return SplitFacts(len(split), dict(zip(class_names, counts, strict=True)), sha256)


def _parts(split: LabelledImages) -> Iterator[bytes | memoryview]:
    """The content of a split's file, a part at a time."""
    yield _header(len(split), tuple(split.images.shape[1:]))
    yield split.labels.numpy().tobytes()
    for some in mapped_files.chunks(split.images.numpy()):
        yield np.ascontiguousarray(some).data


def _header(count: int, image_shape: tuple[int, ...]) -> bytes:
    """What a split's file begins with, as the library safetensors writes it: it needs all images in memory."""
    labels, images = 8 * count, count * math.prod(image_shape)
    content = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, labels]},
        "images": {"dtype": "U8", "shape": [count, *image_shape], "data_offsets": [labels, labels + images]},
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _mean_and_deviation(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of the pixels in [0, 1] of each channel, rounded to six digits."""
    sums = squares = np.zeros(images.shape[-1], np.int64)
    for some, squared in mapped_files.on_all_cores(_sums, images.numpy()):
        sums, squares = sums + some, squares + squared
    count = images[..., 0].numel()
    means = [total / count for total in sums.tolist()]
    variances = [  # of whole numbers: nothing is lost
        (square * count - total * total) / (count * (count - 1))
        for total, square in zip(sums.tolist(), squares.tolist(), strict=True)
    ]
    return tuple(round(mean / 255, 6) for mean in means), tuple(round(math.sqrt(each) / 255, 6) for each in variances)


def _sums(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sum of the levels, and that of their squares, for each channel."""
    return _sum(images), _sum(np.multiply(images, images, dtype=np.uint16))


def _sum(values: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.int64]:
    """The sum for each channel (C,) of some images (N, H, W, C); over the images first, which is fast."""
    return np.asarray(values.sum(axis=0, dtype=np.uint32).sum(axis=(0, 1), dtype=np.int64))


def read_dataset(folder: Path = files.PREPARED) -> Dataset:
    """Read ``dataset.json``. Raises Fault where it has changed since it was written."""
    path = folder / "dataset.json"
    try:
        content = json.loads(files.read(path, made_by="prepare"))
        if content.pop("sha256") != _digest(content):
            raise ValueError("its SHA-256 differs")
        dataset = _typed(content)
        check_class_names(dataset.class_names)
        if set(dataset.splits) != set(SPLITS):
            raise ValueError(f"its splits are not {', '.join(SPLITS)}")
        return dataset
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Fault(f"{path} is damaged ({printable(str(error))}): run `dvc repro -f prepare`") from error


def _typed(content: dict[str, Any]) -> Dataset:
    """The content of dataset.json. Raises ValueError, in one line, for another key or type of value."""
    try:
        return TypeAdapter(Dataset).validate_json(json.dumps(content), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_split(
    dataset: Dataset, split: str, folder: Path = files.PREPARED, memory_limit: float = math.inf
) -> LabelledImages:
    """One split. Its SHA-256 is checked, because DVC does not hash the files in its cache again.

    A file of more than ``memory_limit`` GiB is mapped: its images are read from the disk when they are used, and cannot
    be changed. Raises Fault where the file is not what ``dataset`` says: the number of images, their shape, the labels.
    """
    path = folder / f"{split}.safetensors"
    with files.open_input(path, made_by="prepare") as file:
        if files.sha256_of(file) != dataset.splits[split].sha256:
            raise Fault(f"{path} is damaged (its SHA-256 is not the one in dataset.json): run `dvc repro -f prepare`")
        content = mapped_files.content(file, memory_limit * GIB)
    try:
        return _labelled(content, dataset, split)
    except ValueError as error:
        raise Fault(f"{path} is damaged ({printable(str(error))}): run `dvc repro -f prepare`") from error


def _labelled(content: NDArray[np.uint8], dataset: Dataset, split: str) -> LabelledImages:
    """What a split's file holds. Raises ValueError where it is not what ``dataset`` says."""
    count = dataset.splits[split].count
    header = _header(count, dataset.image_shape)
    labels_end = len(header) + 8 * count
    size = labels_end + count * math.prod(dataset.image_shape)
    if content[: len(header)].tobytes() != header or len(content) != size:
        raise ValueError(f"it is not {counted(count, 'image')} of {dataset.image_shape}, with labels")
    labels = torch.from_numpy(content[len(header) : labels_end].copy().view(np.int64))
    images = mapped_files.tensor(content[labels_end:].reshape(count, *dataset.image_shape))
    if count == 0 or labels.min() < 0 or labels.max() >= len(dataset.class_names):
        raise ValueError("it has no images, or labels that are not a class")
    return LabelledImages(images, labels)
