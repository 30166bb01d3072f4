"""A person's own pictures in a clone: train, predict, the server and the exports see the same bytes."""

import csv
import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file

from pipeline import files, predict
from pipeline.data import image_files
from pipeline.data.decoder import Decoder, Decoders
from pipeline.data.splits import LabelledImages
from pipeline.tracking import registry, serving, store
from tests import forked
from tests.conftest import free_port, write_params
from tests.data.test_image_files import stored
from tests.test_clone import ONE_EPOCH, clone, environment, repro, succeed

__all__ = ["clone"]
pytestmark = pytest.mark.slow
OWN = ONE_EPOCH | {"data.dataset": "folder", "data.test_fraction": 0.38, "train.epochs": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, LabelledImages]) -> Path:
    """1,500 real digits as JPEG files in class folders, outside the repository."""
    folder = tmp_path_factory.mktemp("pictures") / "my digits ü"
    images = digits["train"][slice(1500)]
    for index, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0].numpy()).save(path, quality=90)
    return folder


@pytest.fixture(scope="module")
def trained(clone: Path, pictures: Path) -> Path:
    """The clone, with a model of these pictures."""
    write_params(clone, OWN | {"data.path": str(pictures)})
    repro("evaluate", folder=clone)
    return clone


def table(path: Path) -> list[dict[str, str]]:
    return list(files.read_table(path, made_by="prepare"))


def test_every_way_to_a_model_gives_each_test_picture_the_label_that_evaluate_gave(
    trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_every_way(trained, pictures, monkeypatch) >= 500


def check_every_way(folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """`predict`, the server and the exports agree with `evaluate` on each test picture; how many these are."""
    rows = [row for row in table(folder / files.IMAGES) if row["split"] == "test"]
    expected = table(folder / files.PREDICTIONS)
    assert len(rows) == len(expected)
    expected = [expected[int(row["index"])] for row in rows]
    assert [row["label"] for row in rows] == [each["actual"] for each in expected]
    labels, confidence = [each["predicted"] for each in expected], [float(each["confidence"]) for each in expected]
    paths = [pictures / row["path"] for row in rows]
    command = [forked.python(), "-m", "pipeline.predict", "--csv", *map(str, paths)]
    answers: dict[str, list[dict[str, Any]]] = {
        "predict": list(csv.DictReader(succeed(*command, folder=folder).splitlines())),
        "one at a time": [],
        "a hundred at a time": [],
    }
    with served(folder) as address:
        for path in paths:
            header = {"Content-Type": "image/jpeg"}
            answers["one at a time"] += predictions(requests.post(address, path.read_bytes(), headers=header))
        for start in range(0, len(paths), 100):
            form = [("picture", (path.name, path.read_bytes())) for path in paths[start : start + 100]]
            answers["a hundred at a time"] += predictions(requests.post(address, files=form))
    assert [each["file"] for each in answers["a hundred at a time"]] == [path.name for path in paths]
    for way, found in answers.items():
        assert [each["label"] for each in found] == labels, way
        assert [float(each["probability"]) for each in found] == pytest.approx(confidence, abs=1e-5), way
    images = check_bytes(folder, paths, [int(row["index"]) for row in rows], monkeypatch)
    check_exports(folder, images, [list(each["probabilities"].values()) for each in answers["one at a time"]])
    return len(paths)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Where the champion of a clone takes requests."""
    port = free_port()
    command = [forked.python(), "-m", "pipeline.serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert b"is served at" in b"".join(itertools.islice(process.stdout, 2))
        yield f"http://127.0.0.1:{port}/invocations"
        process.terminate()


def predictions(answer: requests.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["predictions"])


def check_bytes(
    folder: Path, paths: list[Path], indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> NDArray[np.uint8]:
    """What `train` and `evaluate` read, what `predict` makes of the files, and what the server makes of them."""
    prepared = load_file(folder / files.PREPARED / "test.safetensors")["images"].numpy()[indices]
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)
    store.connect()
    loaded = registry.load(registry.find("champion"))
    with Decoders() as decoders:
        read = list(predict._readable(list(map(str, paths)), loaded, decoders))
    assert np.stack([image for _, image in read]).tobytes() == prepared.tobytes()
    with Decoder() as decoder:
        named = [(path.name, memoryview(path.read_bytes())) for path in paths]
        decoded = serving.Predictor(loaded, decoder)._decoded(named)
    assert decoded.tobytes() == prepared.tobytes()
    return prepared


def check_exports(folder: Path, images: NDArray[np.uint8], expected: list[list[float]]) -> None:
    """On the same bytes, the files that `export` writes give the same probabilities."""
    for form in ("onnx", "pt2"):
        succeed(forked.python(), "-m", "pipeline.export", "--format", form, "--out", f"../it.{form}", folder=folder)
    (of_onnx,) = onnxruntime.InferenceSession(folder.parent / "it.onnx").run(["probabilities"], {"images": images})
    np.testing.assert_allclose(of_onnx, expected, atol=1e-4)
    with torch.no_grad():
        of_pt2 = torch.export.load(folder.parent / "it.pt2").module()(torch.from_numpy(images))
    np.testing.assert_allclose(of_pt2.numpy(), expected, atol=1e-4)


def test_colour_pictures_turned_by_exif_data_come_out_alike_everywhere(
    trained: Path, digits: dict[str, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits in colour, as a camera held in any way stores them."""
    images = digits["train"][slice(300)]
    for index, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = tmp_path / "colours" / str(label) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(image[:, :, 0].numpy()).resize((60, 80))
        exif = Image.Exif()
        exif[image_files.ORIENTATION] = orientation = 1 + index % 8
        upright = ImageOps.colorize(grey, (10 * label, 0, 90), ("yellow", "white", "lime")[index % 3])
        stored(upright, orientation).save(path, exif=exif)
    write_params(trained, OWN | {"data.path": str(tmp_path / "colours"), "data.image_size": 32})
    repro("evaluate", folder=trained)
    assert check_every_way(trained, tmp_path / "colours", monkeypatch) > 50
