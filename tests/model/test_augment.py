"""Augmentations against images worked out by hand."""

import pytest
import torch

from pipeline.model.augment import AUGMENTATIONS, augment, shift
from pipeline.params import Augmentation


def test_shifted_images_are_moved_and_what_comes_into_view_is_black() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 5, 5, 1)
    shifts = shift(image.expand(500, 5, 5, 1), 1, torch.Generator().manual_seed(0))
    by_hand = set()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = torch.zeros(7, 7, dtype=torch.uint8)
            moved[1 + down : 6 + down, 1 + right : 6 + right] = image[0, :, :, 0]
            by_hand.add(tuple(moved[1:6, 1:6].flatten().tolist()))
    assert {tuple(each.flatten().tolist()) for each in shifts} == by_hand


def test_a_strength_of_zero_leaves_the_images_and_the_generator_alone() -> None:
    images = torch.randint(256, (4, 6, 5, 3), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert augment(images, dict.fromkeys(AUGMENTATIONS, 0), generator) is images
    assert torch.equal(generator.get_state(), before)


def some_strength(name: str) -> float:
    """A value that params.yaml may give the augmentation: half the largest, which for a probability is neither end."""
    parameter = Augmentation.model_fields[name]
    bounds = [getattr(each, end) for each in parameter.metadata for end in ("le", "lt") if hasattr(each, end)]
    half = min(bounds, default=2) / 2
    return max(1, int(half)) if parameter.annotation is int else half


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_same_generator_gives_the_same_images_and_another_others(name: str) -> None:
    images = torch.randint(256, (100, 20, 18, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    strengths = {name: some_strength(name)}
    first, again, other = (augment(images, strengths, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
