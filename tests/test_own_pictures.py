"""A person's own pictures in a clone: `dvc repro`, and the same answers for the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline import files
from pipeline.data.splits import LabelledImages
from tests import forked
from tests.conftest import write_params
from tests.test_clone import ONE_EPOCH, clone, repro, run, succeed

__all__ = ["clone"]
pytestmark = pytest.mark.slow
OWN = ONE_EPOCH | {"data.dataset": "folder", "train.epochs": 2, "data.memory_limit": 1e-6}  # splits stay on the disk


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, LabelledImages]) -> Path:
    """1,500 real digits as files in class folders, outside the repository."""
    folder = tmp_path_factory.mktemp("pictures") / "my digits ü"
    images = digits["train"][slice(1500)]
    for index, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0].numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(clone: Path, pictures: Path) -> Path:
    """The clone, with a model of these pictures."""
    write_params(clone, OWN | {"data.path": str(pictures)})
    repro("evaluate", folder=clone)
    return clone


def table(path: Path) -> list[dict[str, str]]:
    return list(files.read_table(path, made_by="prepare"))


def test_predict_gives_each_test_picture_the_label_that_evaluate_gave(trained: Path, pictures: Path) -> None:
    rows = [row for row in table(trained / files.IMAGES) if row["split"] == "test"]
    expected = table(trained / files.PREDICTIONS)
    assert len(rows) == len(expected) > 200
    paths = [str(pictures / row["path"]) for row in rows]
    answers = [
        json.loads(line)
        for line in succeed(forked.python(), "-m", "pipeline.predict", "--json", *paths, folder=trained).splitlines()
    ]
    for row, answer in zip(rows, answers, strict=True):
        evaluated = expected[int(row["index"])]
        assert evaluated["actual"] == row["label"]
        assert answer["label"] == evaluated["predicted"]
        assert answer["probability"] == pytest.approx(float(evaluated["confidence"]), abs=1e-5)


def test_the_folders_name_is_that_of_the_model(trained: Path) -> None:
    assert "my-digits-u-cnn version 1" in succeed(forked.python(), "-m", "pipeline.models", folder=trained)


def stages_that_ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_another_name_or_a_stray_file_trains_nothing_anew_and_a_changed_picture_does(
    trained: Path, pictures: Path
) -> None:
    assert stages_that_ran(repro("evaluate", folder=trained)) == []
    before = (trained / files.MODEL).read_bytes()
    (pictures / "3/.DS_Store").write_bytes(b"junk")
    first = next(path for path in sorted((pictures / "3").glob("*.png")))
    first.rename(first.with_name("renamed.png"))
    assert stages_that_ran(repro("evaluate", folder=trained)) == ["prepare"]
    Image.open(first.with_name("renamed.png")).rotate(180).save(first.with_name("renamed.png"))
    assert stages_that_ran(repro("evaluate", folder=trained)) == ["prepare", "train", "evaluate"]
    assert (trained / files.MODEL).read_bytes() != before


def test_a_zip_of_the_same_pictures_gives_the_same_model(trained: Path, pictures: Path, tmp_path: Path) -> None:
    before = (trained / files.MODEL).read_bytes()
    archive = shutil.make_archive(str(tmp_path / pictures.name), "zip", pictures)
    write_params(trained, OWN | {"data.path": archive})
    repro("prepare", folder=trained)
    assert (trained / files.MODEL).read_bytes() == before
    assert stages_that_ran(run("dvc", "repro", "--dry", folder=trained).stdout) in ([], ["visualize"])


def test_the_model_holds_how_a_picture_becomes_an_image(trained: Path) -> None:
    with safe_open(trained / files.MODEL, "pt") as model:
        facts: dict[str, Any] = json.loads(model.metadata()["cnn"])
    prepared = json.loads((trained / files.PREPARED / "dataset.json").read_text())
    assert facts["preprocessing"] == prepared["preprocessing"]
    assert load_file(trained / files.PREPARED / "train.safetensors")["images"].shape[1:] == (28, 28, 1)
