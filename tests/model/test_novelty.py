"""Pictures that do not look like the training images are found, and those that do are not taken for such."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import files
from pipeline.data import strokes
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError
from pipeline.model import model_file, novelty
from pipeline.model.cnn import CNN, Architecture
from pipeline.model.model_file import TrainedModel
from tests import unlike
from tests.drawn import all_of_them


@pytest.fixture(scope="module")
def trained(good: Path) -> TrainedModel:
    return model_file.from_bytes((good / files.MODEL).read_bytes())


def share_found(trained: TrainedModel, images: Tensor) -> float:
    assert trained.novelty is not None
    return trained.novelty.is_unlike(novelty.outputs(trained.cnn, images)).double().mean().item()


def test_few_of_the_images_like_those_of_the_training_are_found(
    trained: TrainedModel, digits: dict[str, LabelledImages]
) -> None:
    validation, test = (share_found(trained, digits[split].images) for split in ("validation", "test"))
    assert validation == pytest.approx(novelty.FALSE_ALARMS, abs=1 / len(digits["validation"]))
    assert test < 0.02


def test_few_of_the_drawn_digits_are_found(trained: TrainedModel) -> None:
    images = [strokes.centred(picture, (28, 28, 1), name) for name, _, picture in all_of_them()]
    assert share_found(trained, torch.from_numpy(np.stack(images))) < 0.1


@pytest.mark.parametrize(
    ("kind", "least"), [("noise", 0.5), ("photograph", 0.35), ("word", 0.8), ("two_digits", 0.9), ("three_digits", 0.9)]
)
def test_most_pictures_of_other_things_are_found(trained: TrainedModel, kind: str, least: float) -> None:
    """By the model that has seen 3,644 digits; CI asks more of the one that has seen all of MNIST."""
    images = []
    for picture in unlike.pictures(kind):
        with suppress(UserError):  # a part of a photograph that is blank, which `predict` refuses
            images.append(strokes.centred(picture, (28, 28, 1), kind))
    assert len(images) > 0.9 * unlike.COUNT
    assert share_found(trained, torch.from_numpy(np.stack(images))) >= least


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_blank_image_is_found(trained: TrainedModel, value: int) -> None:
    assert share_found(trained, torch.full((1, 28, 28, 1), value, dtype=torch.uint8)) == 1


def test_the_logits_are_those_of_the_network(trained: TrainedModel, digits: dict[str, LabelledImages]) -> None:
    images = digits["test"].images[:300]
    outputs = novelty.outputs(trained.cnn, images)
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, trained.cnn(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.features.norm(dim=1), torch.ones(300))


def test_the_number_of_threads_changes_nothing(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    train, validation = digits["train"], digits["validation"]
    found, threads = set(), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rows = novelty.chosen(len(train), torch.Generator().manual_seed(0))
            some = ((train.images[each], train.labels[each]) for each in rows)
            fitted = novelty.fit(learned, some, validation.images)
            found.add(model_file.to_bytes(TrainedModel(learned, novelty=fitted)))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (9, 5, 1), (40, 28, 3)])
def test_images_of_any_shape_a_class_of_one_image_and_an_untrained_network(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    cnn = CNN(Architecture(shape, ("cat", "dog", "cow"), (4,), kernel_size=1, pool_size=1), generator)
    images = torch.randint(256, (12, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0] * 6 + [1] + [2] * 5)
    fitted = novelty.fit(cnn, [(images, labels)], images.repeat(20, 1, 1, 1))
    assert fitted is not None
    assert fitted.centres.shape == (11, novelty.feature_count(cnn.architecture))
    assert fitted.score(novelty.outputs(cnn, images)).isfinite().all()
    model_file.from_bytes(model_file.to_bytes(TrainedModel(cnn, novelty=fitted)))


def test_few_validation_images_cannot_set_a_limit(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    train, validation = digits["train"], digits["validation"].images[: novelty.MIN_VALIDATION - 1]
    assert novelty.fit(learned, [(train.images, train.labels)], validation) is None
