"""Downloads over a real HTTP server on this machine, of small data sets in the published formats."""

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import socket
import socketserver
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from pipeline.data import downloads, published, sources
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
MB = 1_000_000
CLOSED_PORT = "http://127.0.0.1:9/"  # discard: nothing answers there


def idx(values: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Bytes in the format of the MNIST files: magic number, sizes, values."""
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 | values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes(), mtime=0)


def small_mnist(scale: int = 1) -> dict[str, bytes]:
    """The four files with 30 training and 10 test images of noise, or ``scale`` times as many."""
    noise = np.random.default_rng(0)
    found = {}
    for prefix, count in (("train", 30 * scale), ("t10k", 10 * scale)):
        found[f"{prefix}-images-idx3-ubyte.gz"] = idx(noise.integers(256, size=(count, 28, 28), dtype=np.uint8))
        found[f"{prefix}-labels-idx1-ubyte.gz"] = idx((np.arange(count) % 10).astype(np.uint8))
    return found


def publish(
    patch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    name: str = "mnist",
    mirror: str = CLOSED_PORT,
    max_bytes: int = 100_000,
) -> None:
    """Make ``files`` the published ones, at ``mirror`` only."""
    these = tuple(
        downloads.PublishedFile(
            file,
            hashlib.sha256(content).hexdigest(),
            max_bytes=max_bytes,
            content_sha256=hashlib.sha256(gzip.decompress(content)).hexdigest() if file.endswith("ubyte.gz") else None,
        )
        for file, content in files.items()
    )
    patch.setitem(published.PUBLISHED, name, replace(published.PUBLISHED[name], files=these, mirrors=(mirror,)))


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which a server of this machine hands it out."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository's root; no mirror is set and none of the published ones is asked."""
    root = tmp_path / "clone"
    root.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv(downloads.MIRROR_VARIABLE, raising=False)
    publish(monkeypatch, small_mnist())
    return root


def raw(clone: Path, name: str = "mnist") -> list[str]:
    folder = clone / "data/raw" / name
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def is_small_mnist(source: sources.Source) -> bool:
    images = gzip.decompress(small_mnist()[TRAIN_IMAGES])[16:]
    return bool(source.train.images.numpy().tobytes() == images) and source.train.labels.tolist() == [*range(10)] * 3


def test_the_mirror_of_the_user_is_tried_first(
    clone: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = mirror
    put(folder, small_mnist())
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, url)
    _, source = sources.load("mnist")
    assert is_small_mnist(source)
    assert source.train.images.shape == (30, 28, 28, 1)
    assert source.train.images.dtype == torch.uint8
    assert source.train.labels.dtype == torch.int64
    assert source.test is not None
    assert len(source.test) == 10
    assert source.class_names == tuple("0123456789")
    assert raw(clone) == sorted(small_mnist())


@pytest.mark.parametrize("form", ["absolute", "relative to the root", "several data sets"])
def test_a_mirror_may_be_a_folder(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    put(tmp_path / "files/mnist", small_mnist())
    own = {"absolute": str(tmp_path / "files/mnist"), "relative to the root": "../files/mnist"}
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, own.get(form, str(tmp_path / "files")))
    assert is_small_mnist(sources.load("mnist")[1])


@pytest.mark.parametrize("form", ["compressed otherwise", "not compressed"])
@pytest.mark.parametrize("place", ["data/raw", "a folder", "a URL"])
def test_files_of_the_published_content_will_do(
    clone: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, form: str, place: str
) -> None:
    """As Debian hands out Fashion-MNIST, and as people have unpacked their files."""
    folder, url = mirror
    contents = {name: gzip.decompress(content) for name, content in small_mnist().items()}
    if form == "compressed otherwise":
        found = {name: gzip.compress(content, compresslevel=1) for name, content in contents.items()}
    else:
        found = {name.removesuffix(".gz"): content for name, content in contents.items()}
    put(clone / "data/raw/mnist" if place == "data/raw" else folder, found)
    if place != "data/raw":
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, url if place == "a URL" else str(folder))
    assert is_small_mnist(sources.load("mnist")[1])
    assert raw(clone) == sorted(found)
    assert [(path.name, whole) for path, whole in published.downloaded()] == [(name, True) for name in found]


def test_other_content_without_compression_is_refused(clone: Path) -> None:
    name = TRAIN_IMAGES.removesuffix(".gz")
    put(clone / "data/raw/mnist", small_mnist() | {name: b"other"})
    (clone / "data/raw/mnist" / TRAIN_IMAGES).unlink()
    with pytest.raises(UserError, match=rf"{name} is not the published file .* delete it and run again"):
        sources.load("mnist")


def test_no_more_is_unpacked_than_a_file_may_have(tmp_path: Path) -> None:
    content = bytes(1_000_000)
    path = put(tmp_path, {"file.gz": gzip.compress(content)}) / "file.gz"
    allowed = downloads.PublishedFile("file.gz", "", len(content), hashlib.sha256(content).hexdigest())
    assert allowed.is_at(path)
    assert not replace(allowed, max_bytes=len(content) - 1).is_at(path)


def test_the_published_mirrors_are_tried_where_the_users_has_another_file(
    mirror: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = mirror
    put(folder, small_mnist())
    publish(monkeypatch, small_mnist(), mirror=url)
    own = put(tmp_path / "own", small_mnist() | {TRAIN_IMAGES: b"<html>Please log in</html>"})
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(own))
    assert is_small_mnist(sources.load("mnist")[1])


def test_files_that_are_there_are_not_downloaded_again(clone: Path) -> None:
    put(clone / "data/raw/mnist", small_mnist())
    assert is_small_mnist(sources.load("mnist")[1])


@pytest.mark.faults
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],  # truncated
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),  # one bit flipped
        lambda content: b"<html>404</html>",
        lambda content: gzip.compress(b"\x00" * 1_000_000),  # another file, or a bomb
        lambda content: b"",
    ],
)
def test_fault_19_a_damaged_file_is_refused_by_name_with_the_remedy(clone: Path, damage: Any) -> None:
    content = small_mnist()
    put(clone / "data/raw/mnist", content | {TRAIN_IMAGES: damage(content[TRAIN_IMAGES])})
    with pytest.raises(UserError, match=rf"{TRAIN_IMAGES} is not the published file .* delete it and run again"):
        sources.load("mnist", "mnist-5k")  # the fallback is for silent mirrors, not for damaged files


@pytest.mark.parametrize("answer", ["nothing", "an HTML page", "404"])
def test_without_a_mirror_one_line_names_each_and_nothing_is_left(
    clone: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    folder, url = mirror
    if answer == "an HTML page":
        put(folder, small_mnist() | {TRAIN_IMAGES: b"<html>Please log in</html>"})
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, CLOSED_PORT if answer == "nothing" else url)
    with pytest.raises(downloads.NoMirrorError) as error:
        sources.load("mnist", None)
    message = str(error.value)
    assert "\n" not in message
    assert f"{TRAIN_IMAGES} could not be downloaded" in message
    assert CLOSED_PORT in message
    assert {"nothing": "refused", "an HTML page": "its SHA-256 differs", "404": "404"}[answer] in message
    assert downloads.MIRROR_VARIABLE in message
    assert raw(clone) == []


def test_a_mirror_that_never_responds_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "MIRROR_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(downloads.NoMirrorError, match=r"no answer within 0\.5 s"):
            sources.load("mnist")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("beginning", "answer"),
    [(b"HTTP/1.1 200 OK\r\nX-Slow: ", "no answer within 0.5 s"), (b"HTTP/1.1 200 OK\r\n\r\n", "it sends less than")],
)
def test_a_mirror_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, beginning: bytes, answer: str) -> None:
    """A byte every 50 ms, each of which starts a timeout of half a second anew."""
    monkeypatch.setattr(downloads, "MIRROR_TIMEOUT_SECONDS", 0.5)
    with serving(beginning, b"0", every=0.05) as url:
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, url)
        started = time.monotonic()
        with pytest.raises(downloads.NoMirrorError, match=answer):
            sources.load("mnist")
    assert time.monotonic() - started < 5


@pytest.mark.faults
def test_a_mirror_that_sends_without_end_is_given_up(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(b"HTTP/1.1 200 OK\r\n\r\n", bytes(50_000), every=0) as url:
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, url)
        with pytest.raises(
            downloads.NoMirrorError, match="it sends more than the 100,000 bytes that the file may have"
        ):
            sources.load("mnist")
    assert raw(clone) == []


def test_a_connection_that_ends_too_early_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n1234", None, every=0) as url:
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, url)
        with pytest.raises(downloads.NoMirrorError, match="it sent 4 of 5,000 bytes"):
            sources.load("mnist")


@contextmanager
def serving(beginning: bytes, rest: bytes | None, every: float) -> Iterator[str]:
    """The URL of a server that answers with ``beginning``, and then with ``rest`` again and again."""

    class Answers(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            with suppress(OSError):  # the client has closed the connection
                self.request.sendall(beginning)
                while rest is not None:
                    self.request.sendall(rest)
                    time.sleep(every)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("nonsense", ["http://127.0.0.1:9/my files/", "nonsense://host/"])
def test_an_invalid_mirror_url_counts_as_unreachable(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, nonsense)
    with pytest.raises(downloads.NoMirrorError, match=nonsense):
        sources.load("mnist")


def test_a_missing_mirror_folder_is_an_error_and_not_a_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, "/no/such/folder")
    with pytest.raises(UserError, match="PIPELINE_DATA_MIRROR is /no/such/folder, which is neither a URL nor a folder"):
        sources.load("mnist", "mnist-5k")


def test_a_server_that_does_not_speak_http_counts_as_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                with server.accept()[0] as connection:
                    connection.recv(100)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, f"http://127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(downloads.NoMirrorError, match="SSH-2"):
            sources.load("mnist")


def test_the_fallback_prints_a_loud_warning(capsys: pytest.CaptureFixture[str]) -> None:
    name, source = sources.load("mnist", "mnist-5k")
    assert name == "mnist-5k"
    assert len(source.train) == 5000
    assert source.train.labels.bincount().tolist() == [500] * 10
    warning = capsys.readouterr().err
    assert warning.startswith("!!!!!")
    assert "WARNING: mnist could not be downloaded, so mnist-5k is used in its place" in warning
    assert "data.offline_fallback: null" in warning


def test_digits_never_stand_in_for_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, small_mnist(), name="fashion-mnist")
    with pytest.raises(
        downloads.NoMirrorError, match="mnist-5k cannot stand in for fashion-mnist, which has different classes"
    ):
        sources.load("fashion-mnist", "mnist-5k")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("mnits", None),
            "params.yaml: data.dataset is 'mnits'; allowed: mnist, fashion-mnist, kmnist, cifar10, mnist-5k",
        ),
        (("mnist", "kmnist"), "params.yaml: data.offline_fallback is 'kmnist'; allowed: mnist-5k or null"),
    ],
)
def test_an_unknown_name_is_refused(arguments: tuple[str, str | None], line: str) -> None:
    with pytest.raises(UserError) as error:
        sources.load(*arguments)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(("name", "label"), [("fashion-mnist", "Sandal"), ("kmnist", "ha")])
def test_the_other_data_sets_of_the_format_come_with_their_class_names(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: str
) -> None:
    publish(monkeypatch, small_mnist(), name=name)
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(put(tmp_path / "files", small_mnist())))
    _, source = sources.load(name)
    assert is_small_mnist(source)
    assert source.class_names[5] == label
    assert raw(clone, name) == sorted(small_mnist())


def test_a_new_data_set_is_a_function_and_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    images = LabelledImages(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    toys = sources.DataSource(lambda: sources.Source("a shelf", ("car", "doll"), images))
    monkeypatch.setitem(sources.DATASETS, "toys", toys)
    assert sources.load("toys") == ("toys", toys.load())
    with pytest.raises(UserError, match="mnist-5k, toys"):
        sources.load("toy")


def publish_small_cifar10(patch: pytest.MonkeyPatch, folder: Path, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An archive of noise like CIFAR-10's, ``count`` images of each class in either split: the training pixels."""
    noise = np.random.default_rng(0)
    pixels = {name: noise.integers(256, size=(10 * count, 3072), dtype=np.uint8) for name in ("train", "test")}
    labels = [*range(10)] * count
    batches = {
        "data_batch_1": pickle.dumps({"data": pixels["train"], "labels": labels}),
        "test_batch": pickle.dumps({"data": pixels["test"], "labels": labels}),
        "batches.meta": pickle.dumps({"label_names": ["airplane"]}),
    }
    digest = {name: hashlib.md5(content).hexdigest() for name, content in batches.items()}
    for attribute, value in {
        "train_list": [["data_batch_1", digest["data_batch_1"]]],
        "test_list": [["test_batch", digest["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": digest["batches.meta"]},
    }.items():
        patch.setattr(torchvision.datasets.CIFAR10, attribute, value)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in batches.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    files = {"cifar-10-python.tar.gz": archive.getvalue()}
    publish(patch, files, name="cifar10", max_bytes=MB)
    patch.setenv(downloads.MIRROR_VARIABLE, str(put(folder, files)))
    return pixels["train"]


def test_cifar10_comes_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = publish_small_cifar10(monkeypatch, tmp_path / "files", count=1)
    _, source = sources.load("cifar10")
    assert source.train.images.shape == (10, 32, 32, 3)
    assert source.train.labels.tolist() == [*range(10)]
    assert source.class_names[8] == "ship"
    assert source.train.images[2, 5, 7].tolist() == [
        int(pixels[2, channel * 1024 + 5 * 32 + 7]) for channel in range(3)
    ]


def test_every_published_file_has_a_sha256() -> None:
    digests = [file.sha256 for source in published.PUBLISHED.values() for file in source.files]
    assert len(set(digests)) == 13
    contents = [file.content_sha256 for source in published.PUBLISHED.values() for file in source.files]
    known = [digest for digest in contents if digest is not None]
    assert len(set(known)) == 8
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests + known)
