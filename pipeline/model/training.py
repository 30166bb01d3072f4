"""Training: fit() yields one row of numbers an epoch."""

import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from pipeline.model import cpu_ops, cpu_threads, metrics
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN
from pipeline.model.cpu_ops import Precision

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "one-cycle"]
DeviceName = Literal["auto", "cpu", "cuda"]
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


@dataclass(frozen=True)
class Step:
    """What one batch gave. It stays on the device until it is asked for."""

    losses: Tensor  # (), their sum over the batch
    logits: Tensor  # (images, classes)
    labels: Tensor  # (images,)

    @property
    def images(self) -> int:
        """How many there were."""
        return len(self.labels)

    def loss(self) -> float:
        """The mean over the batch."""
        return self.losses.item() / self.images

    def accuracy(self) -> float:
        """The share that was classified right."""
        return metrics.accuracy(self.logits, self.labels)


def set_up(device: DeviceName, threads: int | None, precision: Precision) -> torch.device:
    """Make torch compute the same bits every time, on ``threads`` CPU threads (None: one a core); returns the device.

    Raises ValueError where the machine has no such device, or no instructions for the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU; allowed here: auto | cpu")
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if precision == "bfloat16" and not has_bfloat16(chosen):
        raise ValueError("precision is bfloat16, but this processor has no instructions for it; allowed here: float32")
    if threads:
        torch.set_num_threads(threads)
    if chosen.type == "cuda":  # without it cuBLAS has no deterministic sums; read when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.allow_tf32 = False  # float32 as on the CPU; else convolutions round to 11 significant bits
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it did not write, so none need be filled first: that takes 3 % of the training.
    deterministic: Any = torch.utils.deterministic  # torch puts a class in the module's place when it is imported
    deterministic.fill_uninitialized_memory = False
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for bfloat16, so that these are not imitated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # oneDNN also says yes to AVX-512 without bfloat16 instructions, where it imitates them, slower than float32.
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False
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
    start: Checkpoint | None = None,
    keep: Callable[[Checkpoint], object] = lambda checkpoint: None,
    checkpoint_seconds: float | None = None,
) -> Iterator[Epoch]:
    """Train ``cnn`` in place and yield an Epoch after each pass.

    ``train`` and ``validation`` are images (N, H, W, C) uint8 and labels (N,) int64 on the device of ``generator``,
    from which the order of the images, the shifts and the dropout masks are drawn. ``on_step`` is called after each
    step. ``keep`` is given a checkpoint after each pass, once the Epoch has been taken, and within a pass whenever
    ``checkpoint_seconds`` have gone by; ``start`` is one of the same fit, to go on from. From the first step of an
    epoch to its last nothing else is copied from the device. Raises DivergedError.
    """
    images, labels = train
    cnn.to(images.device)
    parameters = list(cnn.parameters())
    # The fused optimizers pair weights and gradients by their place in memory, so both must lie there alike.
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    steps = math.ceil(len(labels) / batch_size)
    torch_optimizer = _optimizer(optimizer, cnn, learning_rate, weight_decay)
    rate = _schedule(schedule, torch_optimizer, learning_rate, epochs * steps)

    def forward_backward(
        rows: Tensor, targets: Tensor, batch: int, seed: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Of a chunk of a batch: the sum of its losses, its logits, its share of the batch's gradients."""
        draws = torch.Generator(images.device).manual_seed(seed)
        seen = images.index_select(0, rows)
        if max_shift:
            seen = shifted(seen, max_shift, draws)
        logits = cpu_ops.logits(cnn, seen, draws, precision)
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
        return loss.detach(), logits.detach(), torch.autograd.grad(loss / batch, parameters)

    def checkpoint_now(passes: int, seconds: float, drawn_from: Tensor) -> Checkpoint:
        states = cnn.state_dict(), torch_optimizer.state_dict(), rate.state_dict()
        return Checkpoint(passes, done, seconds, *states, drawn_from, losses, logits)

    # Kept for the whole epoch, so made once: small results that stay between large ones that go would fragment memory.
    losses = torch.empty(steps, device=images.device)
    logits = torch.empty(len(labels), len(cnn.architecture.class_names), device=images.device)
    passes, done, before = 0, 0, 0.0
    if start:
        passes, done, before = start.epoch, start.step, start.seconds
        _go_on(start, cnn, torch_optimizer, rate, generator)
        if done:
            losses.copy_(start.losses)
            logits.copy_(start.logits)
    for epoch in range(passes + 1, epochs + 1):
        started = kept = time.perf_counter()
        drawn_from = generator.get_state()
        cnn.train()
        order = torch.randperm(len(labels), generator=generator, device=images.device)
        targets = labels[order]
        seeds = torch.randint(2**62, (steps,), generator=generator, device=images.device).tolist()
        batches = zip(*(torch.split(each, batch_size) for each in (order, targets, logits)), losses, seeds, strict=True)
        with cpu_threads.thread_pool(cnn, images.device) as pool:
            for rows, of_batch, its_logits, its_losses, seed in itertools.islice(batches, done, None):
                chunks = (torch.split(each, pool.chunk(batch_size)) for each in (rows, of_batch))
                results = pool.map(forward_backward, *chunks, itertools.repeat(len(rows)), itertools.count(seed))
                for total in (its_losses, *gradients):
                    total.zero_()
                filled = 0
                for loss, scores, shares in results:
                    its_losses += loss
                    its_logits[filled : filled + len(scores)] = scores
                    for gradient, share in zip(gradients, shares, strict=True):
                        gradient.add_(share)
                    filled += len(scores)
                torch_optimizer.step()
                rate.step()
                on_step(Step(its_losses, its_logits, of_batch))
                done += 1
                if checkpoint_seconds and done < steps and time.perf_counter() - kept > checkpoint_seconds:
                    kept = time.perf_counter()
                    keep(checkpoint_now(epoch - 1, before + kept - started, drawn_from))
        predicted = metrics.predict_logits(cnn, validation[0])
        seen = Epoch(
            epoch=epoch,
            train_loss=losses.double().sum().item() / len(labels),
            train_accuracy=metrics.accuracy(logits, targets),
            validation_loss=metrics.cross_entropy(predicted, validation[1]),
            validation_accuracy=metrics.accuracy(predicted, validation[1]),
            learning_rate=float(rate.get_last_lr()[0]),
            seconds=before + time.perf_counter() - started,
        )
        for split, mean_loss in (("training", seen.train_loss), ("validation", seen.validation_loss)):
            if not mean_loss < LARGEST_LOSS:  # true for NaN too
                raise DivergedError(f"the {split} loss is {mean_loss:.3g} in epoch {epoch}")
        yield seen
        done, before = 0, 0.0
        keep(checkpoint_now(epoch, before, generator.get_state()))


def _go_on(
    start: Checkpoint, cnn: CNN, optimizer: Optimizer, schedule: LRScheduler, generator: torch.Generator
) -> None:
    cnn.load_state_dict(start.model)
    optimizer.load_state_dict(dict(start.optimizer))
    schedule.load_state_dict(dict(start.schedule))
    generator.set_state(start.generator)


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
