"""The recipes that are measured: the published one, and two with fewer epochs.

The short ones are the best of their candidates by validation accuracy (bench/choose.py). The test images were not used.
"""

import json
from collections.abc import Iterable, Mapping

from ruamel.yaml import YAML

from pipeline import recipe
from pipeline.data.splits import Dataset, LabelledImages
from pipeline.model import training
from pipeline.model.cnn import CNN
from pipeline.params import Params, with_values

SHORT: dict[str, object] = {
    "model.dropout": 0.1,
    "train.epochs": 4,
    "train.schedule": "one-cycle",
    "train.learning_rate": 0.015,
    "train.label_smoothing": 0.05,
    "train.augmentation.shift": 1,
}
SHORTEST: dict[str, object] = SHORT | {"train.epochs": 2, "train.batch_size": 64, "train.label_smoothing": 0.1}
SHORT_EPOCHS = (4, 2)


def published() -> Params:
    """The published recipe, whatever params.yaml holds now: the default of every parameter."""
    return Params()


def as_yaml(values: Mapping[str, object]) -> str:
    """A params.yaml with the default of every parameter, except for some values by their dotted paths."""
    return with_values(b"", {**Params().model_dump(mode="json"), **values}).decode()


def as_words(overrides: Mapping[str, object]) -> list[str]:
    """Parameters as `dvc exp run -S` and the programs here take them: ``path=value``."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in overrides.items()]


def from_words(words: Iterable[str]) -> dict[str, object]:
    """The parameters that ``as_words`` wrote."""
    pairs = (word.partition("=") for word in words)
    return {path: YAML(typ="safe").load(value) for path, _, value in pairs}


def fitted(
    seed: int, params: Params, dataset: Dataset, train: LabelledImages, validation: LabelledImages
) -> tuple[CNN, list[training.Epoch]]:
    """Train with ``seed`` in place of the recipe's; the network and the figures of its epochs."""
    params = params.model_copy(update={"seed": seed})
    cnn = recipe.build(params, dataset)
    history = list(recipe.fit(cnn, train, validation, params))
    return cnn, history
