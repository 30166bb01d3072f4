"""Interrupted trainings: by what one is known, where its checkpoint lies, and when that is thrown away."""

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
from pipeline.model.training import Epoch
from pipeline.params import Params

SUFFIX = ".checkpoint"
FORGOTTEN_AFTER = 30 * 24 * 3600  # seconds; the checkpoint of a training that nobody has gone on with for so long


@dataclass(frozen=True)
class Interrupted:
    """A training that did not come to its end: how far it came, and the MLflow run that has its beginning."""

    checkpoint: Checkpoint
    history: list[Epoch]
    run_id: str


def fingerprint(params: Params, dataset: Dataset, device: torch.device) -> str:
    """64 hexadecimal digits: a digest of everything that decides the bits of the trained model."""
    decides = {
        "recipe": params.recipe,
        "data": dataset.sha256,
        "machine": machine.facts(device),
        "numpy": np.__version__,
        "code": dvc_files.code_of("train"),
    }
    return files.sha256(json.dumps(decides, sort_keys=True).encode())


def find(fingerprint: str) -> Interrupted | None:
    """The training of this fingerprint that was interrupted, if one was. One that cannot be read is begun anew."""
    path = _path(fingerprint)
    try:
        kept, facts = checkpoint.from_bytes(path.read_bytes())
        return Interrupted(kept, [Epoch(**row) for row in facts["history"]], facts["run_id"])
    except FileNotFoundError:
        return None
    except (checkpoint.DamagedError, KeyError, TypeError) as error:
        print(f"warning: {path} is damaged ({error}): the training begins anew", file=sys.stderr)
        path.unlink()
        return None


def keep(fingerprint: str, reached: Checkpoint, history: Sequence[Epoch], run_id: str) -> None:
    """Write a checkpoint in the place of the one before, whole or not at all."""
    facts = {"history": [asdict(epoch) for epoch in history], "run_id": run_id}
    files.write(_path(fingerprint), checkpoint.to_bytes(reached, facts))


def forget(fingerprint: str) -> None:
    """The training has come to its end. Those that were left unfinished long ago go too."""
    _path(fingerprint).unlink(missing_ok=True)
    for path in files.checkpoints_folder().glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another training forgets it too
            if time.time() - path.stat().st_mtime > FORGOTTEN_AFTER:
                path.unlink()


def _path(fingerprint: str) -> Path:
    return files.checkpoints_folder() / f"{fingerprint[:16]}{SUFFIX}"
