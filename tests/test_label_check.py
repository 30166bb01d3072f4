"""Labels that may be wrong: planted ones are found in a person's folder, with their file names."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import files, label_check, prepare
from pipeline.data import splitting
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError
from pipeline.explain import attribution, label_page
from tests.conftest import write_params

WRONG = 30


def _save(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[:, :, 0].numpy()).save(path)


@pytest.fixture
def mislabelled(
    workspace: Path, tmp_path: Path, digits: dict[str, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """A prepared folder of 1,500 real digits, some of them in the folder of another digit: the paths of these."""
    planted = set()
    train = digits["train"]
    for index in range(1500):
        label = int(train.labels[index])
        if index < WRONG:
            label = (label + 1 + index % 9) % 10
            planted.add(f"{label}/{index} <b>.png")
        _save(train.images[index], tmp_path / "own" / str(label) / f"{index} <b>.png")
    # With the seed by which these digits are training images, all of them would be so again.
    own = {"data.dataset": "folder", "data.path": str(tmp_path / "own"), "data.split_seed": 1}
    write_params(workspace, own | {"train.epochs": 5, "train.batch_size": 32})
    prepare.main()
    monkeypatch.setattr("sys.argv", ["label_check"])
    return planted


def test_wrong_labels_are_found_and_shown_with_their_files(mislabelled: set[str]) -> None:
    label_check.main()
    rows = files.read_table(files.LABEL_CHECK, made_by="label_check")
    in_train = {row["path"] for row in files.read_table(files.IMAGES, made_by="prepare") if row["split"] == "train"}
    assert {row["path"] for row in rows} == in_train
    doubtful = [row["path"] for row in rows if row["suggested"]]
    planted = mislabelled & in_train
    assert len(planted) > 15
    assert len(planted & set(doubtful)) >= 0.8 * len(planted)
    assert len(planted & set(doubtful[: len(planted)])) >= 0.6 * len(planted)  # the most doubtful first
    page = files.LABEL_PAGE.read_text()
    shown = [html.unescape(path) for path in re.findall(r'"path"><bdi>(.*?)</bdi>', page)]
    assert shown == doubtful
    assert page.count("data:image/png;base64,") == len(doubtful)


def test_an_older_table_of_pictures_is_refused(mislabelled: set[str]) -> None:
    rows = files.read_table(files.IMAGES, made_by="prepare")
    rows.remove(next(row for row in rows if row["split"] == "train"))
    files.write_table(files.IMAGES, rows)
    with pytest.raises(UserError, match=r"is not of the .* training images here: run `dvc repro -f prepare`"):
        label_check.main()


def test_more_folds_than_distinct_images_are_refused(
    workspace: Path, tmp_path: Path, digits: dict[str, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(60):
        _save(digits["train"].images[index], tmp_path / "own" / str(index % 2) / f"{index}.png")
    write_params(workspace, {"data.dataset": "folder", "data.path": str(tmp_path / "own"), "data.split_seed": 1})
    prepare.main()
    monkeypatch.setattr("sys.argv", ["label_check", "--folds", "60"])
    with pytest.raises(UserError, match=r"--folds is 60; allowed here: at most [345]\d, the training images"):
        label_check.main()


def test_folds_keep_units_together_and_spread_each_class() -> None:
    units = np.repeat(np.arange(60), 2)
    labels = np.repeat([0] * 40 + [1] * 15 + [2] * 5, 2)
    folds = splitting.folds(units, labels, 5, seed=1)
    assert all(len(set(folds[units == unit])) == 1 for unit in range(60))
    for label, count in ((0, 8), (1, 3), (2, 1)):
        assert [len(set(units[(folds == fold) & (labels == label)])) for fold in range(5)] == [count] * 5
    assert (splitting.folds(units, labels, 5, seed=1) == folds).all()
    assert (splitting.folds(units, labels, 5, seed=2) != folds).any()


def test_the_table_has_the_doubtful_first_and_the_page_any_name() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.99, 0.01]])
    labels = torch.tensor([0, 1, 1, 1])
    doubts = attribution.likely_label_errors(probabilities, labels)
    names = ("<i>", "\N{HEBREW LETTER ALEF}&")
    rows = label_page.rows(probabilities, labels, doubts, names, ["a", "b", "c", "d"])
    assert [row.path for row in rows] == ["d", "a", "b", "c"]
    assert rows[0] == label_page.Row(3, "d", names[1], "0.010000", names[0], "0.990000")
    assert rows[1].suggested == rows[1].suggested_probability == ""
    page = label_page.page("A title", ["a < b"], [(rows[0], np.full((3, 5, 3), 7, np.uint8))])
    assert "<i>" not in page
    assert html.unescape(page).count(names[1]) == 1
    assert "(1.0%)" in page
    assert "a &lt; b" in page
