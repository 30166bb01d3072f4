"""Lower bound: how many operations an epoch needs, and how many this machine can do per second."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.splits import LabelledImages
from pipeline.model.cnn import CNN, Architecture, Block, as_input, layers

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

    The gradients of the weights take as many as the forward pass, and so do those of the inputs, except where these are
    the pixels. All of a convolution's gradients are counted, including those that pooling makes zero, or only the
    nonzero ones: ``live`` per image in each convolution.
    """
    forward, back = 0, 0.0
    for index, each in enumerate(_convolutions(architecture)):
        forward += each.values * each.multiply_adds
        gradients = each.values if live is None else live[index]
        back += gradients * each.multiply_adds * (1 if each.reads_pixels else 2)
    dense = sum(layer.multiply_adds for layer in layers(architecture) if layer.name.startswith("dense"))
    return round(2 * (train * (forward + back + 3 * dense) + validation * (forward + dense)))


class _Convolution(NamedTuple):
    """How many of its values reach a logit, the multiply-adds of each, and whether it reads the pixels."""

    values: int
    multiply_adds: int
    reads_pixels: bool


def _convolutions(architecture: Architecture) -> list[_Convolution]:
    """Those of a network, in the order in which they run."""
    height, width, channels = architecture.image_shape
    shapes = dict[nn.Module, torch.Size]()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        shapes[module] = maps.shape

    with torch.device("meta"):
        cnn = CNN(architecture, None).eval()
        for layer in (*cnn.block_list(), *_convolutions_of(cnn.blocks)):
            layer.register_forward_hook(keep)
        cnn(torch.empty(1, channels, height, width))
    return [each for number, block in enumerate(cnn.block_list()) for each in _counted(block, shapes, number == 0)]


def _counted(block: Block, shapes: Mapping[nn.Module, torch.Size], has_pixels: bool) -> Iterator[_Convolution]:
    """Of what is pooled, pooling leaves out the last rows and columns if the sizes do not divide evenly."""
    path, size = block.convolutions(), block.pooling.size
    shortcut = [layer for layer in _convolutions_of(block) if layer not in path]
    for layer in (*path, *shortcut):
        is_pooled, is_first = layer in (path[-1], *shortcut), layer in (path[0], *shortcut)
        height, width = (side * size for side in shapes[block][2:]) if is_pooled else shapes[layer][2:]
        values = height * width * layer.out_channels
        yield _Convolution(values, layer.weight[0].numel(), reads_pixels=has_pixels and is_first)


def _convolutions_of(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def live_gradients(cnn: CNN, some: LabelledImages, generator: torch.Generator) -> list[float]:
    """How many outputs of each convolution have a nonzero gradient, per image, during training.

    Counted from PyTorch's own gradients of the plain network, independently of this project's kernels.
    """
    made: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        maps.retain_grad()
        made.append(maps)

    hooks = [layer.register_forward_hook(keep) for layer in _convolutions_of(cnn.blocks)]
    logits = cnn.train()(as_input(some.images), generator)
    torch.autograd.backward(F.cross_entropy(logits, some.labels))
    for hook in hooks:
        hook.remove()
    return [int(torch.count_nonzero(maps.grad)) / len(some) for maps in made if maps.grad is not None]
