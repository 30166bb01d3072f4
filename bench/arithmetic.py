"""Lower bound: how many operations an epoch needs, and how many this machine can do per second."""

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.splits import LabelledImages
from pipeline.model.cnn import CNN, Architecture, as_input, layers

SUSTAINED = 0.5  # seconds; a burst of milliseconds says nothing about an epoch


def peak() -> float:
    """Floating-point operations per second that this machine sustains in the fastest float32 product or convolution.

    The faster of both, since a slow library must not make the share of the peak look better.
    """
    found: list[float] = []
    with torch.no_grad():
        for side in (1024, 2048):
            left, right = torch.randn(2, side, side)
            found.append(_rate(torch.matmul, left, right, 2 * side**3))
        for channels, side in ((64, 14), (64, 28), (256, 14)):
            images = torch.randn(64, channels, side, side).to(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
            found.append(_rate(torch.conv2d, images, weight, 2 * 64 * (side - 2) ** 2 * channels**2 * 9))
    return max(found)


def _rate(compute: Callable[..., Tensor], left: Tensor, right: Tensor, operations: int) -> float:
    compute(left, right)
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < SUSTAINED:
        compute(left, right)
        times += 1
    return times * operations / (time.perf_counter() - started)


def needed_operations(
    architecture: Architecture, train: int, validation: int, live: Sequence[float] | None = None
) -> int:
    """Floating-point operations of an epoch: two for each multiply-add that reaches a logit, and for its gradients.

    The gradients of the weights take as many as the forward pass, and so do those of the inputs, except in the first
    block. All of a convolution's gradients are counted, including those that pooling makes zero, or only the nonzero
    ones: ``live`` per image in each block.
    """
    channels = [architecture.image_shape[2], *architecture.filters]
    forward, back = 0, 0.0
    for index, ((before, after), (height, width)) in enumerate(
        zip(itertools.pairwise(channels), _sides(architecture), strict=True)
    ):
        values = height * width * architecture.pool_size**2 * after
        of_one = before * architecture.kernel_size**2
        forward += values * of_one
        back += (values if live is None else live[index]) * of_one * (2 if index else 1)
    features = next(layer.output_shape[0] for layer in layers(architecture) if layer.name == "flatten")
    dense = features * len(architecture.class_names)
    return round(2 * (train * (forward + back + 3 * dense) + validation * (forward + dense)))


def _sides(architecture: Architecture) -> list[tuple[int, int]]:
    """Height and width of each block's maps, without what reaches no logit."""
    height, width, channels = architecture.image_shape
    sides = list[tuple[int, int]]()
    with torch.device("meta"):
        cnn = CNN(architecture, None).eval()
        for block in cnn.block_list():
            block.register_forward_hook(lambda _, inputs, maps: sides.append((maps.shape[2], maps.shape[3])))
        cnn(torch.empty(1, channels, height, width))
    return sides


def live_gradients(cnn: CNN, some: LabelledImages, generator: torch.Generator) -> list[float]:
    """How many outputs of each convolution have a nonzero gradient, per image, during training.

    Counted from PyTorch's own gradients of the plain network, independently of this project's kernels.
    """
    made: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        maps.retain_grad()
        made.append(maps)

    hooks = [block.convolution.register_forward_hook(keep) for block in cnn.block_list()]
    logits = cnn.train()(as_input(some.images), generator)
    torch.autograd.backward(F.cross_entropy(logits, some.labels))
    for hook in hooks:
        hook.remove()
    return [int(torch.count_nonzero(maps.grad)) / len(some) for maps in made if maps.grad is not None]
