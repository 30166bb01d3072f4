"""Convolution, pooling and the network's layers against numbers worked out by hand, and against other code."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from pipeline.model import cnn as cnn_module
from pipeline.model.cnn import (
    CNN,
    Architecture,
    Block,
    Classifier,
    as_input,
    layers,
    multiply_adds,
    output_shape,
    parameter_count,
    summary,
)
from pipeline.model.layers import Dropout, Normalization, Pool, Pooling

DIGITS = tuple("0123456789")
PUBLISHED = Architecture(image_shape=(28, 28, 1), class_names=DIGITS, filters=(32, 64))

IMAGE = torch.tensor(
    [
        [1.0, 0, 2, 1, 0],
        [0, 1, 1, 0, 2],
        [2, 1, 0, 1, 1],
        [0, 2, 1, 0, 0],
        [1, 0, 1, 2, 1],
    ]
)
FILTER = torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block(image_channels: int, kernel: Tensor, *, bias: float = 0.0, stride: int = 1, padding: int = 0) -> Block:
    """One block with one filter of the given weights (C, 3, 3) and no pooling."""
    architecture = Architecture((5, 5, image_channels), DIGITS, (1,), stride=stride, padding=padding, pool_size=1)
    made = Block(image_channels, 1, architecture)
    made.load_state_dict({"convolution.weight": kernel[None], "convolution.bias": torch.tensor([bias])})
    return made


class WithoutBias(Block):
    """A block as somebody may write it before batch normalisation, which has a bias of its own."""

    def __init__(self, channels: int, filters: int, architecture: Architecture) -> None:
        super().__init__(channels, filters, architecture)
        self.convolution = nn.Conv2d(channels, filters, architecture.kernel_size, bias=False)


def test_a_convolution_may_have_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnn_module, "Block", WithoutBias)
    cnn = CNN(replace(PUBLISHED, filters=(3, 5)), seeded()).eval()
    weights = cnn.state_dict()
    maps = torch.rand(2, 1, 28, 28, generator=seeded())
    logits = cnn(maps)
    for number in (0, 1):
        maps = F.max_pool2d(F.conv2d(maps, weights[f"blocks.{number}.convolution.weight"]).relu(), 2)
    features = maps.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(logits, F.linear(features, weights["dense.weight"]))


@pytest.mark.parametrize(
    ("stride", "by_hand"),
    [(1, [[-2.0, 0, 3], [1, -1, -1], [4, 3, -1]]), (2, [[-2.0, 3], [4, -1]])],
)
def test_a_convolution_multiplies_the_filter_with_each_place_and_adds_up(
    stride: int, by_hand: list[list[float]]
) -> None:
    made = block(1, FILTER[None], stride=stride)
    assert made.convolution(IMAGE[None, None])[0, 0].tolist() == by_hand
    assert made(IMAGE[None, None])[0, 0].tolist() == torch.tensor(by_hand).clamp(min=0).tolist()  # ReLU


def test_padding_puts_zeros_around_the_image() -> None:
    maps = block(1, FILTER[None], padding=1).convolution(IMAGE[None, None])[0, 0]
    assert maps.shape == (5, 5)
    assert maps[0, 0] == 1 * 1 + 1 * 1  # only the centre and the lower right of the filter lie on the image
    assert maps[1:4, 1:4].tolist() == [[-2.0, 0, 3], [1, -1, -1], [4, 3, -1]]


def test_a_filter_sums_over_all_channels() -> None:
    image = torch.stack([IMAGE, 10 * IMAGE, 100 * IMAGE])
    kernel = torch.stack([FILTER, FILTER, -FILTER])
    maps = block(3, kernel, bias=0.5).convolution(image[None])[0, 0]
    assert maps[0].tolist() == [(1 + 10 - 100) * value + 0.5 for value in (-2.0, 0, 3)]


@pytest.mark.parametrize(
    ("pool", "by_hand"),
    [("max", [[7.0, 24], [23, 21]]), ("mean", [[5.25, 12.75], [14.25, 11.75]]), ("min", [[3.0, 1], [6, 4]])],
)
def test_pooling_takes_one_number_from_each_window_and_cuts_off_what_is_left_over(
    pool: Pool, by_hand: list[list[float]]
) -> None:
    image = torch.tensor(
        [
            [7.0, 6, 24, 8, 99],
            [3, 5, 18, 1, 99],
            [23, 6, 21, 4, 99],
            [12, 16, 9, 13, 99],
            [99, 99, 99, 99, 99],
        ]
    )
    assert Pooling(pool, 2)(image[None, None])[0, 0].tolist() == by_hand


@pytest.mark.parametrize(("pool", "batch_norm"), [*product(("max", "mean", "min"), (False, True))])
def test_a_block_is_convolution_then_relu_then_pooling(pool: Pool, batch_norm: bool) -> None:
    architecture = Architecture((28, 28, 3), DIGITS, (8,), pool=pool, batch_norm=batch_norm)
    made = Block(3, 8, architecture).eval()
    if batch_norm:  # also with a negative scale, which turns large into small
        made.get_submodule("normalisation").weight.data = torch.linspace(-2, 2, 8)
    images = torch.rand(4, 3, 28, 28, generator=seeded())
    normalised = made.convolution(images)
    if batch_norm:
        normalised = made.get_submodule("normalisation")(normalised)
    textbook = Pooling(pool, 2)(F.relu(normalised))
    torch.testing.assert_close(made(images), textbook)


def test_two_filters_on_four_colour_images_give_the_shape_of_the_course_note() -> None:
    images = torch.zeros(4, 28, 28, 3, dtype=torch.uint8)
    maps = Block(3, 2, Architecture((28, 28, 3), DIGITS, (2,), pool_size=1))(as_input(images))
    assert maps.permute(0, 2, 3, 1).shape == (4, 26, 26, 2)


def test_the_summary_table_is_that_of_the_published_network() -> None:
    assert [line.split(maxsplit=1) for line in summary(PUBLISHED).splitlines()[1:]] == [
        ["conv2d", "(26, 26, 32)               320"],
        ["max_pooling2d", "(13, 13, 32)                 0"],
        ["conv2d_1", "(11, 11, 64)            18,496"],
        ["max_pooling2d_1", "(5, 5, 64)                   0"],
        ["flatten", "(1600)                       0"],
        ["dropout", "(1600)                       0"],
        ["dense", "(10)                    16,010"],
        ["total", "34,826"],
    ]


@pytest.mark.parametrize(
    "architecture",
    [
        PUBLISHED,
        Architecture((32, 32, 3), DIGITS, (8, 16, 4), padding=1, batch_norm=True),
        Architecture((31, 17, 2), DIGITS[:3], (5,), kernel_size=5, stride=3, padding=2, pool="mean", pool_size=1),
        Architecture((28, 28, 1), DIGITS, (4, 4), kernel_size=4, stride=2, pool="min", pool_size=2),
    ],
)
def test_the_summary_matches_the_network(architecture: Architecture) -> None:
    cnn = CNN(architecture, seeded())
    height, width, channels = architecture.image_shape
    assert sum(parameter.numel() for parameter in cnn.parameters()) == parameter_count(architecture)
    maps = torch.zeros(2, channels, height, width)
    announced = [layer.output_shape for layer in layers(architecture) if "pooling" in layer.name]
    for built, shape in zip(cnn.blocks, announced, strict=True):
        maps = built(maps)
        assert tuple(maps.permute(0, 2, 3, 1).shape[1:]) == shape
    assert cnn.eval()(torch.zeros(2, channels, height, width)).shape == (2, len(architecture.class_names))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (replace(PUBLISHED, kernel_size=15), r"block 2 does not fit the 7 x 7 pixels .*Kernel size: \(15 x 15\)"),
        (replace(PUBLISHED, pool_size=8), r"block 2 does not fit the 3 x 3 pixels .*too small"),
        (replace(PUBLISHED, stride=8, pool_size=5), r"block 1 does not fit the 28 x 28 pixels .*too small"),
    ],
)
def test_layers_that_do_not_fit_the_images_are_refused_by_name(architecture: Architecture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CNN(architecture, seeded())


def test_weights_are_channels_last() -> None:
    for each in CNN(PUBLISHED, seeded()).block_list():
        assert each.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_first_weights_are_glorot_uniform_and_biases_zero() -> None:
    cnn = CNN(PUBLISHED, seeded())
    fans = {(32, 1, 3, 3): (9, 288), (64, 32, 3, 3): (288, 576), (10, 1600): (1600, 10)}
    for name, parameter in cnn.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            bound = (6 / sum(fans[tuple(parameter.shape)])) ** 0.5
            assert 0.98 * bound < parameter.abs().max() <= bound
            # The variance of the uniform distribution; 288 values put the estimate within 25 %.
            assert parameter.var().item() == pytest.approx(bound**2 / 3, rel=0.25)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9])
def test_dropout_sets_a_share_to_zero_and_keeps_the_expected_sum(p: float) -> None:
    dropout, features = Dropout(p), torch.ones(1000, 1601)
    dropped = dropout(features, seeded())
    assert (dropped == 0).double().mean().item() == pytest.approx(p, abs=0.002)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped[dropped > 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-4)]
    assert torch.equal(dropped, dropout(features, seeded()))
    assert p == 0 or not torch.equal(dropped, dropout(features, seeded(1)))
    assert torch.equal(dropout.eval()(features, None), features)


def test_each_place_is_dropped_independently_of_the_next() -> None:
    kept = (Dropout(0.5)(torch.ones(500_000), seeded()) > 0).double()
    for distance in (1, 2, 3, 4):
        both = (kept[:-distance] * kept[distance:]).mean().item()
        assert both == pytest.approx(0.25, abs=0.003)


def test_the_classifier_takes_bytes_and_gives_probabilities() -> None:
    images = torch.randint(256, (5, 28, 28, 1), dtype=torch.uint8, generator=seeded())
    cnn = CNN(PUBLISHED, seeded())
    probabilities = Classifier(cnn)(images)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    scaled = images.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(probabilities, cnn.eval()(scaled).softmax(dim=1))


COLOUR = Architecture((13, 18, 3), tuple("abcd"), (4, 6), dropout=0.0, pool="mean")
SAME = replace(COLOUR, padding="same")
PIXELS: dict[str, Any] = {"normalize": True, "mean": (0.5, 0.4, 0.6), "std": (0.3, 0.2, 0.1)}
KINDS = {
    "several convolutions": replace(COLOUR, convolutions=2, pool_size=1),
    "same padding, stride": replace(SAME, kernel_size=5, stride=2, convolutions=2),
    "residual, projection": replace(SAME, residual=True),
    "residual, identity": replace(SAME, filters=(3, 3), residual=True, convolutions=2),
    "residual, stride": replace(SAME, residual=True, stride=2, convolutions=3, pool_size=1),
    "average": replace(COLOUR, head="average"),
    "dense": replace(COLOUR, dense=7),
    "normalised": replace(COLOUR, **PIXELS),
    "all": replace(SAME, residual=True, convolutions=2, head="average", dense=7, pool="max", **PIXELS),
}
BATCH_NORM = {f"{name}, batch norm": replace(each, batch_norm=True) for name, each in KINDS.items()}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_kind_twice = pytest.mark.parametrize("kind", KINDS | BATCH_NORM)


def made(architecture: Architecture) -> CNN:
    """With biases and batch statistics as after some training."""
    cnn = CNN(architecture, seeded())
    generator = seeded(1)
    for name, values in cnn.state_dict().items():
        if name.endswith("bias") or "normalisation" in name:
            values.copy_(torch.rand(values.shape, generator=generator) + (0.5 if "bias" not in name else -0.5))
    return cnn


class Plain:
    """A network by its formulas in float64: weights in the order in which they are used, none of this project's code.

    ``tensors`` are those of a network's state_dict, without names.
    """

    def __init__(self, architecture: Architecture, tensors: list[Tensor], training: bool) -> None:
        self.a, self.training = architecture, training
        self.tensors: Iterator[Tensor] = iter(tensors)

    def convolve(self, maps: Tensor, stride: int, padding: int) -> Tensor:
        maps = F.conv2d(maps, next(self.tensors), next(self.tensors), stride, padding)
        if self.a.batch_norm:
            weight, bias, mean, variance, _ = (next(self.tensors) for _ in range(5))
            maps = F.batch_norm(maps, mean.clone(), variance.clone(), weight, bias, self.training)
        return maps

    def block(self, maps: Tensor, filters: int) -> Tensor:
        inputs, padding = maps, (self.a.kernel_size - 1) // 2 if self.a.padding == "same" else 0
        for number in range(self.a.convolutions):
            maps = self.convolve(maps.clamp(min=0) if number else maps, self.a.stride if number == 0 else 1, padding)
        if self.a.residual:
            is_alike = inputs.shape[1] == filters and self.a.stride == 1
            maps = maps + (inputs if is_alike else self.convolve(inputs, self.a.stride, 0))
        maps = maps.clamp(min=0)
        return F.max_pool2d(maps, self.a.pool_size) if self.a.pool == "max" else F.avg_pool2d(maps, self.a.pool_size)

    def logits(self, pixels: Tensor) -> Tensor:
        """Of pixels (N, C, H, W) in [0, 1]."""
        if self.a.normalize:
            channels = zip(self.a.mean, self.a.std, strict=True)
            pixels = torch.stack([(pixels[:, i] - mean) / std for i, (mean, std) in enumerate(channels)], dim=1)
        for filters in self.a.filters:
            pixels = self.block(pixels, filters)
        features = pixels.mean((2, 3)) if self.a.head == "average" else pixels.permute(0, 2, 3, 1).flatten(1)
        if self.a.dense:
            features = (features @ next(self.tensors).T + next(self.tensors)).clamp(min=0)
        return features @ next(self.tensors).T + next(self.tensors)


def logits_and_gradients(logits: Tensor, weights: list[Tensor]) -> list[Tensor]:
    labels = torch.arange(len(logits)) % logits.shape[1]
    return [logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, labels), weights)]


def by_formulas(cnn: CNN, images: Tensor) -> list[Tensor]:
    """The logits and the gradients of all parameters, in float64."""
    tensors = [values.double() for values in cnn.state_dict().values()]
    weights = [
        each for name, each in zip(cnn.state_dict(), tensors, strict=True) if name in dict(cnn.named_parameters())
    ]
    for each in weights:
        each.requires_grad_()
    pixels = images.permute(0, 3, 1, 2).double() / 255
    return logits_and_gradients(Plain(cnn.architecture, tensors, cnn.training).logits(pixels), weights)


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs]


@pytest.mark.parametrize("training", [True, False])
@each_kind
def test_each_kind_of_block_is_its_formula(kind: str, training: bool) -> None:
    """With images as bytes in float32, as in training and scoring."""
    cnn = made(KINDS[kind]).train(training)
    images = torch.randint(256, (9, 13, 18, 3), dtype=torch.uint8, generator=seeded())
    found = logits_and_gradients(cnn(images, seeded()), list(cnn.parameters()))
    assert max(relative_errors(found, by_formulas(cnn, images))) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@each_kind_twice
def test_each_kind_of_block_is_its_formula_in_float64(kind: str, training: bool) -> None:
    """With batch normalisation too, whose sums over channels_last maps PyTorch rounds in float32."""
    cnn = made((KINDS | BATCH_NORM)[kind]).train(training)
    images = torch.randint(256, (9, 13, 18, 3), dtype=torch.uint8, generator=seeded())
    exact = by_formulas(cnn, images)
    found = logits_and_gradients(cnn.double()(as_input(images).double(), seeded()), list(cnn.parameters()))
    for error, values in zip(relative_errors(found, exact), exact, strict=True):
        # Batch normalisation takes off a bias: in training its gradient is nothing but rounding.
        assert error < 1e-5 or values.norm() < 1e-12


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (5, 1), (8, 2)], ids=["identity", "projection", "stride"])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_block_is_that_of_torchvision(channels: int, stride: int, training: bool) -> None:
    a = replace(SAME, filters=(8,), convolutions=2, stride=stride, residual=True, batch_norm=True, pool_size=1)
    ours = Block(channels, 8, a).double().train(training)
    projection = nn.Sequential(nn.Conv2d(channels, 8, 1, stride, bias=False), nn.BatchNorm2d(8))
    theirs = BasicBlock(channels, 8, stride, None if (channels, stride) == (8, 1) else projection)
    theirs.double().train(training)
    for block in (ours, theirs):
        for norm in (layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=seeded(norm.num_features))
            nn.init.uniform_(
                norm.running_var if norm.running_var is not None else norm.weight, 1, 2, generator=seeded()
            )
    pairs = zip(
        *([each for each in block.modules() if isinstance(each, nn.Conv2d)] for block in (ours, theirs)), strict=True
    )
    for own, other in pairs:
        own.weight.data.copy_(other.weight)
        nn.init.zeros_(own.get_parameter("bias"))
    inputs = torch.randn(5, channels, 9, 12, dtype=torch.float64, generator=seeded()).requires_grad_()
    results = [block(inputs) for block in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    slope = torch.randn(results[0].shape, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(*(torch.autograd.grad(each, inputs, slope)[0] for each in results), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [11, 12, 28])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_same_padding_leaves_the_size_to_the_stride(side: int, stride: int, kernel_size: int) -> None:
    a = replace(SAME, image_shape=(side, 30, 3), filters=(2,), stride=stride, kernel_size=kernel_size, pool_size=1)
    assert output_shape(replace(a, convolutions=3)) == (2, -(-side // stride), -(-30 // stride))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"padding": "same", "kernel_size": 4}, "padding: same needs an odd kernel_size, and it is 4"),
        ({"residual": True}, "residual: maps of 11 x 16 and 13 x 18 pixels cannot be added: set padding to same"),
        ({"residual": True, "padding": 2}, "residual: maps of 15 x 20 and 13 x 18 pixels cannot be added: set padding"),
        ({"residual": True, "kernel_size": 13}, "residual: maps of 1 x 6 and 13 x 18 pixels cannot be added"),
        ({"normalize": True}, "normalize needs a mean and a deviation for each of the 3 channels"),
        (PIXELS | {"std": (0.1, 0.1)}, "normalize needs a mean and a deviation for each of the 3 channels"),
        (PIXELS | {"std": (0.1, 0.1, -0.1)}, "normalize: the mean .* or the deviation .* is not one of pixels"),
        (
            PIXELS | {"mean": (0.1, 0.1, float("nan"))},
            "normalize: the mean .* or the deviation .* is not one of pixels",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CNN(replace(COLOUR, **changed), seeded())


def test_a_kernel_of_one_pixel_keeps_the_size_for_a_residual_block() -> None:
    assert output_shape(replace(COLOUR, residual=True, kernel_size=1, pool_size=1)) == (6, 13, 18)


def test_a_channel_that_is_the_same_in_all_training_images_is_not_divided_by_zero() -> None:
    pixels = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert Normalization((0.25, 0.5), (0.0, 0.5))(pixels).flatten().tolist() == [0, 0.5]
    assert Normalization((0.5, 0.5), (0.0, 0.5))(pixels)[0, 0].item() == pytest.approx(-0.25 * 255)  # a grey level


def test_normalised_training_pixels_have_mean_0_and_deviation_1() -> None:
    images = torch.randint(256, (50, 9, 9, 3), dtype=torch.uint8, generator=seeded()) // torch.tensor([1, 2, 5]).byte()
    pixels = as_input(images).double()
    mean, std = (tuple(each.tolist()) for each in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)))
    cnn = CNN(Architecture((9, 9, 3), DIGITS, (4,), normalize=True, mean=mean, std=std), seeded())
    seen = cnn.block_list()[0].before("convolution", as_input(images)).double()
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_the_summary_counts_what_pytorch_counts_and_names_layers_as_keras_does() -> None:
    a = replace(KINDS["all"], batch_norm=True)
    names = [layer.name for layer in layers(a)]
    assert names[:9] == [
        "normalization", "conv2d", "batch_norm", "conv2d_1", "batch_norm_1", "conv2d_2", "batch_norm_2", "add",
        "max_pooling2d",
    ]  # fmt: skip
    assert names[-4:] == ["global_average_pooling2d", "dense", "dropout", "dense_1"]
    assert len(set(names)) == len(names)
    assert sum(weights.numel() for weights in CNN(a, seeded()).parameters()) == parameter_count(a)
    assert {len(line) for line in summary(a).splitlines()} == {len(summary(a).splitlines()[0])}


def test_multiply_adds_of_a_residual_block_are_those_counted_by_hand() -> None:
    a = replace(SAME, filters=(4,), residual=True, convolutions=2, stride=2, pool_size=1, head="average", dense=7)
    maps = 7 * 9  # half of 13 x 18, rounded up
    assert multiply_adds(a) == maps * 4 * (3 * 9 + 4 * 9 + 3) + 4 * 7 + 7 * 4


@pytest.mark.parametrize("side", [16, 64, 256])
def test_networks_of_many_classes_and_large_images_can_be_built(side: int) -> None:
    a = replace(KINDS["all"], image_shape=(side, side, 3), class_names=tuple(map(str, range(37))), batch_norm=True)
    probabilities = Classifier(CNN(a, seeded()))(torch.zeros(2, side, side, 3, dtype=torch.uint8))
    assert probabilities.shape == (2, 37)
    assert layers(a)[-1].parameters == (7 + 1) * 37
