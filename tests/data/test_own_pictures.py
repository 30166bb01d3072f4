"""A folder of pictures as prepared images, and what a person is told of it."""

import csv
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import decoder, file_trees, own_pictures, splits
from pipeline.data.decoder import Decoders, Request
from pipeline.data.own_pictures import OwnPictures
from pipeline.data.splits import SPLITS, TEST, TRAIN
from pipeline.errors import UserError
from pipeline.params import Data

COUNT = 60
SIDE = 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the name `shapes`, for pictures; the cache is beside it."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    made = tmp_path / "shapes"
    made.mkdir()
    return made


def pixels(number: int, colour: bool = False) -> NDArray[np.uint8]:
    """A picture unlike all others: blocks of random brightness, the same in all three colours if not ``colour``."""
    random = np.random.default_rng(number)
    blocks = random.integers(0, 256, (5, 5, 3 if colour else 1), dtype=np.uint8)
    return np.broadcast_to(blocks.repeat(SIDE // 5, 0).repeat(SIDE // 5, 1), (SIDE, SIDE, 3)).copy()


def save(path: Path, image: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def label_of(number: int) -> str:
    return ("circle", "square", "star")[number % 3]


def fill(folder: Path, count: int = COUNT, start: int = 0) -> None:
    """Class folders of grey pictures."""
    for number in range(start, start + count):
        save(folder / label_of(number) / f"{number}.png", pixels(number)[..., 0])


def prepare(folder: Path, **changed: Any) -> OwnPictures:
    return own_pictures.prepare(Data(dataset="folder", path=str(folder), **changed))


def tensors(own: OwnPictures) -> list[torch.Tensor]:
    return [each for split in SPLITS for each in (own.prepared.splits[split].images, own.prepared.splits[split].labels)]


def same(one: OwnPictures, other: OwnPictures) -> bool:
    """Whether both have the same images and labels in the same order."""
    return all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))


def split_of(own: OwnPictures) -> Mapping[str, str]:
    return {row.path: row.split for row in own.rows}


def test_every_picture_is_in_one_split_with_its_pixels_and_its_label(folder: Path) -> None:
    fill(folder)
    own = prepare(folder)
    assert (own.prepared.name, own.prepared.class_names) == ("shapes", ("circle", "square", "star"))
    found = {
        image.numpy().tobytes(): own.prepared.class_names[label]
        for split in own.prepared.splits.values()
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }
    assert found == {pixels(number)[..., 0].tobytes(): label_of(number) for number in range(COUNT)}
    for split in SPLITS:
        assert set(own.prepared.splits[split].labels.tolist()) == {0, 1, 2}
        assert len(own.prepared.splits[split]) == sum(row.split == split for row in own.rows)
    for row in own.rows:
        image = own.prepared.splits[row.split].images[int(row.index), ..., 0].numpy()
        assert np.array_equal(image, pixels(int(Path(row.path).stem))[..., 0])


def test_the_same_pictures_as_folders_table_names_and_zip_give_the_same_images(folder: Path, tmp_path: Path) -> None:
    fill(folder)
    flat, listed, zipped = (tmp_path / name / "shapes" for name in ("flat", "listed", "zipped"))
    rows = []
    for number in range(COUNT):
        image = pixels(number)[..., 0]
        save(flat / f"{number:03} {label_of(number)}.bmp", image)
        rows.append((f"all/{-number}.tif", label_of(number)))
        save(listed / rows[-1][0], image)
    with (listed / "labels.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("path", "label"), *rows])
    zipped.parent.mkdir()
    with zipfile.ZipFile(zipped.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    first = prepare(folder)
    assert same(first, prepare(flat, label_pattern=r"\d+ (?P<label>\w+)\.bmp"))
    assert same(first, prepare(listed, labels="labels.csv"))
    assert same(first, prepare(zipped.with_suffix(".zip")))


def stats(folder: Path) -> Mapping[Path, tuple[int, int, int]]:
    """What tells a changed file; reading one changes only the time of access."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (facts.st_mode, facts.st_size, facts.st_mtime_ns) for path, facts in found.items()}


def test_another_name_and_junk_change_nothing_and_nothing_is_written_into_the_folder(folder: Path) -> None:
    fill(folder)
    first = prepare(folder)
    (folder / "star/2.png").rename(folder / "star/renamed.png")
    (folder / "star/.DS_Store").write_bytes(b"junk")
    (folder / "star/notes.txt").write_text("a note")
    before = stats(folder)
    second = prepare(folder)
    assert same(first, second)
    assert stats(folder) == before
    assert "left out, not a picture by its name: 1 file, such as star/notes.txt" in second.left_out


def test_adding_pictures_moves_none_of_the_old_ones(folder: Path) -> None:
    """Not even those of other sizes, which make all images larger."""
    fill(folder, 300)
    own = prepare(folder)
    assert own.prepared.preprocessing.image_shape == (SIDE, SIDE, 1)
    before = split_of(own)
    fill(folder, 50, start=300)
    for number in range(350, 700):
        save(folder / label_of(number) / f"{number}.png", pixels(number)[..., 0].repeat(3, 0).repeat(2, 1))
    own = prepare(folder)
    assert own.prepared.preprocessing.image_shape[0] > SIDE
    after = split_of(own)
    assert len(after) == 700
    assert after.items() >= before.items()
    assert split_of(prepare(folder, image_size=9, channels=3, resize="crop")) == after


def test_only_new_files_are_read_and_only_new_contents_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_trees, "CLOCK_TICK", 0)  # files that were written just now count as old
    fill(folder)
    prepare(folder)
    read, decoded = list[str](), list[str]()
    ask = Decoders.ask

    def counted(self: Decoders, function: decoder.Function, requests: Sequence[Request]) -> Iterator[decoder.Answer]:
        (read if function is decoder.digest else decoded).extend(request.name for request in requests)
        return ask(self, function, requests)

    monkeypatch.setattr(Decoders, "ask", counted)
    shutil.copy(folder / "star/2.png", folder / "star/copy.png")
    fill(folder, 1, start=COUNT)
    prepare(folder)
    assert sorted(read) == [f"circle/{COUNT}.png", "star/copy.png"]
    assert set(decoded) == {f"circle/{COUNT}.png"}
    decoded.clear()
    prepare(folder, resize="stretch", image_size=9)
    assert len(set(decoded)) == COUNT + 1  # the copy has the same content


@pytest.mark.parametrize("place", [0, 9000])
def test_a_damaged_cache_is_begun_anew(folder: Path, tmp_path: Path, place: int) -> None:
    fill(folder)
    first = prepare(folder)
    with (tmp_path / own_pictures.CACHE).open("r+b") as cache:
        cache.seek(place)
        cache.write(b"not a database at all" * 1000)
    assert same(first, prepare(folder))


def test_a_split_whose_pictures_all_belong_elsewhere_is_an_error(folder: Path) -> None:
    for number in range(COUNT):
        split = "test" if number % 5 == 0 else "train"
        save(folder / split / label_of(number) / f"p{number // 10}-{number}.png", pixels(number)[..., 0])
    own = prepare(folder, group="(?P<group>p[0-9])-")
    with pytest.raises(UserError, match="the test split has no images: copies, or pictures of one subject, join"):
        splits.check(own.prepared.splits, own.prepared.name, own.prepared.class_names)


def test_a_picture_that_cannot_be_read_is_named_and_not_replaced(folder: Path) -> None:
    fill(folder)
    content = (folder / "star/2.png").read_bytes()
    (folder / "star/2.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^1 of 60 pictures cannot be read, such as: star/2\.png .*max_bad_fraction"):
        prepare(folder)
    own = prepare(folder, max_bad_fraction=0.05)
    assert sum(len(split) for split in own.prepared.splits.values()) == COUNT - 1
    row = next(row for row in own.rows if row.path == "star/2.png")
    assert row.split == ""
    assert row.reason.startswith("star/2.png ")
    assert any(warning.startswith("star/2.png is not used: ") for warning in own.warnings)


@pytest.mark.parametrize("broken", ["circle", "all"])
def test_a_class_or_a_folder_of_unreadable_pictures_is_an_error(folder: Path, broken: str) -> None:
    fill(folder)
    for path in folder.rglob("*.png"):
        if broken in ("all", path.parent.name):
            path.write_bytes(b"no picture")
    expected = "none of the pictures of class circle" if broken == "circle" else "60 of 60 pictures cannot be read"
    with pytest.raises(UserError, match=expected):
        prepare(folder, max_bad_fraction=0.99)


@pytest.mark.parametrize(
    ("changed", "shape"),
    [
        ({}, (SIDE, SIDE, 1)),
        ({"image_size": 8}, (8, 8, 1)),
        ({"image_size": [10, 12], "channels": 3}, (10, 12, 3)),
    ],
)
def test_the_images_have_the_size_of_the_pictures_or_the_one_asked_for(
    folder: Path, changed: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    fill(folder)
    own = prepare(folder, **changed)
    assert own.prepared.preprocessing.image_shape == own.prepared.splits[TRAIN].images.shape[1:] == shape


def test_pictures_of_several_sizes_become_squares_of_a_middle_size(folder: Path) -> None:
    fill(folder)
    for number in range(40):
        save(folder / "star" / f"large {number}.png", pixels(COUNT + number).repeat(2, 0).repeat(3, 1))
    assert prepare(folder).prepared.preprocessing.image_shape == (SIDE, SIDE, 1)
    for number in range(100):
        save(folder / "star" / f"huge {number}.png", pixels(200 + number).repeat(9, 0).repeat(9, 1))
    assert prepare(folder).prepared.preprocessing.image_shape == (64, 64, 1)


def test_one_picture_in_colour_makes_all_images_colour_images(folder: Path) -> None:
    fill(folder)
    for number in range(3):  # in a colour mode, and grey
        save(folder / "star" / f"grey {number}.png", pixels(COUNT + number))
    assert prepare(folder).prepared.preprocessing.image_shape[2] == 1
    save(folder / "star/colour.png", pixels(99, colour=True))
    assert prepare(folder).prepared.preprocessing.image_shape[2] == 3


def test_pictures_of_16_bits_keep_their_brightness_relative_to_each_other(folder: Path) -> None:
    for number in range(COUNT):
        image = pixels(number)[..., 0].astype(np.uint16) * (16 if number % 2 else 8)  # 12 bits, and half of them
        save(folder / label_of(number) / f"{number}.png", image)
    own = prepare(folder)
    assert own.prepared.preprocessing.value_range is not None
    lowest, highest = own.prepared.preprocessing.value_range
    assert lowest < 100
    assert 3900 < highest < 4096
    brightest = [int(image.max()) for image in own.prepared.splits[TRAIN].images]
    assert max(brightest) > 250
    assert min(brightest) < 140


def test_a_planted_leak_is_found_kept_on_one_side_and_reported(folder: Path) -> None:
    """Copies under other names, compressed again and resized, half of them in another class."""
    fill(folder, 300)
    for number in range(100):
        picture = Image.fromarray(pixels(number)[..., 0])
        label = label_of(number + number % 2)
        if number % 3 == 0:
            picture = picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        picture.save(folder / label / f"{999 - number} copy.jpg", quality=80)
    own = prepare(folder)
    where = split_of(own)
    apart = [
        number
        for number in range(100)
        if where[f"{label_of(number)}/{number}.png"]
        != where[f"{label_of(number + number % 2)}/{999 - number} copy.jpg"]
    ]
    assert len(apart) <= 2
    report = " / ".join(own.warnings)
    assert "pictures have copies, which are all in one split" in report
    assert "have different classes, such as" in report
    assert "a random split would have put" in report


def test_the_pictures_of_one_subject_stay_together(folder: Path) -> None:
    for number in range(300):
        save(folder / label_of(number) / f"patient{number // 6:02}-{number}.png", pixels(number)[..., 0])
    own = prepare(folder, group="(?P<group>patient[0-9]+)")
    of: dict[str, str] = {}
    for row in own.rows:
        assert of.setdefault(row.group, row.split) == row.split
    assert len(of) == 50


def test_a_published_split_is_kept_but_for_copies_on_both_sides(folder: Path) -> None:
    for split, start in (("train", 0), ("test", 200)):
        for number in range(start, start + 200):
            save(folder / split / label_of(number) / f"{number}.png", pixels(number)[..., 0])
    shutil.copy(folder / "train/circle/0.png", folder / "test/circle/again.png")
    own = prepare(folder)
    where = split_of(own)
    assert where["test/circle/again.png"] == where["train/circle/0.png"] != TEST
    others = {path: split for path, split in where.items() if path != "test/circle/again.png"}
    assert all((split == TEST) == path.startswith("test/") for path, split in others.items())
    assert "moved out of the published split: 1 picture, such as test/circle/again.png" in own.warnings
    row = next(row for row in own.rows if row.path == "test/circle/again.png")
    assert row.reason.startswith("published in test")


def test_rare_classes_and_great_differences_are_warned_of(folder: Path) -> None:
    for number in range(200):
        save(folder / "common" / f"{number}.png", pixels(number)[..., 0])
    for number in range(200, 205):
        save(folder / "rare" / f"{number}.png", pixels(number)[..., 0])
    warnings = prepare(folder).warnings
    assert "classes with fewer than 10 pictures: rare" in warnings
    assert "the class common has 200 pictures and rare 5" in warnings
