"""Training: fit() yields one row of numbers an epoch."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from pipeline.network import scoring
from pipeline.network.cnn import CNN, as_input

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "one-cycle"]
DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
LARGEST_LOSS = 1e6  # nats; a network that guesses among ten classes has 2.3


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave.

    The training loss and accuracy are means over the epoch's batches, seen with dropout and while the weights still
    moved; those of the validation images are taken after the pass, without dropout. Losses are in nats;
    ``learning_rate`` is the one that the next step would take.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


class Step(NamedTuple):
    """What one batch gave. ``loss`` (its mean) and ``hits`` stay on the device until they are asked for."""

    images: int
    loss: Tensor
    hits: Tensor


def set_up(device: DeviceName, threads: int | None, precision: Precision) -> torch.device:
    """Make torch compute the same bits every time, on ``threads`` CPU threads (None: one a core); returns the device.

    Raises ValueError where the machine has no such device, or no instructions for the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU; allowed here: auto | cpu")
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if precision == "bfloat16" and not _has_bfloat16(chosen):
        raise ValueError("precision is bfloat16, but this processor has no instructions for it; allowed here: float32")
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it did not write, so none need be filled first. The attribute is there only once
    # torch has put a class of its own in the module's place, which no type checker sees.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class DivergedError(Exception):
    """The training loss is no longer a number, or one that no network recovers from."""


def fit(
    cnn: CNN,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    optimizer: OptimizerName,
    learning_rate: float,
    schedule: ScheduleName,
    weight_decay: float,
    label_smoothing: float,
    max_shift: int,
    precision: Precision,
    generator: torch.Generator,
    on_step: Callable[[Step], object] = lambda step: None,
) -> Iterator[Epoch]:
    """Train ``cnn`` in place and yield an Epoch after each pass.

    ``train`` and ``validation`` are images (N, H, W, C) uint8 and labels (N,) int64 on the device of ``generator``,
    from which the order of the images, the shifts and the dropout masks are drawn. ``on_step`` is called after each
    step. Nothing is copied from the device within an epoch. Raises DivergedError.
    """
    images, labels = train
    cnn.to(images.device)
    steps = math.ceil(len(labels) / batch_size)
    stepper = _optimizer(optimizer, cnn, learning_rate, weight_decay)
    rate = _schedule(schedule, stepper, learning_rate, epochs * steps)

    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        cnn.train()
        losses, hits = [], []
        for rows in torch.split(torch.randperm(len(labels), generator=generator, device=images.device), batch_size):
            batch, targets = images[rows], labels[rows]
            if max_shift:
                batch = shifted(batch, max_shift, generator)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = cnn(as_input(batch), generator)
                loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
            torch.autograd.backward(loss)
            stepper.step()
            stepper.zero_grad()
            rate.step()
            step = Step(len(rows), loss.detach(), (logits.detach().argmax(dim=1) == targets).sum())
            losses.append(step.loss * step.images)
            hits.append(step.hits)
            on_step(step)
        train_loss = torch.stack(losses).double().sum().item() / len(labels)
        logits = scoring.predict_logits(cnn, validation[0])
        validation_loss = scoring.cross_entropy(logits, validation[1])
        for split, mean_loss in (("training", train_loss), ("validation", validation_loss)):
            if not mean_loss < LARGEST_LOSS:  # true for NaN too
                raise DivergedError(f"the {split} loss is {mean_loss:.3g} in epoch {epoch}")
        yield Epoch(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=torch.stack(hits).sum().item() / len(labels),
            validation_loss=validation_loss,
            validation_accuracy=scoring.accuracy(logits, validation[1]),
            learning_rate=float(rate.get_last_lr()[0]),
            seconds=time.perf_counter() - started,
        )


def _optimizer(name: OptimizerName, cnn: CNN, learning_rate: float, weight_decay: float) -> Optimizer:
    parameters = cnn.parameters()
    match name:
        case "adam":  # eps as in Keras
            return torch.optim.Adam(parameters, learning_rate, eps=1e-7, weight_decay=weight_decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, learning_rate, eps=1e-7, weight_decay=weight_decay, fused=True)
        case "sgd":
            return torch.optim.SGD(
                parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True
            )


def _schedule(name: ScheduleName, optimizer: Optimizer, learning_rate: float, steps: int) -> LRScheduler:
    if name == "constant":
        return ConstantLR(optimizer, factor=1.0)
    return OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.3, cycle_momentum=False)


def shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Each image (N, H, W, C) moved by up to ``max_shift`` pixels along each side; what comes into view is 0."""
    count, height, width, _ = images.shape
    wide = F.pad(images, (0, 0, max_shift, max_shift, max_shift, max_shift))
    down, right = torch.randint(2 * max_shift + 1, (2, count, 1), generator=generator, device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    return wide[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
