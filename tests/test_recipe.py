"""The network and its training as params.yaml describes them."""

from pathlib import Path
from typing import get_args

import pytest

from pipeline import recipe
from pipeline.data.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import UserError
from pipeline.model.augment import AUGMENTATIONS, GEOMETRY
from pipeline.model.training import CLASS_WEIGHTS, LOSSES, OPTIMIZERS, SCHEDULES
from pipeline.params import Augmentation, Train, read_params


@pytest.mark.parametrize(
    ("name", "table"),
    [("loss", LOSSES), ("class_weights", CLASS_WEIGHTS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)],
)
def test_what_params_yaml_may_name_is_there(name: str, table: dict[str, object]) -> None:
    assert set(get_args(Train.model_fields[name].annotation)) == set(table)


def test_each_augmentation_has_a_parameter_that_switches_it_off() -> None:
    assert Augmentation().model_dump() == dict.fromkeys((*GEOMETRY, *AUGMENTATIONS, "mixup"), 0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.residual": True}, "residual: maps of 26 x 26 and 28 x 28 pixels cannot be added: set padding to same"),
        ({"model.padding": "same", "model.kernel_size": 4}, "padding: same needs an odd kernel_size, and it is 4"),
        ({"model.filters": {"width": 512}}, "filters gives block 3 2,048 of them; allowed: 1 to 1,024"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused_in_one_line(
    workspace: Path, changes: dict[str, object], line: str
) -> None:
    with pytest.raises(UserError) as refusal:
        recipe.build(read_params().changed(changes), read_dataset())
    assert str(refusal.value) == f"params.yaml: model: {line}"


def test_the_constants_that_normalise_are_those_of_the_training_pixels(workspace: Path) -> None:
    dataset = read_dataset()
    found = recipe.architecture(read_params().changed({"model.normalize": True}), dataset)
    assert (found.mean, found.std) == (dataset.mean, dataset.std)
    pixels = read_split(dataset, TRAIN).images.double() / 255
    assert found.mean == pytest.approx((pixels.mean().item(),), abs=1e-6)
    assert found.std == pytest.approx((pixels.std(correction=0).item(),), abs=1e-6)


@pytest.mark.parametrize(("batch_size", "images"), [(256, 257), (1, 20)])
def test_a_batch_too_small_for_batch_normalisation_is_refused(workspace: Path, batch_size: int, images: int) -> None:
    layers = {"model.filters": [4] * 4, "model.kernel_size": 2, "model.stride": 2, "model.pool_size": 1}
    params = read_params().changed(layers | {"model.batch_norm": True, "train.batch_size": batch_size})
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    cnn = recipe.build(params, dataset)
    with pytest.raises(UserError, match=rf"batch_size is {batch_size}, .* one of the {images} images"):
        recipe.fit(cnn, train[:images], validation, params)
    assert len(list(recipe.fit(cnn, train[:258], validation, params.changed({"train.batch_size": 256}))))
