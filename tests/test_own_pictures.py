"""A person's own pictures in a clone: `dvc repro`, and the same answers for the same files."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline import files
from pipeline.data import sources, splits
from tests import forked
from tests.conftest import write_params
from tests.test_clone import ONE_EPOCH, clone, repro, run, succeed

__all__ = ["clone"]
pytestmark = pytest.mark.slow
OWN = ONE_EPOCH | {"data.dataset": "folder", "data.memory_limit": 1e-6}  # splits stay on the disk


@pytest.fixture(scope="module")
def packaged(clone: Path) -> dict[str, object]:
    """What `data.dataset: mnist-5k` gives."""
    return outputs(clone)


def outputs(folder: Path) -> dict[str, object]:
    """The digest of the images, the trained weights, and the scores with all predictions."""
    scores = json.loads((folder / files.METRICS).read_text())
    weights = load_file(folder / files.MODEL)
    return {
        "data": splits.read_dataset(folder / files.PREPARED).sha256,
        "weights": {name: weight.numpy().tobytes() for name, weight in weights.items()},
        "scores": (scores["test"], scores["validation"]),
        "predictions": (folder / files.PREDICTIONS).read_bytes(),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 5,000 digits of mnist-5k as PNG files in class folders, outside the repository."""
    folder = tmp_path_factory.mktemp("pictures") / "my digits ü"
    _, source = sources.load("mnist-5k")
    for index, (image, label) in enumerate(zip(source.train.images, source.train.labels.tolist(), strict=True)):
        path = folder / source.class_names[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0].numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(clone: Path, packaged: dict[str, object], pictures: Path) -> Path:
    """The clone, with a model of these pictures."""
    write_params(clone, OWN | {"data.path": str(pictures)})
    repro("evaluate", folder=clone)
    return clone


@pytest.fixture(scope="module")
def model(trained: Path) -> bytes:
    """The model file of the class folders."""
    return (trained / files.MODEL).read_bytes()


def test_the_digits_as_class_folders_give_the_same_pixels_weights_and_scores_as_mnist_5k(
    trained: Path, packaged: dict[str, object]
) -> None:
    assert outputs(trained) == packaged


def table(path: Path) -> list[dict[str, str]]:
    return list(files.read_table(path, made_by="prepare"))


def test_the_folders_name_is_that_of_the_model(trained: Path) -> None:
    assert "my-digits-u-cnn version 1" in succeed(forked.python(), "-m", "pipeline.models", folder=trained)


def test_the_model_holds_how_a_picture_becomes_an_image(trained: Path) -> None:
    with safe_open(trained / files.MODEL, "pt") as model:
        facts: dict[str, Any] = json.loads(model.metadata()["cnn"])
    prepared = json.loads((trained / files.PREPARED / "dataset.json").read_text())
    assert facts["preprocessing"] == prepared["preprocessing"]
    assert load_file(trained / files.PREPARED / "train.safetensors")["images"].shape[1:] == (28, 28, 1)


def stages_that_ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_a_zip_of_the_same_pictures_trains_nothing_anew(
    trained: Path, model: bytes, pictures: Path, tmp_path: Path
) -> None:
    archive = shutil.make_archive(str(tmp_path / pictures.name), "zip", pictures)
    write_params(trained, OWN | {"data.path": archive})
    repro("prepare", folder=trained)
    assert (trained / files.MODEL).read_bytes() == model
    assert stages_that_ran(run("dvc", "repro", "--dry", folder=trained).stdout) in ([], ["visualize"])


def test_a_ds_store_or_another_name_trains_nothing_anew_and_a_changed_picture_does(
    trained: Path, model: bytes, pictures: Path
) -> None:
    write_params(trained, OWN | {"data.path": str(pictures)})
    assert stages_that_ran(repro("evaluate", folder=trained)) in ([], ["prepare"])  # the latter after the zip
    (pictures / "3/.DS_Store").write_bytes(b"junk")
    first = next(path for path in sorted((pictures / "3").glob("*.png")))
    content = first.read_bytes()
    first.rename(first.with_name("renamed.png"))
    assert stages_that_ran(repro("evaluate", folder=trained)) == ["prepare"]
    Image.open(first.with_name("renamed.png")).rotate(180).save(first.with_name("renamed.png"))
    assert stages_that_ran(repro("evaluate", folder=trained)) == ["prepare", "train", "evaluate"]
    assert (trained / files.MODEL).read_bytes() != model
    first.with_name("renamed.png").write_bytes(content)


def as_table(pictures: Path, folder: Path) -> dict[str, object]:
    """In one folder, with a table of their paths and labels."""
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label"))
        for path in pictures.rglob("*.png"):
            shutil.copy(path, folder / path.name)
            rows.writerow((path.name, path.parent.name))
    return {"data.path": str(folder), "data.labels": "labels.csv"}


def as_names(pictures: Path, folder: Path) -> dict[str, object]:
    """In one folder, with the label in their names."""
    for path in pictures.rglob("*.png"):
        shutil.copy(path, folder / f"{path.stem} is a {path.parent.name}.png")
    return {"data.path": str(folder), "data.label_pattern": r"is a (?P<label>\d)\.png"}


@pytest.mark.parametrize("form", [as_table, as_names])
def test_the_digits_as_a_table_or_as_names_give_the_same_pixels_weights_and_scores_as_mnist_5k(
    trained: Path,
    packaged: dict[str, object],
    model: bytes,
    pictures: Path,
    tmp_path: Path,
    form: Callable[[Path, Path], dict[str, object]],
) -> None:
    folder = tmp_path / pictures.name
    folder.mkdir()
    write_params(trained, OWN | form(pictures, folder))
    assert stages_that_ran(repro("evaluate", folder=trained)) == ["prepare", "train", "evaluate"]
    assert outputs(trained) == packaged
    assert (trained / files.MODEL).read_bytes() == model
