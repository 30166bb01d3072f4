"""The trained CNN as the bytes of a safetensors file, and back."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import Fault, printable
from pipeline.model import novelty
from pipeline.model.cnn import CNN, Architecture
from pipeline.model.novelty import Novelty

METADATA, DIGEST = "cnn", "sha256"
CENTRES = "novelty.centres"  # the tensor that is not one of the CNN
MAX_HEADER_SIZE = 1_000_000  # bytes; most of them are class names
DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # of the tensors in a CNN, as safetensors names them
OF_THE_DATA = ("image_shape", "class_names", "mean", "std")  # in an Architecture; the others are parameters of `model`


@dataclass(frozen=True)
class TrainedModel:
    """The contents of a model file: the CNN in evaluation mode, and what it was trained on and how.

    ``preprocessing`` says how pictures become images for it; empty in older files. ``novelty`` finds images that do not
    look like the training images; None in older files.
    """

    cnn: CNN
    data: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    novelty: Novelty | None = None


def to_bytes(trained: TrainedModel) -> bytes:
    """The weights, with the architecture in the metadata, so that the file can rebuild its own network.

    The same contents give the same bytes: all the metadata is under one key, because safetensors writes several keys in
    no fixed order.
    """
    tensors = {name: tensor.contiguous() for name, tensor in trained.cnn.cpu().state_dict().items()}
    architecture = asdict(trained.cnn.architecture)
    facts: dict[str, Any] = {"architecture": architecture, "data": dict(trained.data), "recipe": dict(trained.recipe)}
    if trained.preprocessing:
        facts["preprocessing"] = dict(trained.preprocessing)
    if trained.novelty:
        tensors[CENTRES] = trained.novelty.centres.contiguous()
        facts["novelty"] = {key: getattr(trained.novelty, key) for key in ("distance", "logit", "threshold")}
    return safetensors.torch.save(tensors, {METADATA: json.dumps(facts | {DIGEST: _digest(facts, tensors)})})


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
        if any(not isinstance(value, str) for value in dict(facts["data"]).values()):
            raise ValueError("what it says of its data is not text")
        described = json.dumps([facts["data"], facts["recipe"], facts.get("preprocessing")], ensure_ascii=False)
        if "\\" in described or not described.isprintable():
            raise ValueError("what it says of its data and recipe is not printable text")
        _check_tensors(header, architecture, has_novelty="novelty" in facts)
        tensors = safetensors.torch.load(content)
        if facts.pop(DIGEST) != _digest(facts, tensors):
            raise ValueError("its SHA-256 does not match")
        if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{bad[0]} has values that are not finite")
        found = _novelty(facts["novelty"], tensors.pop(CENTRES)) if "novelty" in facts else None
        cnn = CNN(architecture, torch.Generator())
        cnn.load_state_dict(tensors)
        preprocessing = dict(facts.get("preprocessing", {}))
        return TrainedModel(cnn.eval(), dict(facts["data"]), dict(facts["recipe"]), preprocessing, found)
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


def _check_tensors(header: Mapping[str, Any], architecture: Architecture, has_novelty: bool) -> None:
    """Raises ValueError where these are not the tensors, shapes and types of such a network, which takes no memory."""
    with torch.device("meta"):
        expected: dict[str, Tensor] = CNN(architecture, None).state_dict()
        if has_novelty:
            most = novelty.CENTRES * len(architecture.class_names)
            count = min(int(header[CENTRES]["shape"][0]), most)
            expected[CENTRES] = torch.empty(count, novelty.feature_count(architecture))
    found = {key: (each["dtype"], tuple(each["shape"])) for key, each in header.items()}
    for key in expected | found:
        wanted = (DTYPES[expected[key].dtype], tuple(expected[key].shape)) if key in expected else None
        if found.get(key) != wanted:
            raise ValueError(f"its tensor {key} is {found.get(key)}; the architecture's is {wanted}")


def _novelty(facts: Mapping[str, Any], centres: Tensor) -> Novelty:
    """What the metadata and the centres say. Raises ValueError where they cannot be."""
    read = Novelty(centres, tuple(facts["distance"]), tuple(facts["logit"]), facts["threshold"])
    numbers = [*read.distance, *read.logit, read.threshold]
    if len(numbers) != 5 or any(type(number) is not float or not math.isfinite(number) for number in numbers):
        raise ValueError("its novelty statistics are not five finite numbers")
    if min(read.distance[1], read.logit[1]) <= 0 or len(centres) == 0:
        raise ValueError("its novelty statistics have a deviation that is not above 0, or no centres")
    return read


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
