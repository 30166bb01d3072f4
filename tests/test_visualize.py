"""Stage visualize: which files it writes, and which it leaves alone."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline import files, visualize
from pipeline.explain import report


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
