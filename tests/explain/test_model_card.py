"""The model card of data sets with few and with many classes."""

from typing import Any

import pytest
import torch

from pipeline.data.image_files import Preprocessing
from pipeline.data.splits import SPLITS, Dataset, SplitFacts
from pipeline.explain.model_card import model_card
from pipeline.model.cnn import CNN, Architecture
from pipeline.model.metrics import BESIDE_ACCURACY
from pipeline.model.model_file import TrainedModel


def card(count_of_classes: int, **changed: Any) -> str:
    """Of a data set whose class number n has 3 x (n + 10) images and the recall n / 1000."""
    names = tuple(f"class *{number}*" for number in range(count_of_classes))
    counts = {name: number + 10 for number, name in enumerate(names)}
    splits = {split: SplitFacts(sum(counts.values()), counts, "0" * 64) for split in SPLITS}
    dataset = Dataset("d", "d", "s", names, Preprocessing("fit", (8, 8, 3)), (0.5,) * 3, (0.5,) * 3, splits)
    summary = {
        "classes": [
            {"class": name, **dict.fromkeys(SPLITS, count), "unreadable": 0, "smallest": [8, 8], "largest": [8, 8]}
            for name, count in counts.items()
        ],
        "warnings": [],
    }
    scores = {name: {"recall": number / 1000} for number, name in enumerate(names)}
    test = {"accuracy": 0.5, "error_count": 1, "loss": 1.0, "ece": 0.1, "robustness": {}, "per_class": scores}
    test |= dict.fromkeys(BESIDE_ACCURACY, 0.5)
    cnn = CNN(Architecture((8, 8, 3), names, (2,)), torch.Generator().manual_seed(0))
    return model_card(dataset, summary | changed, TrainedModel(cnn), {"test": test}, {})


def test_few_classes_are_all_in_the_table_with_their_images() -> None:
    found = card(3)
    assert "| number | class | train | validation | test |" in found
    assert r"| 2 | class \*2\* | 12 | 12 | 12 |" in found
    assert "What may be wrong" not in found


@pytest.mark.parametrize("classes", [37, 200])
def test_of_many_classes_the_largest_the_smallest_and_the_worst_are_shown(classes: int) -> None:
    found = card(classes)
    assert rf"| {classes - 1} | class \*{classes - 1}\* | {classes + 9} |" in found
    assert r"| 0 | class \*0\* | 10 |" in found
    assert rf"| {classes // 2} | class" not in found
    assert f"The other {classes - 10} have 45 to {3 * (classes + 4)} each" in found
    assert rf"class \*19\* and {classes - 20} more" in found
    assert f"The recall of the other {classes - 20} is at least 2.00%" in found
    assert len(found) < 5000  # what the databases of MLflow take


def test_warnings_and_sizes_are_shown_where_there_are_any() -> None:
    other = {
        "class": "a",
        "train": 1,
        "validation": 1,
        "test": 1,
        "unreadable": 2,
        "smallest": [8, 8],
        "largest": [9, 7],
    }
    found = card(3, warnings=["blank: 1 picture, such as a|b.png"], classes=[other])
    assert "| number | class | train | validation | test | unreadable | smallest | largest |" in found
    assert "| 0 | a | 1 | 1 | 1 | 2 | 8 x 8 | 9 x 7 |" in found
    assert r"- blank: 1 picture, such as a\|b.png" in found
