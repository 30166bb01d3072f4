"""What params.yaml says, carried out."""

from pathlib import Path

import pytest

from pipeline import recipe
from pipeline.data.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import UserError
from pipeline.params import read_params


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
