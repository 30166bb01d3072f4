"""The figures and tables of a report: readable and correct, for networks and images of many kinds."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pipeline import files
from pipeline.data.image_files import Preprocessing
from pipeline.data.splits import Dataset, LabelledImages
from pipeline.explain import report
from pipeline.explain.class_images import nearest_images
from pipeline.explain.report_inputs import ReportInputs
from pipeline.figures import canvas
from pipeline.model import metrics
from pipeline.model.cnn import CNN, Architecture
from pipeline.params import Params
from tests.layout import assert_readable

COLUMNS = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
HISTORY = [{"epoch": str(epoch)} | dict.fromkeys(COLUMNS, str(0.5 + epoch / 10)) for epoch in (1, 2)]
LONG = ("T-shirt/top", "automobile", "Ankle boot", "a class whose name is rather too long", "Pullover")


def untrained(architecture: Architecture, count: int, right: float, **params: object) -> ReportInputs:
    """An untrained network, images of noise, and labels; the network predicts a share ``right`` of them."""
    generator = torch.Generator().manual_seed(0)
    cnn = CNN(architecture, generator).eval()
    images = torch.randint(256, (count, *architecture.image_shape), dtype=torch.uint8, generator=generator)
    probabilities = metrics.predict_logits(cnn, images).softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    names = architecture.class_names
    labels = torch.where(torch.arange(count) < right * count, predicted, (predicted + 1) % len(names))
    rows = [
        {"actual": names[label], "predicted": names[guess], "confidence": f"{sure:.6f}"}
        for label, guess, sure in zip(labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    ]
    changes = {f"visualize.{name}": value for name, value in ({"maximisation.steps": 3} | params).items()}
    changed = Params().changed(changes)
    split = LabelledImages(images, labels)
    dataset = Dataset(
        "noise", "noise", "a test", names, Preprocessing("fit", architecture.image_shape), (0.5,), (0.3,), {}
    )
    bins = changed.evaluate.calibration_bins
    return ReportInputs(cnn, dataset, split, split, HISTORY, rows, changed.visualize, bins)


NETWORKS = {
    "long names, colour": lambda: untrained(Architecture((16, 12, 3), LONG, (4, 5)), 60, 0.5),
    "two hundred classes": lambda: untrained(
        Architecture((14, 14, 1), tuple(f"猫 ${number}$ {'long ' * (number % 9)}" for number in range(200)), (8,)),
        600,
        0.5,
    ),
    "no mistakes": lambda: untrained(Architecture((14, 14, 1), ("a", "b"), (3,)), 40, 1.0),
    "nothing but mistakes": lambda: untrained(Architecture((14, 14, 1), ("a", "b"), (3,)), 3, 0.0),
    "one feature": lambda: untrained(Architecture((8, 8, 1), ("a", "b"), (1,), pool_size=6), 40, 0.5),
    "four blocks": lambda: untrained(Architecture((16, 16, 3), LONG, (4, 20, 4, 4), padding=1), 40, 0.5),
    "residual": lambda: untrained(
        Architecture(
            (16, 16, 3),
            LONG,
            (4, 6, 8),
            convolutions=4,
            padding="same",
            batch_norm=True,
            residual=True,
            head="average",
            dense=5,
            normalize=True,
            mean=(0.5,) * 3,
            std=(0.3,) * 3,
        ),
        40,
        0.5,
    ),
    "no pooling": lambda: untrained(Architecture((12, 12, 1), ("a", "b"), (3, 3), pool_size=1), 40, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_figure_of_every_network_can_be_read(kind: str) -> None:
    inputs = NETWORKS[kind]()
    for name, draw in report.FIGURES.items():
        figure = draw(inputs)
        assert_readable(figure)
        with Image.open(io.BytesIO(canvas.as_png(figure))) as picture:
            assert picture.height < 2000, name
    assert all(rows(inputs) for rows in report.TABLES.values())


AUGMENTATIONS: dict[str, float] = {
    **{"shift": 2, "crop_padding": 2, "horizontal_flip": 0.5, "rotation": 30, "scale": 0.3, "shear": 20, "elastic": 4},
    **{"brightness": 0.5, "contrast": 0.5, "cutout": 6, "mixup": 1},
}


def augmented_images(kind: str, **strengths: float) -> Figure:
    recipe = {f"train.augmentation.{name}": strength for name, strength in strengths.items()}
    inputs = replace(NETWORKS[kind](), recipe=recipe)
    return report.figures_of(inputs)["augmented_images"](inputs)


@pytest.mark.parametrize("strengths", [AUGMENTATIONS, {"rotation": 30}, {"mixup": 1}], ids=len)
@pytest.mark.parametrize("kind", ["long names, colour", "two hundred classes", "nothing but mistakes"])
def test_augmented_images_are_beside_the_originals(kind: str, strengths: dict[str, float]) -> None:
    figure = augmented_images(kind, **strengths)
    assert_readable(figure)
    with Image.open(io.BytesIO(canvas.as_png(figure))) as picture:
        assert picture.height < 2000
    inputs = NETWORKS[kind]()
    originals = inputs.train.images[inputs.samples]
    rows = [axes for axes in figure.axes if axes.get_ylabel()]
    labels = [" ".join(axes.get_ylabel().split()) for axes in rows]
    each = [f"{name.replace('_', ' ')} {strength:g}" for name, strength in strengths.items()]
    expected = ["original", *(each if len(each) > 1 else ()), *["all together" if len(each) > 1 else each[0]] * 3]
    assert [re.sub(r" \(\d+% own\)", "", label) for label in labels] == expected
    shown = np.stack([np.atleast_3d(np.asarray(axes.images[0].get_array())) for axes in figure.axes])
    pictures = shown.reshape(len(rows), len(originals), *originals.shape[1:])
    assert np.array_equal(pictures[0], originals.numpy())
    for row in pictures[-3:]:
        assert not np.array_equal(row, pictures[0])


def test_no_augmentation_has_no_figure() -> None:
    inputs = NETWORKS["no pooling"]()
    assert report.figures_of(inputs) == report.FIGURES
    off = {f"train.augmentation.{name}": 0 for name in AUGMENTATIONS}
    assert report.figures_of(replace(inputs, recipe=off)) == report.FIGURES


def test_the_images_are_of_as_many_classes_as_possible() -> None:
    inputs = NETWORKS["two hundred classes"]()
    labels = torch.tensor([7, 7, 7, 2, 7, 2, 0, 7, 7, 7, 7, 7, 7])
    few = replace(inputs, train=LabelledImages(inputs.train.images[: len(labels)], labels))
    assert few.samples.tolist() == [6, 3, 0, 5, 1, 2, 4, 7]
    of_many = inputs.train.labels[inputs.samples]
    assert len(of_many) == len(set(of_many.tolist())) == 8


def test_the_captions_of_mistakes_and_doubtful_labels_are_correct() -> None:
    inputs = untrained(Architecture((14, 14, 1), tuple("abc"), (4,)), 200, 0.5)
    titles = {
        name: [axes.get_title() for axes in report.FIGURES[name](inputs).axes if axes.images]
        for name in ("confident_mistakes", "doubtful_labels")
    }
    assert len(titles["confident_mistakes"]) == 25
    for title in titles["confident_mistakes"] + titles["doubtful_labels"]:
        guess, label = title[0], title[-1]
        assert guess != label, title
    sure = [float(title.split("(")[1].split("%")[0]) for title in titles["confident_mistakes"]]
    wrong = [float(row["confidence"]) for row in inputs.predictions if row["actual"] != row["predicted"]]
    assert sure == pytest.approx([100 * each for each in sorted(wrong, reverse=True)[:25]], abs=0.06)


def test_the_tables_agree_with_the_predictions_and_the_metrics(finished: Path) -> None:
    def table(name: str) -> list[dict[str, str]]:
        with (files.PLOTS / f"{name}.csv").open(newline="") as rows:
            return list(csv.DictReader(rows))

    with files.PREDICTIONS.open(newline="") as rows:
        pairs = [(row["actual"], row["predicted"]) for row in csv.DictReader(rows)]
    metrics = json.loads(files.METRICS.read_text())["test"]
    for row in table("per_class"):
        hits = pairs.count((row["class"], row["class"]))
        for measure, count in (
            ("precision", sum(predicted == row["class"] for _, predicted in pairs)),
            ("recall", sum(actual == row["class"] for actual, _ in pairs)),
        ):
            assert float(row[measure]) == pytest.approx(hits / max(count, 1), abs=1e-6)
            assert float(row[f"{measure}_low"]) <= float(row[measure]) <= float(row[f"{measure}_high"])
    bins = table("reliability")
    assert sum(int(row["images"]) for row in bins) == len(pairs)
    right = sum(float(row["accuracy"]) * int(row["images"]) for row in bins)
    assert right / len(pairs) == pytest.approx(metrics["accuracy"], abs=1e-5)
    surplus = [abs(float(row["accuracy"]) - float(row["confidence"])) * int(row["images"]) for row in bins]
    assert sum(surplus) / len(pairs) == pytest.approx(metrics["ece"], abs=1e-5)
    assert float(table("accuracy_shift")[0]["accuracy"]) == pytest.approx(metrics["accuracy"])
    still, *moved = table("pooling_and_shifts")
    assert still.pop("pixels") == "0"
    assert all(float(similarity) == pytest.approx(1, abs=1e-5) for similarity in still.values())
    assert all(0 < float(row["first_convolution"]) < 1 for row in moved)


def test_the_nearest_image_does_not_depend_on_brightness_and_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, (12_000, 6, 5, 1), dtype=torch.uint8, generator=generator)
    chosen = torch.tensor([3, 11_999, 10_000])
    made = 0.3 + images[chosen].permute(0, 3, 1, 2) / 255 * 0.5
    assert nearest_images(made, images).tolist() == chosen.tolist()
    assert nearest_images(1 - made, images).tolist() != chosen.tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    {"steps": 4, "step_size": 0.3, "noise": 0.4, "l1": 3e3, "total_variation": 3e3, "jitter": 4, "seed": 1}.items(),
)
def test_every_parameter_of_the_ascent_changes_the_images(name: str, value: object) -> None:
    def images(**params: object) -> torch.Tensor:
        made = untrained(Architecture((14, 14, 1), tuple("ab"), (4,)), 20, 0.5, **params).class_images
        return made[-1].images

    assert not torch.equal(images(**{f"maximisation.{name}": value}), images())


@pytest.mark.parametrize(
    ("name", "value", "figure"), [("patches", 4, "strongest_patches"), ("occlusion_side", 2, "explanations")]
)
def test_the_other_parameters_change_their_figures(name: str, value: object, figure: str) -> None:
    def drawn(**params: object) -> bytes:
        inputs = untrained(Architecture((14, 14, 1), tuple("ab"), (4,)), 20, 0.5, **params)
        return canvas.as_png(report.FIGURES[figure](inputs))

    assert drawn(**{name: value}) != drawn()
