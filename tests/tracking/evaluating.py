"""`evaluate` in processes that race each other or kill themselves; what tests/tracking/test_evaluating.py starts.

python -m tests.tracking.evaluating FOLDER SIDE ROUNDS    a new model a round, at the same time as the other side
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import evaluate, files
from pipeline.model import model_file
from pipeline.tracking import promotion, store

STEPS = (
    "create_registered_model",
    "create_model_version",
    "set_model_version_tag",
    "update_model_version",
    "set_logged_model_tags",
    "set_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "delete_model_version_tag",
)


def race(meeting_point: Path, side: int, rounds: int) -> None:
    """Evaluate model after model. They get better, by and large."""
    first = model_file.from_bytes(files.MODEL.read_bytes())
    for number in range(rounds):
        change_model(first, seed=2 * number + side, noise=1.5 * (1 - number / rounds))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(promotion, "register", _met(promotion.register, meeting_point, number, side))
            evaluate.main()


def _met(register: Callable[..., Any], meeting_point: Path, number: int, side: int) -> Callable[..., Any]:
    """The gate, which both sides enter at the same moment: else they would hardly ever meet in it."""

    def call(*arguments: Any) -> Any:
        (meeting_point / f"{number} {side}").touch()
        while not (meeting_point / f"{number} {1 - side}").exists():
            time.sleep(0.0002)
        return register(*arguments)

    return call


def change_model(saved: model_file.TrainedModel, seed: int, noise: float = 0.5) -> None:
    """Another model in place of the trained one, with more errors the more noise there is on its biases."""
    other = model_file.from_bytes(model_file.to_bytes(saved)).cnn
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        other.dense.bias.add_(noise * torch.randn(other.dense.bias.shape, generator=generator))
    files.write(files.MODEL, model_file.to_bytes(replace(saved, cnn=other)))


def kill(what: str, step: int, when: str) -> None:
    """Evaluate, or roll back; SIGKILL ``when`` ("before" or "after") the registry is written to the ``step``th time."""
    steps = iter(range(1, 1000))
    for name in STEPS:
        setattr(MlflowClient, name, _deadly(getattr(MlflowClient, name), steps, step, when))
    if what == "evaluate":
        evaluate.main()
    else:
        store.connect()
        promotion.roll_back(None)


def _deadly(method: Callable[..., Any], steps: Any, step: int, when: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        last = next(steps) == step
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return method(*arguments, **named)
        finally:
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

    return call


if __name__ == "__main__":
    race(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
