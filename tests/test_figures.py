"""Pictures: the same bytes each time, nothing of the machine in them, and the right content in the right place."""

import io
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline import figures

CLASSES = ("cat", "dog", "a rather long class name")
HISTORY: dict[str, list[float]] = {
    "epoch": [1, 2, 3],
    "train_loss": [0.9, 0.5, 0.4],
    "validation_loss": [0.8, 0.6, 0.5],
    "train_accuracy": [0.5, 0.7, 0.8],
    "validation_accuracy": [0.6, 0.7, 0.75],
}


def noise(*shape: int) -> figures.Array:
    return np.random.default_rng(0).normal(size=shape)


def every_figure() -> dict[str, Figure]:
    images = np.abs(noise(7, 28, 28, 1) * 80).clip(0, 255).astype(np.uint8)
    return {
        "curves": figures.learning_curves(HISTORY),
        "one epoch": figures.learning_curves({name: values[:1] for name, values in HISTORY.items()}),
        "confusion": figures.confusion_matrix(np.array([[9, 1, 0], [0, 8, 2], [0, 0, 10]]), CLASSES, "title"),
        "no mistakes": figures.confusion_matrix(np.diag([3, 4, 5]), CLASSES, "title"),
        "filters": figures.filters(noise(32, 1, 3, 3)),
        "colour filters": figures.filters(noise(10, 3, 5, 5)),
        "one filter": figures.filters(noise(1, 1, 3, 3)),
        "maps": figures.feature_maps(images[0], {"conv2d": noise(20, 26, 26), "max_pooling2d": noise(20, 13, 13)}, "x"),
        "mistakes": figures.mistakes(images, ["cat"] * 7, ["dog"] * 7, [0.9] * 7),
        "one mistake in colour": figures.mistakes(images[:1].repeat(3, axis=3), [CLASSES[2]], ["dog"], [0.5]),
        "study": figures.study_history([0, 1, 2, 3], [0.97, 0.98, 0.5, 0.975], [False, False, True, False]),
        "study of one trial": figures.study_history([0], [0.97], [False]),
        "front": figures.accuracy_against_size([100, 2000, 30000], [0.97, 0.98, 0.975]),
        "none": figures.mistakes(images[:0], [], [], []),
    }


@pytest.mark.parametrize("name", list(every_figure()))
def test_a_picture_is_as_wide_as_the_readme_and_always_the_same_bytes(name: str) -> None:
    content = figures.as_png(every_figure()[name])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.width == pytest.approx(figures.WIDTH * figures.DOTS_PER_INCH, abs=1)
        assert 100 < picture.height < 2000
        assert len(picture.convert("L").getcolors(256) or []) > 5  # something is drawn
    assert content == figures.as_png(every_figure()[name])


def test_nothing_of_the_machine_or_the_time_is_in_a_picture() -> None:
    content, kinds, place = figures.as_png(every_figure()["curves"]), set(), 8
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        kinds.add(kind.decode())
        place += 12 + length
    assert kinds <= {"IHDR", "pHYs", "IDAT", "IEND"}


def test_the_curves_are_those_of_the_history() -> None:
    loss, accuracy = every_figure()["curves"].axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in loss.lines}
    assert list(drawn.values()) == [HISTORY["train_loss"], HISTORY["validation_loss"]]
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "cross-entropy (nats)")
    assert (accuracy.get_xlabel(), accuracy.get_title()) == ("epoch", "Accuracy")


def test_the_confusion_matrix_shows_every_count_in_its_place_and_the_class_names() -> None:
    (axes,) = every_figure()["confusion"].axes
    counts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts[0, 0] == "9"
    assert counts[1, 2] == "2"
    assert counts[0, 2] == ""
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "actual class")


def test_filters_share_one_scale_that_is_white_at_zero() -> None:
    figure = every_figure()["filters"]
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert len(limits) == 1
    ((low, high),) = limits
    assert low == -high == -np.abs(noise(32, 1, 3, 3)).max()


def test_each_channel_of_a_colour_filter_is_a_tile_of_its_own() -> None:
    weights = noise(10, 3, 5, 5)
    tile = every_figure()["colour filters"].axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(tile), np.hstack([weights[0, 0], weights[0, 1], weights[0, 2]]))


def test_a_mosaic_puts_each_map_in_its_place() -> None:
    maps = noise(5, 3, 3)
    mosaic = figures._mosaic(maps, columns=2)
    assert mosaic.shape == (11, 7)
    assert np.array_equal(mosaic[4:7, 4:7], maps[3])
    assert np.isnan(mosaic[3]).all()
    assert np.isnan(mosaic[8:, 4:]).all()


def test_each_mistake_tells_what_was_predicted_and_what_it_really_is() -> None:
    titles = [axes.get_title() for axes in every_figure()["mistakes"].axes]
    assert titles[0] == "dog (90.0%), really cat"
    assert titles[7:] == ["", "", ""]


def test_the_history_of_a_study_has_the_best_so_far_and_every_trial() -> None:
    accuracies, pruned = [0.97, 0.1, 0.98, 0.975, 0.99], [False, True, False, False, True]
    (axes,) = figures.study_history([0, 1, 2, 3, 4], accuracies, pruned).axes
    drawn = {line.get_label(): tuple(np.asarray(line.get_data(), float).tolist()) for line in axes.lines}
    assert drawn["complete"] == ([0, 2, 3], [0.97, 0.98, 0.975])
    assert drawn["best so far"] == ([0, 2, 3, 4], [0.97, 0.98, 0.98, 0.98])  # a pruned one is never the best
    assert drawn["pruned, at its last epoch"] == ([4], [0.99])
    numbers, shown = drawn["lower than shown"]
    lowest, highest = axes.get_ylim()
    assert numbers == [1]
    assert lowest <= shown[0] < 0.97  # on the edge, not out of sight
    assert all(lowest <= each <= highest for _, points in drawn.values() for each in points)
