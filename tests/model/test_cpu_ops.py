"""The fused operations against the layers that they stand in for: the same logits, the same gradients."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.splits import LabelledImages
from pipeline.model import cpu_ops, cpu_threads, training
from pipeline.model.cnn import CNN, Architecture, as_input
from pipeline.model.training import Precision
from tests.conftest import REPOSITORY, needs_a_gpu, needs_bfloat16

DIGITS = tuple("0123456789")
PUBLISHED = Architecture(image_shape=(28, 28, 1), class_names=DIGITS, filters=(32, 64))
ARCHITECTURES = [
    PUBLISHED,
    replace(PUBLISHED, pool="min"),
    replace(PUBLISHED, pool="mean"),
    replace(PUBLISHED, filters=(20, 5, 7)),
    replace(PUBLISHED, filters=(8, 16), dropout=0.3),
    replace(PUBLISHED, filters=(16, 8), kernel_size=5),
    replace(PUBLISHED, filters=(16, 8), kernel_size=5, padding=2),
    replace(PUBLISHED, filters=(24, 8), kernel_size=4, stride=2),
    replace(PUBLISHED, filters=(24, 8), kernel_size=2, stride=2, pool_size=2),
    replace(PUBLISHED, filters=(24, 8), pool_size=1, stride=3),
    replace(PUBLISHED, filters=(24, 8), pool_size=3, dropout=0.0),
    replace(PUBLISHED, filters=(16, 8), kernel_size=1, pool_size=4),
    replace(PUBLISHED, filters=(16, 8), image_shape=(20, 31, 3)),
    replace(PUBLISHED, filters=(32, 40), image_shape=(20, 31, 3)),
    replace(PUBLISHED, filters=(33, 37)),
    replace(PUBLISHED, filters=(16, 8), image_shape=(20, 31, 3), padding=1, pool="min"),
]
# Numba compiles the loops of each in five seconds.
each_architecture = pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] if number % 3 else []) for number, each in enumerate(ARCHITECTURES)],
    ids=str,
)


def trained_a_little(architecture: Architecture) -> CNN:
    """With biases that are not zero, as after some steps of training."""
    generator = torch.Generator().manual_seed(1)
    cnn = CNN(architecture, generator)
    for name, parameter in cnn.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
    return cnn


def images_for(architecture: Architecture, digits: dict[str, LabelledImages]) -> LabelledImages:
    """Digits where they fit, with their black, white and flat places, else noise."""
    some = digits["train"][:99]
    if architecture.image_shape == (28, 28, 1):
        return some
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(256, (99, *architecture.image_shape), dtype=torch.uint8, generator=generator)
    return LabelledImages(noise, some.labels)


def logits_and_gradients(cnn: CNN, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*cnn.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


def logits(cnn: CNN, images: Tensor, generator: torch.Generator | None, precision: Precision) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        found: Tensor = cnn(images, generator)
    return found.float()


def in_chunks(cnn: CNN, some: LabelledImages, size: int) -> dict[str, Tensor]:
    """What `logits_and_gradients` gives, from chunks of ``size`` images that threads compute."""
    names, parameters = zip(*cnn.named_parameters(), strict=True)

    def forward_backward(images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        scores = cnn(images)
        loss = F.cross_entropy(scores, labels, reduction="sum") / len(some)
        return scores.detach(), torch.autograd.grad(loss, parameters)

    with cpu_threads.thread_pool(cnn, torch.device("cpu")) as pool:
        chunks = list(pool.map(forward_backward, torch.split(some.images, size), torch.split(some.labels, size)))
    scores, gradients = zip(*chunks, strict=True)
    sums = [torch.stack(shares).sum(dim=0) for shares in zip(*gradients, strict=True)]
    return {"logits": torch.cat(scores), **dict(zip(names, sums, strict=True))}


def by_its_layers(cnn: CNN) -> CNN:
    """A copy that calls every layer: no operation stands in for one with a hook."""
    plain = copy.deepcopy(cnn)
    for layer in plain.modules():
        if not list(layer.children()):
            layer.register_forward_pre_hook(lambda *_: None)
    return plain


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(some: LabelledImages, plain: CNN, cnn: CNN, precision: Precision) -> dict[str, float]:
    """How far the logits and gradients of ``cnn`` are from those of ``plain`` in float64."""
    plain = copy.deepcopy(plain).double()
    found = logits(cnn, some.images, torch.Generator().manual_seed(3), precision)
    exact = plain(as_input(some.images).double(), torch.Generator().manual_seed(3))
    pairs = logits_and_gradients(cnn, found, some.labels), logits_and_gradients(plain, exact, some.labels)
    return {name: relative_error(pairs[0][name], pairs[1][name]) for name in pairs[1]}


@each_architecture
def test_float32_matches_the_plain_network(architecture: Architecture, digits: dict[str, LabelledImages]) -> None:
    cnn = trained_a_little(architecture)
    found = errors(images_for(architecture, digits), cnn, cnn, "float32")
    assert max(found.values()) < 1e-5, found


@needs_a_gpu
@each_architecture
def test_a_gpu_matches_the_plain_network(architecture: Architecture, digits: dict[str, LabelledImages]) -> None:
    device = training.set_up("cuda", None, "float32")
    cnn = trained_a_little(replace(architecture, dropout=0.0)).to(device)  # it would draw other masks
    found = errors(images_for(architecture, digits).to(device), cnn, cnn, "float32")
    assert max(found.values()) < 1e-5, found


class Rounding(CNN):
    """The network with 8 significant bits where bfloat16 has them: around convolutions that do not read bytes."""

    def __init__(self, cnn: CNN) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(copy.deepcopy(cnn).__dict__)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As the CNN; the gradient passes through the rounding."""
        maps, pixels = images, torch.zeros(1, dtype=torch.uint8)
        for index, block in enumerate(self.block_list()):
            convolution = block.convolution
            if index or not cpu_ops._can_read_bytes(convolution, nn.ReLU(), block.pooling, pixels):
                weight, bias = rounded(convolution.weight), rounded(convolution.bias)
                maps = F.conv2d(rounded(maps), weight, bias, convolution.stride, convolution.padding)
                maps = block.onwards("activation", rounded(maps))
            else:
                maps = block(maps)
        return self.head(maps, generator)


def rounded(values: Tensor | None) -> Tensor:
    assert values is not None
    return values + (values.bfloat16().double() - values).detach()


@needs_bfloat16
@each_architecture
def test_bfloat16_matches_the_plain_network(architecture: Architecture, digits: dict[str, LabelledImages]) -> None:
    some, cnn = images_for(architecture, digits), trained_a_little(architecture)
    assert 1e-5 < errors(some, cnn, cnn, "bfloat16")["logits"] < 1e-2
    # Which value of a window is the largest can change when all are rounded, and the gradient goes another way; so the
    # gradients are held against those of a network that rounds in the same places.
    found = errors(some, Rounding(cnn), cnn, "bfloat16")
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "changed",
    [{}, {"pool": "mean"}, {"pool_size": 1, "stride": 2}, {"padding": 1, "pool": "min"}, {"filters": (20, 5, 7)}],
    ids=str,
)
def test_batch_normalisation_matches_the_plain_network(
    changed: dict[str, Any], threads: int, digits: dict[str, LabelledImages]
) -> None:
    """Of whole batches, also where their chunks are computed in threads. The scales have both signs."""
    torch.set_num_threads(threads)
    cnn, some = trained_a_little(replace(PUBLISHED, batch_norm=True, dropout=0.0, **changed)), digits["train"][:99]
    for name, parameter in cnn.named_parameters():
        if name.endswith("normalisation.weight"):
            nn.init.uniform_(parameter, -2, 2, generator=torch.Generator().manual_seed(4))
    plain = by_its_layers(cnn).double()
    for train in (True, False):
        exact = logits_and_gradients(plain, plain.train(train)(as_input(some.images).double()), some.labels)
        found = in_chunks(cnn.train(train), some, 33)
        for name, values in exact.items():
            # A convolution's bias is taken off again by the mean: in training its gradient is nothing but rounding.
            if not (train and name.endswith("convolution.bias")):
                assert relative_error(found[name], values) < 1e-5, name
    statistics = {name: values for name, values in cnn.state_dict().items() if "running" in name}
    assert len(statistics) == 2 * len(cnn.architecture.filters)
    for name, values in statistics.items():
        torch.testing.assert_close(values.double(), plain.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert cnn.state_dict()["blocks.0.normalisation.num_batches_tracked"] == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 20, 20, 1), torch.zeros(2, 32, 32, 1), torch.zeros(2, 28, 28, 3)])
def test_images_of_another_shape_are_refused(images: Tensor) -> None:
    cnn = trained_a_little(PUBLISHED)
    for given in (images.to(torch.uint8), images.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"images are \(2, .*; the network takes N x 28 x 28 x 1 torch.uint8"):
            cnn(given)


def test_a_layer_with_a_hook_and_one_of_another_kind_are_called(digits: dict[str, LabelledImages]) -> None:
    cnn, images = trained_a_little(PUBLISHED).eval(), digits["train"].images[:5]
    expected, seen = cnn(images), list[Tensor]()
    cnn.block_list()[1].activation.register_forward_hook(lambda _, inputs, output: seen.append(output))
    torch.testing.assert_close(cnn(images), expected)
    assert seen[0].shape == (5, 64, 10, 10)
    cnn.block_list()[0].activation = nn.Tanh()
    assert not torch.allclose(cnn(images), expected)


def test_a_hook_on_a_block_sees_the_same_maps_in_training_and_by_its_layers(
    digits: dict[str, LabelledImages],
) -> None:
    fast = trained_a_little(PUBLISHED)
    plain, images = by_its_layers(fast), digits["train"].images[:64]
    seen: dict[int, list[Tensor]] = {}
    for index, cnn in enumerate((fast, plain)):
        for block in cnn.block_list():
            block.register_forward_hook(lambda _, inputs, maps, to=index: seen.setdefault(to, []).append(maps.detach()))
    fast.train()(images, torch.Generator())
    plain.eval()(as_input(images))
    for maps, expected in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(maps, expected)


@pytest.mark.slow
def test_the_loops_are_compiled_once_and_not_in_each_process(tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import torch",
            "from pipeline.model.cnn import CNN, Architecture",
            "for filters in ((16, 8), (32, 64)):",
            "    cnn = CNN(Architecture((28, 28, 1), ('a', 'b'), filters), torch.Generator())",
            "    images, draws = torch.ones(2, 28, 28, 1, dtype=torch.uint8), torch.Generator()",
            "    cnn(images, draws).sum().backward()",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "NUMBA_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        kept.append({path: path.stat().st_ino for path in tmp_path.rglob("*.loop")})
    assert len(kept[0]) == 11
    assert kept[0] == kept[1]


@pytest.mark.parametrize("broken", ["blocks.0.convolution.weight", "blocks.1.convolution.bias", "dense.bias"])
def test_nan_and_infinite_weights_reach_the_logits(broken: str, digits: dict[str, LabelledImages]) -> None:
    cnn = trained_a_little(PUBLISHED).eval()
    with torch.no_grad():
        cnn.get_parameter(broken).view(-1)[0] = torch.nan
        assert cnn(digits["train"].images[:5]).isnan().any()


@pytest.mark.parametrize(
    ("architecture", "image", "maps"),
    [
        (PUBLISHED, (26, 26), [(12, 12), (5, 5)]),
        (replace(PUBLISHED, padding=1), (28, 28), [(14, 14), (7, 7)]),
        (replace(PUBLISHED, batch_norm=True), (28, 28), [(13, 13), (5, 5)]),
        (replace(PUBLISHED, kernel_size=4, stride=2), (26, 26), [(6, 6), (1, 1)]),
        (replace(PUBLISHED, image_shape=(31, 20, 1)), (30, 18), [(14, 8), (6, 3)]),
    ],
)
def test_only_pixels_that_cannot_reach_a_logit_are_skipped(
    architecture: Architecture, image: tuple[int, int], maps: list[tuple[int, int]]
) -> None:
    cnn = trained_a_little(architecture).double().eval()
    assert cnn.seen == image
    found = list[tuple[int, ...]]()
    for block in cnn.block_list():
        block.register_forward_hook(lambda _, inputs, output: found.append(tuple(output.shape[2:])))
    images = torch.rand(2, 1, *architecture.image_shape[:2], dtype=torch.float64, requires_grad=True)
    cnn(images).sum().backward()
    assert found == maps
    assert images.grad is not None
    seen = [int(images.grad.sum(dim=(0, 1, 3 - side)).nonzero().max()) + 1 for side in (0, 1)]
    if not architecture.batch_norm:
        assert all(0 <= most - side <= 1 for most, side in zip(image, seen, strict=True))  # a loser of a window is dark
