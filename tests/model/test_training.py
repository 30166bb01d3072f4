"""The training loop on real digits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.splits import LabelledImages
from pipeline.model import metrics, model_file, training
from pipeline.model.augment import mixup
from pipeline.model.cnn import CNN, Architecture, as_input
from pipeline.model.model_file import TrainedModel
from tests.conftest import needs_a_gpu, needs_bfloat16
from tests.rare_class import NAMES, imbalanced

ARCHITECTURE = Architecture((28, 28, 1), tuple("0123456789"), (16, 32))
SETTINGS = training.Settings(
    epochs=2,
    batch_size=64,
    optimizer="adam",
    learning_rate=0.002,
    schedule="constant",
    weight_decay=0.0,
    loss="cross-entropy",
    label_smoothing=0.0,
    precision="float32",
)


ARCHITECTURE_WITHOUT_DROPOUT = replace(ARCHITECTURE, dropout=0.0)
ALL_AUGMENTATIONS: dict[str, float] = {
    **{"rotation": 10, "scale": 0.1, "shear": 5, "elastic": 2, "shift": 1, "crop_padding": 1, "cutout": 4},
    **{"horizontal_flip": 0.1, "brightness": 0.1, "contrast": 0.1, "mixup": 0.2},
}


def fit(
    digits: dict[str, LabelledImages],
    seed: int = 0,
    architecture: Architecture = ARCHITECTURE,
    on_step: Callable[[training.Step], object] = lambda step: None,
    **changed: Any,
) -> tuple[CNN, list[training.Epoch]]:
    train, validation = digits["train"], digits["validation"]
    cnn = CNN(architecture, torch.Generator().manual_seed(seed))
    epochs = training.fit(
        cnn,
        (train.images, train.labels),
        (validation.images, validation.labels),
        replace(SETTINGS, **changed),
        generator=torch.Generator().manual_seed(seed),
        on_step=on_step,
    )
    return cnn, list(epochs)


def to_bytes(cnn: CNN) -> bytes:
    return model_file.to_bytes(TrainedModel(cnn))


@pytest.mark.parametrize("name", training.LOSSES)
def test_a_loss_is_the_sum_over_the_images(name: str) -> None:
    logits, labels = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([1])
    of_one = training.LOSSES[name](logits, labels, SETTINGS)
    of_two = training.LOSSES[name](logits.expand(2, 3), labels.expand(2), SETTINGS)
    assert of_one > 0
    torch.testing.assert_close(of_two, 2 * of_one)


@pytest.mark.parametrize("name", training.LOSSES)
def test_balanced_weights_scale_the_gradient_of_each_image_whatever_the_loss(
    digits: dict[str, LabelledImages], name: str
) -> None:
    """One step of gradient descent, with as much from the 8s as from the 3s, which are 24 times as many."""
    few = {split: images[-50:] for split, images in imbalanced(digits).items()}
    architecture = replace(ARCHITECTURE_WITHOUT_DROPOUT, class_names=NAMES)
    step: dict[str, Any] = {"epochs": 1, "batch_size": 50, "optimizer": "sgd", "learning_rate": 0.1, "loss": name}
    weighted, _ = fit(few, architecture=architecture, **step, class_weights="balanced")

    plain, (images, labels) = (
        CNN(architecture, torch.Generator().manual_seed(0)).double(),
        (few["train"].images, few["train"].labels),
    )
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True)
    logits = plain(as_input(images).double())
    counts = torch.bincount(labels)
    assert counts.tolist() == [40, 10]
    of_class = [training.LOSSES[name](logits[labels == label], labels[labels == label], SETTINGS) for label in (0, 1)]
    torch.autograd.backward(of_class[0] * 50 / (2 * 40) / 50 + of_class[1] * 50 / (2 * 10) / 50)
    sgd.step()
    for parameter, weights in plain.named_parameters():
        torch.testing.assert_close(weighted.get_parameter(parameter).double(), weights, rtol=1e-3, atol=1e-5)


def test_a_class_weighs_its_share_of_the_images_and_the_mean_image_weighs_one() -> None:
    labels = torch.tensor([0] * 6 + [2] * 2)
    weights = training.CLASS_WEIGHTS["balanced"](labels, 4)
    assert weights is not None
    assert weights.tolist() == pytest.approx([8 / (2 * 6), 0, 8 / (2 * 2), 0])  # classes 1 and 3 have no image
    assert weights[labels].mean().item() == pytest.approx(1)
    assert training.CLASS_WEIGHTS["none"](labels, 4) is None


def test_class_weights_find_the_rare_class(digits: dict[str, LabelledImages]) -> None:
    few, architecture = imbalanced(digits), replace(ARCHITECTURE, class_names=NAMES, filters=(8, 8))
    common, rare = (digits["test"].images[digits["test"].labels == int(name)] for name in NAMES)  # about 100 of each
    found = {}
    for weights in ("none", "balanced"):
        cnn, history = fit(few, architecture=architecture, epochs=4, batch_size=32, class_weights=weights)
        logits = metrics.predict_logits(cnn, few["validation"].images)
        assert history[-1].validation_balanced_accuracy == metrics.balanced_accuracy(logits, few["validation"].labels)
        answers = [metrics.predict_logits(cnn, images).argmax(dim=1).double() for images in (common, rare)]
        found[weights] = 1 - answers[0].mean().item(), answers[1].mean().item()
    assert found["none"] == (1, 0)  # it always says 3
    recall_of_common, recall_of_rare = found["balanced"]
    assert recall_of_rare > 0.5
    assert 0.7 < recall_of_common < 1


def test_it_learns_and_reports_every_epoch(digits: dict[str, LabelledImages]) -> None:
    taken: list[training.Step] = []
    cnn, history = fit(digits, epochs=3, on_step=taken.append)
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert history[0].train_loss > history[1].train_loss > history[2].train_loss
    assert history[-1].validation_accuracy > 0.9
    images = [step.images for step in taken]
    assert images == [*[64] * 56, 60] * 3
    assert all(0 < step.loss() < 10 and 0 <= step.accuracy() <= 1 for step in taken)
    for of_epoch, of_step in (("train_loss", training.Step.loss), ("train_accuracy", training.Step.accuracy)):
        mean = sum(of_step(step) * step.images for step in taken[-57:]) / len(digits["train"])
        assert getattr(history[-1], of_epoch) == pytest.approx(mean)
    assert all(epoch.seconds > 0 for epoch in history)
    # The last row is what the returned network really does.
    logits = metrics.predict_logits(cnn, digits["validation"].images)
    assert metrics.accuracy(logits, digits["validation"].labels) == history[-1].validation_accuracy
    assert metrics.cross_entropy(logits, digits["validation"].labels) == history[-1].validation_loss


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(digits: dict[str, LabelledImages]) -> None:
    first, again, other = (to_bytes(fit(digits, seed, epochs=1)[0]) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("changed", [{}, {"padding": 1}, {"pool": "mean"}, {"filters": (5, 6, 7)}])
def test_its_steps_match_a_reference_implementation(digits: dict[str, LabelledImages], changed: dict[str, Any]) -> None:
    architecture = replace(ARCHITECTURE_WITHOUT_DROPOUT, **changed)
    some = {name: split[:400] for name, split in digits.items()}
    fast, _ = fit(some, architecture=architecture, epochs=1, batch_size=150)

    generator = torch.Generator().manual_seed(0)
    plain = CNN(architecture, torch.Generator().manual_seed(0)).double()
    adam = torch.optim.Adam(plain.parameters(), 0.002, eps=1e-7)
    for rows in torch.split(torch.randperm(400, generator=generator), 150):
        adam.zero_grad()
        logits = plain(as_input(some["train"].images[rows]).double())
        torch.autograd.backward(F.cross_entropy(logits, some["train"].labels[rows]))
        adam.step()
    for name, weights in plain.named_parameters():
        torch.testing.assert_close(fast.get_parameter(name).double(), weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_mixup_mixes_the_losses_of_both_labels(
    digits: dict[str, LabelledImages], monkeypatch: pytest.MonkeyPatch, class_weights: str
) -> None:
    """One step of gradient descent, against the cross-entropy with probabilities for labels, as of torchvision."""
    given: list[tuple[Tensor, Tensor]] = []

    def spy(images: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        given.append(mixup(images, alpha, generator))
        return given[-1]

    monkeypatch.setattr(training, "mixup", spy)
    torch.set_num_threads(1)  # one chunk
    few = {name: split[:50] for name, split in digits.items()}
    step: dict[str, Any] = {"epochs": 1, "batch_size": 50, "optimizer": "sgd", "learning_rate": 0.1}
    mixed, history = fit(
        few,
        architecture=ARCHITECTURE_WITHOUT_DROPOUT,
        **step,
        class_weights=class_weights,
        augmentations={"mixup": 10.0},
        label_smoothing=0.1,
    )
    ((images, share),) = given
    assert 0.5 < share < 0.95

    labels = few["train"].labels[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    ones = F.one_hot(labels, 10).double()
    probabilities = share * ones + (1 - share) * ones.roll(1, dims=0)
    plain = CNN(ARCHITECTURE_WITHOUT_DROPOUT, torch.Generator().manual_seed(0)).double()
    logits = plain(as_input(images).double())
    assert history[0].train_accuracy == metrics.accuracy(logits, labels)
    unweighted = F.cross_entropy(logits, probabilities, label_smoothing=0.1)
    assert history[0].train_loss == pytest.approx(unweighted.item(), rel=1e-5)

    weights = training.CLASS_WEIGHTS[class_weights](labels, 10)
    both = torch.cat([labels, labels.roll(1)])
    each = F.cross_entropy(logits.repeat(2, 1), both, label_smoothing=0.1, reduction="none")
    shares = torch.tensor([share, 1 - share]).repeat_interleave(50)
    of_each = torch.ones(100) if weights is None else weights[both]
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True)
    torch.autograd.backward((shares * of_each * each).sum() / 50)
    sgd.step()
    for parameter, expected in plain.named_parameters():
        torch.testing.assert_close(mixed.get_parameter(parameter).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("augmentations", [{}, {"shift": 1}, ALL_AUGMENTATIONS])
def test_one_thread_and_two_give_the_same_bytes(
    digits: dict[str, LabelledImages], augmentations: dict[str, float]
) -> None:
    models = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models.add(to_bytes(fit(digits, epochs=1, batch_size=128, augmentations=augmentations)[0]))
        assert torch.get_num_threads() == threads
    assert len(models) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "learning_rate": 0.05},
        *(
            pytest.param(changed, marks=pytest.mark.slow)
            for changed in (
                {"optimizer": "adam", "weight_decay": 0.01},
                {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.001},
                {"schedule": "one-cycle", "learning_rate": 0.01},
                {"label_smoothing": 0.1},
                *({"augmentations": {name: strength}} for name, strength in ALL_AUGMENTATIONS.items()),
                {"augmentations": ALL_AUGMENTATIONS},
            )
        ),
    ],
)
def test_every_choice_of_the_recipe_learns(digits: dict[str, LabelledImages], changed: dict[str, Any]) -> None:
    _, history = fit(digits, **changed)
    assert history[-1].validation_accuracy > 0.85
    for name in changed:  # no choice is ignored
        default = getattr(SETTINGS, name)
        if changed[name] != default:
            other = fit(digits, epochs=1, **changed | {name: default})[1]
            assert other[0].train_loss != history[0].train_loss, name


def test_one_cycle_goes_up_and_then_down_to_nothing(digits: dict[str, LabelledImages]) -> None:
    _, history = fit(digits, epochs=5, schedule="one-cycle", learning_rate=0.01)
    rates = [epoch.learning_rate for epoch in history]
    assert max(rates) == rates[1] > 0.009
    assert rates[-1] < 1e-6


@needs_bfloat16
@pytest.mark.parametrize("batch_norm", [False, True])
def test_bfloat16_learns_as_well(digits: dict[str, LabelledImages], batch_norm: bool) -> None:
    _, history = fit(digits, architecture=replace(ARCHITECTURE, batch_norm=batch_norm), epochs=3, precision="bfloat16")
    assert history[-1].validation_accuracy > 0.9


def test_no_random_number_is_used_twice(digits: dict[str, LabelledImages], monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[bytes] = []
    steps: list[training.Step] = []

    def spy(cnn: CNN, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if generator is not None:  # none where validation images are scored
            draws.append(generator.get_state().numpy().tobytes())
        return forward(cnn, images, generator)

    forward = CNN.forward
    monkeypatch.setattr(CNN, "forward", spy)
    torch.set_num_threads(2)
    fit(digits, batch_size=128, on_step=steps.append)
    chunks = 28 * 2 + 1  # of an epoch: 28 batches of two chunks, and 16 images
    assert len(draws) == len(set(draws)) == 2 * chunks
    one, other = (torch.cat([step.labels for step in each]) for each in (steps[:29], steps[29:]))
    assert one.bincount().tolist() == other.bincount().tolist()
    assert not torch.equal(one, other)


def test_the_training_loss_is_the_mean_over_images_not_over_batches(digits: dict[str, LabelledImages]) -> None:
    untrained = CNN(ARCHITECTURE_WITHOUT_DROPOUT, torch.Generator().manual_seed(0))
    expected = metrics.cross_entropy(metrics.predict_logits(untrained, digits["train"].images), digits["train"].labels)
    _, history = fit(digits, architecture=ARCHITECTURE_WITHOUT_DROPOUT, batch_size=3500, epochs=1, learning_rate=1e-12)
    assert history[0].train_loss == pytest.approx(expected, rel=1e-5)


def test_a_divergence_in_the_last_step_is_noticed(digits: dict[str, LabelledImages]) -> None:
    with pytest.raises(training.DivergedError, match=r"the validation loss is nan in epoch 1"):
        fit(digits, batch_size=5000, learning_rate=1e30, epochs=1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("learning_rate", [1e6, 1e30])
def test_divergence_ends_the_training(digits: dict[str, LabelledImages], optimizer: str, learning_rate: float) -> None:
    with pytest.raises(training.DivergedError, match=r"the training loss is (nan|[\d.]+e\+\d+) in epoch 1"):
        fit(digits, optimizer=optimizer, learning_rate=learning_rate)


def test_the_requested_number_of_threads_is_used() -> None:
    before = torch.get_num_threads()
    try:
        assert training.set_up("cpu", 1, "float32") == torch.device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@needs_a_gpu
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_gpu_learns_without_synchronisation_within_an_epoch(
    digits: dict[str, LabelledImages], batch_norm: bool
) -> None:
    device = training.set_up("cuda", None, "float32")
    train, validation = digits["train"].to(device), digits["validation"].to(device)
    steps = []

    def forbid_waiting(step: training.Step) -> None:
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if len(steps) % 57 else "default")  # until the epoch's last step

    cnn = CNN(replace(ARCHITECTURE, batch_norm=batch_norm), torch.Generator().manual_seed(0))
    splits = (train.images, train.labels), (validation.images, validation.labels)
    generator = torch.Generator(device).manual_seed(0)
    try:
        settings = replace(SETTINGS, augmentations=ALL_AUGMENTATIONS, class_weights="balanced")
        history = list(training.fit(cnn, *splits, settings, generator=generator, on_step=forbid_waiting))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 2 * 57
    assert history[-1].validation_accuracy > 0.85


@needs_a_gpu
def test_a_gpu_gives_the_same_bytes_twice(digits: dict[str, LabelledImages]) -> None:
    device = training.set_up("cuda", None, "float32")
    on_gpu = {name: split.to(device) for name, split in digits.items()}
    models = []
    for _ in range(2):
        cnn = CNN(ARCHITECTURE, torch.Generator().manual_seed(0))
        train, validation = on_gpu["train"], on_gpu["validation"]
        generator = torch.Generator(device).manual_seed(0)
        splits = (train.images, train.labels), (validation.images, validation.labels)
        list(training.fit(cnn, *splits, SETTINGS, generator=generator))
        models.append(to_bytes(cnn))
    assert models[0] == models[1]
