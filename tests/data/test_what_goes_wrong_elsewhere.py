"""What sinks people with pictures of their own elsewhere, each on a small folder, from the files to the images.

In the order in which it is usually told. What needs a trained model is elsewhere: a changed picture that `dvc repro`
sees, and a `.DS_Store` that trains nothing anew, in tests/test_own_pictures.py; `predict`, the server and the exports,
which agree with `evaluate`, in tests/test_pictures_alike.py; the accuracy that is the share of the largest class, in
tests/model/test_metrics.py; names that MLflow refuses in metrics, in tests/tracking/test_runs.py.
"""

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import image_files, own_pictures, splits
from pipeline.data.own_pictures import OwnPictures
from pipeline.data.splits import SPLITS, TEST, TRAIN
from pipeline.errors import UserError
from tests import unlike
from tests.conftest import REPOSITORY
from tests.data.test_image_files import rows_of
from tests.data.test_own_pictures import COUNT, SIDE, fill, folder, label_of, pixels, prepare, same, save, split_of

__all__ = ["folder"]
Images = NDArray[np.uint8]


def image_of(own: OwnPictures, path: str) -> Images:
    """What became of a picture."""
    row = next(row for row in own.rows if row.path == path)
    return own.prepared.splits[row.split].images[int(row.index)].numpy()


def grey(number: int) -> Images:
    return pixels(number)[..., 0]


def test_a_sideways_phone_photo_is_upright(folder: Path) -> None:
    fill(folder)
    exif = Image.Exif()
    exif[0x0112] = 6  # hold it turned by 90 degrees
    sideways = Image.fromarray(grey(99)).transpose(Image.Transpose.ROTATE_90)
    sideways.save(folder / "star/photo.png", exif=exif)
    assert np.array_equal(image_of(prepare(folder), "star/photo.png")[..., 0], grey(99))


def test_one_broken_file_is_named_and_neither_replaced_by_a_black_or_the_next_picture_nor_overwritten(
    folder: Path,
) -> None:
    fill(folder)
    broken = (folder / "star/2.png").read_bytes()[:100]
    (folder / "star/2.png").write_bytes(broken)
    with pytest.raises(UserError, match=r"star/2\.png cannot be read: "):
        prepare(folder)
    own = prepare(folder, max_bad_fraction=0.1)
    images = [image.numpy().tobytes() for split in own.prepared.splits.values() for image in split.images]
    assert sorted(images) == sorted(grey(number).tobytes() for number in range(COUNT) if number != 2)
    assert (folder / "star/2.png").read_bytes() == broken
    (folder / "square/again.png").write_bytes(broken)
    reasons = {row.path: row.reason for row in prepare(folder, max_bad_fraction=0.1).rows if not row.split}
    assert reasons.keys() == {"star/2.png", "square/again.png"}
    assert all(reason.startswith(f"{path} cannot be read: ") for path, reason in reasons.items())


JUNK = (
    "star/.DS_Store", "star/._1.png", "Thumbs.db", "desktop.ini", "__MACOSX/star/._2.png", ".ipynb_checkpoints/1.png",
    "star/.ipynb_checkpoints/2-checkpoint.png",
)  # fmt: skip


def test_ds_store_thumbs_db_macosx_and_the_like_are_neither_pictures_nor_class_0(folder: Path) -> None:
    fill(folder)
    before = prepare(folder)
    picture = save(folder.parent / "a picture.png", grey(77))
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / name)
    after = prepare(folder)
    assert after.prepared.class_names == ("circle", "square", "star")
    assert same(before, after)


def publish(folder: Path, train: str = "train", test: str = "test") -> None:
    fill(folder / train)
    fill(folder / test, 30, start=COUNT)


@pytest.mark.parametrize("third", ["validation", "val", "valid"])
def test_train_valid_and_test_are_not_taken_for_classes(folder: Path, third: str) -> None:
    publish(folder)
    fill(folder / third, 15, start=200)
    own = prepare(folder)
    assert own.prepared.class_names == ("circle", "square", "star")
    assert Counter(row.split for row in own.rows) == {"train": COUNT, "validation": 15, "test": 30}


def test_a_third_folder_beside_train_and_test_is_named(folder: Path) -> None:
    publish(folder)
    save(folder / "extra/star/1.png", grey(500))
    with pytest.raises(UserError, match=r"shapes has extra beside train, test: move what is not a split elsewhere\."):
        prepare(folder)


def test_class_numbers_are_the_same_in_training_and_test_when_the_test_lacks_a_class(folder: Path) -> None:
    publish(folder)
    shutil.rmtree(folder / "test/circle")
    own = prepare(folder)
    assert own.prepared.class_names == ("circle", "square", "star")
    assert set(own.prepared.splits[TEST].labels.tolist()) == {1, 2}
    for row in own.rows:
        label = own.prepared.splits[row.split].labels[int(row.index)]
        assert own.prepared.class_names[int(label)] == row.label
    warnings = splits.check(own.prepared.splits, own.prepared.name, own.prepared.class_names)
    assert warnings == ["the test split has no image of class circle"]


def test_a_class_without_pictures_is_a_warning_and_a_class_only_in_test_an_error(folder: Path) -> None:
    publish(folder)
    (folder / "train/empty").mkdir()
    assert "folders without pictures are no classes (1): train/empty" in prepare(folder).warnings
    save(folder / "test/comet/1.png", grey(500))
    with pytest.raises(UserError, match=r"no pictures in train for 1 of its classes: comet: put some there, or leave"):
        prepare(folder)


def photographs(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [unlike.photograph(random).resize((48, 48), Image.Resampling.BOX) for _ in range(count)]


def recompressed(picture: Image.Image) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return Image.open(content)


CHANGES: tuple[Callable[[Image.Image], Image.Image], ...] = (
    Image.Image.copy, lambda picture: picture.resize((96, 96), Image.Resampling.BICUBIC), recompressed,
)  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2], ids=["copied", "resized", "recompressed"])
def test_the_same_picture_on_both_sides_of_a_published_split_is_found_kept_on_one_side_and_reported(
    folder: Path, number: int
) -> None:
    """A leak of 100 pictures of train, under mirrored names in another class of test. The others are noise."""
    random = np.random.default_rng(1)
    for place in range(160):
        save(folder / ("test" if place > 120 else "train") / label_of(place) / f"{place}.png",
             random.integers(0, 256, (48, 48, 3), dtype=np.uint8))  # fmt: skip
    for place, picture in enumerate(photographs(100)):
        picture.save(folder / "train" / label_of(place) / f"photo{place}.png")
        CHANGES[number](picture).save(folder / "test" / label_of(place + 1) / f"{place}otohp.png")
    own = prepare(folder)
    where = split_of(own)
    together = sum(
        where[f"test/{label_of(place + 1)}/{place}otohp.png"] == where[f"train/{label_of(place)}/photo{place}.png"]
        for place in range(100)
    )
    assert together == 100 if number == 0 else together >= 95
    report = "\n".join(own.warnings)
    assert "moved out of the published split: " in report
    assert "have different classes, such as " in report
    others = {path: split for path, split in where.items() if "photo" not in path and "otohp" not in path}
    assert all((split == TEST) == path.startswith("test/") for path, split in others.items())


def test_the_same_subject_is_never_on_both_sides_of_a_split(folder: Path) -> None:
    for number in range(300):
        save(folder / label_of(number) / f"patient{number // 6:02}-{number}.png", grey(number))
    sides = {(row.group, row.split) for row in prepare(folder, group="(?P<group>patient[0-9]+)").rows}
    assert len(sides) == 50


def test_a_split_never_loses_a_rare_class(folder: Path) -> None:
    fill(folder, 300)
    for number in range(300, 303):
        save(folder / "rare" / f"{number}.png", grey(number))
    own = prepare(folder)
    assert {row.split for row in own.rows if row.label == "rare"} == set(SPLITS)
    (folder / "rare/300.png").unlink()
    with pytest.raises(
        UserError, match=r"the class rare has too few pictures or .* \(2\); each of 3 splits needs one: add pictures"
    ):
        prepare(folder)


def test_a_largest_class_of_which_95_percent_accuracy_may_be_the_share_is_said(folder: Path) -> None:
    for number in range(210):
        save(folder / ("common" if number >= 10 else "rare") / f"{number}.png", grey(number))
    assert "the class common has 200 pictures and rare 10" in prepare(folder).warnings


def test_an_object_at_the_edge_is_not_cut_off(folder: Path) -> None:
    fill(folder)
    wide = np.full((20, 100), 10, np.uint8)
    wide[:, :5], wide[:, -5:] = 250, 130
    save(folder / "star/wide.png", wide)
    image = image_of(prepare(folder), "star/wide.png")[..., 0]
    middle = image[SIDE // 2]
    assert int(middle[0]) == pytest.approx(250, abs=25)
    assert int(middle[-1]) == pytest.approx(130, abs=25)


RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
GREY = (RAMP * 255).round().astype(np.uint8)


def as_bytes(picture: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def on_black() -> Image.Image:
    """Transparent where it is white, over black."""
    picture = Image.new("RGBA", (SIDE, SIDE))
    picture.putalpha(Image.fromarray(255 - GREY))
    return picture


ODD_KINDS = {
    "16_bit.png": as_bytes(Image.fromarray((RAMP * 65535).astype("<u2")), "PNG"),
    "12_bits_in_16.png": as_bytes(Image.fromarray((RAMP * 4095).astype("<u2")), "PNG"),
    "12_bits_in_16.tif": as_bytes(Image.fromarray((RAMP * 4095).astype("<u2")), "TIFF"),
    "cmyk.jpg": as_bytes(Image.fromarray(GREY).convert("CMYK"), "JPEG", quality=100),
    "alpha_on_black.png": as_bytes(on_black(), "PNG"),
    "palette.png": as_bytes(Image.fromarray(GREY).convert("P"), "PNG"),
    "a_png.jpg": as_bytes(Image.fromarray(GREY), "PNG"),
    "UPPERCASE.JPG": as_bytes(Image.fromarray(GREY), "JPEG", quality=100),
}


@pytest.mark.parametrize("name", ODD_KINDS)
def test_a_picture_of_an_odd_kind_is_neither_white_nor_black_nor_inverted(folder: Path, name: str) -> None:
    fill(folder)
    (folder / "star" / name).write_bytes(ODD_KINDS[name])
    image = image_of(prepare(folder, near_duplicates=None), f"star/{name}")
    assert np.abs(image.astype(int) - GREY[..., None]).max() <= 4


def test_of_a_gif_of_88_frames_the_first_is_used_and_that_is_reported(folder: Path) -> None:
    fill(folder)
    first, *others = (Image.fromarray(grey(number)) for number in range(1000, 1088))
    first.save(folder / "star/moving.gif", save_all=True, append_images=others)
    own = prepare(folder)
    assert np.array_equal(image_of(own, "star/moving.gif")[..., 0], grey(1000))
    assert "only the first frame or page is used of 1 picture with several, such as star/moving.gif (88)" in (
        own.warnings
    )


SCAN = (18_000, 11_000)  # width, height: 198 megapixels
COLOUR = bytes((16, 128, 240))


def tiff_scan(part: tuple[int, int]) -> bytes:
    """A compressed TIFF of SCAN in COLOUR, in tiles of this width and height, or in strips of the picture's width."""
    tiled = part[0] != SCAN[0]
    content = zlib.compress(COLOUR * part[0] * part[1], 1)
    count = -(-SCAN[0] // part[0]) * -(-SCAN[1] // part[1])
    offsets, lengths, sides = (324, 325, {322: part[0], 323: part[1]}) if tiled else (273, 279, {278: part[1]})
    longs = {256: SCAN[0], 257: SCAN[1], 259: 8, 262: 2, 277: 3, **sides}
    fields: dict[int, tuple[int, ...]] = {tag: (value,) for tag, value in longs.items()}
    fields |= {258: (8, 8, 8), offsets: (0,) * count, lengths: (len(content),) * count}
    more = 8 + 2 + 12 * len(fields) + 4  # where longer values are
    end = more + sum(4 * len(values) for values in fields.values() if len(values) > 1)
    fields[offsets] = (end,) * count  # each part is the same
    entries, longer = b"", b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        alone = len(values) == 1
        entries += struct.pack("<HHI", tag, 4, len(values)) + (
            packed if alone else struct.pack("<I", more + len(longer))
        )
        longer += b"" if alone else packed
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + longer + content


def png_scan() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *SCAN, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows_of(COLOUR, *SCAN)) + chunk(b"IEND", b"")


PREPARE = """
import resource, sys
from pipeline.data import own_pictures
from pipeline.params import Data
own = own_pictures.prepare(Data(dataset="folder", path=sys.argv[1]))
row = next(row for row in own.rows if row.path.startswith("star/scan"))
print(own.prepared.splits[row.split].images[row.index][10, 10].tolist())
who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(max(resource.getrusage(each).ru_maxrss for each in who))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scan.png", png_scan),
        ("scan.tif", lambda: tiff_scan((SCAN[0], 64))),
        ("scan in tiles.tif", lambda: tiff_scan((512, 512))),
        ("scan.jpg", lambda: as_bytes(Image.new("L", SCAN, 100), "JPEG")),
    ],
    ids=["PNG", "TIFF in strips", "TIFF in tiles", "JPEG"],
)
def test_a_198_megapixel_scan_is_read_and_does_not_eat_all_memory(
    folder: Path, name: str, content: Callable[[], bytes]
) -> None:
    """In `prepare`, PyTorch's half gigabyte included."""
    fill(folder)
    (folder / "star" / name).write_bytes(content())
    shell = ["sh", "-c", '"$0" "$@"; exit $?']  # a process begins with the peak of the one that starts it
    command = [*shell, sys.executable, "-c", PREPARE, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, pixel, peak = done.stdout.splitlines()
    assert pixel == ("[100]" if name.endswith("jpg") else "[16, 128, 240]")
    assert int(peak) * (1 if sys.platform == "darwin" else 1024) < 1_500_000_000


def test_images_that_would_fill_the_disk_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    line = r"1,000,000 images of 4096 x 4096 x 3 need 251,658\.2 GB on the disk of .* free: give data\.image_size"
    with pytest.raises(UserError, match=line):
        own_pictures._check_room(tmp_path, 1_000_000, (4096, 4096, 3))


NAMES = (
    "café", "日本語", "👍🏽", "👎🏽", "👩\u200d🔬", "x" * 255, "x" * 254 + "y", "a=b", "a,b", "a:b", "a@b", "שלום",
    "née <b>&amp; | `x` [y](z)", "%20 'q' \"d\"", "NaN", "-rf *", "$HOME {0} #1", "1e3",
)  # fmt: skip


def test_accented_cjk_emoji_and_very_long_names_and_those_with_signs_are_classes_and_files(folder: Path) -> None:
    for number in range(5 * len(NAMES)):
        save(folder / NAMES[number % len(NAMES)] / f"{NAMES[number % 5]} {number}=,:@.png", grey(number))
    own = prepare(folder)
    assert own.prepared.class_names == tuple(sorted(NAMES))
    assert len(own.rows) == sum(len(split) for split in own.prepared.splits.values()) == 5 * len(NAMES)
    assert splits.check(own.prepared.splits, own.prepared.name, own.prepared.class_names) == []


def test_a_folder_of_a_very_long_name_gives_a_model_a_name_that_mlflow_takes(folder: Path) -> None:
    long = folder.with_name("ü" * 100)
    fill(long)
    assert prepare(long).prepared.name == "u" * 100
    longer = folder.with_name("long" * 60)
    fill(longer)
    assert prepare(longer).prepared.name == ("long" * 60)[:100]


def test_symlinks_are_followed_loops_end_and_nested_folders_belong_to_the_class_above(folder: Path) -> None:
    fill(folder)
    elsewhere = folder.parent / "elsewhere"
    save(elsewhere / "linked.png", grey(500))
    save(folder / "star/deep/deeper/nested.png", grey(501))
    (folder / "star/more").symlink_to(elsewhere)
    (folder / "star/one.png").symlink_to(elsewhere / "linked.png")
    (folder / "star/loop").symlink_to(folder)
    own = prepare(folder)
    added = {row.path: row.label for row in own.rows if not row.path[-5].isdigit()}
    assert added == dict.fromkeys(("star/deep/deeper/nested.png", "star/more/linked.png", "star/one.png"), "star")


def test_all_ways_of_reading_a_picture_use_the_preprocessing_that_is_stored_with_the_model(folder: Path) -> None:
    """The same bytes by the facts in the model's file; tests/test_pictures_alike.py asks `predict` itself."""
    fill(folder)
    save(folder / "star/large.png", pixels(99, colour=True).repeat(7, 0).repeat(4, 1))
    own = prepare(folder)
    stored = image_files.Preprocessing.from_facts(asdict(own.prepared.preprocessing))
    image = image_files.read(folder / "star/large.png", "it", stored).image
    assert np.array_equal(image, image_of(own, "star/large.png"))
    assert own.prepared.splits[TRAIN].images.shape[1:] == stored.image_shape
