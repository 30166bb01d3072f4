"""Stage visualize: which files it writes, and which it leaves alone."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure

from pipeline import files, visualize
from pipeline.explain import report
from pipeline.model import model_file


def trained_with(**strengths: float) -> None:
    """Put into the model file's recipe that the model was trained with these augmentations."""
    model = model_file.from_bytes(files.MODEL.read_bytes())
    recipe = dict(model.recipe) | {f"train.augmentation.{name}": strength for name, strength in strengths.items()}
    files.write(files.MODEL, model_file.to_bytes(replace(model, recipe=recipe)))


def test_augmented_images_are_shown_for_a_model_that_was_trained_with_them_and_no_other(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "FIGURES", {"shared_weights": report.FIGURES["shared_weights"]})
    monkeypatch.setattr(report, "TABLES", {})
    client = mlflow.MlflowClient()
    for strengths in ({"rotation": 20.0, "cutout": 6}, {"rotation": 0.0, "cutout": 0}):
        expected = {"shared_weights.png"} | ({"augmented_images.png"} if strengths["rotation"] else set())
        trained_with(**strengths)
        visualize.main()
        assert {path.name for path in files.FIGURES.glob("*.png")} == expected
        (run, *_) = client.search_runs(["1"], order_by=["attributes.start_time DESC"], max_results=1)
        assert {each.path for each in client.list_artifacts(run.info.run_id, "figures")} == {
            f"figures/{name}" for name in expected
        }


def test_only_figures_that_are_no_longer_made_are_removed(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ("learning_curves", "shared_weights")
    monkeypatch.setattr(
        report, "FIGURES", {name: report.FIGURES[name] for name in quick} | {"empty": lambda _: Figure()}
    )
    monkeypatch.setattr(report, "TABLES", {"shared_weights": report.TABLES["shared_weights"]})
    notes = [folder / name for folder in (files.FIGURES, files.PLOTS) for name in ("notes.txt", "my.csv")]
    for path in notes:
        path.write_text("mine")
    for folder in (files.FIGURES / ".ipynb_checkpoints", files.FIGURES / "folder.png"):
        folder.mkdir()
        (folder / "copy.png").write_bytes(b"mine")
    files.FIGURES.joinpath("mine.png").write_bytes(b"\x89PNG of a person")
    visualize.main()
    assert {path.name for path in files.FIGURES.glob("*.png")} == {
        "mine.png",
        "learning_curves.png",
        "shared_weights.png",
        "empty.png",
        "folder.png",
    }
    assert all(path.read_text() == "mine" for path in notes)
    assert (files.FIGURES / ".ipynb_checkpoints/copy.png").exists()
    assert (files.FIGURES / "folder.png/copy.png").exists()
