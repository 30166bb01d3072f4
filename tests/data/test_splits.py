"""The prepared splits: their sizes, that they are disjoint, that damage is noticed."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.data import splits
from pipeline.data.image_files import Preprocessing
from pipeline.data.splits import LabelledImages
from pipeline.errors import Fault, UserError


def cut(train: LabelledImages, test: LabelledImages | None = None) -> dict[str, LabelledImages]:
    """A tenth for validation; without test images, the last fifth is for testing."""
    if test is None:
        train, test = train[: len(train) * 4 // 5], train[len(train) * 4 // 5 :]
    return splits.cut(train, test, validation_fraction=0.1)


def numbered(count: int) -> LabelledImages:
    """Images whose first pixels encode their number."""
    images = torch.zeros(count, 2, 2, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    images[:, 0, 1, 0] = torch.arange(count) // 256
    return LabelledImages(images, torch.arange(count) % 3)


def numbers(split: LabelledImages) -> list[int]:
    return (split.images[:, 0, 0, 0].long() + 256 * split.images[:, 0, 1, 0].long()).tolist()


def fingerprints(split: LabelledImages) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images}


def test_validation_is_the_last_part_of_the_published_training_images() -> None:
    made = cut(numbered(60_000), numbered(10_000))
    assert numbers(made["train"]) == list(range(54_000))
    assert numbers(made["validation"]) == list(range(54_000, 60_000))
    assert numbers(made["test"]) == list(range(10_000))


def test_a_fraction_that_leaves_no_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.validation_fraction is 0\.0001, less than one image of 600"):
        splits.cut(numbered(600), numbered(100), validation_fraction=0.0001)


def test_the_splits_of_the_packaged_digits_are_disjoint(digits: dict[str, LabelledImages]) -> None:
    """And hold about the shares of params.yaml; which ones is tested with folders of the same digits."""
    assert sum(map(len, digits.values())) == 5000
    assert len(digits["test"]) == pytest.approx(0.2 * 5000, abs=100)
    assert len(digits["validation"]) == pytest.approx(0.1 * 0.8 * 5000, abs=60)
    train, validation, test = (fingerprints(digits[name]) for name in splits.SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def write(folder: Path, count: int = 600) -> splits.Dataset:
    preprocessing = Preprocessing("fit", (2, 2, 1), (9, 8, 7), (10.0, 4000.0))
    prepared = splits.Prepared(cut(numbered(count)), "numbers", "letters", "a test", ("a", "b", "c"), preprocessing)
    return splits.write_splits(prepared, folder)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert splits.read_dataset(tmp_path) == written
    expected = cut(numbered(600))
    for name in splits.SPLITS:
        read = splits.read_split(written, name, tmp_path)
        assert torch.equal(read.images, expected[name].images)
        assert torch.equal(read.labels, expected[name].labels)


def test_a_split_beyond_the_memory_limit_stays_on_the_disk_and_has_the_same_images(tmp_path: Path) -> None:
    dataset = write(tmp_path)
    path = tmp_path / "train.safetensors"
    gibibytes = path.stat().st_size / 2**30
    whole, mapped = (splits.read_split(dataset, "train", tmp_path, limit) for limit in (gibibytes, gibibytes * 0.99))
    assert torch.equal(whole.images, mapped.images)
    assert torch.equal(whole.labels, mapped.labels)
    with path.open("r+b") as file:  # what changes on the disk shows which of them is there
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert [int(each.images[-1, -1, -1]) for each in (whole, mapped)] == [0, 255]


def test_a_splits_file_is_what_the_library_safetensors_writes(tmp_path: Path) -> None:
    write(tmp_path)
    made = cut(numbered(600))
    for name in splits.SPLITS:
        expected = safetensors.torch.save({"images": made[name].images, "labels": made[name].labels})
        assert (tmp_path / f"{name}.safetensors").read_bytes() == expected


def test_dataset_json_records_what_was_used(tmp_path: Path) -> None:
    written = write(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["name"] == "numbers"
    assert content["requested"] == "letters"
    assert content["class_names"] == ["a", "b", "c"]
    assert content["preprocessing"] == {
        "resize": "fit",
        "image_shape": [2, 2, 1],
        "background": [9, 8, 7],
        "value_range": [10.0, 4000.0],
    }
    pixels = splits.read_split(written, "train", tmp_path).images.double() / 255
    assert content["mean"] == [pytest.approx(pixels.mean().item(), abs=1e-6)]
    assert content["std"] == [pytest.approx(pixels.std().item(), abs=1e-6)]
    for name in splits.SPLITS:
        facts = content["splits"][name]
        assert sum(facts["per_class"].values()) == facts["count"]
        assert facts["sha256"] == hashlib.sha256((tmp_path / f"{name}.safetensors").read_bytes()).hexdigest()


def test_the_same_data_has_the_same_digest_and_other_data_another(tmp_path: Path) -> None:
    first, again, other = write(tmp_path / "1"), write(tmp_path / "2"), write(tmp_path / "3", count=601)
    assert first.sha256 == again.sha256 != other.sha256
    assert (tmp_path / "1/dataset.json").read_bytes() == (tmp_path / "2/dataset.json").read_bytes()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    dataset = write(tmp_path)
    path = tmp_path / "train.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Fault, match=r"train\.safetensors is damaged .* run `dvc repro -f prepare`"):
        splits.read_split(dataset, "train", tmp_path)


def test_a_split_that_is_not_there_names_the_stage(tmp_path: Path) -> None:
    dataset = write(tmp_path)
    (tmp_path / "test.safetensors").unlink()
    with pytest.raises(UserError, match=r"test\.safetensors does not exist: run `dvc repro prepare` first"):
        splits.read_split(dataset, "test", tmp_path)


@pytest.mark.faults
def test_fault_20_labels_outside_the_classes_and_a_class_without_images_are_refused() -> None:
    names = ("a", "b", "c")
    made = cut(numbered(600))
    assert splits.check(made, "it", names) == []
    with pytest.raises(
        UserError, match=r"it: the train split has 144 labels outside the classes, such as 2; allowed: 0 to 1"
    ):
        splits.check(made, "it", names[:2])
    made["train"].labels[7] = -1
    with pytest.raises(
        UserError, match=r"it: the train split has 1 label outside the classes, such as -1; allowed: 0 to 2"
    ):
        splits.check(made, "it", names)
    with pytest.raises(UserError, match=r"it: the train split has no image of class d"):
        splits.check(cut(numbered(600)), "it", (*names, "d"))


@pytest.mark.faults
def test_fault_20_the_same_image_in_two_splits_is_reported() -> None:
    made = cut(numbered(600))
    made["test"] = LabelledImages(torch.cat([made["test"].images, made["train"].images[:3]]), torch.zeros(123).long())
    assert splits.check(made, "it", ("a", "b", "c")) == [
        "the test split has no image of class b",
        "the test split has no image of class c",
    ]
    assert list(splits.copy_warnings(made)) == [
        "the train and the test split share 3 images",
        "copies of 2 images have different labels",  # those of the classes b and c
    ]


def test_an_image_that_is_twice_in_a_split_is_reported_where_its_labels_differ() -> None:
    made = cut(numbered(600))
    train = made["train"]
    images, labels = torch.cat([train.images, train.images[:2]]), torch.cat([train.labels, train.labels[1:3]])
    made["train"] = LabelledImages(images, labels)
    assert train.labels[:3].tolist() == [0, 1, 2]
    assert list(splits.copy_warnings(made)) == ["copies of 2 images have different labels"]
    labels[-2:] = train.labels[:2]
    assert list(splits.copy_warnings(made)) == []


Tensors = dict[str, torch.Tensor]
HOSTILE: dict[str, Callable[[Tensors], Tensors]] = {
    "another name": lambda split: {"pictures": split["images"], "labels": split["labels"]},
    "a tensor more": lambda split: split | {"more": torch.zeros(1)},
    "floats": lambda split: split | {"images": split["images"].float()},
    "another shape": lambda split: split | {"images": split["images"].reshape(-1, 4, 1, 1)},
    "half of the labels": lambda split: split | {"labels": split["labels"][::2].clone()},
    "a label outside the classes": lambda split: split | {"labels": split["labels"] + 1},
    "a negative label": lambda split: split | {"labels": split["labels"] - 1},
}


def replace_train(folder: Path, dataset: splits.Dataset, content: bytes) -> None:
    """Another train.safetensors, and a dataset.json that has its hash."""
    (folder / "train.safetensors").write_bytes(content)
    facts = replace(dataset.splits["train"], sha256=hashlib.sha256(content).hexdigest())
    splits.write_dataset(replace(dataset, splits=dataset.splits | {"train": facts}), folder)


@pytest.mark.faults
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_fault_42_a_split_that_is_not_what_dataset_json_says_is_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    dataset = write(tmp_path)
    tensors = safetensors.torch.load((tmp_path / "train.safetensors").read_bytes())
    replace_train(tmp_path, dataset, safetensors.torch.save(change(tensors)))
    with pytest.raises(Fault, match=r"train\.safetensors is damaged \(it .* run `dvc repro -f prepare`$"):
        splits.read_split(splits.read_dataset(tmp_path), "train", tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"x" * 99, (2000).to_bytes(8, "little") + b" " * 2000])
def test_fault_42_a_split_with_another_header_is_refused(tmp_path: Path, content: bytes) -> None:
    replace_train(tmp_path, write(tmp_path), content)
    with pytest.raises(Fault, match=r"train\.safetensors is damaged \(.* run `dvc repro -f prepare`$"):
        splits.read_split(splits.read_dataset(tmp_path), "train", tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "facts",
    [
        {"class_names": ("a", "b", "\x1b[31mc")},
        {"class_names": ("a", "b", "b")},
        {"class_names": (1, 2, 3)},
        {"image_shape": (2, 2)},
        {"image_shape": (2, 2, "1")},
        {"splits": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_fault_42_a_dataset_json_with_other_facts_is_refused_in_one_line(
    tmp_path: Path, facts: dict[str, object]
) -> None:
    write(tmp_path)
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_text()) | facts
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": splits._digest(json.loads(json.dumps(content)))}))
    with pytest.raises(Fault, match=r"^[^\n]*dataset\.json is damaged \([^\n]* run `dvc repro -f prepare`$") as error:
        splits.read_dataset(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.faults
def test_fault_42_a_dataset_json_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(Fault, match=r"dataset\.json is damaged"):
        splits.read_dataset(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("names", [("a", "b", "b"), ("a", "b", ""), ("a", "b", "c\n"), ("a", "b", "c" * 301)])
def test_fault_42_class_names_that_no_model_file_may_have_are_refused_by_prepare(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^it: (a class has the name|two classes have the name)"):
        splits.check(cut(numbered(600)), "it", names)
