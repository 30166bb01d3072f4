"""The images that a run shows of a training: the filters and an image made for a class, after each epoch."""

import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline import files, train
from pipeline.explain import activation_maximization, live_images
from pipeline.model.cnn import CNN, Architecture
from pipeline.params import Params
from tests.conftest import QUICK, write_params

LOGGED = re.compile(r"images/(.+)\+step\+(\d+)\+timestamp\+\d+\+[\w-]+\.png")


def logged(run: Run, folder: Path) -> dict[tuple[str, int], np.ndarray]:
    """The images of a run by their names and epochs."""
    paths = [each.path for each in MlflowClient().list_artifacts(run.info.run_id, "images")]
    found = {path: LOGGED.fullmatch(path) for path in paths}
    return {
        (match[1], int(match[2])): np.asarray(Image.open(download(run, path, folder)))
        for path, match in found.items()
        if match
    }


def download(run: Run, path: str, folder: Path) -> str:
    return mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=path, dst_path=str(folder))


def the_run() -> Run:
    (run,) = mlflow.search_runs(output_format="list")
    assert isinstance(run, Run)
    return run


def test_every_epoch_has_its_images(finished: Path, tmp_path: Path) -> None:
    images = logged(the_run(), tmp_path)
    assert set(images) == {(name, epoch) for name in ("filters", "class image") for epoch in (0, 1, 2)}
    for name in ("filters", "class image"):
        before, between, after = (images[name, epoch] for epoch in (0, 1, 2))
        assert before.shape == between.shape == after.shape
        assert min(before.shape[:2]) > 100  # pixels: large enough to see
        assert (before != between).any()
        assert (between != after).any()
    assert the_run().data.tags["mlflow.loggedImages"] == "True"


@pytest.mark.slow
def test_the_model_is_the_same_without_them(finished: Path, workspace: Path) -> None:
    model = (finished / files.MODEL).read_bytes()
    write_params(workspace, QUICK | {"train.live_images": False})
    train.main()
    assert files.MODEL.read_bytes() == model
    assert MlflowClient().list_artifacts(the_run().info.run_id, "images") == []


@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 24, 3)])
def test_the_class_image_continues_from_the_epoch_before(image_shape: tuple[int, int, int]) -> None:
    cnn = CNN(Architecture(image_shape, ("a", "b"), (4, 8)), torch.Generator().manual_seed(0))
    state = {name: weights.clone() for name, weights in cnn.state_dict().items()}
    no_penalty = {"l1": 0.0, "total_variation": 0.0, "jitter": 0}
    pictures = live_images.LiveImages(cnn, Params().visualize.maximisation.model_copy(update=no_penalty))
    logit = activation_maximization.class_logits(cnn, torch.tensor([0]))

    def now() -> float:
        with torch.no_grad():
            return float(logit(pictures.image))

    reached = [now()]
    for _ in range(3):
        drawn = pictures.after_epoch()
        reached.append(now())
        assert {name: image.dtype for name, image in drawn.items()} == {"filters": np.uint8, "class image": np.uint8}
        height, width, channels = drawn["class image"].shape
        assert (height / width, channels) == (image_shape[0] / image_shape[1], 3)
    assert reached == sorted(reached)
    assert all(torch.equal(weights, state[name]) for name, weights in cnn.state_dict().items())


def test_weights_are_red_above_zero_and_blue_below() -> None:
    colours = live_images.red_and_blue(np.array([[1.0, 0.0], [-1.0, 0.5]]))
    red, white, blue, pale = colours[0, 0], colours[0, 1], colours[1, 0], colours[1, 1]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert white.tolist() == [255, 255, 255]
    assert red.sum() < pale.sum() < white.sum()
