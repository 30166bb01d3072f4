"""Copies are found, whatever was done to them, and pictures that only resemble each other are not taken for copies."""

import io
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import duplicates
from pipeline.data.splits import LabelledImages
from tests import unlike

SIDE = 64
COUNT = 40
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photographs() -> Images:
    """Parts of photographs, (N, 64, 64, 3)."""
    random = np.random.default_rng(1)
    found = [np.asarray(unlike.photograph(random).resize((SIDE, SIDE), Image.Resampling.BOX)) for _ in range(COUNT)]
    return np.stack(found)


def compressed(picture: Image.Image) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=50)
    return Image.open(content)


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((45, 50), Image.Resampling.BICUBIC).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def lighter(picture: Image.Image) -> Image.Image:
    return picture.point(lambda value: round(40 + 0.8 * value))


@pytest.mark.parametrize("change", [Image.Image.copy, compressed, resized, lighter])
def test_a_copy_is_found(photographs: Images, change: Callable[[Image.Image], Image.Image]) -> None:
    copies = np.stack([np.asarray(change(Image.fromarray(image))) for image in photographs])
    numbers = duplicates.clusters(np.concatenate([photographs, copies]), 6)
    assert (numbers[:COUNT] == numbers[COUNT:]).mean() >= 0.95


def test_things_that_differ_in_colour_only_are_not_copies() -> None:
    images = np.full((3, 32, 32, 3), 250, np.uint8)
    for channel in range(3):
        images[channel, 8:24, 8:24] = 30
        images[channel, 8:24, 8:24, channel] = 220
    assert len(set(duplicates.clusters(images, 16))) == 3


def test_with_null_only_equal_images_are_copies(photographs: Images) -> None:
    copies = np.stack([np.asarray(lighter(Image.fromarray(image))) for image in photographs])
    numbers = duplicates.clusters(np.concatenate([photographs, copies, photographs]), None)
    assert len(set(numbers)) == 2 * COUNT
    assert (numbers[:COUNT] == numbers[2 * COUNT :]).all()


def test_digits_that_resemble_each_other_are_not_copies(digits: dict[str, LabelledImages]) -> None:
    images = digits["train"].images.numpy()
    numbers = duplicates.clusters(images, 6)
    assert len(images) - len(set(numbers)) < 0.02 * len(images)


def test_a_copy_of_a_copy_belongs_to_the_first() -> None:
    """Each is close to the next one only."""
    one, other = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).repeat(8, axis=1).repeat(8, axis=2)
    images = np.stack([one + share * (other - one) for share in (0, 0.06, 0.12)]).astype(np.uint8)
    assert len(set(duplicates.clusters(images[[0, 2]], 16))) == 2
    assert len(set(duplicates.clusters(images, 16))) == 1


def test_the_order_of_the_images_changes_nothing(photographs: Images) -> None:
    images = np.concatenate([photographs, photographs[:9] // 2 + 60])
    order = np.random.default_rng(0).permutation(len(images))
    one, other = duplicates.clusters(images, 6)[order], duplicates.clusters(images[order], 6)
    assert ((one[:, None] == one) == (other[:, None] == other)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 1), (28, 28, 1), (7, 5, 3)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    numbers = duplicates.clusters(np.concatenate([images, images]), 0)
    assert (numbers[:20] == numbers[20:]).all()


def test_blank_images_are_copies_of_each_other() -> None:
    images = np.full((30, 16, 16, 1), np.arange(30, dtype=np.uint8)[:, None, None, None])
    assert len(set(duplicates.clusters(images, 0))) == 1


def test_hashes_that_differ_in_few_bits_have_a_part_in_common() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 300, dtype=np.uint64)
    for bit in range(1, 8):
        changed = sum(1 << int(place) for place in random.choice(64, bit, replace=False))
        hashes = np.concatenate([hashes, hashes[:20] ^ np.uint64(changed)])
    for distance in (0, 3, 6):
        expected = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= distance, 1))
        found = {
            (min(pair), max(pair))
            for group in duplicates._equal_parts(hashes, distance)
            for pair in itertools.combinations(group.tolist(), 2)
        }
        assert {(one, other) for one, other in expected.tolist()} <= found


def frames(count: int, scenes: int, side: int = 32) -> Images:
    """What cameras that never move see: (N, side, side, 1). The frames of each differ by their noise."""
    random = np.random.default_rng(0)
    seen = random.integers(30, 220, (scenes, 8, 8, 1)).repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    found = np.empty((count, side, side, 1), np.uint8)
    for number in range(count):
        found[number] = seen[number % scenes] + random.integers(-9, 10, (side, side, 1))
    return found


def test_all_frames_of_a_camera_are_copies_as_if_each_were_compared_with_all_others(photographs: Images) -> None:
    still = frames(1500, scenes=3)
    fading = still[:1] * np.linspace(1, 0.02, 600)[:, None, None, None]  # the camera's light goes out
    images = np.concatenate([still, fading.astype(np.uint8), photographs[:, ::2, ::2, :1]])
    known = duplicates.Fingerprints.of(images, 6)
    one, other = np.triu_indices(len(images), 1)
    close = np.bitwise_count(known.hashes[one] ^ known.hashes[other]) <= 6
    one, other = one[close], other[close]
    copies = known.are_copies(one, other)
    expected = duplicates.connected(len(images), np.stack([one[copies], other[copies]], axis=1))
    found = duplicates.clusters(images, 6)
    assert len(set(found)) == len(set(expected)) < 0.2 * len(images)
    assert len(set(zip(found.tolist(), expected.tolist(), strict=True))) == len(set(found))


@pytest.mark.slow
@pytest.mark.parametrize("scenes", [1, 50])
def test_sixty_thousand_frames_of_cameras_among_a_hundred_thousand_images_take_seconds(scenes: int) -> None:
    others = np.random.default_rng(1).integers(0, 256, (40_000, 8, 8, 1), dtype=np.uint8)
    images = np.concatenate([frames(60_000, scenes), others.repeat(4, axis=1).repeat(4, axis=2)])
    started = time.process_time()
    numbers = duplicates.clusters(images, 6)
    assert len(set(numbers)) == 40_000 + scenes
    assert time.process_time() - started < 60


@pytest.mark.slow
def test_a_hundred_thousand_images_take_seconds() -> None:
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (100_000, 8, 8, 1), dtype=np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)
    images[1::1000] = images[::1000] // 2 + 50
    started = time.process_time()
    numbers = duplicates.clusters(images, 6)
    assert len(set(numbers)) == 100_000 - 100
    assert time.process_time() - started < 60
