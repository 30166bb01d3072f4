"""Recipes that are measured: the published one, and what is changed in it to be done sooner.

The short ones are the best of their candidates by validation accuracy (bench/choose.py); the test images had no say.
"""

import itertools
import json
from collections.abc import Iterable, Mapping

from ruamel.yaml import YAML

from pipeline.params import Params, with_values

SHORT: dict[str, object] = {
    "model.dropout": 0.1,
    "train.epochs": 4,
    "train.schedule": "one-cycle",
    "train.learning_rate": 0.015,
    "train.label_smoothing": 0.05,
    "train.max_shift": 1,
}
SHORTEST: dict[str, object] = SHORT | {"train.epochs": 2, "train.batch_size": 64, "train.label_smoothing": 0.1}


SHORT_EPOCHS = (4, 2)


def candidates(epochs: int) -> list[dict[str, object]]:
    """What the short recipe of so many epochs was chosen from, as changes of the published one."""
    common = {"train.epochs": epochs, "train.schedule": "one-cycle", "train.max_shift": 1}
    rates, dropouts, smoothings, sizes = (0.01, 0.015, 0.02), (0.1, 0.2), (0.0, 0.1), (64, 128)
    grid: list[dict[str, object]] = [
        {
            "model.dropout": dropout,
            "train.learning_rate": rate,
            "train.label_smoothing": smoothing,
            "train.batch_size": size,
        }
        for rate, dropout, smoothing, size in itertools.product(rates, dropouts, smoothings, sizes)
    ]
    middle: dict[str, object] = {"model.dropout": 0.1, "train.learning_rate": 0.015, "train.label_smoothing": 0.1}
    others: list[dict[str, object]] = [
        middle | {"train.learning_rate": 0.005},
        middle | {"model.dropout": 0.3},
        middle | {"model.dropout": 0.0},
        middle | {"train.label_smoothing": 0.05},
        middle | {"train.label_smoothing": 0.2},
        middle | {"train.max_shift": 0},
        middle | {"train.max_shift": 2},
        middle | {"train.optimizer": "adamw", "train.weight_decay": 0.02},
        middle | {"train.optimizer": "sgd", "train.learning_rate": 0.1},
        middle | {"model.batch_norm": True},
    ]
    return [common | each for each in grid + others]


def published() -> Params:
    """The published recipe, whatever params.yaml says: the default of every parameter."""
    return Params()


def as_yaml(values: Mapping[str, object]) -> str:
    """A params.yaml with the default of every parameter, except for some values by their dotted paths."""
    return with_values("", {**Params().model_dump(mode="json"), **values})


def as_words(knobs: Mapping[str, object]) -> list[str]:
    """The knobs as they are given to `dvc exp run -S` and to the programs here: ``path=value``."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in knobs.items()]


def from_words(words: Iterable[str]) -> dict[str, object]:
    """What ``as_words`` wrote."""
    pairs = (word.partition("=") for word in words)
    return {path: YAML(typ="safe").load(value) for path, _, value in pairs}
