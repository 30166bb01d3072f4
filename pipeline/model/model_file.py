"""The trained CNN as the bytes of a safetensors file, and back."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import Fault, printable
from pipeline.model.cnn import CNN, Architecture

METADATA, DIGEST = "cnn", "sha256"
MAX_HEADER_SIZE = 1_000_000  # bytes; most of them are class names
DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # of the tensors in a CNN, as safetensors names them
OF_THE_DATA = ("image_shape", "class_names")  # in an Architecture; the others are parameters of `model`
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


def from_bytes(
    content: bytes,
    name: str = "the model file",
    check_model: Callable[[Mapping[str, object]], object] = lambda values: None,
) -> TrainedModel:
    """What ``to_bytes`` wrote; ``name`` is the file's, for messages.

    The header is judged before any network is built, so a file cannot ask for more memory than it takes itself.
    ``check_model`` is given the parameters of ``model`` and raises ValueError for values that are not allowed; without
    it, read your own files only.

    Raises Fault for another kind of file, where a single byte has changed, and for weights that are not finite.
    """
    try:
        header = _header(content)
        facts = json.loads(header.pop("__metadata__")[METADATA], object_pairs_hook=_object)
        layers: dict[str, Any] = {key: _as_tuples(value) for key, value in facts["architecture"].items()}
        check_model({key: value for key, value in layers.items() if key not in OF_THE_DATA})
        architecture = Architecture(**layers)
        if any(not isinstance(value, str) or printable(value) != value for value in dict(facts["data"]).values()):
            raise ValueError("what it says of its data is not printable text")
        _check_tensors(header, architecture)
        weights = safetensors.torch.load(content)
        if facts.pop(DIGEST) != _digest(facts, weights):
            raise ValueError("its SHA-256 does not match")
        if bad := [key for key, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"{bad[0]} has values that are not finite")
        cnn = CNN(architecture, torch.Generator())
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
        raise Fault(f"{name} is damaged ({printable(reason)}): run `dvc repro -f train`, then `dvc repro`") from error


def _header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file: what it says of each tensor, and its metadata. Raises ValueError."""
    size = int.from_bytes(content[:8], "little")
    if size > MAX_HEADER_SIZE:
        raise ValueError(f"its header has {size:,} bytes; allowed: {MAX_HEADER_SIZE:,}")
    return dict(json.loads(content[8 : 8 + size].decode(), object_pairs_hook=_object))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that comes twice, another reader might take the other value: raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _check_tensors(header: Mapping[str, Any], architecture: Architecture) -> None:
    """Raises ValueError where these are not the tensors, shapes and types of such a network, which takes no memory."""
    with torch.device("meta"):
        expected = CNN(architecture, None).state_dict()
    found = {key: (each["dtype"], tuple(each["shape"])) for key, each in header.items()}
    for key in expected | found:
        wanted = (DTYPES[expected[key].dtype], tuple(expected[key].shape)) if key in expected else None
        if found.get(key) != wanted:
            raise ValueError(f"its tensor {key} is {found.get(key)}; the architecture's is {wanted}")


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
