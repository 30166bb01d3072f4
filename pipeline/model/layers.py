"""The layers that PyTorch does not have, or has with other conventions than the published network."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.cpu_threads import current_chunk

Pool = Literal["max", "mean", "min"]
Head = Literal["flatten", "average"]
GREY_LEVEL = 1 / 255


class Pooling(nn.Module):
    """The maximum, mean or minimum of each ``size`` x ``size`` window; rows and columns left over are cut off."""

    def __init__(self, kind: Pool, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, C, H // size, W // size) out."""
        if self.size == 1:
            return maps
        match self.kind:
            case "max":
                return F.max_pool2d(maps, self.size)
            case "mean":
                return F.avg_pool2d(maps, self.size)
            case "min":
                return -F.max_pool2d(-maps, self.size)

    def extra_repr(self) -> str:
        """For print(cnn)."""
        return f"{self.kind}, size={self.size}"


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe and Szegedy, 2015), also of a batch whose chunks are computed in several threads."""

    gathers = True  # see cpu_threads.thread_pool

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) in, the same shape out."""
        if self.training and current_chunk():
            raise RuntimeError("a chunk of a batch has not the mean of the batch: see cpu_ops.FUSED")
        return super().forward(maps)

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics to those of a batch (C,) of ``count`` values a channel."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((variance * (count / max(1, count - 1))).to(self.running_var), self.momentum)


class Normalization(nn.Module):
    """Subtracts a mean from each channel and divides by a deviation, both of pixels in [0, 1]: one value per channel.

    A deviation of less than a grey level counts as one: that of a channel which is the same in all training images is
    0. Raises ValueError where these are not numbers, or a deviation is negative.
    """

    def __init__(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__()
        if not all(map(math.isfinite, (*mean, *deviation))) or min(deviation, default=0) < 0:
            raise ValueError(f"normalize: the mean {mean} or the deviation {deviation} is not one of pixels")
        # Not in the state_dict: they are in the Architecture, with which a network is built again.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        divisors = torch.tensor(deviation).clamp(min=GREY_LEVEL)
        self.register_buffer("deviation", divisors.view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) floats in [0, 1] in, the same shape out."""
        return (pixels - self.get_buffer("mean")) / self.get_buffer("deviation")


class Add(nn.Module):
    """The sum of two maps of the same shape."""

    def forward(self, maps: Tensor, others: Tensor) -> Tensor:
        """Two times (N, C, H, W) in, one out. Raises ValueError where their sizes differ."""
        if maps.shape[1:] != others.shape[1:]:  # PyTorch would stretch maps of one pixel
            sizes = " and ".join(f"{height} x {width}" for *_, height, width in (maps.shape, others.shape))
            raise ValueError(f"residual: maps of {sizes} pixels cannot be added: set padding to same")
        return maps + others


class Flatten(nn.Module):
    """Maps (N, C, H, W) as features (N, H * W * C), pixel by pixel: in memory order, and as in Keras."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, features) out."""
        return maps.permute(0, 2, 3, 1).flatten(1)


class GlobalAverage(nn.Module):
    """The mean of each map, which is one feature: global average pooling (Lin et al., 2014)."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, C) out."""
        return maps.mean(dim=(2, 3))


# How the last block's maps become features.
HEADS: dict[Head, Callable[[], nn.Module]] = {"flatten": Flatten, "average": GlobalAverage}


class Dropout(nn.Module):
    """Dropout whose mask is drawn from the generator that is passed in (Srivastava et al., 2014).

    During training each feature is set to zero with probability ``p`` (in steps of 1/65,536, and at most 65,535 of
    them) and the others are divided by the share that is kept, so that the expected sum does not change.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        # 8 or 16 random bits per feature are cut from 64-bit numbers: bernoulli_ draws a number per feature, on one
        # thread. Eight bits are enough for a half, a quarter, an eighth ...
        self.bits: int = 8 if (p * 2**8).is_integer() else 16
        # This many of the 2^bits numbers that can be drawn drop a feature.
        self.dropped: int = min(round(p * 2**self.bits), 2**self.bits - 1)
        self.scale: float = 2**self.bits / (2**self.bits - self.dropped)

    @property
    def lowest_kept(self) -> int:
        """The lowest number from ``draw`` that keeps a feature."""
        return self.dropped - (1 << self.bits - 1)

    def draw(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random signed integer of ``bits`` bits for each feature."""
        numbers = torch.empty(math.ceil(features.numel() * self.bits / 64), dtype=torch.int64, device=features.device)
        numbers.random_(-(2**63), None, generator=generator)
        drawn = numbers.view(torch.int8 if self.bits == 8 else torch.int16)
        return drawn[: features.numel()].view(features.shape)

    def forward(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features of any shape in, the same shape out; ``generator`` is needed during training only."""
        if not self.training or not self.dropped:
            return features
        kept: Tensor = self.draw(features, generator) >= self.lowest_kept
        return features * kept * self.scale


def as_float(pixels: Tensor) -> Tensor:
    """Pixels of bytes, 0 to 255, as float32 in [0, 1]; floats are returned as they are."""
    return pixels.to(torch.float32).div_(255) if pixels.dtype == torch.uint8 else pixels
