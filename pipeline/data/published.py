"""The published data sets that torchvision reads: their files, where those are, and the SHA-256 of each."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
import torchvision.datasets
from numpy.typing import NDArray
from torchvision.datasets.utils import extract_archive

from pipeline import files
from pipeline.data import downloads
from pipeline.data.downloads import PublishedFile
from pipeline.data.splits import LabelledImages

MB = 1_000_000


class Unpacked(Protocol):
    """What torchvision's data sets of images in memory have in common; torchvision has no type for it."""

    data: torch.Tensor | NDArray[np.uint8]
    targets: torch.Tensor | list[int]


@dataclass(frozen=True)
class Published:
    """How torchvision reads one data set, its files, and where they are published.

    torchvision checks MD5, which does not protect against a hostile mirror; the SHA-256 values are those of its
    prototype datasets, and those of the contents are computed from these files. ``unpacked`` is the folder in which
    torchvision looks for the unpacked files.
    """

    dataset: Callable[..., Unpacked]
    files: tuple[PublishedFile, ...]
    mirrors: tuple[str, ...]
    unpacked: str
    class_names: tuple[str, ...]


def _mnist_family(
    dataset: type[torchvision.datasets.MNIST], class_names: tuple[str, ...], *digests: tuple[str, str | None]
) -> Published:
    names = (name for name, _ in dataset.resources)
    return Published(
        dataset,
        tuple(
            PublishedFile(name, sha256, 64 * MB, content)
            for name, (sha256, content) in zip(names, digests, strict=True)
        ),
        tuple(dataset.mirrors),
        f"{dataset.__name__}/raw",
        class_names,
    )


_CIFAR10 = torchvision.datasets.CIFAR10
PUBLISHED = {
    "mnist": _mnist_family(
        torchvision.datasets.MNIST,
        tuple("0123456789"),
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": _mnist_family(
        torchvision.datasets.FashionMNIST,
        tuple(torchvision.datasets.FashionMNIST.classes),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "kmnist": _mnist_family(
        torchvision.datasets.KMNIST,
        tuple(torchvision.datasets.KMNIST.classes),
        ("51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4", None),
        ("e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17", None),
        ("edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5", None),
        ("20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c", None),
    ),
    "cifar10": Published(
        _CIFAR10,
        (
            PublishedFile(
                _CIFAR10.filename, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", 256 * MB
            ),
        ),
        (_CIFAR10.url.removesuffix(_CIFAR10.filename),),
        "",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


def read(name: str) -> tuple[str, tuple[str, ...], LabelledImages, LabelledImages]:
    """The data set ``name``, downloaded into ``data/raw`` if it is not there: its origin, classes and two splits.

    Raises NoMirrorError, and UserError for a damaged file in ``data/raw``.
    """
    source = PUBLISHED[name]
    archives = [downloads.fetch(files.raw_folder() / name, file, _mirrors(name)) for file in source.files]
    with TemporaryDirectory(prefix="convtrack-") as unpacked:
        folder = Path(unpacked) / source.unpacked
        folder.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            _unpack(archive, folder)
        train, test = (_labelled(source.dataset(unpacked, train=train)) for train in (True, False))
    return f"torchvision.datasets.{source.dataset.__name__}", source.class_names, train, test


def downloaded() -> Iterator[tuple[Path, bool]]:
    """The published files that are in ``data/raw``, and whether each is as published."""
    for name, source in PUBLISHED.items():
        for file in source.files:
            path = downloads.find(files.raw_folder() / name, file)
            if path is not None:
                yield path, file.is_at(path)


def _mirrors(name: str) -> Iterator[str]:
    """Folders and URLs to try, in this order. A mirror may have one folder per data set."""
    for own in downloads.own_mirror():
        yield from (own, f"{own}{name}/")
    yield from PUBLISHED[name].mirrors


def _unpack(archive: Path, folder: Path) -> None:
    if ".tar" in archive.suffixes:
        extract_archive(str(archive), str(folder))
        return
    with downloads.open_content(archive) as content, (folder / archive.name.removesuffix(".gz")).open("wb") as file:
        shutil.copyfileobj(content, file)


def _labelled(dataset: Unpacked) -> LabelledImages:
    images = torch.as_tensor(dataset.data)
    return LabelledImages(images.reshape(*images.shape[:3], -1), torch.as_tensor(dataset.targets))
