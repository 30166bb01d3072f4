"""The operations on images: the loops for the CPU against the PyTorch operations for a GPU, both on the CPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model.image_kernels import KNOTS
from pipeline.model.image_ops import LOOPS, TORCH, Displacement

SHAPES = [(28, 28, 1), (20, 18, 3), (7, 40, 3), (1, 5, 1), (6, 1, 3), (1, 1, 1), (9, 8, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
COUNT = 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(shape: tuple[int, int, int]) -> Tensor:
    return torch.randint(256, (COUNT, *shape), dtype=torch.uint8, generator=generator())


def same(name: str, *arguments: object) -> None:
    """Both give the same images; rounding may differ by one grey level, and seldom does."""
    first, second = (getattr(each, name)(*arguments) for each in (LOOPS, TORCH))
    assert (first.shape, first.dtype) == (second.shape, second.dtype)
    assert first.is_contiguous()
    assert second.is_contiguous()
    apart = (first.int() - second.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.1


@pytest.mark.parametrize("reflects", [False, True])
@each_shape
def test_moved_images_are_the_same(shape: tuple[int, int, int], reflects: bool) -> None:
    images, (height, width, _) = noise(shape), shape
    ups, lefts = torch.tensor([[0, 1, -1, 2, -30, 50, -7], [0, -2, 1, 40, 3, -70, 0]])
    moved = LOOPS.move(images, ups, lefts, reflects)
    assert torch.equal(moved, TORCH.move(images, ups, lefts, reflects))
    framed = np.pad(images.numpy(), [(0, 0), (80, 80), (80, 80), (0, 0)], mode="reflect" if reflects else "constant")
    for image, up, left, result in zip(framed, ups.tolist(), lefts.tolist(), moved, strict=True):
        assert np.array_equal(image[80 + up : 80 + up + height, 80 + left : 80 + left + width], result.numpy())


@each_shape
def test_mirrored_images_are_the_same(shape: tuple[int, int, int]) -> None:
    images, mirrored = noise(shape), torch.arange(COUNT) % 3 == 0
    flipped = LOOPS.flip(images, mirrored)
    assert torch.equal(flipped, TORCH.flip(images, mirrored))
    assert torch.equal(flipped[mirrored], images[mirrored].flip(2))
    assert torch.equal(flipped[~mirrored], images[~mirrored])


@pytest.mark.parametrize("is_elastic", [False, True])
@each_shape
def test_resampled_images_are_the_same(shape: tuple[int, int, int], is_elastic: bool) -> None:
    (height, width, _), draws = shape, generator(1)
    rotations, scales, shears = (limit * (2 * torch.rand(COUNT, generator=draws) - 1) for limit in (180, 0.9, 60))
    field = Displacement(
        3 * torch.randn(COUNT, 2, KNOTS, KNOTS, generator=draws),
        torch.rand(KNOTS, height, generator=draws),
        torch.rand(KNOTS, width, generator=draws),
    )
    same("warp", noise(shape), rotations, scales, shears, field if is_elastic else None)


@each_shape
def test_an_image_that_stays_where_it_is_keeps_its_bytes(shape: tuple[int, int, int]) -> None:
    images, zero, one = noise(shape), torch.zeros(COUNT), torch.ones(COUNT)
    for each in (LOOPS, TORCH):
        assert torch.equal(each.warp(images, zero, zero, zero, None), images)
        assert torch.equal(each.adjust(images, one, False), images)
        assert torch.equal(each.adjust(images, one, True), images)
        assert torch.equal(each.mix(images, torch.tensor(1.0)), images)


@pytest.mark.parametrize("scale", [-0.999999, 1e6])
def test_far_beyond_the_edge_are_the_edge_s_pixels(scale: float) -> None:
    """The loop reads nothing outside of the image, whatever it is told."""
    images, zero = noise((17, 19, 3)), torch.zeros(COUNT)
    far = Displacement(torch.full((COUNT, 2, KNOTS, KNOTS), -1e6), torch.ones(KNOTS, 17), torch.ones(KNOTS, 19))
    for field in (None, far):
        same("warp", images, zero + 180, zero + scale, zero + 60, field)
    corner = images[:, :1, :1].expand(images.shape)
    assert torch.equal(LOOPS.warp(images, zero, zero, zero, far), corner)
    assert torch.equal(LOOPS.warp(images, zero + torch.nan, zero, zero, None), corner)


@pytest.mark.parametrize("keeps_mean", [False, True])
@each_shape
def test_values_are_the_same_and_stay_within_their_range(shape: tuple[int, int, int], keeps_mean: bool) -> None:
    images = noise(shape)
    same("adjust", images, torch.linspace(0, 3, COUNT), keeps_mean)
    assert set(LOOPS.adjust(images, torch.full((COUNT,), 1e4), False).flatten().tolist()) <= {0, 255}


@pytest.mark.parametrize("side", [1, 4, 100])
@each_shape
def test_squares_are_the_same_and_may_reach_beyond_the_image(shape: tuple[int, int, int], side: int) -> None:
    images, (height, width, _) = noise(shape), shape
    tops, lefts = (torch.randint(-side, length, (COUNT,), generator=generator(3)) for length in (height, width))
    same("cutout", images, tops, lefts, side)
    before = images.clone()
    changed = LOOPS.cutout(images, tops, lefts, side)
    assert torch.equal(images, before)
    for image, top, left, result in zip(images, tops.tolist(), lefts.tolist(), changed, strict=True):
        expected = image.double()
        expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = image.double().mean(dim=(0, 1))
        assert (result - expected).abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize("share", [0.5, 0.71, 0.999])
@each_shape
def test_mixed_images_are_the_same(shape: tuple[int, int, int], share: float) -> None:
    same("mix", noise(shape), torch.tensor(share))
