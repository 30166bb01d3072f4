"""A fit that resumes from a checkpoint gives the same bits as an uninterrupted one."""

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.splits import LabelledImages
from pipeline.model import checkpoint, model_file, training
from pipeline.model.checkpoint import Checkpoint, DamagedError
from pipeline.model.cnn import CNN, Architecture
from tests.model import test_training
from tests.model.test_training import ARCHITECTURE
from tests.test_bad_input import damaged

SETTINGS = replace(test_training.SETTINGS, epochs=3, batch_size=128, weight_decay=0.01, checkpoint_seconds=1e-9)
Fitted = tuple[bytes, list[training.Epoch], list[bytes]]


def fit(digits: dict[str, LabelledImages], resumed: bytes | None, architecture: Architecture, **changed: Any) -> Fitted:
    """The model, the epochs, and a checkpoint at every epoch and at some steps between."""
    cnn = CNN(architecture, torch.Generator().manual_seed(0))
    kept: list[bytes] = []

    def save_checkpoint(reached: Checkpoint) -> None:
        if reached.step % 3 == 0:
            kept.append(checkpoint.to_bytes(reached, {"reached": [reached.epoch, reached.step]}))

    epochs = training.fit(
        cnn,
        (digits["train"].images, digits["train"].labels),
        (digits["validation"].images, digits["validation"].labels),
        replace(SETTINGS, **changed),
        generator=torch.Generator().manual_seed(0),
        resume_from=checkpoint.from_bytes(resumed)[0] if resumed else None,
        save_checkpoint=save_checkpoint,
    )
    history = list(epochs)
    return model_file.to_bytes(model_file.TrainedModel(cnn)), history, kept


@pytest.mark.parametrize(
    ("architecture", "changed"),
    [
        (ARCHITECTURE, {}),
        (ARCHITECTURE, {"optimizer": "adamw", "schedule": "one-cycle", "augmentations": {"shift": 1}}),
        (ARCHITECTURE, {"optimizer": "sgd", "learning_rate": 0.05, "label_smoothing": 0.1}),
        (replace(ARCHITECTURE, batch_norm=True), {}),
        (replace(ARCHITECTURE, filters=(8, 6, 5), kernel_size=2), {}),
    ],
)
def test_resuming_from_any_checkpoint_gives_the_same_bits(
    digits: dict[str, LabelledImages], architecture: Architecture, changed: dict[str, Any]
) -> None:
    digits = {name: split[:1000] for name, split in digits.items()}
    whole, history, kept = fit(digits, None, architecture, **changed)
    reached = [tuple(checkpoint.from_bytes(each)[1]["reached"]) for each in kept]
    assert reached == [*((epoch, step) for epoch in range(3) for step in (0, 3, 6)), (3, 0)][1:]
    for at, each in zip(reached, kept, strict=True):
        again, rest, _ = fit(digits, each, architecture, **changed)
        assert again == whole, at
        assert [replace(epoch, seconds=0) for epoch in rest] == [
            replace(epoch, seconds=0) for epoch in history[int(at[0]) :]
        ], at


def test_a_checkpoint_can_be_resumed_more_than_once(digits: dict[str, LabelledImages]) -> None:
    digits = {name: split[:1000] for name, split in digits.items()}
    whole, _, kept = fit(digits, None, ARCHITECTURE)
    for _ in range(3):
        model, _, after = fit(digits, kept[0], ARCHITECTURE)
        assert model == whole
        assert len(after) == len(kept) - 1
        kept = after


def test_a_checkpoint_between_epochs_is_small(digits: dict[str, LabelledImages]) -> None:
    digits = {name: split[:1000] for name, split in digits.items()}
    _, _, kept = fit(digits, None, ARCHITECTURE, epochs=1)
    within, between = kept[0], kept[-1]
    parameters = sum(each.numel() for each in CNN(ARCHITECTURE, torch.Generator()).parameters())
    assert len(between) < 3 * 4 * parameters + 20_000  # weights and Adam's two moments
    assert len(within) - len(between) > 4 * 10 * len(digits["train"])  # and the logits of the pass so far


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('PWNED', 'w')",)


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["nothing", "half", "a flipped bit", "code", "another file"])
def test_fault_26_an_invalid_checkpoint_is_refused_and_not_executed(
    digits: dict[str, LabelledImages], damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = fit({name: split[:200] for name, split in digits.items()}, None, ARCHITECTURE, epochs=1)[2][-1]
    digest = checkpoint.DIGEST_SIZE
    damaged = {
        "nothing": b"",
        "half": content[: len(content) // 2],
        "a flipped bit": content[:5000] + bytes([content[5000] ^ 4]) + content[5001:],
        "code": checkpoint._signed(pickle.dumps(Attack())),
        "another file": checkpoint._signed(b"x" * 100),
    }[damage]
    with pytest.raises(DamagedError):
        checkpoint.from_bytes(damaged)
    assert len(content) > digest
    assert not Path("PWNED").exists()


CHECKPOINT = Checkpoint(
    epoch=1,
    step=0,
    seconds=1.0,
    model=CNN(ARCHITECTURE, torch.Generator()).state_dict(),
    optimizer={"state": {}},
    schedule={},
    generator=torch.Generator().get_state(),
    losses=torch.empty(0),
    logits=torch.empty(0),
)


@pytest.mark.faults
def test_fault_42_a_checkpoint_that_would_take_more_memory_than_its_file_is_refused() -> None:
    stored = checkpoint.to_bytes(CHECKPOINT, {})[checkpoint.DIGEST_SIZE :]
    size = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + size])
    header["0"] |= {"shape": [10**10], "data_offsets": [0, 4 * 10**10]}
    larger = json.dumps(header).encode()
    with pytest.raises(DamagedError):
        checkpoint.from_bytes(checkpoint._signed(len(larger).to_bytes(8, "little") + larger + stored[8 + size :]))


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        {"model": CNN(replace(ARCHITECTURE, filters=(16, 33)), torch.Generator()).state_dict()},
        {"model": {name: each.half() for name, each in CHECKPOINT.model.items()}},
        {"model": {name: each * float("nan") for name, each in CHECKPOINT.model.items()}},
        {"model": dict(list(CHECKPOINT.model.items())[1:])},
        {"model": [1, 2]},
        {"epoch": "one"},
        {"optimizer": {}},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
        {"optimizer": {"state": {99: {"exp_avg": torch.zeros(1)}}}},
    ],
    ids=[
        "shapes",
        "half precision",
        "NaN",
        "a tensor less",
        "a list",
        "an epoch that is text",
        "no optimizer",
        "moments",
        "parameter 99",
    ],
)
def test_fault_42_a_checkpoint_of_another_network_is_refused(change: dict[str, Any]) -> None:
    cnn = CNN(ARCHITECTURE, torch.Generator())
    checkpoint.check(checkpoint.from_bytes(checkpoint.to_bytes(CHECKPOINT, {}))[0], cnn)
    other = checkpoint.from_bytes(checkpoint.to_bytes(replace(CHECKPOINT, **change), {}))[0]
    with pytest.raises(DamagedError):
        checkpoint.check(other, cnn)


@pytest.mark.faults
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_fault_42_any_other_bytes_that_are_signed_are_refused_or_harmless(data: st.DataObject) -> None:
    stored = checkpoint.to_bytes(CHECKPOINT, {})[checkpoint.DIGEST_SIZE :]
    content = data.draw(damaged(stored[:4000]).map(lambda start: start + stored[4000:]) | damaged(stored))
    with suppress(DamagedError):
        checkpoint.check(checkpoint.from_bytes(checkpoint._signed(content))[0], CNN(ARCHITECTURE, torch.Generator()))
