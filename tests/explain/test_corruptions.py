"""Corruptions do what their names say, and the accuracy is that on the corrupted images."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from pipeline.data.splits import LabelledImages
from pipeline.explain import corruptions
from pipeline.model import metrics
from pipeline.model.cnn import CNN, Architecture


def test_corruptions_do_what_their_names_say() -> None:
    images = torch.zeros(2, 9, 9, 1, dtype=torch.uint8)
    images[:, 2, 3] = 200
    assert torch.nonzero(corruptions.moved(images, 2, 2)).tolist() == [[0, 4, 5, 0], [1, 4, 5, 0]]
    quarter = corruptions.rotated(images, 90)
    assert int(quarter.sum()) == pytest.approx(400, abs=8)
    assert quarter[0].argmax() != images[0].argmax()
    torch.testing.assert_close(corruptions.rotated(images, 360), images)
    grey = torch.full((100, 9, 9, 1), 128, dtype=torch.uint8)
    noisy = corruptions.noisy(grey, 0.1, torch.Generator().manual_seed(0)).double()
    assert float(noisy.mean()) == pytest.approx(128, abs=1)
    assert float(noisy.std()) == pytest.approx(25.5, abs=1)
    assert sorted(set(corruptions.with_contrast(images, 0.5).flatten().tolist())) == [64, 164]


def test_the_reported_accuracy_is_that_on_the_corrupted_images(digits: dict[str, LabelledImages]) -> None:
    test, cnn = digits["test"], CNN(Architecture((28, 28, 1), tuple("0123456789"), (4,)), torch.Generator())
    found = corruptions.reported_accuracy(cnn, test.images, test.labels, "shifted_2_pixels")
    assert set(corruptions.REPORTED) == {"shifted_2_pixels", "rotated_15_degrees", "noise_20_percent", "half_contrast"}
    logits = metrics.predict_logits(cnn, corruptions.moved(test.images, 2, 2))
    assert found == metrics.accuracy(logits, test.labels)


def test_images_that_are_corrupted_a_few_at_a_time_are_the_same(
    digits: dict[str, LabelledImages], learned: CNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = digits["test"]

    def accuracies() -> list[float]:
        names = corruptions.REPORTED
        return [corruptions.reported_accuracy(learned, test.images, test.labels, name) for name in names]

    whole = accuracies()
    monkeypatch.setattr(corruptions, "MAX_VALUES", 50 * 28 * 28)  # 48 images, and 40 at last
    assert accuracies() == whole
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    some = [corruptions.noisy(each, 0.2, draws[0]) for each in torch.split(test.images, 48)]
    assert torch.equal(torch.cat(some), corruptions.noisy(test.images, 0.2, draws[1]))


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_blurred_image_is_that_of_scipy() -> None:
    images = noise(3, 20, 24, 3)
    theirs = gaussian_filter(images.double().numpy(), (0, 1.5, 1.5, 0), mode="constant", radius=(0, 5, 5, 0))
    assert np.abs(corruptions.blurred(images, 1.5).numpy() - theirs).max() <= 1
    assert torch.equal(corruptions.blurred(images, 0), images)


def test_a_scaled_image_has_the_same_centre() -> None:
    images = torch.zeros(1, 20, 20, 1, dtype=torch.uint8)
    images[:, 8:12, 8:12] = 255
    assert int((corruptions.scaled(images, 2) > 127).sum()) == 64
    assert int((corruptions.scaled(images, 0.5) > 127).sum()) == 4
    assert torch.equal(corruptions.scaled(images, 1), images)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (-2, 3), (0, -1), (25, 0)])
def test_a_moved_image_is_where_it_should_be(down: int, right: int) -> None:
    image = noise(1, 9, 11, 2)
    moved = corruptions.moved(image, down, right)
    for row, column in np.ndindex(9, 11):
        inside = 0 <= row - down < 9 and 0 <= column - right < 11
        assert torch.equal(moved[0, row, column], image[0, row - down, column - right] if inside else torch.zeros(2))


def test_a_subsampled_image_keeps_one_pixel_in_four() -> None:
    image = noise(1, 5, 6, 1)
    assert torch.equal(corruptions.subsampled(image, 2)[:, ::2, ::2], image[:, ::2, ::2])
    assert len(torch.unique(corruptions.subsampled(image, 2))) <= 9
    assert corruptions.subsampled(image, 2).shape == image.shape


def test_the_curve_of_each_corruption_contains_the_uncorrupted_images(digits: dict[str, LabelledImages]) -> None:
    test, cnn = digits["test"][:300], CNN(Architecture((28, 28, 1), tuple("0123456789"), (4,)), torch.Generator())
    found = corruptions.accuracies(cnn, test.images, test.labels)
    plain = metrics.accuracy(metrics.predict_logits(cnn, test.images), test.labels)
    unchanged = {"shift": 0, "rotation": 0, "scale": 1, "noise": 0, "blur": 0, "contrast": 1}
    assert set(found) == set(corruptions.CORRUPTIONS)
    assert {name: dict(found[name])[strength] for name, strength in unchanged.items()} == dict.fromkeys(
        unchanged, plain
    )
    assert all(list(curve) == sorted(curve) for curve in found.values())
