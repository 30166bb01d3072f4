"""Checkpoints of trainings on disk: saved during training, found again after an interruption, removed at the end."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline import dvc_files, files, machine
from pipeline.data.splits import Dataset
from pipeline.model import checkpoint
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN
from pipeline.model.training import Epoch
from pipeline.params import Params

SUFFIX = ".checkpoint"
MAX_AGE = 30 * 24 * 3600  # seconds without a change, after which another training removes a checkpoint


@dataclass(frozen=True)
class SavedTraining:
    """An interrupted training: how far it got, its epochs so far, and the MLflow run that logged them."""

    checkpoint: Checkpoint
    history: list[Epoch]
    run_id: str


def fingerprint(params: Params, dataset: Dataset, device: torch.device) -> str:
    """A digest of everything that decides the bits of the trained model: 64 hexadecimal digits."""
    inputs = {
        "recipe": params.recipe,
        "data": dataset.sha256,
        "machine": machine.facts(device),
        "numpy": np.__version__,
        "code": dvc_files.code_of("train"),
    }
    return files.sha256(json.dumps(inputs, sort_keys=True).encode())


def find(fingerprint: str, cnn: CNN) -> SavedTraining | None:
    """The interrupted training of ``cnn`` with this fingerprint, if there is one. A damaged checkpoint is removed."""
    path = _path(fingerprint)
    try:
        saved = read(path)
        checkpoint.check(saved.checkpoint, cnn)
        return saved
    except FileNotFoundError:
        return None
    except checkpoint.DamagedError as error:
        print(f"warning: {path} is damaged ({error}): training starts from the beginning", file=sys.stderr)
        path.unlink()
        return None


def read(path: Path) -> SavedTraining:
    """What ``save`` wrote. Raises checkpoint.DamagedError or OSError."""
    saved, facts = checkpoint.from_bytes(path.read_bytes())
    try:
        return SavedTraining(saved, [Epoch(**row) for row in facts["history"]], facts["run_id"])
    except (KeyError, TypeError) as error:
        raise checkpoint.DamagedError(str(error)) from error


def paths() -> list[Path]:
    """The files of all checkpoints."""
    return sorted(files.checkpoints_folder().glob(f"*{SUFFIX}"))


def save(fingerprint: str, reached: Checkpoint, history: Sequence[Epoch], run_id: str) -> None:
    """Replace the training's checkpoint atomically."""
    facts = {"history": [asdict(epoch) for epoch in history], "run_id": run_id}
    files.write(_path(fingerprint), checkpoint.to_bytes(reached, facts))


def remove(fingerprint: str) -> None:
    """Remove the checkpoint of a training that has ended, and those that nobody has continued for a long time."""
    _path(fingerprint).unlink(missing_ok=True)
    for path in paths():
        with suppress(FileNotFoundError):  # another training may remove it at the same time
            if time.time() - path.stat().st_mtime > MAX_AGE:
                path.unlink()


def _path(fingerprint: str) -> Path:
    return files.checkpoints_folder() / f"{fingerprint[:16]}{SUFFIX}"
