"""Recipes that are measured: the published one, and what is changed in it to be done sooner.

The short ones were chosen by the validation accuracy over many seeds; the test images had no say.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.params import Params, read_params

PUBLISHED = Path("tests/params.yaml")
SHORT: dict[str, object] = {
    "model.dropout": 0.1,
    "train.epochs": 4,
    "train.schedule": "one-cycle",
    "train.learning_rate": 0.015,
    "train.label_smoothing": 0.1,
    "train.max_shift": 1,
}
SHORTEST: dict[str, object] = SHORT | {"train.epochs": 2}


def published() -> Params:
    """The published recipe, whatever params.yaml says."""
    return read_params(PUBLISHED)


def changed(params: Params, knobs: Mapping[str, object]) -> Params:
    """The same parameters with other values for some knobs, named by their dotted paths. Raises ValueError."""
    content = params.model_dump()
    for path, value in knobs.items():
        *sections, knob = path.split(".")
        section = content
        for name in sections:
            section = section[name]
        if knob not in section:
            raise ValueError(f"{path} is no knob")
        section[knob] = value
    return Params.model_validate(content)


def as_words(knobs: Mapping[str, object]) -> list[str]:
    """The knobs as they are given to `dvc exp run -S` and to the programs here: ``path=value``."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in knobs.items()]


def from_words(words: Iterable[str]) -> dict[str, object]:
    """What ``as_words`` wrote."""
    pairs = (word.partition("=") for word in words)
    return {path: YAML(typ="safe").load(value) for path, _, value in pairs}
