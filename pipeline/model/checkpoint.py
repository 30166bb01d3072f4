"""Checkpoints of a training: everything that its next step depends on, to the last bit, as bytes and back."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        read = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        return Checkpoint(**read["fit"]), read["facts"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        raise DamagedError(str(error).splitlines()[0]) from error
