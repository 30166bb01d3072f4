"""Checkpoints of a training: everything that its next step depends on, to the last bit, as bytes and back."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import printable
from pipeline.model.cnn import CNN

STRUCTURE = "checkpoint"  # the entry of the file's metadata that has all but the values of the tensors
# What safetensors raises for other bytes, and what JSON raises, or gives, that has another structure.
UNREADABLE = (safetensors.SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}  # each of its parameter's shape, as fused optimizers take it
DIGEST_SIZE = hashlib.sha256().digest_size


class DamagedError(Exception):
    """These bytes are not what ``to_bytes`` wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on: resuming here gives the same bits as never having stopped.

    ``epoch`` epochs are complete, and ``step`` steps of the next one, which took ``seconds``. ``losses`` (steps,) and
    ``logits`` (images, classes) are filled up to that step. ``generator`` is the state at the beginning of that epoch.
    The tensors are those of the training and change with its next step.
    """

    epoch: int
    step: int
    seconds: float
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    generator: Tensor
    losses: Tensor
    logits: Tensor


def to_bytes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> bytes:
    """The checkpoint together with ``facts``: numbers, text, and lists and mappings of them."""
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    if not checkpoint.step:  # nothing of the next epoch is done
        fields |= {"losses": torch.empty(0), "logits": torch.empty(0)}
    tensors = dict[str, Tensor]()
    structure = json.dumps(_without_tensors({"fit": fields, "facts": facts}, tensors))
    return _signed(safetensors.torch.save(tensors, {STRUCTURE: structure}))


def _without_tensors(value: object, tensors: dict[str, Tensor]) -> object:
    """``value`` as JSON can hold it: tensors are moved to ``tensors``, and the keys of mappings keep their types."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {"tensor": name, "channels_last": _is_channels_last(value)}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, tensors) for each in value]
    return value


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _with_tensors(value: object, tensors: Mapping[str, Tensor]) -> object:
    """What ``_without_tensors`` was given, with lists for tuples. Raises ValueError for another mapping."""
    match value:
        case {"tensor": str(name), "channels_last": bool(is_channels_last)}:
            # The fused optimizers need weights and moments with the same memory layout.
            is_4d = is_channels_last and tensors[name].dim() == 4
            return tensors[name].contiguous(memory_format=torch.channels_last) if is_4d else tensors[name]
        case {"items": list(items)}:
            return {key: _with_tensors(each, tensors) for key, each in items}
        case dict():
            raise ValueError("its structure is not that of a checkpoint")
        case list():
            return [_with_tensors(each, tensors) for each in value]
    return value


def _signed(content: bytes) -> bytes:
    """With its SHA-256 in front, so that damage is noticed."""
    return hashlib.sha256(content).digest() + content


def from_bytes(content: bytes) -> tuple[Checkpoint, dict[str, Any]]:
    """What ``to_bytes`` wrote, on the CPU. Raises DamagedError."""
    stored = content[DIGEST_SIZE:]
    if _signed(stored) != content:
        raise DamagedError("its SHA-256 does not match")
    try:
        tensors = safetensors.torch.load(stored)
        header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
        read: Any = _with_tensors(json.loads(header["__metadata__"][STRUCTURE]), tensors)
        return Checkpoint(**read["fit"]), dict(read["facts"])
    except UNREADABLE as error:
        raise DamagedError(_reason(error)) from error


def check(checkpoint: Checkpoint, cnn: CNN) -> None:
    """Raises DamagedError for a checkpoint that is not of a training of such a network."""
    try:
        if _kinds(checkpoint.model) != _kinds(cnn.state_dict()):
            raise ValueError("its weights are not those of the network")
        shapes = [parameter.shape for parameter in cnn.parameters()]
        for index, state in checkpoint.optimizer["state"].items():
            if any(state[name].shape != shapes[index] for name in MOMENTS & state.keys()):
                raise ValueError("its optimizer is not that of the network")
        if not all(weights.isfinite().all() for weights in checkpoint.model.values()):
            raise ValueError("it has weights that are not finite")
        if not all(
            isinstance(n, int | float) and n >= 0 for n in (checkpoint.epoch, checkpoint.step, checkpoint.seconds)
        ):
            raise ValueError("it does not say how far it got")
    except UNREADABLE as error:
        raise DamagedError(_reason(error)) from error


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (weights.shape, weights.dtype) for name, weights in state.items()}


def _reason(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
