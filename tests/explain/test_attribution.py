"""What the network looks for and where it finds it: against captum, finite differences and networks made by hand."""

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from pipeline.data.splits import LabelledImages
from pipeline.explain import attribution
from pipeline.explain.attribution import feature_maps, first_filters, most_confident_mistakes
from pipeline.model.cnn import CNN, Architecture, as_input
from pipeline.model.metrics import predict_logits

MEAN, STD = (0.5, 0.4, 0.6), (0.3, 0.2, 0.1)
SHAPES = [
    Architecture((28, 28, 1), tuple("0123456789"), (8, 16)),
    Architecture((20, 24, 3), tuple("abc"), (6, 7, 8), padding=1, pool="mean"),
    Architecture((28, 28, 1), tuple("ab"), (5,), kernel_size=5, stride=2, pool="min", batch_norm=True),
    Architecture((24, 20, 3), tuple("abc"), (6, 8), convolutions=2, dense=10, normalize=True, mean=MEAN, std=STD),
    Architecture(
        (24, 20, 3), tuple("ab"), (4, 6), convolutions=2, padding="same", residual=True, batch_norm=True, head="average"
    ),
]
NAMES = ["published", "colour, mean", "min, batch norm", "dense, normalised", "residual"]
every_shape = pytest.mark.parametrize("architecture", SHAPES, ids=NAMES)


def network(architecture: Architecture) -> CNN:
    return CNN(architecture, torch.Generator().manual_seed(0)).eval()


def noise(architecture: Architecture, count: int = 5) -> Tensor:
    return torch.rand(count, architecture.image_shape[2], *architecture.image_shape[:2], generator=seed(1))


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def classes(architecture: Architecture, count: int = 5) -> Tensor:
    return torch.arange(count) % len(architecture.class_names)


def test_feature_maps_are_what_the_layers_compute() -> None:
    cnn = network(SHAPES[0])
    images = torch.randint(256, (3, 28, 28, 1), dtype=torch.uint8, generator=seed(1))
    found = feature_maps(cnn, images)
    assert [(layer, tuple(maps.shape)) for layer, maps in found] == [
        ("conv2d", (3, 8, 26, 26)),
        ("max_pooling2d", (3, 8, 13, 13)),
        ("conv2d_1", (3, 16, 11, 11)),
        ("max_pooling2d_1", (3, 16, 5, 5)),
    ]
    torch.testing.assert_close(found[-1].maps, cnn.blocks(as_input(images)).detach())
    assert torch.equal(first_filters(cnn), cnn.block_list()[0].convolution.weight)


def test_feature_maps_are_named_after_the_last_layer_before_the_pooling() -> None:
    cnn = network(SHAPES[2])
    images = torch.randint(256, (3, 28, 28, 1), dtype=torch.uint8, generator=seed(1))
    assert [layer for layer, _ in feature_maps(cnn, images)] == ["batch_norm", "min_pooling2d"]


def test_feature_maps_of_residual_blocks_are_those_after_the_sum() -> None:
    cnn, images = network(SHAPES[4]), torch.randint(256, (3, 24, 20, 3), dtype=torch.uint8, generator=seed(1))
    found = feature_maps(cnn, images)
    assert [layer for layer, _ in found] == ["add", "max_pooling2d", "add_1", "max_pooling2d_1"]
    assert torch.equal(found[-1].maps, cnn.maps(images))


def test_the_first_filters_are_those_of_the_first_of_several_convolutions() -> None:
    for architecture in SHAPES[3:]:
        cnn, images = network(architecture), torch.randint(256, (9, 24, 20, 3), dtype=torch.uint8, generator=seed(1))
        first = next(layer for layer in cnn.modules() if isinstance(layer, nn.Conv2d))
        assert torch.equal(first_filters(cnn), first.weight)
        seen = list[Tensor]()
        first.register_forward_hook(lambda _, inputs, maps, seen=seen: seen.append(maps))
        cnn(torch.cat([torch.zeros_like(images[:1]), images]))
        black, *others = seen[0].relu()
        use = (torch.stack(others) - black).abs().double().mean(dim=(0, 2, 3))
        torch.testing.assert_close(attribution.use_of_first_filters(cnn, images).float(), use.float())


@torch.no_grad()
def test_filter_use_is_the_change_of_its_pooled_maps() -> None:
    cnn = network(SHAPES[0])
    first = cnn.block_list()[0]
    first.convolution.weight[3] = 0.0
    first.convolution.get_parameter("bias")[3] = 100.0  # it answers, but to all images alike
    images = torch.randint(256, (600, 28, 28, 1), dtype=torch.uint8, generator=seed(1))
    use = attribution.use_of_first_filters(cnn, images)
    expected = (first(as_input(images)) - first(torch.zeros(1, 1, 28, 28))).abs().double().mean(dim=(0, 2, 3))
    torch.testing.assert_close(use, expected)
    assert use[3] == 0
    assert use.max() > 0.01


@every_shape
def test_saliency_is_that_of_captum(architecture: Architecture) -> None:
    cnn, images, of = network(architecture), noise(architecture), classes(architecture)
    theirs = captum.attr.Saliency(cnn).attribute(images.clone().requires_grad_(), target=of)
    torch.testing.assert_close(attribution.saliency(cnn, images, of), theirs.amax(dim=1), rtol=0, atol=1e-6)
    assert theirs.max() > 1e-3


def test_saliency_is_what_a_small_change_of_a_pixel_does() -> None:
    cnn, images, of = network(SHAPES[0]).double(), noise(SHAPES[0]).double(), classes(SHAPES[0])
    found, change = attribution.saliency(cnn, images, of), 1e-6
    for row, column in ((3, 4), (14, 14), (20, 9)):
        more, less = images.clone(), images.clone()
        more[:, :, row, column] += change
        less[:, :, row, column] -= change
        slope = (cnn(more) - cnn(less)).gather(1, of[:, None])[:, 0] / (2 * change)
        torch.testing.assert_close(found[:, row, column], slope.abs().detach(), rtol=1e-4, atol=1e-8)


@every_shape
def test_occlusion_is_that_of_captum(architecture: Architecture) -> None:
    cnn, images, of = network(architecture), noise(architecture), classes(architecture)
    window = (architecture.image_shape[2], 6, 6)
    theirs = captum.attr.Occlusion(cnn).attribute(images, window, target=of, baselines=0)
    torch.testing.assert_close(attribution.occlusion(cnn, images, of, 6), theirs[:, 0], rtol=0, atol=1e-4)
    assert theirs.abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(100, 90, 1), (8, 120, 1), (256, 256, 3)])
def test_occlusion_of_large_images_covers_every_pixel_with_few_squares(shape: tuple[int, int, int]) -> None:
    cnn = CNN(Architecture(shape, ("a", "b"), (2,), stride=4), torch.Generator().manual_seed(0)).eval()
    squares = 0

    def count(*_: object) -> None:
        nonlocal squares
        squares += 1

    cnn.register_forward_hook(count)
    image = torch.rand((1, shape[2], *shape[:2]), generator=torch.Generator().manual_seed(0))
    found = attribution.occlusion(cnn, image, torch.tensor([1]), 6)
    assert found.shape == (1, *shape[:2])
    assert found.isfinite().all()
    assert 30 < squares <= 41**2 + 1


@every_shape
def test_grad_cam_is_that_of_captum(architecture: Architecture) -> None:
    cnn, images, of = network(architecture), noise(architecture), classes(architecture)
    cnn.seen = architecture.image_shape[:2]  # captum stretches the maps of what the forward pass looks at
    before_activation = "residual" if architecture.residual else "normalisation"
    layer = cnn.block_list()[-1].get_submodule(before_activation if architecture.batch_norm else "convolution")
    theirs = captum.attr.LayerGradCam(cnn, layer).attribute(images, target=of, relu_attributions=True)
    stretched = captum.attr.LayerAttribution.interpolate(theirs, images.shape[2:], "bilinear")
    found = attribution.grad_cam(cnn, images, of)
    torch.testing.assert_close(found, stretched[:, 0].detach(), rtol=1e-4, atol=float(stretched.max()) * 1e-5)
    assert (stretched.flatten(1).amax(dim=1) > 0).sum() >= 3


def test_grad_cam_changes_when_the_weights_are_random(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    """An explanation that an untrained network gives too explains the image, not what was learned."""
    test = digits["test"][:200]
    images = as_input(test.images)
    heat = attribution.grad_cam(learned, images, test.labels).flatten(1)
    other = attribution.grad_cam(attribution.with_random_weights(learned), images, test.labels).flatten(1)
    alike = torch.cosine_similarity(heat - heat.mean(1, keepdim=True), other - other.mean(1, keepdim=True))
    assert alike.mean() < 0.5


@every_shape
def test_the_receptive_field_contains_the_pixels_that_change_the_output(architecture: Architecture) -> None:
    cnn = network(architecture)
    field = attribution.receptive_field(cnn)
    images = noise(architecture, 1).requires_grad_()
    last = cnn.block_list()[-1]
    maps = last.before("activation", cnn.blocks[:-1](images))
    row, column = maps.shape[2] // 2, maps.shape[3] // 2
    (gradient,) = torch.autograd.grad(maps[0, :, row, column].abs().sum(), images)
    seen = gradient.abs().sum(dim=(0, 1)).nonzero()
    for axis, at in ((0, row), (1, column)):
        low = field.first + at * field.step
        assert low <= seen[:, axis].min()
        assert seen[:, axis].max() < low + field.side
        # With max pooling the outermost pixels may have lost; with the mean none is left out.
        if architecture.pool == "mean" or len(architecture.filters) == 1:
            assert (int(seen[:, axis].min()), int(seen[:, axis].max())) == (low, low + field.side - 1)


@every_shape
def test_the_strongest_patches_give_the_strongest_answers(architecture: Architecture) -> None:
    cnn = network(architecture)
    height, width, channels = architecture.image_shape
    images = torch.randint(256, (300, height, width, channels), dtype=torch.uint8, generator=seed(2))
    patches, answers = attribution.strongest_patches(cnn, images, 3)
    side = attribution.receptive_field(cnn).side
    assert patches.shape == (architecture.filters[-1], 3, side, side, channels)
    last = cnn.block_list()[-1]
    maps = last.before("activation", cnn.blocks[:-1](as_input(images))).detach()
    strongest, place = maps.flatten(2).max(dim=2)
    torch.testing.assert_close(answers, strongest.amax(dim=0))
    for filter in range(architecture.filters[-1]):
        image = int(strongest[:, filter].argmax())
        field = attribution.receptive_field(cnn)
        top, left = (field.first + field.step * at for at in divmod(int(place[image, filter]), maps.shape[3]))
        inside = images[image, max(top, 0) : top + side, max(left, 0) : left + side]
        found = patches[filter, 0, max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]
        assert torch.equal(found, inside)


def test_what_sees_more_than_the_image_is_excited_by_the_whole_image() -> None:
    architecture = Architecture((12, 40, 1), tuple("ab"), (2, 3, 3), padding="same", convolutions=2)
    cnn, images = network(architecture), torch.randint(256, (9, 12, 40, 1), dtype=torch.uint8, generator=seed(2))
    side = attribution.receptive_field(cnn).side
    assert 12 < side <= 40
    patches = attribution.strongest_patches(cnn, images, 4).patches
    assert patches.shape == (3, 4, 12, side, 1)
    last = cnn.block_list()[-1].before("activation", cnn.blocks[:-1](as_input(images))).flatten(2)
    for filter, found in enumerate(patches):
        strongest = images[int(last[:, filter].amax(dim=1).argmax())]
        windows = strongest.squeeze(2).unfold(1, 8, 1).permute(1, 0, 2)  # all parts of 12 x 8 pixels
        middle = found[0, :, side // 2 - 4 : side // 2 + 4, 0]
        assert (windows == middle).all(dim=(1, 2)).any() or not middle.all(dim=0).all()


def test_pooled_maps_change_less_when_the_image_moves(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    alike = attribution.shift_similarity(learned, digits["test"].images[:200], shifts=3)
    assert list(alike) == ["conv2d", "max_pooling2d", "conv2d_1", "max_pooling2d_1"]
    for layer, values in alike.items():
        assert values[0] == pytest.approx(1, abs=1e-6)
        assert values == sorted(values, reverse=True), layer
    assert alike["max_pooling2d"][1] > alike["conv2d"][1]
    assert alike["max_pooling2d_1"][1] > alike["conv2d_1"][1]


def test_features_are_what_the_dense_layer_sees(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    images = digits["test"].images[:600]
    features = attribution.penultimate_features(learned, images)
    torch.testing.assert_close(features, learned.features(learned.blocks(as_input(images))).detach())


def test_principal_components_match_the_full_svd() -> None:
    stretch = torch.tensor([9.0, 5.0, 1.0, 0.5, 0.1])
    turn, _ = torch.linalg.qr(torch.randn(40, 5, generator=seed(3)))
    features = (torch.randn(500, 5, generator=seed(4)) * stretch) @ turn.T + 7
    points, shares = attribution.principal_components(features, 2)
    centred = features - features.mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(points.abs(), (left * values)[:, :2].abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shares, (values**2 / (values**2).sum())[:2], rtol=1e-3, atol=1e-4)
    again, _ = attribution.principal_components(features, 2)
    assert torch.equal(points, again)


def test_a_network_with_one_feature_has_a_second_direction_without_variance() -> None:
    points, shares = attribution.principal_components(torch.randn(20, 1, generator=seed(5)), 2)
    assert points.shape == (20, 2)
    assert not points[:, 1].any()
    assert shares.tolist() == [pytest.approx(1), 0]


def test_a_convolution_shares_its_weights() -> None:
    counts = attribution.parameters_of_convolutions(Architecture((28, 28, 1), tuple("0123456789"), (32, 64)))
    assert counts == {
        "conv2d": (320, (28 * 28 + 1) * 26 * 26 * 32),
        "conv2d_1": (18_496, (13 * 13 * 32 + 1) * 11 * 11 * 64),
    }


def test_a_shortcut_is_a_convolution_of_the_block_s_input() -> None:
    counts = attribution.parameters_of_convolutions(SHAPES[4])
    assert len(counts) == 6
    assert counts["conv2d_2"] == (3 * 4 + 4, (24 * 20 * 3 + 1) * 24 * 20 * 4)
    assert counts["conv2d_5"] == (4 * 6 + 6, (12 * 10 * 4 + 1) * 12 * 10 * 6)


def test_the_most_confident_mistakes_come_first() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    predicted = torch.tensor([0, 0, 0, 0, 4])
    confidence = torch.tensor([1.0, 0.5, 0.9, 0.7, 1.0])
    assert most_confident_mistakes(labels, predicted, confidence, 2).tolist() == [2, 3]
    assert most_confident_mistakes(labels, predicted, confidence, 10).tolist() == [2, 3, 1]
    assert most_confident_mistakes(labels, labels, confidence, 10).tolist() == []


def test_wrong_labels_are_flagged(learned: CNN, digits: dict[str, LabelledImages]) -> None:
    test = digits["test"]
    probabilities = predict_logits(learned, test.images).softmax(dim=1)
    before = set(attribution.likely_label_errors(probabilities, test.labels).images.tolist())
    labels, wrong = test.labels.clone(), list(range(0, len(test), 50))
    labels[wrong] = (labels[wrong] + 1) % 10
    doubts = attribution.likely_label_errors(probabilities, labels)
    assert (doubts.classes != labels[doubts.images]).all()
    guessed = dict(zip(*(each.tolist() for each in doubts), strict=True))
    assert all(guessed[index] == test.labels[index] for index in set(wrong) & set(guessed) - before)
    doubted = doubts.images.tolist()
    assert len(set(wrong) & set(doubted)) >= 15
    assert len(set(doubted) - set(wrong) - before) <= 5
    assert len(set(wrong) & set(doubted[:20])) >= 12  # the most doubtful first
