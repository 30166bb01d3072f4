"""Activation maximization: images that score higher, stay images, and follow each regularization."""

import pytest
import torch

from pipeline.explain import activation_maximization
from pipeline.explain.activation_maximization import Ascent, Regularization, total_variation
from pipeline.model.cnn import CNN, Architecture

SHORT = Ascent(steps=60, step_size=0.1, noise=0.1, seed=0)


NO_REGULARIZATION = Regularization()


def class_images(cnn: CNN, regularization: Regularization = NO_REGULARIZATION, ascent: Ascent = SHORT) -> torch.Tensor:
    return activation_maximization.maximize(cnn, activation_maximization.class_logits, 10, regularization, ascent)


@torch.no_grad()
def own_logits(cnn: CNN, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = cnn(images)
    return logits.diag()


def test_each_image_raises_its_own_class(learned: CNN) -> None:
    images = class_images(learned)
    start = activation_maximization.starts(10, (28, 28, 1), noise=0.1, seed=0)
    assert images.shape == start.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert (own_logits(learned, images) > own_logits(learned, start) + 5).all()
    assert torch.equal(learned(images).argmax(dim=1), torch.arange(10))


def test_each_image_raises_its_own_filter() -> None:
    architecture = Architecture((20, 24, 3), tuple("abc"), (6, 12), padding=1, batch_norm=True)
    cnn = CNN(architecture, torch.Generator().manual_seed(0)).eval()
    images = activation_maximization.maximize(cnn, activation_maximization.filter_sums, 12, Regularization(), SHORT)
    sums = activation_maximization.filter_sums(cnn, torch.arange(12))
    with torch.no_grad():
        before, after = (
            sums(activation_maximization.starts(12, architecture.image_shape, noise=0.1, seed=0)),
            sums(images),
        )
    assert images.shape == (12, 3, 20, 24)
    assert (after > before).all()


def test_each_regularization_does_what_it_says(learned: CNN) -> None:
    plain = class_images(learned)
    assert (class_images(learned, Regularization(l1=40)).mean(dim=(1, 2, 3)) < plain.mean(dim=(1, 2, 3))).all()
    assert (
        total_variation(class_images(learned, Regularization(total_variation=40))) < total_variation(plain) / 2
    ).all()


def test_with_jitter_the_class_is_found_in_other_places_too(learned: CNN) -> None:
    def moved(images: torch.Tensor) -> torch.Tensor:
        places = [
            own_logits(learned, torch.roll(images, move, dims=(2, 3))) for move in ((2, 0), (-2, 0), (0, 2), (0, -2))
        ]
        return torch.stack(places).mean()

    assert moved(class_images(learned, Regularization(jitter=2))) > moved(class_images(learned))


def test_total_variation_is_the_mean_square_of_the_differences() -> None:
    images = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]])
    assert total_variation(images).item() == pytest.approx((0 + 0.25) / 2 + (1 + 0.25) / 2)


def test_the_number_of_threads_does_not_change_the_result(learned: CNN) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(class_images(learned, Regularization(total_variation=20, jitter=1), Ascent(20, 0.1, 0.1, 0)))
    assert torch.equal(*found)
    assert not torch.equal(
        found[0], class_images(learned, Regularization(total_variation=20, jitter=1), Ascent(20, 0.1, 0.1, seed=1))
    )
