"""The training loop: fit() trains a CNN and yields the metrics of each epoch."""

import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from pipeline.model import cpu_threads, metrics
from pipeline.model.augment import augment, mixup
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN, layers

DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
MAX_LOSS = 1e6  # nats; a network that guesses among ten classes has 2.3


@dataclass(frozen=True)
class Epoch:
    """The metrics of one pass over the training images.

    The training loss and accuracy are means over the epoch's batches, with dropout and while the weights still change;
    those of the validation images are computed after the pass, without dropout. Losses are in nats, without class
    weights; ``learning_rate`` is that of the next step.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    validation_balanced_accuracy: float


@dataclass(frozen=True)
class Step:
    """The results of one batch, on the device until somebody reads them."""

    losses: Tensor  # (), their sum over the batch
    logits: Tensor  # (images, classes)
    labels: Tensor  # (images,)

    @property
    def images(self) -> int:
        """The size of the batch."""
        return len(self.labels)

    def loss(self) -> float:
        """The mean over the batch."""
        return self.losses.item() / self.images

    def accuracy(self) -> float:
        """The share of correct predictions."""
        return metrics.accuracy(self.logits, self.labels)


def set_up(device: DeviceName, threads: int | None, precision: Precision) -> torch.device:
    """Make torch deterministic, with ``threads`` CPU threads (None: one per core); returns the device.

    Raises ValueError where the machine lacks the device, or instructions for the precision.
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
    # No code here reads uninitialised memory, so filling it, which takes 3 % of the training, is switched off.
    deterministic: Any = torch.utils.deterministic  # torch puts a class in the module's place when it is imported
    deterministic.fill_uninitialized_memory = False
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it would be emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # oneDNN also says yes to AVX-512 without bfloat16 instructions, where it emulates them, slower than float32.
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class DivergedError(Exception):
    """The loss is NaN, or too large for the network to recover."""


@dataclass(frozen=True)
class Settings:
    """How a network is trained. Each field is a parameter of `train` in params.yaml, which has its unit and range."""

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    weight_decay: float
    loss: str
    label_smoothing: float
    precision: Precision
    class_weights: str = "none"
    augmentations: dict[str, float] = field(default_factory=dict)  # strengths by the names in AUGMENTATIONS
    checkpoint_seconds: float | None = None


def summed_cross_entropy(logits: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """-log p(label), summed over the images; label smoothing spreads a share of the target evenly over all classes."""
    return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="sum")


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """A weight for each class (classes,): every class with images counts the same, and the images' mean weight is 1.

    That is n / (k n_class), with n images in k classes; 0 for a class without images. As in scikit-learn.
    """
    counts = torch.bincount(labels, minlength=classes)
    weights = len(labels) / (counts.count_nonzero() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0).float()


def _one_cycle(optimizer: Optimizer, highest: float, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, highest, total_steps=steps + 1, pct_start=0.3, cycle_momentum=False)


# From logits (N, classes) and labels (N,): the sum over the images, not the mean. Chunks of a batch are summed and then
# divided by the size of the batch.
LOSSES: dict[str, Callable[[Tensor, Tensor, Settings], Tensor]] = {
    "cross-entropy": summed_cross_entropy,
}
# From the labels of all training images and the number of classes: the weight of each class, or None for no weights.
CLASS_WEIGHTS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "none": lambda labels, classes: None,
    "balanced": balanced_weights,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(torch.optim.Adam, eps=1e-7, fused=True),  # eps as in Keras
    "adamw": partial(torch.optim.AdamW, eps=1e-7, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
}
# By the optimizer, its learning rate (the highest one), and how many steps there will be.
SCHEDULES: dict[str, Callable[[Optimizer, float, int], LRScheduler]] = {
    "constant": lambda optimizer, rate, steps: ConstantLR(optimizer, factor=1.0),
    "one-cycle": _one_cycle,
}


def fit(
    cnn: CNN,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    settings: Settings,
    *,
    generator: torch.Generator,
    on_step: Callable[[Step], object] = lambda step: None,
    resume_from: Checkpoint | None = None,
    save_checkpoint: Callable[[Checkpoint], object] = lambda checkpoint: None,
) -> Iterator[Epoch]:
    """Train ``cnn`` in place and yield an Epoch after each pass.

    ``train`` and ``validation`` are images (N, H, W, C) uint8 and labels (N,) int64 on the device of ``generator``,
    from which the order of the images, the augmentations and the dropout masks are drawn. ``on_step`` is called after
    each step. ``save_checkpoint`` is given a checkpoint after each pass, once the Epoch has been taken, and within a
    pass every ``checkpoint_seconds``; ``resume_from`` is one of the same fit. From the first step of an
    epoch to its last nothing else is copied from the device. Raises DivergedError.
    """
    images, labels = train
    cnn.to(images.device)
    parameters = list(cnn.parameters())
    # The fused optimizers need weights and gradients with the same memory layout.
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    steps = math.ceil(len(labels) / settings.batch_size)
    values = max(math.prod(layer.output_shape) for layer in layers(cnn.architecture))
    optimizer = OPTIMIZERS[settings.optimizer](
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = SCHEDULES[settings.schedule](optimizer, settings.learning_rate, settings.epochs * steps)

    class_weights = CLASS_WEIGHTS[settings.class_weights](labels, len(cnn.architecture.class_names))
    in_bfloat16 = settings.precision == "bfloat16"
    alpha = settings.augmentations.get("mixup", 0)

    def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
        if class_weights is not None:
            # A loss is a sum over images, so its gradient at an image's logits is that of this image's loss alone.
            weighted: Any = scores.view_as(scores)
            weighted.register_hook(class_weights[targets].unsqueeze(1).mul)
            scores = weighted
        return LOSSES[settings.loss](scores, targets, settings)

    def forward_backward(
        rows: Tensor, targets: Tensor, batch: int, seed: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """For a chunk of a batch: the sum of its losses, its logits, and its share of the batch's gradients."""
        draws = torch.Generator(images.device).manual_seed(seed)
        chunk = augment(images.index_select(0, rows), settings.augmentations, draws)
        if alpha:
            chunk, share = mixup(chunk, alpha, draws)
        with torch.autocast(images.device.type, torch.bfloat16) if in_bfloat16 else nullcontext():
            scores = cnn(chunk, draws).float()
        loss = loss_of(scores, targets)
        if alpha:
            loss = share * loss + (1 - share) * loss_of(scores, targets.roll(1))
        return loss.detach(), scores.detach(), torch.autograd.grad(loss / batch, parameters)

    def checkpoint_now(passes: int, seconds: float, drawn_from: Tensor) -> Checkpoint:
        states = cnn.state_dict(), optimizer.state_dict(), schedule.state_dict()
        return Checkpoint(passes, done, seconds, *states, drawn_from, losses, logits)

    # Allocated once: small results kept between large temporary ones would fragment memory.
    losses = torch.empty(steps, device=images.device)
    logits = torch.empty(len(labels), len(cnn.architecture.class_names), device=images.device)
    passes, done, before = 0, 0, 0.0  # epochs, then steps and seconds of the next one that an earlier process has done
    if resume_from:
        passes, done, before = resume_from.epoch, resume_from.step, resume_from.seconds
        _restore(resume_from, cnn, optimizer, schedule, generator)
        if done:
            losses.copy_(resume_from.losses)
            logits.copy_(resume_from.logits)
    for epoch in range(passes + 1, settings.epochs + 1):
        started = saved = time.perf_counter()
        drawn_from = generator.get_state()
        cnn.train()
        order = torch.randperm(len(labels), generator=generator, device=images.device)
        targets = labels[order]
        seeds = torch.randint(2**62, (steps,), generator=generator, device=images.device).tolist()
        split = (torch.split(each, settings.batch_size) for each in (order, targets, logits))
        batches = zip(*split, losses, seeds, strict=True)
        with cpu_threads.thread_pool(cnn, images.device) as pool:
            for rows, batch_targets, batch_logits, batch_loss, seed in itertools.islice(batches, done, None):
                chunks = (torch.split(each, pool.chunk(settings.batch_size, values)) for each in (rows, batch_targets))
                results = pool.map(forward_backward, *chunks, itertools.repeat(len(rows)), itertools.count(seed))
                for total in (batch_loss, *gradients):
                    total.zero_()
                filled = 0
                for loss, scores, shares in results:
                    batch_loss += loss
                    batch_logits[filled : filled + len(scores)] = scores
                    for gradient, share in zip(gradients, shares, strict=True):
                        gradient.add_(share)
                    filled += len(scores)
                optimizer.step()
                schedule.step()
                on_step(Step(batch_loss, batch_logits, batch_targets))
                done += 1
                seconds = settings.checkpoint_seconds
                if seconds and done < steps and time.perf_counter() - saved > seconds:
                    saved = time.perf_counter()
                    save_checkpoint(checkpoint_now(epoch - 1, before + saved - started, drawn_from))
        predicted = metrics.predict_logits(cnn, validation[0])
        finished = Epoch(
            epoch=epoch,
            train_loss=losses.double().sum().item() / len(labels),
            train_accuracy=metrics.accuracy(logits, targets),
            validation_loss=metrics.cross_entropy(predicted, validation[1]),
            validation_accuracy=metrics.accuracy(predicted, validation[1]),
            learning_rate=float(schedule.get_last_lr()[0]),
            seconds=before + time.perf_counter() - started,
            validation_balanced_accuracy=metrics.balanced_accuracy(predicted, validation[1]),
        )
        for split_name, mean_loss in (("training", finished.train_loss), ("validation", finished.validation_loss)):
            if not mean_loss < MAX_LOSS:  # true for NaN too
                raise DivergedError(f"the {split_name} loss is {mean_loss:.3g} in epoch {epoch}")
        yield finished
        done, before = 0, 0.0
        save_checkpoint(checkpoint_now(epoch, before, generator.get_state()))


def _restore(
    checkpoint: Checkpoint, cnn: CNN, optimizer: Optimizer, schedule: LRScheduler, generator: torch.Generator
) -> None:
    cnn.load_state_dict(checkpoint.model)
    optimizer.load_state_dict(dict(checkpoint.optimizer))
    schedule.load_state_dict(dict(checkpoint.schedule))
    generator.set_state(checkpoint.generator)
