"""Convolution, pooling and the network's layers against numbers worked out by hand."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model import cnn as cnn_module
from pipeline.model.cnn import (
    CNN,
    Architecture,
    Block,
    Classifier,
    as_input,
    layers,
    parameter_count,
    summary,
)
from pipeline.model.layers import Dropout, Pool, Pooling

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
