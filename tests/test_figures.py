"""Figures: the same bytes each time, nothing of the machine in them, and the right content in the right place."""

import io
import struct
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.figures import canvas, curves, network, scores, tiles
from pipeline.figures.network import Heatmap
from tests.layout import assert_readable

CLASSES = ("cat", "dog", "a rather long class name")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
VEHICLES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FORMULAS = (r"$\frac$", "a_b^c", "$$$$", r"5 \$ and $x^2$")
SURE = np.array([0.5, 0.9, 1.0])
HISTORY: dict[str, list[float]] = {
    "epoch": [1, 2, 3],
    "train_loss": [0.9, 0.5, 0.4],
    "validation_loss": [0.8, 0.6, 0.5],
    "train_accuracy": [0.5, 0.7, 0.8],
    "validation_accuracy": [0.6, 0.7, 0.75],
}


def noise(*shape: int) -> tiles.Array:
    return np.random.default_rng(0).normal(size=shape)


def drawings() -> dict[str, Callable[[], Figure]]:
    images = np.abs(noise(7, 28, 28, 1) * 80).clip(0, 255).astype(np.uint8)
    return {
        "curves": lambda: curves.learning_curves(HISTORY, dropout=True),
        "one epoch": lambda: curves.learning_curves(
            {name: values[:1] for name, values in HISTORY.items()}, dropout=False
        ),
        "confusion": lambda: scores.confusion_matrix(np.array([[9, 1, 0], [0, 8, 2], [0, 0, 10]]), CLASSES, "title"),
        "no mistakes": lambda: scores.confusion_matrix(np.diag([3, 4, 5]), CLASSES, "title"),
        "filters": lambda: network.filters(noise(32, 1, 3, 3), np.arange(32)),
        "colour filters": lambda: network.filters(noise(10, 3, 5, 5), -np.arange(10)),
        "one filter": lambda: network.filters(noise(1, 1, 3, 3), np.ones(1)),
        "maps": lambda: network.feature_maps(
            images[0], {"conv2d": noise(20, 26, 26), "max_pooling2d": noise(20, 13, 13)}, "x"
        ),
        "one map": lambda: network.feature_maps(images[0], {"conv2d": noise(1, 26, 26)}, "x"),
        "mistakes": lambda: scores.captioned(
            images, [f"dog (90.0%), labelled {name}" for name in FASHION[:7]], "title"
        ),
        "one mistake in colour": lambda: scores.captioned(
            images[:1].repeat(3, axis=3), ["dog (50.0%), labelled a rather long n…"], "title"
        ),
        "study": lambda: curves.study_history([0, 1, 2, 3], [0.97, 0.98, 0.5, 0.975], [False, False, True, False]),
        "study of one trial": lambda: curves.study_history([0], [0.97], [False]),
        "front": lambda: curves.accuracy_against_size([100, 2000, 30000], [0.97, 0.98, 0.975]),
        "maps of classes": lambda: network.maps_of_classes(
            images[:3],
            CLASSES,
            {"conv2d": np.abs(noise(3, 6, 26, 26)), "max_pooling2d": np.abs(noise(3, 6, 13, 13))},
            4,
        ),
        "maps of one block": lambda: maps_of_blocks(1),
        "maps of three blocks": lambda: maps_of_blocks(3),
        "maps of four blocks": lambda: maps_of_blocks(4),
        "maps of seven blocks": lambda: maps_of_blocks(7),
        "patches": lambda: network.strongest_patches(
            images[:5, None, :9, :9].repeat(9, axis=1), np.array([1, 1, 0, 1, 1]), "conv2d_1"
        ),
        "one patch": lambda: network.strongest_patches(images[:1, None, :9, :9], np.ones(1), "conv2d_1"),
        "filter images": lambda: network.filter_images(images[:3] / 255, np.array([1, -0.5, 2]), "conv2d"),
        "filter images in colour": lambda: network.filter_images(images.repeat(3, axis=3) / 255, np.ones(7), "conv2d"),
        "class images": lambda: network.class_images(
            {"none": images[:3] / 255, "smooth": images[:3] / 255}, {"none": SURE, "smooth": SURE}, CLASSES, CLASSES
        ),
        "class images of fashion": lambda: class_images_of(FASHION),
        "class images of vehicles": lambda: class_images_of(VEHICLES),
        "explanations": lambda: network.explanations(
            images[:3],
            CLASSES,
            {"saliency": Heatmap(np.abs(noise(3, 28, 28)), False), "occlusion": Heatmap(noise(3, 28, 28), True)},
            "title",
        ),
        "explanations of long names": lambda: network.explanations(
            np.repeat(images, 2, axis=0)[:8],
            [f"{name}, labelled {other}" for name, other in zip(FASHION[:8], reversed(VEHICLES[:8]), strict=True)],
            {"occlusion 6 x 6, random weights": Heatmap(np.abs(noise(8, 28, 28)), True)},
            "title",
        ),
        "nothing found": lambda: network.explanations(
            images[:1], ["cat"], {"Grad-CAM": Heatmap(np.zeros((1, 28, 28)), False)}, "title"
        ),
        "equivariance": lambda: network.equivariance(images[:3], np.abs(noise(3, 26, 26)), CLASSES, "title"),
        "parameter sharing": lambda: network.parameter_sharing(
            {"conv2d": (320, 17_000_000), "conv2d_1": (18_496, 42_000_000)}
        ),
        "per class": lambda: scores.per_class(
            {"precision": [(0.9, 0.8, 1.0)] * 3, "recall": [(0.0, 0.0, 1.0)] * 3}, CLASSES
        ),
        "reliability": lambda: scores.reliability([(0.4, 0.5, 0.2, 0.8, 3), (0.99, 0.98, 0.97, 0.99, 5000)], "title"),
        "reliability of few": lambda: scores.reliability([(0.6, 0.5, 0.3, 0.7, 20), (0.9, 1, 0.8, 1, 60)], "title"),
        "confusion of two hundred": lambda: scores.confusion_of_many(
            np.abs(noise(200, 200)), [(f"class {i} {FASHION[i % 10] * 3}", "Bag", 40 - i) for i in range(20)], "title"
        ),
        "two hundred without mistakes": lambda: scores.confusion_of_many(np.eye(200), [], "title"),
        "names like formulas": lambda: scores.confusion_matrix(np.eye(4), FORMULAS, "title"),
        "confusion of many": lambda: scores.confusion_matrix(
            np.full((30, 30), 1000), [f"class {i}" for i in range(30)], ""
        ),
        "robustness": lambda: scores.robustness(
            {name: [(0, 1.0), (1, 0.5)] for name in "abcd"}, dict.fromkeys("abcd", "pixels")
        ),
        "shifts": lambda: network.shift_similarity({"conv2d": [1, 0.5, 0.2], "max_pooling2d": [1, 0.7, 0.4]}),
        "shifts of 4 blocks": lambda: network.shift_similarity(
            {f"{kind}_{block}": [1, 0.5, 0.2, 0.1, 0] for block in range(4) for kind in ("conv2d", "max_pooling2d")}
        ),
        "components": lambda: scores.components(
            noise(30, 2), [0.3, 0.1], np.arange(30) % 2, np.arange(30) % 9 == 0, dict(enumerate(CLASSES))
        ),
        "components of digits": lambda: scores.components(
            noise(30, 2), [0.3, 0.1], np.arange(30) % 10, np.arange(30) % 9 == 0, dict(enumerate("0123456789"))
        ),
        "none": lambda: scores.captioned(images[:0], [], "No mistake in 7 test images"),
    }


def maps_of_blocks(blocks: int) -> Figure:
    layers = [f"{kind}_{block}" for block in range(blocks) for kind in ("conv2d", "max_pooling2d")]
    maps = {layer: np.abs(noise(10, 128, 9, 9)) for layer in layers}
    return network.maps_of_classes(np.abs(noise(10, 9, 9, 1) * 80), VEHICLES, maps, chosen=4)


def class_images_of(names: Sequence[str]) -> Figure:
    return network.class_images({"none": np.abs(noise(10, 28, 28, 1))}, {"none": np.ones(10)}, names, names)


def figure_of(name: str) -> Figure:
    return drawings()[name]()


LARGE = {  # two seconds each
    *("maps of one block", "maps of three blocks", "maps of four blocks", "maps of seven blocks"),
    *("filters", "colour filters", "confusion of many", "explanations of long names"),
}
each_drawing = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in drawings()]
)


@each_drawing
def test_a_picture_is_as_wide_as_the_readme_and_always_the_same_bytes(name: str) -> None:
    content = canvas.as_png(figure_of(name))
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.width == pytest.approx(canvas.WIDTH * canvas.DOTS_PER_INCH, abs=1)
        assert 100 < picture.height < 2000
    assert content == canvas.as_png(figure_of(name))


@each_drawing
def test_no_text_is_cut_off_or_overlaps_and_no_panel_is_empty(name: str) -> None:
    assert_readable(figure_of(name))


def test_nothing_of_the_machine_or_the_time_is_in_a_picture() -> None:
    content, texts, place = canvas.as_png(figure_of("curves")), [], 8
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        assert kind in (b"IHDR", b"pHYs", b"IDAT", b"IEND", b"tEXt")
        if kind == b"tEXt":
            texts.append(content[place + 8 : place + 8 + length])
        place += 12 + length
    assert texts == [b"Software\0convtrack"]


def test_the_curves_are_those_of_the_history() -> None:
    loss, accuracy = figure_of("curves").axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in loss.lines}
    assert list(drawn.values()) == [HISTORY["train_loss"], HISTORY["validation_loss"]]
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "loss (nats)")
    assert (accuracy.get_xlabel(), accuracy.get_title()) == ("epoch", "Accuracy")


def test_the_confusion_matrix_shows_every_count_in_its_place_and_the_class_names() -> None:
    (axes,) = figure_of("confusion").axes
    counts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts[0, 0] == "9"
    assert counts[1, 2] == "2"
    assert counts[0, 2] == ""
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "a rather long class…"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "actual class")


def test_names_are_no_formulas() -> None:
    (axes,) = figure_of("names like formulas").axes
    drawn = [label.get_text().replace(r"\$", "$") for label in axes.get_yticklabels()]
    assert drawn == list(FORMULAS)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Žluťoučký kůň", "Žluťoučký kůň"),
        ("שלום مرحبا", "שלום مرحبا"),
        ("猫 cat", r"7: \u732b cat"),
        ("हिन्दी", r"7: \u0939\u093f\u0928\u094d\u0926\u0940"),
        ("🦩", r"7: \U0001f9a9"),
    ],
)
def test_a_name_that_the_font_lacks_is_shown_with_the_number_of_its_class(name: str, shown: str) -> None:
    assert canvas.legible(name, 7) == shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.as_png(scores.confusion_matrix(np.eye(1), [canvas.legible(name, 7)], "title"))


def test_filters_share_one_scale_that_is_white_at_zero() -> None:
    figure = figure_of("filters")
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert len(limits) == 1
    ((low, high),) = limits
    assert low == -high == -np.abs(noise(32, 1, 3, 3)).max()


def test_each_channel_of_a_colour_filter_is_a_tile_of_its_own() -> None:
    weights = noise(10, 3, 5, 5)
    tile = figure_of("colour filters").axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(tile), np.hstack([weights[0, 0], weights[0, 1], weights[0, 2]]))


def test_a_mosaic_puts_each_map_in_its_place() -> None:
    maps = noise(5, 3, 3)
    mosaic = tiles.mosaic(maps, columns=2)
    assert mosaic.shape == (11, 7)
    assert np.array_equal(mosaic[4:7, 4:7], maps[3])
    assert np.isnan(mosaic[3]).all()
    assert np.isnan(mosaic[8:, 4:]).all()


def test_each_image_has_its_caption() -> None:
    titles = [axes.get_title() for axes in figure_of("mistakes").axes]
    assert titles[1] == "dog (90.0%), labelled\nTrouser"
    assert titles[7:] == ["", "", ""]


def test_the_number_of_a_filter_that_nothing_excites_is_in_brackets() -> None:
    def titles(name: str) -> list[str]:
        return [axes.get_title() for axes in figure_of(name).axes]

    assert titles("patches") == ["0", "1", "(2)", "3", "4"]
    assert titles("filter images") == ["0", "(1)", "2"]


def test_a_heatmap_of_zeros_is_labelled() -> None:
    assert [text.get_text() for text in figure_of("nothing found").axes[1].texts] == ["0 every-\nwhere"]
    assert not figure_of("explanations").axes[5].texts


def test_the_history_of_a_study_has_the_best_so_far_and_every_trial() -> None:
    accuracies, pruned = [0.97, 0.1, 0.98, 0.975, 0.99], [False, True, False, False, True]
    (axes,) = curves.study_history([0, 1, 2, 3, 4], accuracies, pruned).axes
    drawn = {line.get_label(): tuple(np.asarray(line.get_data(), float).tolist()) for line in axes.lines}
    assert drawn["complete"] == ([0, 2, 3], [0.97, 0.98, 0.975])
    assert drawn["best so far"] == ([0, 2, 3, 4], [0.97, 0.98, 0.98, 0.98])  # a pruned one is never the best
    assert drawn["pruned, at its last epoch"] == ([4], [0.99])
    numbers, shown = drawn["lower than shown"]
    lowest, highest = axes.get_ylim()
    assert numbers == [1]
    assert lowest <= shown[0] < 0.97  # on the edge, not out of sight
    assert all(lowest <= each <= highest for _, points in drawn.values() for each in points)


def test_the_legend_names_dropout_only_if_it_is_on() -> None:
    def legend(dropout: bool) -> list[str]:
        drawn = curves.learning_curves(HISTORY, dropout).axes[0].get_legend()
        return [text.get_text() for text in drawn.get_texts()] if drawn else []

    assert legend(True) == ["training (with dropout)", "validation (without)"]
    assert legend(False) == ["training", "validation"]


def test_the_most_used_filters_come_first() -> None:
    titles = [axes.get_title() for axes in figure_of("filters").axes if axes.images]
    assert titles == [str(number) for number in range(31, -1, -1)]


def test_evidence_against_a_class_is_drawn_around_white() -> None:
    axes = figure_of("explanations").axes
    drawn = {each.images[0].get_cmap().name: each.images[0].get_clim() for each in axes if each.images}
    assert set(drawn) == {"gray", "inferno", "RdBu_r"}
    assert drawn["RdBu_r"][0] == -drawn["RdBu_r"][1]
    assert drawn["inferno"][0] == 0
    colours = {each.images[0].get_cmap().name for each in figure_of("explanations of long names").axes}
    assert colours == {"gray", "RdBu_r"}  # also where no value happens to be negative
