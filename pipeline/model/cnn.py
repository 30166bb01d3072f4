"""The CNN: blocks of convolution, pooling and ReLU, then flatten, dropout and one dense layer."""

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pool = Literal["max", "mean", "min"]


@dataclass(frozen=True)
class Architecture:
    """All that decides the CNN's layers. ``image_shape`` is (H, W, C); one filter count a block."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    filters: tuple[int, ...]
    kernel_size: int = 3
    stride: int = 1
    padding: int = 0
    pool: Pool = "max"
    pool_size: int = 2
    dropout: float = 0.5
    batch_norm: bool = False


class Layer(NamedTuple):
    """One row of the summary table: ``output_shape`` is (H, W, C) or (features,) for one image."""

    name: str
    output_shape: tuple[int, ...]
    parameters: int


def layers(architecture: Architecture) -> list[Layer]:
    """The CNN's layers in order, with their output shapes and parameter counts, without building it.

    Raises ValueError where a filter or a pooling window is larger than what reaches it.
    """
    return list(_layers(architecture))


def _layers(architecture: Architecture) -> Iterator[Layer]:
    a = architecture
    height, width, channels = a.image_shape
    for index, filters in enumerate(a.filters):
        suffix = f"_{index}" if index else ""
        height, width = (
            _places(side, a.kernel_size, a.stride, a.padding, f"block {index + 1}'s filter") for side in (height, width)
        )
        yield Layer(f"conv2d{suffix}", (height, width, filters), filters * (channels * a.kernel_size**2 + 1))
        if a.batch_norm:
            yield Layer(f"batch_norm{suffix}", (height, width, filters), 2 * filters)
        height, width = (
            _places(side, a.pool_size, a.pool_size, 0, f"block {index + 1}'s pooling window")
            for side in (height, width)
        )
        yield Layer(f"{a.pool}_pooling2d{suffix}", (height, width, filters), 0)
        channels = filters
    features = height * width * channels
    yield Layer("flatten", (features,), 0)
    yield Layer("dropout", (features,), 0)
    yield Layer("dense", (len(a.class_names),), (features + 1) * len(a.class_names))


def _places(side: int, window: int, stride: int, padding: int, what: str) -> int:
    """At how many places along one side a window fits."""
    if window > side + 2 * padding:
        raise ValueError(f"{what} ({window} x {window}) is larger than the {side + 2 * padding} pixels that reach it")
    return (side + 2 * padding - window) // stride + 1


@functools.cache
def seen_sides(architecture: Architecture) -> tuple[tuple[int, int], ...]:
    """Height and width of what the dense layer sees of the images, and of each block's maps in turn.

    Where a convolution or a pooling does not come out even, it leaves rows and columns at the right and bottom out:
    of a 28 x 28 image the published network sees 26 x 26. The rest need not be computed. With padding the right edge
    is seen, and batch normalisation looks at all there is.
    """
    a = architecture
    whole = [a.image_shape[:2], *(layer.output_shape[:2] for layer in layers(a) if "pooling" in layer.name)]
    sides = [(height, width) for height, width in whole]
    if not a.padding and not a.batch_norm:
        for index in range(len(a.filters), 0, -1):
            height, width = ((side * a.pool_size - 1) * a.stride + a.kernel_size for side in sides[index])
            sides[index - 1] = (height, width)
    return tuple(sides)


def summary(architecture: Architecture) -> str:
    """The table of layers, output shapes and parameter counts."""
    rows = [("Layer", "Output shape", "Param #")]
    for layer in layers(architecture):
        rows.append((layer.name, f"({', '.join(map(str, layer.output_shape))})", f"{layer.parameters:,}"))
    rows.append(("total", "", f"{parameter_count(architecture):,}"))
    return "\n".join(f"{name:<18}{shape:<20}{parameters:>10}" for name, shape, parameters in rows)


def parameter_count(architecture: Architecture) -> int:
    """How many numbers the training adjusts."""
    return sum(layer.parameters for layer in layers(architecture))


def multiply_adds(architecture: Architecture) -> int:
    """How many multiplications with an addition the convolutions and the dense layer do for one image."""
    total, channels = 0, architecture.image_shape[2]
    for layer in layers(architecture):
        if layer.name.startswith("conv2d"):
            height, width, filters = layer.output_shape
            total += height * width * filters * channels * architecture.kernel_size**2
            channels = filters
        elif layer.name == "flatten":
            total += layer.output_shape[0] * len(architecture.class_names)
    return total


class Dropout(nn.Module):
    """Dropout whose mask is drawn from the generator that is passed in (Srivastava et al., 2014).

    While training each feature is set to zero with probability ``p`` (in steps of 1/65,536, and at most 65,535 of
    them) and the others are divided by the share that is kept, so that the expected sum does not change.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        # 8 or 16 random bits a feature are cut from numbers of 64 bits: bernoulli_ draws a number a feature, on one
        # thread. Eight decide for a half, a quarter, an eighth ...
        self.bits: int = 8 if (p * 2**8).is_integer() else 16
        # Of the 2^bits numbers that can be drawn, so many drop a feature.
        self.dropped: int = min(round(p * 2**self.bits), 2**self.bits - 1)
        self.scale: float = 2**self.bits / (2**self.bits - self.dropped)

    @property
    def lowest_kept(self) -> int:
        """The lowest number from ``draw`` that keeps a feature."""
        return self.dropped - (1 << self.bits - 1)

    def draw(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random integer of ``bits`` bits, with sign, for each feature."""
        numbers = torch.empty(math.ceil(features.numel() * self.bits / 64), dtype=torch.int64, device=features.device)
        numbers.random_(-(2**63), None, generator=generator)
        drawn = numbers.view(torch.int8 if self.bits == 8 else torch.int16)
        return drawn[: features.numel()].view(features.shape)

    def forward(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of any shape in, the same shape out; ``generator`` is needed while training only."""
        if not self.training or not self.dropped:
            return features
        kept: Tensor = self.draw(features, generator) >= self.lowest_kept
        return features * kept * self.scale


class Block(nn.Module):
    """Convolution, batch normalisation if wanted, pooling and ReLU: (N, C, H, W) -> (N, filters, H', W')."""

    def __init__(self, channels: int, filters: int, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.convolution = nn.Conv2d(channels, filters, a.kernel_size, a.stride, a.padding)
        self.normalisation = nn.BatchNorm2d(filters) if a.batch_norm else nn.Identity()
        self.pool, self.pool_size = a.pool, a.pool_size

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, filters, H', W') out."""
        maps: Tensor = self.normalisation(self.convolution(images))
        if self.pool == "mean":
            return pooled(F.relu(maps), self.pool, self.pool_size)
        # ReLU never changes which value of a window is the largest or smallest: after pooling it has a quarter
        # of the work and the result is the same.
        return F.relu(pooled(maps, self.pool, self.pool_size))


def pooled(maps: Tensor, pool: Pool, size: int) -> Tensor:
    """The maximum, mean or minimum of each ``size`` x ``size`` window of (N, C, H, W); what is left over is cut off."""
    if size == 1:
        return maps
    match pool:
        case "max":
            return F.max_pool2d(maps, size)
        case "mean":
            return F.avg_pool2d(maps, size)
        case "min":
            return -F.max_pool2d(-maps, size)


def flattened(maps: Tensor) -> Tensor:
    """(N, filters, H, W) as (N, features), pixel by pixel: as they lie in memory, and as in Keras."""
    return maps.permute(0, 2, 3, 1).flatten(1)


class CNN(nn.Module):
    """The network. Weights are Glorot-uniform (Glorot and Bengio, 2010), biases zero, as in Keras."""

    def __init__(self, architecture: Architecture, generator: torch.Generator) -> None:
        """Build the layers of ``architecture`` with first weights drawn from ``generator`` (on the CPU).

        Raises ValueError where the layers do not fit the images.
        """
        super().__init__()
        features = next(layer.output_shape[0] for layer in layers(architecture) if layer.name == "flatten")
        channels = (architecture.image_shape[2], *architecture.filters)
        self.architecture = architecture
        self.blocks = nn.Sequential(
            *(Block(before, after, architecture) for before, after in itertools.pairwise(channels))
        )
        self.dropout = Dropout(architecture.dropout)
        self.dense = nn.Linear(features, len(architecture.class_names))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.get_parameter("bias"))
        self.to(memory_format=torch.channels_last)

    def block_list(self) -> list[Block]:
        """The blocks in order. The type of an nn.Sequential says only that it holds modules."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) float in [0, 1]; ``generator`` draws the dropout masks."""
        logits: Tensor = self.dense(self.dropout(flattened(self.blocks(images)), generator))
        return logits


def as_input(images: Tensor) -> Tensor:
    """What the CNN takes, (N, C, H, W) float32 in [0, 1], from images (N, H, W, C) uint8."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


MOST_IMAGES = 1000


class Classifier(nn.Module):
    """The CNN as others use it: images (N, H, W, C) uint8 in, class probabilities (N, classes) out."""

    def __init__(self, cnn: CNN) -> None:
        super().__init__()
        # torch.export stores weights in the plain memory format only; channels_last pays off in training alone.
        self.cnn = copy.deepcopy(cnn).cpu().eval().to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities, each row adding up to 1; a RuntimeError for more than MOST_IMAGES."""
        # The exported graph keeps this check: a server's memory must not depend on who asks.
        torch._check(images.shape[0] <= MOST_IMAGES, lambda: f"at most {MOST_IMAGES:,} images at a time")
        logits: Tensor = self.cnn(as_input(images))
        return logits.softmax(dim=1)
