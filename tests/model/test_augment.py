"""Augmentations against those of torchvision.transforms.v2, for the same draws, and the distribution of the draws."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as reference

from pipeline.model import augment as augmentations
from pipeline.model.augment import AFFINE, AUGMENTATIONS, GEOMETRY, augment, mixup
from pipeline.model.image_ops import Displacement, ImageOperations, operations
from pipeline.params import Augmentation

SHAPES = [(28, 28, 1), (20, 18, 3), (13, 30, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
NAMES = [*GEOMETRY, *AUGMENTATIONS]  # mixup, which changes labels too, is a function of its own
UNLIKELY = 1e-3  # a probability; the draws have a fixed seed, so a test that passes once does so always
Recorded = list[tuple[Any, ...]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(shape: tuple[int, int, int], count: int = 30) -> Tensor:
    """Images (N, H, W, C) of random colours that change from pixel to pixel as in photographs."""
    height, width, channels = shape
    coarse = 255 * torch.rand(count, channels, 6, 6, generator=generator(1))
    fine: Tensor = reference.resize(coarse, [height, width])
    return fine.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def noise(shape: tuple[int, int, int], count: int = 30) -> Tensor:
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator(1))


def channels_first(images: Tensor) -> Tensor:
    return images.permute(*range(images.dim() - 3), -1, -3, -2)


def assert_close(images: Tensor, expected: Tensor) -> None:
    """``expected`` has its channels first. One grey level of difference is due to rounding."""
    assert (channels_first(images).int() - expected.int()).abs().max() <= 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    """What each operation on images is given from now on, besides the images."""
    calls: dict[str, Recorded] = {name: [] for name in ImageOperations._fields}

    def spy(name: str, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(images: Tensor, *arguments: Any) -> Tensor:
            calls[name].append(arguments)
            return operation(images, *arguments)

        return call

    def recording(images: Tensor) -> ImageOperations:
        return ImageOperations(*(spy(*each) for each in operations(images)._asdict().items()))

    monkeypatch.setattr(augmentations, "operations", recording)
    return calls


@pytest.mark.parametrize(
    "strengths", [{"rotation": 40}, {"scale": 0.4}, {"shear": 30}, {"rotation": 180, "scale": 0.2, "shear": 10}]
)
@each_shape
def test_rotation_scale_and_shear_are_one_affine_transform(
    recorded: dict[str, Recorded], shape: tuple[int, int, int], strengths: dict[str, float]
) -> None:
    images = noise(shape)
    changed = augment(images, strengths, generator())
    ((rotations, scales, shears, field),) = recorded["warp"]
    assert field is None
    frame = max(shape)  # torchvision fills with a colour, so what comes into view is put there before
    framed = reference.pad(channels_first(images), [frame] * 4, padding_mode="edge").float()
    draws = torch.stack([rotations, 1 + scales, shears], dim=1).tolist()
    for image, (angle, scale, shear), result in zip(framed, draws, changed, strict=True):
        expected = reference.affine(image, angle, [0, 0], scale, [shear, 0], interpolation=InterpolationMode.BILINEAR)
        assert_close(result, reference.center_crop(expected, list(shape[:2])).round())


@each_shape
def test_elastic_images_are_displaced(recorded: dict[str, Recorded], shape: tuple[int, int, int]) -> None:
    images, (height, width, _) = noise(shape), shape
    changed = augment(images, {"elastic": 6}, generator())
    ((*_, field),) = recorded["warp"]
    pixels = displacements(field)
    assert pixels.abs().max() <= 6
    framed = reference.pad(channels_first(images), [8] * 4, padding_mode="edge").float()
    # torchvision counts in half sides.
    places = reference.pad(pixels, [8] * 4) * torch.tensor([2 / (width + 16), 2 / (height + 16)]).view(2, 1, 1)
    for image, place, result in zip(framed, places, changed, strict=True):
        expected = reference.elastic(image, place.permute(1, 2, 0)[None])
        assert_close(result, reference.center_crop(expected, [height, width]).round())


def displacements(field: Displacement) -> Tensor:
    """(N, 2, H, W), in pixels."""
    return torch.einsum("nckl,ki,lj->ncij", field.pushes, field.down_weights, field.right_weights)


def test_the_displacements_are_smooth_and_as_large_as_params_yaml_says(recorded: dict[str, Recorded]) -> None:
    augment(noise((28, 28, 1), 400), {"elastic": 8}, generator())
    found = displacements(recorded["warp"][0][3])
    assert found.square().mean().sqrt() == pytest.approx(8 / 4, rel=0.15)  # everywhere, not in the middle alone:
    assert found.square().mean(dim=(0, 1)).sqrt().min() > 8 / 5
    assert found.diff(dim=3).abs().max() < 8 / 4  # of neighbours
    near, far = (correlation(found[..., :, 0], found[..., :, by]) for by in (4, 20))
    assert near > 0.6  # as of a Gaussian of four pixels: exp(-4 * 4 / (4 * 4 * 4)) = 0.78
    assert abs(far) < 0.1


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_all_geometry_is_one_resampling(recorded: dict[str, Recorded]) -> None:
    strengths = {"shear": 10.0, "elastic": 2.0, "rotation": 10.0, "scale": 0.1}
    augment(smooth((28, 28, 1)), strengths, generator())
    assert {name: len(calls) for name, calls in recorded.items() if calls} == {"warp": 1}


@pytest.mark.parametrize("name", ["shift", "crop_padding"])
@each_shape
def test_shifted_images_are_cut_out_of_padded_ones_from_every_place_equally_often(
    shape: tuple[int, int, int], name: str
) -> None:
    image, (height, width, _) = noise(shape, 1)[0], shape
    changed = augment(image.expand(5000, *shape), {name: 2}, generator())
    mode = "constant" if name == "shift" else "reflect"
    padded = reference.pad(channels_first(image), [2] * 4, padding_mode=mode)
    crops = [reference.crop(padded, top, left, height, width) for top in range(5) for left in range(5)]
    counts = [int((channels_first(changed) == crop).flatten(1).all(dim=1).sum()) for crop in crops]
    assert sum(counts) == 5000
    assert stats.chisquare(counts).pvalue > UNLIKELY


@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 2, 3), (1, 1, 1)], ids=str)
def test_a_small_image_is_reflected_again_and_again(shape: tuple[int, int, int]) -> None:
    image, (height, width, _) = noise(shape, 1)[0], shape
    padded = np.pad(image.numpy(), [(9, 9), (9, 9), (0, 0)], mode="reflect")  # torchvision reflects once
    crops = {
        padded[top : top + height, left : left + width].tobytes()
        for top in range(2 * 9 + 1)
        for left in range(2 * 9 + 1)
    }
    changed = augment(image.expand(5000, *shape), {"crop_padding": 9}, generator())
    assert {each.numpy().tobytes() for each in changed} == crops


@each_shape
def test_as_many_images_are_mirrored_as_the_probability_says(shape: tuple[int, int, int]) -> None:
    images = noise(shape, 2000)
    for probability in (0.2, 0.5, 1):
        changed = augment(images, {"horizontal_flip": probability}, generator())
        mirrored = (changed != images).flatten(1).any(dim=1)
        assert torch.equal(
            channels_first(changed)[mirrored], reference.horizontal_flip(channels_first(images)[mirrored])
        )
        assert stats.binomtest(int(mirrored.sum()), 2000, probability).pvalue > UNLIKELY


@pytest.mark.parametrize("name", ["brightness", "contrast"])
@each_shape
def test_brightness_and_contrast_are_those_of_torchvision(
    recorded: dict[str, Recorded], shape: tuple[int, int, int], name: str
) -> None:
    images = noise(shape) // 2 + 100
    changed = augment(images, {name: 0.8}, generator())
    ((factors, _),) = recorded["adjust"]
    adjust = {"brightness": reference.adjust_brightness, "contrast": reference.adjust_contrast}[name]
    for image, factor, result in zip(images, factors.tolist(), changed, strict=True):
        assert_close(result, adjust(channels_first(image).float() / 255, factor).mul(255).round())


@pytest.mark.parametrize("side", [1, 6, 7])
@each_shape
def test_a_square_is_erased_around_any_pixel(
    recorded: dict[str, Recorded], shape: tuple[int, int, int], side: int
) -> None:
    images = smooth(shape, 200)
    changed = augment(images, {"cutout": side}, generator())
    ((tops, lefts, _),) = recorded["cutout"]
    for image, top, left, result in zip(channels_first(images), tops.tolist(), lefts.tolist(), changed, strict=True):
        mean = image.float().mean(dim=(1, 2), keepdim=True).round().to(torch.uint8)
        (i, h), (j, w) = (
            (max(start, 0), min(start + side, length) - max(start, 0))
            for start, length in zip((top, left), shape, strict=False)
        )
        assert_close(result, reference.erase(image, i, j, h, w, mean))
    for starts, length in zip((tops, lefts), shape, strict=False):
        assert stats.chisquare((starts + side // 2).bincount(minlength=length)).pvalue > UNLIKELY


@each_shape
def test_images_are_mixed_as_by_torchvision(shape: tuple[int, int, int]) -> None:
    images = noise(shape)
    mixed, share = mixup(images, 0.4, generator())

    same = v2.MixUp(num_classes=2)
    same.make_params = lambda inputs: {"lam": float(share)}
    expected, _ = same(channels_first(images).float(), torch.zeros(len(images), dtype=torch.long))
    assert_close(mixed, expected.round())


@pytest.mark.parametrize("alpha", [0.4, 1.0, 4.0])
def test_the_shares_have_the_larger_halves_of_a_beta_distribution(alpha: float) -> None:
    images, draws = noise((1, 1, 1), 2), generator()
    shares = [float(mixup(images, alpha, draws)[1]) for _ in range(2000)]
    assert min(shares) >= 0.5
    folded = stats.kstest(shares, lambda share: 2 * stats.beta(alpha, alpha).cdf(share) - 1)
    assert folded.pvalue > UNLIKELY


def test_a_small_alpha_mixes_hardly_anything() -> None:
    images, draws = noise((1, 1, 1), 2), generator()
    shares = torch.stack([mixup(images, 1e-4, draws)[1] for _ in range(200)])
    assert shares.isfinite().all()
    assert (shares > 0.999).float().mean() > 0.95


def drawn(name: str, recorded: dict[str, Recorded]) -> Tensor:
    """The values that an augmentation drew."""
    values: Tensor
    if name in AFFINE:
        values = recorded["warp"][0][AFFINE.index(name)]
    elif name == "elastic":
        values = recorded["warp"][0][3].pushes.flatten()
    else:
        values = recorded["adjust"][0][0] - 1
    return values


@pytest.mark.parametrize("name", [*GEOMETRY, "brightness", "contrast"])
def test_draws_are_uniform_between_plus_and_minus_the_strength(name: str, recorded: dict[str, Recorded]) -> None:
    augment(noise((4, 3, 1), 3000), {name: 0.5}, generator())
    shares = drawn(name, recorded) / 0.5
    assert shares.abs().max() <= 1 + 1e-5
    assert stats.kstest(shares.numpy(), stats.uniform(-1, 2).cdf).pvalue > UNLIKELY


def test_a_strength_of_zero_leaves_the_images_and_the_generator_alone() -> None:
    images, draws = noise((6, 5, 3)), generator()
    before = draws.get_state()
    assert augment(images, dict.fromkeys(NAMES, 0), draws) is images
    assert torch.equal(draws.get_state(), before)


def test_what_is_switched_off_draws_nothing() -> None:
    images = noise((6, 5, 3))
    alone, among_others = (augment(images, each, generator()) for each in ({"shift": 1}, {"rotation": 0, "shift": 1}))
    assert torch.equal(alone, among_others)


def some_strength(name: str) -> float:
    """A value that params.yaml may give the augmentation: half the largest, which for a probability is neither end."""
    parameter = Augmentation.model_fields[name]
    known = [*parameter.metadata, *(each for part in get_args(parameter.annotation) for each in get_args(part))]
    bounds = [getattr(each, end) for each in known for end in ("le", "lt") if hasattr(each, end)]
    half = min(bounds, default=2) / 2
    return max(1, int(half)) if parameter.annotation is int else half


@pytest.mark.parametrize("name", NAMES)
@each_shape
def test_the_same_generator_gives_the_same_images_and_another_others(name: str, shape: tuple[int, int, int]) -> None:
    images = smooth(shape)
    before, strengths = images.clone(), {name: min(some_strength(name), 15)}
    first, again, other = (augment(images, strengths, generator(seed)) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


@each_shape
def test_images_in_any_layout_of_the_memory_give_the_same(shape: tuple[int, int, int]) -> None:
    strengths = {name: min(some_strength(name), 3) for name in NAMES}
    images = smooth(shape)
    strided = images.repeat(2, 1, 1, 2)[::2, ..., : shape[2]]
    assert not strided.is_contiguous()
    assert torch.equal(augment(strided, strengths, generator()), augment(strided.contiguous(), strengths, generator()))
