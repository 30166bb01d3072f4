"""A fit that was interrupted, as bytes, and back: what its next step depends on, to the last bit."""

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
    """All that the next step of a fit depends on: going on from here gives the same bits as never having stopped.

    ``epoch`` passes are done, and ``step`` steps of the one that follows: their ``losses`` (steps,) and ``logits``
    (images, classes), of which as many are filled, and the ``seconds`` that they took. ``generator`` is its state at
    the beginning of that pass. The tensors are the fit's own: they change with its next step.
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
    """The checkpoint and, beside it, ``facts``: numbers, text, and lists and mappings of them."""
    content = io.BytesIO()
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    if not checkpoint.step:  # of a pass that has not begun there is nothing to keep
        fields |= {"losses": torch.empty(0), "logits": torch.empty(0)}
    torch.save({"fit": fields, "facts": dict(facts)}, content)
    return _signed(content.getvalue())


def _signed(content: bytes) -> bytes:
    """Led by its SHA-256, so that it need not be told from outside whether it is whole."""
    return hashlib.sha256(content).digest() + content


def from_bytes(content: bytes) -> tuple[Checkpoint, dict[str, Any]]:
    """What ``to_bytes`` wrote, on the CPU. Nothing that could run is unpickled. Raises DamagedError."""
    stored = content[DIGEST_SIZE:]
    if _signed(stored) != content:
        raise DamagedError("its SHA-256 is not the one in it")
    try:
        read = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        return Checkpoint(**read["fit"]), read["facts"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        raise DamagedError(str(error).splitlines()[0]) from error
