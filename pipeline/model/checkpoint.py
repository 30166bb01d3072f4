"""Checkpoints of a training: everything that its next step depends on, to the last bit, as bytes and back."""

import hashlib
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import printable
from pipeline.model.cnn import CNN

# What zipfile and torch raise for content that is not a checkpoint's, and what its fields raise where it is another's.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
    EOFError, AssertionError, OverflowError, MemoryError, NotImplementedError, struct.error,
)  # fmt: skip
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
    content = io.BytesIO()
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    if not checkpoint.step:  # nothing of the next epoch is done
        fields |= {"losses": torch.empty(0), "logits": torch.empty(0)}
    torch.save({"fit": fields, "facts": dict(facts)}, content)
    return _signed(content.getvalue())


def _signed(content: bytes) -> bytes:
    """With its SHA-256 in front, so that damage is noticed."""
    return hashlib.sha256(content).digest() + content


def from_bytes(content: bytes) -> tuple[Checkpoint, dict[str, Any]]:
    """What ``to_bytes`` wrote, on the CPU. Unpickles tensors and plain values only. Raises DamagedError."""
    stored = content[DIGEST_SIZE:]
    if _signed(stored) != content:
        raise DamagedError("its SHA-256 does not match")
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            records = archive.infolist()
        if sum(record.file_size for record in records) > len(stored):
            raise ValueError("its records are larger than the file")  # compressed, which torch never does
        read = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
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
            if any(state[name].shape != shapes[index] or state[name].is_meta for name in MOMENTS & state.keys()):
                raise ValueError("its optimizer is not that of the network")
        if not all(weights.isfinite().all() for weights in checkpoint.model.values()):
            raise ValueError("it has weights that are not finite")
        if not all(
            isinstance(n, int | float) and n >= 0 for n in (checkpoint.epoch, checkpoint.step, checkpoint.seconds)
        ):
            raise ValueError("it does not say how far it got")
    except UNREADABLE as error:
        raise DamagedError(_reason(error)) from error


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    """What must be the same in both: shapes, types, and that there are values, which a tensor on meta has not."""
    return {name: (weights.shape, weights.dtype, weights.is_meta) for name, weights in state.items()}


def _reason(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
