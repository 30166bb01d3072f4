"""The trained CNN as bytes, and back."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import Fault
from pipeline.model.cnn import CNN, Architecture

METADATA, DIGEST = "cnn", "sha256"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class TrainedModel:
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
    facts = {"architecture": asdict(cnn.architecture), "data": dict(data), "recipe": dict(recipe)}
    return safetensors.torch.save(weights, {METADATA: json.dumps(facts | {DIGEST: _digest(facts, weights)})})


def from_bytes(content: bytes, name: str = "the model file") -> TrainedModel:
    """What ``to_bytes`` wrote; ``name`` is that of the file, for messages.

    Raises Fault for bytes that are no such file, or in which a single one has changed since.
    """
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][METADATA])
        weights = safetensors.torch.load(content)
        if facts.pop(DIGEST) != _digest(facts, weights):
            raise ValueError("its SHA-256 is not the one in it")
        layers = facts["architecture"]
        cnn = CNN(
            Architecture(**layers | {key: tuple(layers[key]) for key in ("image_shape", "class_names", "filters")}),
            torch.Generator(),
        )
        cnn.load_state_dict(weights)
        return TrainedModel(cnn.eval(), dict(facts["data"]), dict(facts["recipe"]))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
        safetensors.SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fault(f"{name} is damaged ({reason}): run `dvc repro -f train`, then `dvc repro`") from error


def _digest(facts: Mapping[str, object], weights: Mapping[str, Tensor]) -> str:
    """Of all that the file holds, so that it need not be told from outside whether it is whole."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
