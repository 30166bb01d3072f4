"""The published data sets besides MNIST, through all four stages: small files in their format."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline import evaluate, files, prepare, train, visualize
from pipeline.data import downloads, splits
from pipeline.explain import report
from pipeline.tracking import registry
from tests.conftest import write_params
from tests.data.test_sources import MB, publish, publish_small_cifar10, put, small_mnist

pytestmark = pytest.mark.slow
QUICK = {"train.epochs": 1, "model.filters": [4, 4], "visualize.maximisation.steps": 3, "visualize.occlusion_side": 16}


@pytest.mark.parametrize(
    ("name", "shape", "class_name"),
    [("cifar10", (32, 32, 3), "ship"), ("kmnist", (28, 28, 1), "wo"), ("fashion-mnist", (28, 28, 1), "Sandal")],
)
def test_a_published_data_set_goes_through_all_stages(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shape: tuple[int, int, int],
    class_name: str,
) -> None:
    if name == "cifar10":
        publish_small_cifar10(monkeypatch, tmp_path / "files", count=15)
    else:
        publish(monkeypatch, small_mnist(20), name=name, max_bytes=MB)
        monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(put(tmp_path / "files", small_mnist(20))))
    write_params(workspace, QUICK | {"data.dataset": name})
    for stage in (prepare, train, evaluate, visualize):
        stage.main()

    dataset = splits.read_dataset()
    assert dataset.image_shape == shape
    scores = json.loads(files.METRICS.read_text())["test"]
    assert scores["accuracy"] < 0.3  # the images are noise
    assert class_name in scores["per_class"]
    assert class_name in files.CARD.read_text()
    assert registry.find("champion").name == f"{name}-cnn"
    for figure in report.FIGURES:
        with Image.open(files.FIGURES / f"{figure}.png") as picture:
            assert picture.width > 800
