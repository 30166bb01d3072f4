"""After `make repro` in ./convtrack: the metrics match the published network, and the model loads outside the clone."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file

CLONE = Path("convtrack").resolve()


def test_the_test_accuracy_is_that_of_the_published_network() -> None:
    """Above: something is wrong with the training. Below: the test images were seen, or too few were counted."""
    metrics = json.loads((CLONE / "reports/metrics.json").read_text())
    assert metrics["dataset"] == "mnist"
    assert metrics["parameters"] == 34826
    assert 0.985 <= metrics["test"]["accuracy"] <= 0.9995


def test_the_splits_are_the_published_ones_and_disjoint() -> None:
    splits = [
        load_file(CLONE / f"data/prepared/{name}.safetensors")["images"] for name in ("train", "validation", "test")
    ]
    assert [images.shape for images in splits] == [(count, 28, 28, 1) for count in (54_000, 6_000, 10_000)]
    train, validation, test = ({image.tobytes() for image in images} for images in splits)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_registered_model_loads_and_predicts_outside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(f"sqlite:///{CLONE / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/mnist-cnn@champion")
    for count in (1, 5, 300):
        probabilities = model.predict(np.zeros((count, 28, 28, 1), dtype=np.uint8))
        assert probabilities.shape == (count, 10)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(MlflowException, match=r"\(-1, 28, 28, 1\)"):
        model.predict(np.zeros((5, 32, 32, 1), dtype=np.uint8))
    assert not any(name.split(".")[0] == "pipeline" for name in sys.modules)


def test_the_champion_answers_the_test_images_as_the_predictions_say() -> None:
    images = load_file(CLONE / "data/prepared/test.safetensors")["images"]
    lines = (CLONE / "reports/predictions.csv").read_text().splitlines()[1:]
    mlflow.set_tracking_uri(f"sqlite:///{CLONE / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/mnist-cnn@champion")
    predicted = np.concatenate([model.predict(batch).argmax(axis=1) for batch in np.split(images, 10)])
    assert [line.split(",")[2] for line in lines] == [str(digit) for digit in predicted]


def test_digits_that_no_data_set_has_seen_come_out_right(tmp_path: Path) -> None:
    """In nine fonts and with pens of all widths; by the commands of the clone, as its user types them."""
    lines = predicted("tests.drawn", tmp_path)
    answers = [re.search(r"-(\d)\.png  (\d)  ", line) for line in lines]
    right = [answer for answer in answers if answer and answer[1] == answer[2]]
    assert len(answers) == 220
    assert len(right) >= 0.97 * len(answers)
    assert share_marked(lines) < 0.04


def predicted(made_by: str, folder: Path) -> list[str]:
    """What the clone's `predict` prints for the pictures that a module of its tests writes into a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    for module in (made_by, "pipeline.predict"):
        command = [sys.executable, "-m", module, str(folder)]
        done = subprocess.run(command, cwd=CLONE, env=environment, capture_output=True, text=True, check=False)
        refused = done.stderr.splitlines()[:-1]  # the last line counts them
        assert all(line.endswith("is blank") for line in refused), done.stderr
    return done.stdout.splitlines()


def share_marked(lines: list[str]) -> float:
    return sum(line.endswith("does not look like the training images") for line in lines) / len(lines)


def test_pictures_of_other_things_are_marked_and_test_images_are_not(tmp_path: Path) -> None:
    lines = predicted("tests.unlike", tmp_path)
    marked = {
        kind: share_marked([line for line in lines if f"/{kind}/" in line])
        for kind in ("noise", "photograph", "word", "two_digits", "three_digits")
    }
    assert marked["noise"] >= 0.75
    assert marked["photograph"] >= 0.65
    assert marked["word"] >= 0.9
    assert min(marked["two_digits"], marked["three_digits"]) >= 0.95
    assert json.loads((CLONE / "reports/metrics.json").read_text())["test"]["unlike_training"] < 0.015


def test_what_the_network_takes_for_a_class_looks_like_one() -> None:
    """Images made to excite a class are classified with confidence, smooth if asked for, and like real ones of it."""
    with (CLONE / "reports/plots/class_images.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 5 * 10
    assert all(float(row["probability"]) > 0.99 for row in rows)
    rough = [sum(float(row["total_variation"]) for row in rows[start : start + 10]) for start in range(0, 50, 10)]
    assert min(rough[:2]) > max(rough[2:])  # without a penalty on edges, and with one
    assert sum(row["nearest"] == row["class"] for row in rows[-10:]) >= 8
