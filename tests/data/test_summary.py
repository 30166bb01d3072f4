"""What prepare writes about the images: the summary of the classes, the warnings, and a contact sheet per class."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import files, prepare
from pipeline.data import contact_sheets, sources
from pipeline.data.sources import DataSource, Source
from pipeline.data.splits import TRAIN, LabelledImages, read_dataset, read_split
from tests.conftest import write_params

CLASSES = ("a=b, c:d@e/f", "猫 🐈", "Žluťoučký kůň " + "x" * 100)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """180 pictures of noise of three classes, in a folder of files named by a table; the current folder is beside it.

    Those of the class 2 are wider than high.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number in range(180):
        width = 24 if number % 3 == 2 else 16
        image = random.integers(0, 256, (4, width // 4), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(image).save(folder / f"{number}.png")
        rows.append({"path": f"{number}.png", "label": CLASSES[number % 3]})
    files.write_table(folder / "labels.csv", rows)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_params(
        tmp_path,
        {"data.dataset": "folder", "data.path": "pictures", "data.labels": "labels.csv", "data.max_bad_fraction": 0.1},
    )
    return folder


def summary() -> dict[str, Any]:
    prepare.main()
    return files.read_json(files.SUMMARY, made_by="prepare")


def test_the_summary_counts_the_images_of_each_class_and_says_how_large_they_are(pictures: Path) -> None:
    Image.new("L", (60, 40)).resize((8, 8)).save(pictures / "4.png")
    (pictures / "1.png").write_bytes(b"no picture")
    found = {facts["class"]: facts for facts in summary()["classes"]}
    dataset = read_dataset()
    assert tuple(found) == dataset.class_names == tuple(sorted(CLASSES))
    for name, facts in found.items():
        assert [facts[split] for split in dataset.splits] == [each.per_class[name] for each in dataset.splits.values()]
    assert [found[name]["unreadable"] for name in CLASSES] == [0, 1, 0]
    assert [found[CLASSES[1]][size] for size in ("smallest", "median", "largest")] == [[8, 8], [16, 16], [16, 16]]
    assert [found[CLASSES[2]][size] for size in ("smallest", "median", "largest")] == [[24, 16]] * 3


def test_blank_and_unreadable_pictures_are_named_whatever_fills_the_image_beside_them(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (24, 16), 7).save(pictures / "2.png")  # the image is white above and below it
    Image.new("L", (16, 16), 99).save(pictures / "0.png")
    (pictures / "1.png").write_bytes(b"no picture")
    warnings = summary()["warnings"]
    assert "1 picture cannot be read, such as 1.png" in warnings
    (blank,) = (line for line in warnings if "blank" in line)
    assert blank.startswith("blank, one value everywhere: 2 pictures, such as ")
    assert set(blank.split("such as ")[1].split(", ")) == {"0.png", "2.png"}
    assert blank in capsys.readouterr().err


def test_a_class_has_a_contact_sheet_whatever_its_name_and_its_images_are_on_it(pictures: Path) -> None:
    names = [facts["contact_sheet"] for facts in summary()["classes"]]
    assert names == [path.name for path in sorted(files.CONTACT_SHEETS.iterdir())]
    assert names == ["00-a-b-c-d-e-f.png", f"01-zlutoucky-kun-{'x' * 26}.png", "02-class.png"]
    train = read_split(read_dataset(), TRAIN)
    first = int((train.labels == 0).nonzero()[0])
    side = 16 * (contact_sheets.SIDE // 16)
    left, top = contact_sheets.GAP, contact_sheets.TEXT + 2 * contact_sheets.GAP
    with Image.open(files.CONTACT_SHEETS / names[0]) as sheet:
        shown = np.asarray(sheet.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.NEAREST))
    assert np.array_equal(shown, train.images[first, :, :, 0].numpy())


def test_a_stray_file_and_another_name_change_nothing_and_sheets_of_older_classes_go(pictures: Path) -> None:
    summary()
    kept = files.CONTACT_SHEETS / "mine.png"
    Image.new("L", (8, 8)).save(kept)
    before = {path: path.read_bytes() for path in (files.SUMMARY, *files.CONTACT_SHEETS.iterdir())}
    (pictures / ".DS_Store").write_bytes(b"junk")
    (pictures / "notes").mkdir()
    (pictures / "notes/notes.txt").write_text("mine")
    rows = files.read_table(pictures / "labels.csv", made_by="hand")
    shutil.move(pictures / "0.png", pictures / "renamed.png")
    files.write_table(pictures / "labels.csv", [{**rows[0], "path": "renamed.png"}, *rows[1:]])
    summary()
    assert {path: path.read_bytes() for path in before} == before
    joined = {CLASSES[1]: CLASSES[0]}
    files.write_table(
        pictures / "labels.csv",
        [row | {"label": joined.get(row["label"], row["label"])} for row in rows if row["path"] != "0.png"],
    )
    assert len(summary()["classes"]) == 2
    assert len(list(files.CONTACT_SHEETS.iterdir())) == 3
    assert kept.exists()


def test_a_published_data_set_has_both_and_no_table_of_pictures(pictures: Path) -> None:
    summary()
    assert files.IMAGES.exists()
    write_params(Path(), {"data.dataset": "mnist-5k"})
    found = summary()
    assert found["warnings"] == []
    assert [facts["largest"] for facts in found["classes"]] == [[28, 28]] * 10
    assert sum(facts["train"] for facts in found["classes"]) == read_dataset().splits[TRAIN].count
    assert len(list(files.CONTACT_SHEETS.iterdir())) == 10
    assert not files.IMAGES.exists()


def test_labels_that_differ_between_copies_are_reported_once_whatever_the_data_set(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pictures / "0.png", pictures / "1.png")
    own = [line for line in summary()["warnings"] if "copies" in line]
    assert len(own) == 2  # that there are copies, and that their labels differ
    printed = capsys.readouterr().err
    assert [printed.count(line) for line in own] == [1, 1]

    by_turns = torch.arange(5000).reshape(10, 500).T.flatten()  # 0, 1, ... 9, 0, 1 ...
    digits = sources.DATASETS["mnist-5k"].load().train[by_turns]
    test = LabelledImages(digits.images[-600:], digits.labels[-600:].clone())
    test.labels[-1] = 0
    source = Source("a test", tuple("0123456789"), digits, test)
    monkeypatch.setitem(sources.DATASETS, "mnist-5k", DataSource(lambda: source))
    write_params(Path(), {"data.dataset": "mnist-5k"})
    assert summary()["warnings"][-1] == "copies of 1 image have different labels"
    assert capsys.readouterr().err.endswith("warning: mnist-5k: copies of 1 image have different labels\n")


@pytest.mark.parametrize(("classes", "each"), [(2, 100), (37, 100), (200, 20), (10_000, 10)])
def test_many_classes_have_fewer_images_on_each_sheet(classes: int, each: int) -> None:
    assert contact_sheets.most_images(classes) == each


@pytest.mark.parametrize("shape", [(16, 16, 3), (256, 256, 3), (256, 8, 1), (28, 28, 1)])
def test_a_sheet_has_images_of_a_size_that_can_be_looked_at(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    sheet = contact_sheets.draw(images, list(range(54_000, 54_012)), "title")
    assert sheet.mode == ("L" if shape[2] == 1 else "RGB")
    assert 400 <= sheet.width <= 1010
    assert 150 <= sheet.height <= 250
