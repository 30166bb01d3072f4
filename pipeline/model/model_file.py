"""The trained CNN as the bytes of a safetensors file, and back."""

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
    """The contents of a model file: the CNN in evaluation mode, and what it was trained on and how."""

    cnn: CNN
    data: Mapping[str, str]
    recipe: Mapping[str, object]


def to_bytes(cnn: CNN, data: Mapping[str, str] = NOTHING, recipe: Mapping[str, object] = NOTHING) -> bytes:
    """The weights, with the architecture in the metadata, so that the file can rebuild its own network.

    ``data`` and ``recipe`` say what it was trained on and how. The same contents give the same bytes: all the metadata
    is under one key, because safetensors writes several keys in no fixed order.
    """
    weights = {name: tensor.contiguous() for name, tensor in cnn.cpu().state_dict().items()}
    facts = {"architecture": asdict(cnn.architecture), "data": dict(data), "recipe": dict(recipe)}
    return safetensors.torch.save(weights, {METADATA: json.dumps(facts | {DIGEST: _digest(facts, weights)})})


def from_bytes(content: bytes, name: str = "the model file") -> TrainedModel:
    """What ``to_bytes`` wrote; ``name`` is the file's, for messages.

    Raises Fault for another kind of file, and where a single byte has changed.
    """
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][METADATA])
        weights = safetensors.torch.load(content)
        if facts.pop(DIGEST) != _digest(facts, weights):
            raise ValueError("its SHA-256 does not match")
        layers: dict[str, Any] = {key: _as_tuples(value) for key, value in facts["architecture"].items()}
        cnn = CNN(Architecture(**layers), torch.Generator())
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


def _as_tuples(value: object) -> object:
    """JSON has only lists, and an Architecture only tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _digest(facts: Mapping[str, object], weights: Mapping[str, Tensor]) -> str:
    """A digest of everything in the file, so that damage is noticed."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
