"""Which figures and tables there are: the right facts, for networks and images of many kinds."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline import files
from pipeline.data.splits import Dataset, LabelledImages
from pipeline.explain import report
from pipeline.explain.report import ReportInputs
from pipeline.figures import canvas
from pipeline.model import metrics
from pipeline.model.cnn import CNN, Architecture
from pipeline.params import Params
from tests.layout import assert_readable

FIGURES = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
HISTORY = [{"epoch": str(epoch)} | dict.fromkeys(FIGURES, str(0.5 + epoch / 10)) for epoch in (1, 2)]
LONG = ("T-shirt/top", "automobile", "Ankle boot", "a class whose name is rather too long", "Pullover")


def inputs(architecture: Architecture, count: int, right: float, **knobs: object) -> ReportInputs:
    """An untrained network, images of noise, and labels of which so many are what the network says."""
    generator = torch.Generator().manual_seed(0)
    cnn = CNN(architecture, generator).eval()
    images = torch.randint(256, (count, *architecture.image_shape), dtype=torch.uint8, generator=generator)
    probabilities = metrics.predict_logits(cnn, images).softmax(dim=1)
    confidence, said = probabilities.max(dim=1)
    names = architecture.class_names
    labels = torch.where(torch.arange(count) < right * count, said, (said + 1) % len(names))
    rows = [
        {"actual": names[label], "predicted": names[guess], "confidence": f"{sure:.6f}"}
        for label, guess, sure in zip(labels.tolist(), said.tolist(), confidence.tolist(), strict=True)
    ]
    params = _params(**{"maximisation.steps": 3} | knobs)
    of = LabelledImages(images, labels)
    dataset = Dataset("noise", "noise", "a test", names, architecture.image_shape, (0.5,), (0.3,), {})
    return ReportInputs(cnn, dataset, of, of, HISTORY, rows, params.visualize, params.evaluate.calibration_bins)


def _params(**knobs: object) -> Params:
    return Params().changed({f"visualize.{knob}": value for knob, value in knobs.items()})


ODD = {
    "long names, colour": lambda: inputs(Architecture((16, 12, 3), LONG, (4, 5)), 60, 0.5),
    "forty classes": lambda: inputs(
        Architecture((14, 14, 1), tuple(f"class {number}" for number in range(40)), (8,)), 300, 0.5
    ),
    "no mistakes": lambda: inputs(Architecture((14, 14, 1), ("a", "b"), (3,)), 40, 1.0),
    "nothing but mistakes": lambda: inputs(Architecture((14, 14, 1), ("a", "b"), (3,)), 3, 0.0),
    "one feature": lambda: inputs(Architecture((8, 8, 1), ("a", "b"), (1,), pool_size=6), 40, 0.5),
    "four blocks": lambda: inputs(Architecture((16, 16, 3), LONG, (4, 20, 4, 4), padding=1), 40, 0.5),
    "no pooling": lambda: inputs(Architecture((12, 12, 1), ("a", "b"), (3, 3), pool_size=1), 40, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD)
def test_every_figure_of_every_network_can_be_read(kind: str) -> None:
    of = ODD[kind]()
    for name, figure in report.figures(of):
        assert_readable(figure)
        with Image.open(io.BytesIO(canvas.as_png(figure))) as picture:
            assert picture.height < 2000, name
    assert all(rows for rows in report.tables(of).values())


def test_what_is_told_of_mistakes_and_doubts_is_so() -> None:
    of = inputs(Architecture((14, 14, 1), tuple("abc"), (4,)), 200, 0.5)
    titles = {
        name: [axes.get_title() for axes in figure.axes if axes.images]
        for name, figure in report.figures(of)
        if name in ("confident_mistakes", "doubtful_labels")
    }
    assert len(titles["confident_mistakes"]) == 25
    for title in titles["confident_mistakes"] + titles["doubtful_labels"]:
        guess, label = title[0], title[-1]
        assert guess != label, title
    sure = [float(title.split("(")[1].split("%")[0]) for title in titles["confident_mistakes"]]
    wrong = [float(row["confidence"]) for row in of.predictions if row["actual"] != row["predicted"]]
    assert sure == pytest.approx([100 * each for each in sorted(wrong, reverse=True)[:25]], abs=0.06)


def test_the_tables_are_what_the_reports_say(finished: Path) -> None:
    def table(name: str) -> list[dict[str, str]]:
        with (files.PLOTS / f"{name}.csv").open(newline="") as rows:
            return list(csv.DictReader(rows))

    with files.PREDICTIONS.open(newline="") as rows:
        pairs = [(row["actual"], row["predicted"]) for row in csv.DictReader(rows)]
    metrics = json.loads(files.METRICS.read_text())["test"]
    for row in table("per_class"):
        hits = pairs.count((row["class"], row["class"]))
        for fact, of in (
            ("precision", sum(predicted == row["class"] for _, predicted in pairs)),
            ("recall", sum(actual == row["class"] for actual, _ in pairs)),
        ):
            assert float(row[fact]) == pytest.approx(hits / max(of, 1), abs=1e-6)
            assert float(row[f"{fact}_low"]) <= float(row[fact]) <= float(row[f"{fact}_high"])
    bins = table("reliability")
    assert sum(int(row["images"]) for row in bins) == len(pairs)
    right = sum(float(row["accuracy"]) * int(row["images"]) for row in bins)
    assert right / len(pairs) == pytest.approx(metrics["accuracy"], abs=1e-5)
    surplus = [abs(float(row["accuracy"]) - float(row["confidence"])) * int(row["images"]) for row in bins]
    assert sum(surplus) / len(pairs) == pytest.approx(metrics["ece"], abs=1e-5)
    assert float(table("accuracy_shift")[0]["accuracy"]) == pytest.approx(metrics["accuracy"])
    still, *moved = table("pooling_and_shifts")
    assert still.pop("pixels") == "0"
    assert all(float(alike) == pytest.approx(1, abs=1e-5) for alike in still.values())
    assert all(0 < float(row["first_convolution"]) < 1 for row in moved)


def test_the_nearest_image_is_the_one_with_the_same_shape_whatever_its_brightness_and_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, (12_000, 6, 5, 1), dtype=torch.uint8, generator=generator)
    chosen = torch.tensor([3, 11_999, 10_000])
    made = 0.3 + images[chosen].permute(0, 3, 1, 2) / 255 * 0.5
    assert report.nearest_images(made, images).tolist() == chosen.tolist()
    assert report.nearest_images(1 - made, images).tolist() != chosen.tolist()


@pytest.mark.parametrize(
    ("knob", "value"),
    {"steps": 4, "step_size": 0.3, "noise": 0.4, "l1": 3e3, "total_variation": 3e3, "jitter": 4, "seed": 1}.items(),
)
def test_every_knob_of_the_ascent_changes_the_images(knob: str, value: object) -> None:
    def images(**knobs: object) -> torch.Tensor:
        made = inputs(Architecture((14, 14, 1), tuple("ab"), (4,)), 20, 0.5, **knobs).class_images
        return made[-1].images

    assert not torch.equal(images(**{f"maximisation.{knob}": value}), images())


@pytest.mark.parametrize(
    ("knob", "value", "picture"), [("patches", 4, "strongest_patches"), ("occlusion_side", 2, "explanations")]
)
def test_the_other_knobs_change_their_pictures(knob: str, value: object, picture: str) -> None:
    def drawn(**knobs: object) -> bytes:
        of = inputs(Architecture((14, 14, 1), tuple("ab"), (4,)), 20, 0.5, **knobs)
        return canvas.as_png(dict(report.figures(of))[picture])

    assert drawn(**{knob: value}) != drawn()
