"""The trained CNN as bytes, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch

from pipeline.errors import Fault
from pipeline.network.cnn import CNN, Architecture

METADATA = "cnn"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Saved:
    """What a model file holds: the CNN, ready to predict, and the data and the recipe that it was trained from."""

    cnn: CNN
    data: Mapping[str, str]
    recipe: Mapping[str, object]


def to_bytes(cnn: CNN, data: Mapping[str, str] = NOTHING, recipe: Mapping[str, object] = NOTHING) -> bytes:
    """The weights as safetensors; in the metadata the architecture, so that the file rebuilds its own network.

    ``data`` and ``recipe`` say what it was trained from. The same weights and facts give the same bytes, which is why
    all the metadata is one key: safetensors writes several keys in no fixed order.
    """
    weights = {name: tensor.contiguous() for name, tensor in cnn.cpu().state_dict().items()}
    metadata = {"architecture": asdict(cnn.architecture), "data": dict(data), "recipe": dict(recipe)}
    return safetensors.torch.save(weights, {METADATA: json.dumps(metadata)})


def from_bytes(content: bytes) -> Saved:
    """What ``to_bytes`` wrote. Raises Fault for bytes that are no such file."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        stored = json.loads(header["__metadata__"][METADATA])
        layers = stored["architecture"]
        cnn = CNN(
            Architecture(**layers | {key: tuple(layers[key]) for key in ("image_shape", "class_names", "filters")}),
            torch.Generator(),
        )
        cnn.load_state_dict(safetensors.torch.load(content))
        return Saved(cnn.eval(), dict(stored["data"]), dict(stored["recipe"]))
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise Fault(f"the model file is damaged ({error}): run `dvc repro -f train`") from error
