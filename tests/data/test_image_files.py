"""Picture files become images like those that the network was trained on."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.data import image_files
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError
from tests.drawn import drawn

DIGIT = (28, 28, 1)


def as_mnist(picture: Image.Image) -> torch.Tensor:
    return image_files.centred_strokes(picture, DIGIT, "it")


def test_pictures_of_a_folder_are_found_by_their_suffixes_in_any_depth(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPEG", "a/deeper/d.webp", "notes.txt", "a/without"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in image_files.pictures(tmp_path)]
    assert found == ["a/c.JPEG", "a/deeper/d.webp", "b.png"]


@pytest.mark.parametrize("digit", range(10))
def test_a_drawn_digit_is_centred_and_scaled_like_mnist(digit: int) -> None:
    image = as_mnist(drawn(digit, 20))
    rows, columns, _ = torch.nonzero(image, as_tuple=True)
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 in (19, 20)
    weights, places = image[..., 0].double(), torch.arange(28.0, dtype=torch.float64)
    for axis in (0, 1):
        assert float((weights.sum(dim=1 - axis) * places).sum() / weights.sum()) == pytest.approx(14, abs=0.6)
    assert int(image.max()) == 255


def in_a_corner(digit: Image.Image) -> Image.Image:
    sheet = Image.new("L", (90, 70))
    sheet.paste(digit, (60, 40))
    return sheet


@pytest.mark.parametrize(
    "change",
    [
        lambda digit: digit,
        lambda digit: Image.eval(digit, lambda value: 255 - value),
        lambda digit: digit.resize((280, 280), Image.Resampling.BICUBIC),
        in_a_corner,
    ],
    ids=["itself", "inverted", "ten times larger", "in a corner"],
)
def test_a_digit_of_mnist_stays_what_it_is(
    digits: dict[str, LabelledImages], change: Callable[[Image.Image], Image.Image]
) -> None:
    alike = [
        float(F.cosine_similarity(as_mnist(change(picture)).flatten().double(), image.flatten().double(), dim=0))
        for image in digits["test"].images[:50]
        for picture in [Image.fromarray(image[..., 0].numpy())]
    ]
    assert np.mean(alike) > 0.9


@pytest.mark.parametrize("picture", [Image.new("L", (50, 50), 200), Image.new("RGB", (1, 1), "white")])
def test_a_blank_picture_is_refused(picture: Image.Image) -> None:
    with pytest.raises(UserError, match=r"^it is blank$"):
        as_mnist(picture)


def test_a_picture_for_another_data_set_is_scaled_and_cropped() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    image = image_files.fitted(wide, (32, 32, 3))
    assert image.shape == (32, 32, 3)
    assert image.dtype == torch.uint8
    assert torch.equal(image[4:-4, 4:-4], torch.tensor([0, 0, 255], dtype=torch.uint8).expand(24, 24, 3))
    assert image_files.fitted(wide, (20, 24, 1)).shape == (20, 24, 1)


def test_transparent_parts_are_white_and_exif_rotation_is_applied(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    clear.putpixel((5, 5), (0, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    read = image_files.read(tmp_path / "clear.png", "it")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((5, 5)) == (0, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    Image.new("L", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_files.read(tmp_path / "turned.jpg", "it").size == (10, 30)


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "it is not a picture; allowed: BMP, JPEG, PNG, WEBP"),
        (b"not a picture at all", "it is not a picture; allowed: BMP, JPEG, PNG, WEBP"),
        (png(drawn(5, 20))[:500], "it cannot be read: "),
        (b"GIF89a" + bytes(100), "it is not a picture; allowed: BMP, JPEG, PNG, WEBP"),
        (png(Image.new("1", (10_000, 6_000))), "it has 10000 x 6000 pixels; allowed: 50,000,000"),
        (png(Image.new("1", (20_000, 20_000))), "it cannot be read: Image size"),
    ],
)
def test_a_file_that_is_not_a_picture_is_an_error_of_one_line(content: bytes, line: str) -> None:
    with pytest.raises(UserError) as error:
        image_files.read(io.BytesIO(content), "it")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.faults
def test_fault_28_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "b.png"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"b\.png is not a regular file"):
        image_files.read(pipe, "b.png")


def test_depth_and_palette_do_not_matter(tmp_path: Path) -> None:
    picture = drawn(5, 20)
    expected = as_mnist(picture).double()
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    for name, other in {"deep": deep, "palette": picture.quantize(16), "grey": picture.convert("L")}.items():
        other.save(tmp_path / f"{name}.png")
        made = as_mnist(image_files.read(tmp_path / f"{name}.png", name)).double()
        assert float((made - expected).abs().mean()) < 3, name


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_that_was_cut_off_or_changed_is_read_or_refused(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    drawn(5, 20).save(content, form, **({} if form == "BMP" else {"exif": exif}))
    whole, generator = content.getvalue(), np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(len(whole), size=1 + number % 4):
            damaged[place] = generator.integers(256)
        if number % 3 == 0:
            del damaged[generator.integers(len(damaged)) :]
        try:
            assert min(image_files.read(io.BytesIO(damaged), "it").size) > 0
        except UserError as error:
            assert str(error).startswith("it ")
