"""Picture files become images like those that the network was trained on."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pillow_heif
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn import functional as F

from pipeline.data import image_files, strokes
from pipeline.data.image_files import Preprocessing, Resize
from pipeline.data.splits import LabelledImages
from pipeline.errors import UserError
from tests.conftest import REPOSITORY
from tests.drawn import drawn

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\b")  # pytest undoes after each test what read() sets
DIGIT = (28, 28, 1)
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "PNG", "TIFF", "WEBP")
BEST: dict[str, dict[str, Any]] = {
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "ICO": {"sizes": [(40, 30)]},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")
MAX_MEMORY = 1_500_000_000  # bytes, with Python and the libraries


def as_mnist(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(strokes.centred(picture, DIGIT, "it"))


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


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file by hand. ``colour`` is 0 for grey, 2 for RGB, 4 and 6 for these with alpha."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(size: tuple[int, int], bits: int, pixels: bytes, zero: int = 1) -> bytes:
    """An uncompressed grey TIFF file by hand. ``zero`` is 1 where 0 is black, 0 where it is white."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: zero, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: size[1]}
    tags[279] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def read(content: bytes, resize: Resize = "fit", channels: int = 3, **values: Any) -> NDArray[np.uint8]:
    """The image (H, W, C) of a picture at its own size."""
    width, height = image_files.inspect(io.BytesIO(content), "it").size
    preprocessing = Preprocessing(resize, (height, width, channels), **values)
    return image_files.read(io.BytesIO(content), "it", preprocessing).image


def resized(picture: Image.Image, resize: Resize, *image_shape: int, **values: Any) -> NDArray[np.uint8]:
    height, width, channels = image_shape
    preprocessing = Preprocessing(resize, (height, width, channels), **values)
    return image_files.read(io.BytesIO(encoded(picture)), "it", preprocessing).image


def scene(width: int, height: int) -> Image.Image:
    """Soft colours that differ in every part."""
    points = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(points).resize((width, height), Image.Resampling.BICUBIC)


def deviation(one: NDArray[Any], other: NDArray[Any]) -> int:
    """The largest difference, in grey levels."""
    return int(np.abs(one.astype(np.int64) - other).max())


def refusal(content: bytes) -> str:
    with pytest.raises(UserError) as error:
        image_files.read(io.BytesIO(content), "it", Preprocessing("fit", (8, 8, 3)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("resize", ["fit", "crop", "stretch"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_picture_of_the_images_size_keeps_its_pixels(resize: Resize, mode: str, channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, channels), dtype=np.uint8)
    picture = Image.fromarray(noise if channels == 3 else noise[..., 0])
    assert picture.mode == mode
    assert np.array_equal(resized(picture, resize, *noise.shape), noise)
    assert np.array_equal(read(encoded(picture, icc_profile=b"any" * 50), resize, channels), noise)


def test_fit_cuts_nothing_off_and_fills_up_with_the_background() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (0, 0, 100, 100))
    image = resized(wide, "fit", 30, 30, 3, background=(0, 255, 0))
    assert (image[:10] == (0, 255, 0)).all()
    assert (image[20:] == (0, 255, 0)).all()
    assert deviation(image[10:20, :8], np.array([0, 0, 255])) <= 2
    assert deviation(image[10:20, 12:], np.array([255, 0, 0])) <= 2
    assert resized(wide, "fit", 20, 24, 1, background=(7, 7, 7))[0, 0].tolist() == [7]


def test_crop_fills_the_image_and_cuts_two_sides_off() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert deviation(resized(wide, "crop", 32, 32, 3)[4:-4, 4:-4], np.array([0, 0, 255])) == 0
    assert resized(wide.transpose(Image.Transpose.ROTATE_90), "crop", 20, 24, 1).shape == (20, 24, 1)


def test_stretch_changes_the_proportions() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (150, 0, 300, 100))
    image = resized(wide, "stretch", 10, 10, 3)
    assert deviation(image[:, :3], np.array([255, 0, 0])) <= 2
    assert deviation(image[:, 7:], np.array([0, 0, 255])) <= 2


def test_every_name_for_resizing_has_a_function() -> None:
    assert set(image_files.RESIZE) == set(get_args(Resize))


def test_strokes_are_what_mnist_has() -> None:
    assert np.array_equal(resized(drawn(5, 20), "strokes", 28, 28, 1), as_mnist(drawn(5, 20)).numpy())
    in_colour = resized(drawn(5, 20), "strokes", 28, 28, 3)
    assert np.array_equal(in_colour[..., :1], in_colour[..., 2:])
    with pytest.raises(UserError, match=r"^it is blank$"):
        resized(Image.new("L", (50, 50), 200), "strokes", 28, 28, 1)


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    """What a camera stores with this EXIF orientation for a picture that looks like ``upright``."""
    exif = Image.Exif()
    exif[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)  # the others undo themselves
    turned = upright.copy()
    turned.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(turned)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["AVIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_with_an_exif_orientation_is_upright(form: str, orientation: int) -> None:
    upright, exif = scene(30, 20), Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored(upright, orientation), form, exif=exif, **BEST.get(form, {}))
    picture = image_files.read(io.BytesIO(content), "it", Preprocessing("fit", (20, 30, 3)))
    assert picture.size == image_files.inspect(io.BytesIO(content), "it").size == (30, 20)
    assert deviation(picture.image, np.asarray(upright)) <= (12 if form in ("AVIF", "JPEG") else 0)


@pytest.mark.parametrize("resize", ["fit", "crop", "stretch"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_upright_picture_is_scaled_like_a_turned_one(orientation: int, resize: Resize) -> None:
    upright, exif, preprocessing = scene(613, 407), Image.Exif(), Preprocessing(resize, (20, 24, 3))
    exif[0x0112] = orientation
    content = encoded(stored(upright, orientation), exif=exif)
    image = image_files.read(io.BytesIO(content), "it", preprocessing).image
    assert deviation(image, resized(upright, resize, 20, 24, 3)) <= 3


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\1\0"])
def test_a_damaged_exif_block_turns_nothing(exif: bytes) -> None:
    assert np.array_equal(read(encoded(scene(8, 6), exif=exif)), np.asarray(scene(8, 6)))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_by_its_content_and_named(form: str, tmp_path: Path) -> None:
    picture = scene(40, 30)
    path = tmp_path / f"a {form}.JPG"
    path.write_bytes(encoded(picture, form, **BEST.get(form, {})))
    found = image_files.read(path, "it", Preprocessing("fit", (30, 40, 3)))
    assert (found.format, found.size, found.frames) == (form, (40, 30), 1)
    assert np.abs(found.image.astype(int) - np.asarray(picture)).mean() < 5  # a GIF has 256 colours
    with path.open("rb") as file:
        again = image_files.read(file, "it", Preprocessing("fit", (30, 40, 3)))
        assert not file.closed
    assert again.image.tobytes() == found.image.tobytes()


HEIC = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100)


def test_heic_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert refusal(HEIC) == "it is a HEIC picture, which needs another package: pip install pillow-heif"
    read(encoded(scene(8, 8), "AVIF"))


def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    pillow_heif.register_heif_opener()  # it also writes, which makes the pictures of this test
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation  # becomes a rotation of the format itself
        whole = encoded(stored(scene(40, 30), orientation), "HEIF", exif=exif.tobytes(), quality=95)
        found = image_files.read(io.BytesIO(whole), "it", Preprocessing("fit", (30, 40, 3)))
        assert (found.format, found.size) == ("HEIF", (40, 30))
        assert np.abs(found.image.astype(int) - np.asarray(scene(40, 30))).mean() < 5
    assert refusal(HEIC).startswith("it cannot be read: ")
    for length in range(0, len(whole), 10):
        assert refusal(whole[:length]).startswith("it ")


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (encoded(Image.fromarray((RAMP * 65535).astype("<u2"))), None),
        (encoded(Image.fromarray((RAMP * 65535).astype("<u2")), "TIFF"), None),
        (encoded(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"), None),
        (encoded(Image.fromarray((RAMP * 4095).astype("<u2"))), (0, 4095)),
        (encoded(Image.fromarray((RAMP * 4095).astype("<u2")), "TIFF"), (0, 4095)),
        (encoded(Image.fromarray((RAMP * 1e6).astype("<i4")), "TIFF"), None),
        (encoded(Image.fromarray((RAMP * 1e6).astype("<i4") - 500_000), "TIFF"), (-500_000, 500_000)),
        (encoded(Image.fromarray(RAMP.astype("<f4")), "TIFF"), None),
        (encoded(Image.fromarray((RAMP * 0.3 - 40).astype("<f4")), "TIFF"), None),
        (encoded(Image.fromarray((RAMP * 200 + 1000).astype("<f4")), "TIFF"), (1000, 1200)),
    ],
)
def test_more_than_8_bits_are_scaled_and_neither_white_nor_black(
    content: bytes, values: tuple[float, float] | None
) -> None:
    assert deviation(read(content, channels=1, value_range=values)[..., 0], GREY) <= 1
    assert read(content, value_range=values).shape == (16, 16, 3)


def test_a_value_range_given_for_a_folder_keeps_its_pictures_comparable() -> None:
    dark, light = (encoded(Image.fromarray(np.full((4, 4), value, "<u2"))) for value in (1000, 3000))
    assert (read(dark, channels=1, value_range=(0, 4000)) == 64).all()
    assert (read(light, channels=1, value_range=(0, 4000)) == 191).all()
    assert (read(light, channels=1, value_range=(0, 2000)) == 255).all()
    half = encoded(Image.fromarray(np.array([[0.25, 0.5]], "<f4")), "TIFF")
    assert read(half, channels=1).ravel().tolist() == [64, 128]  # of 0 to 1, which holds all of them


def test_12_bits_that_the_file_names_are_not_black() -> None:
    pairs = bytes([0x80, 0x0F, 0xFF]) * 8  # the values 0x800 and 0xFFF
    assert read(tiff((2, 8), 12, pairs), channels=1)[..., 0].tolist() == [[128, 255]] * 8


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_zero_is_white_is_not_a_negative(bits: int) -> None:
    pixels = b"".join((value * (257 if bits == 16 else 1)).to_bytes(bits // 8, "little") for value in range(256))
    content = tiff((16, 16), bits, pixels, zero=0)
    assert np.array_equal(read(content, channels=1)[..., 0], 255 - GREY)


def test_a_range_of_one_value_is_black_and_no_error() -> None:
    flat = encoded(Image.fromarray(np.full((2, 2), 7, "<i4")), "TIFF")
    assert not read(flat).any()
    assert not read(flat, value_range=(7, 7)).any()


def test_values_that_are_no_numbers_are_black_and_nothing_else_is_refused() -> None:
    values = np.array([[np.nan, 2, 4], [np.inf, 3, 2]], "<f4")
    image = read(encoded(Image.fromarray(values), "TIFF"), channels=1)[..., 0]
    assert image.tolist() == [[0, 0, 255], [255, 128, 0]]
    assert refusal(encoded(Image.fromarray(values[:, :1]), "TIFF")) == (
        "it cannot be read: none of its values is a number"
    )


def test_the_transparent_colour_of_16_bits_does_not_make_a_picture_white() -> None:
    grey = np.array([[0, 65535], [32896, 300]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    content = png((2, 2), 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 300)))
    assert read(content, channels=1)[..., 0].tolist() == [[0, 255], [128, 255]]
    assert read(content, background=(255, 0, 0))[1, 1].tolist() == [255, 0, 0]
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in grey)
    content = png((2, 2), 16, 2, rows, chunk(b"tRNS", struct.pack(">HHH", *[32896] * 3)))
    assert read(content, background=(9, 8, 7)).tolist() == [[[0] * 3, [255] * 3], [[9, 8, 7], [1] * 3]]


def test_cmyk_and_ycck_are_not_inverted() -> None:
    colours = Image.new("RGB", (48, 16), "red")
    colours.paste("white", (16, 0, 32, 16))
    colours.paste("navy", (32, 0, 48, 16))
    cmyk = encoded(colours.convert("CMYK"), "JPEG", quality=100)
    assert deviation(read(cmyk), np.asarray(colours)) < 8
    # In a YCCK file the inverted cyan, magenta and yellow are stored as luma and chroma; Adobe's marker says so.
    bands = ImageOps.invert(colours).convert("YCbCr").split()
    # Pillow inverts what it stores.
    ycck = Image.merge("CMYK", [*(ImageOps.invert(band) for band in bands), Image.new("L", colours.size)])
    content = bytearray(encoded(ycck, "JPEG", quality=100, subsampling=0))
    content[content.index(b"Adobe") + 11] = 2
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert deviation(read(bytes(content)), np.asarray(colours)) < 8


def in_mode(mode: str) -> Image.Image:
    """A transparent black pixel beside one of a light grey that is opaque."""
    grey = Image.fromarray(np.array([[0, 200]], np.uint8))
    picture = grey.convert(mode)
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    return picture


@pytest.mark.parametrize(
    "content",
    [
        encoded(in_mode("RGBA")),
        encoded(in_mode("LA")),
        encoded(in_mode("PA"), "TIFF"),
        encoded(in_mode("RGBA"), "TIFF"),
        encoded(in_mode("RGBA"), "WEBP", lossless=True, exact=True),
        encoded(in_mode("RGBA").quantize(4)),
        encoded(in_mode("L"), transparency=0),
        encoded(in_mode("RGB"), transparency=(0, 0, 0)),
        encoded(in_mode("L").quantize(4), transparency=bytes([255, 0])),
        encoded(in_mode("RGBA"), "GIF"),
    ],
    ids=["RGBA", "LA", "PA", "TIFF", "WebP", "palette with alpha", "grey", "one colour", "palette", "GIF"],
)
def test_the_background_shows_through_transparent_parts(content: bytes) -> None:
    assert deviation(read(content, background=(10, 60, 250)), np.array([[[10, 60, 250], [200] * 3]])) <= 1
    assert deviation(read(content, channels=1), np.array([[[255], [200]]])) <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_that_were_multiplied_by_their_alpha_are_not_dark(mode: str) -> None:
    picture = Image.new("RGBA", (1, 1), (200, 200, 200, 128)).convert("LA" if mode == "La" else "RGBA").convert(mode)
    converted = image_files._converted(picture, Preprocessing("fit", (1, 1, 3)), None)
    assert deviation(np.asarray(converted), np.array([228] * 3)) <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_colour_mode_gives_the_colours(mode: str) -> None:
    picture = scene(20, 10)
    if mode in ("1", "L"):
        picture = picture.convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    if mode == "LAB":
        stored_as = encoded(Image.new("LAB", (20, 10), (138, 209, 198)), "TIFF")  # red
        assert deviation(read(stored_as), np.array([255, 0, 0])) <= 5
        return
    converted = picture.quantize(200) if mode == "P" else picture.convert(mode)
    if mode == "HSV":  # no file has it
        as_rgb = image_files._converted(converted, Preprocessing("fit", (10, 20, 3)), None)
        assert deviation(np.asarray(as_rgb), expected) <= 6
        return
    assert np.abs(read(encoded(converted, "TIFF")).astype(int) - expected).mean() < 3


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (12, 8), (250 - number * 2, 20, number * 2)) for number in range(count)]


@pytest.mark.parametrize(("form", "count"), [("GIF", 88), ("WEBP", 5), ("PNG", 5), ("AVIF", 3), ("TIFF", 4)])
def test_the_first_frame_is_read_and_the_frames_are_counted(form: str, count: int) -> None:
    first, *others = frames(count)
    content = encoded(first, form, save_all=True, append_images=others, **BEST.get(form, {}))
    picture = image_files.read(io.BytesIO(content), "it", Preprocessing("fit", (8, 12, 3)))
    assert picture.frames == image_files.inspect(io.BytesIO(content), "it").frames == count
    assert deviation(picture.image, np.asarray(first)) <= 4


def test_inspecting_8_bits_decodes_nothing() -> None:
    content = encoded(scene(300, 200))
    facts = image_files.inspect(io.BytesIO(content[:100]), "it")
    assert facts == ("PNG", (300, 200), "RGB", 1, None, None)
    assert image_files.inspect(io.BytesIO(encoded(scene(30, 20), "JPEG")), "it").mode == "RGB"


def test_inspecting_more_bits_tells_the_lowest_and_the_highest_value() -> None:
    deep = np.arange(1000, 3000, dtype="<u2").reshape(40, 50)
    assert image_files.inspect(io.BytesIO(encoded(Image.fromarray(deep))), "it") == (
        ("PNG", (50, 40), "I;16", 1, 1000, 2999)
    )  # fmt: skip
    floats = np.array([[np.nan, -0.5], [np.inf, 1.5]], "<f4")
    facts = image_files.inspect(io.BytesIO(encoded(Image.fromarray(floats), "TIFF")), "it")
    assert (facts.mode, facts.lowest, facts.highest) == ("F", -0.5, 1.5)


def test_colour_is_a_pixel_that_is_not_grey() -> None:
    grey = scene(1500, 1100).convert("L")
    spot = grey.convert("RGB")
    spot.putpixel((1400, 1050), (10, 11, 10))
    unseen = grey.convert("RGBA")
    unseen.putpixel((3, 3), (255, 0, 0, 0))
    deep = Image.fromarray(np.zeros((3, 3), "<u2"))
    for picture in (grey, grey.convert("RGB"), grey.quantize(9), unseen, grey.convert("1"), deep):
        assert not image_files.has_colour(io.BytesIO(encoded(picture)), "it"), picture
    for picture in (spot, scene(9, 9).quantize(9)):
        assert image_files.has_colour(io.BytesIO(encoded(picture)), "it"), picture
    assert not image_files.has_colour(io.BytesIO(encoded(grey.convert("RGB"), "JPEG")), "it")
    assert image_files.has_colour(io.BytesIO(encoded(scene(9, 9), "JPEG")), "it")


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (3, 2000)])
@pytest.mark.parametrize("resize", ["fit", "crop", "stretch"])
def test_extreme_proportions_are_read(size: tuple[int, int], resize: Resize) -> None:
    image = resized(Image.new("RGB", size, (200, 100, 50)), resize, 20, 24, 3)
    coloured = (image == (200, 100, 50)).all(axis=2)
    assert coloured.any() if resize == "fit" else coloured.all()


ALLOWED = "it is not a picture; allowed: AVIF, BMP, GIF, HEIC, ICO, JPEG, PNG, TIFF, WEBP"
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "it is empty"),
        (b"not a picture at all", ALLOWED),
        (b"II", ALLOWED),
        (b"GIF89a" + bytes(100), "it cannot be read: "),
        (png((0, 5), 8, 0, b""), "it "),
        (png((5, 0), 8, 0, b""), "it "),
        (png((20_000, 15_001), 1, 0, b""), "it has more than 300,000,000 pixels"),
        (png((2**31 - 1, 2**31 - 1), 1, 0, b""), "it has more than 300,000,000 pixels"),
        (tiff((65_535, 65_535), 8, b"x"), "it has more than 300,000,000 pixels"),
        (tiff((10_000, 10_000), 8, b"x"), "it cannot be read: image file is truncated"),
        (png((1, 1), 8, 0, b"\0\0", TEXT_BOMB), "it cannot be read: Decompressed data too large"),
        (b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "it "),
    ],
)
def test_a_file_that_is_not_a_picture_is_an_error_of_one_line(content: bytes, line: str) -> None:
    assert refusal(content).startswith(line)


def test_what_needs_too_much_memory_is_refused_by_its_header() -> None:
    progressive = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True))
    start = progressive.index(b"\xff\xc2")
    progressive[start + 5 : start + 9] = struct.pack(">HH", 15_000, 15_000)
    assert refusal(bytes(progressive)) == ("it has 15000 x 15000 pixels; allowed for this kind of JPEG: 125,000,000")


@pytest.mark.faults
def test_fault_28_what_is_no_readable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    """Among these a named pipe, which must not be waited for."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(scene(4, 4)))
    (tmp_path / "secret.png").chmod(0)
    reasons = {
        "pipe.png": "is not a regular file",
        "folder.png": "cannot be read: it is a folder without pictures (.avif, ",
        "missing.png": "cannot be read: no such file",
        "secret.png": "cannot be read: Permission denied",
    }
    for name, reason in reasons.items():
        user = os.geteuid()
        if name == "secret.png" and user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(UserError) as error:
                image_files.read(tmp_path / name, name, Preprocessing("fit", (8, 8, 3)))
        finally:
            os.seteuid(user)
        assert str(error.value).startswith(f"{name} {reason}")


@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, BEST.get(form, {})) for form in FORMATS), ("JPEG", {"progressive": True}), ("WEBP", {})]
    + [("TIFF", {"compression": name}) for name in COMPRESSIONS],
)
def test_a_picture_that_was_cut_off_is_refused_or_read_as_a_whole(form: str, options: dict[str, object]) -> None:
    whole = encoded(scene(40, 30), form, **options)
    expected = read(whole)
    refused = 0
    for length in range(0, len(whole), max(1, min(10, len(whole) // 30))):
        content = io.BytesIO(whole[:length])
        try:
            image = image_files.read(content, "it", Preprocessing("fit", (30, 40, 3))).image
        except UserError as error:
            assert str(error).startswith("it ")
            assert "\n" not in str(error)
            refused += 1
        else:
            assert np.array_equal(image, expected), length
    assert refused > 0.9 * length / max(1, min(10, len(whole) // 30))


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_that_was_changed_is_read_or_refused(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(drawn(5, 20, size=60), form, **({} if form in ("BMP", "GIF", "ICO") else {"exif": exif}))
    generator = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(len(whole), size=1 + number % 4):
            damaged[place] = generator.integers(256)
        if number % 3 == 0:
            del damaged[generator.integers(len(damaged)) :]
        for ask in (image_files.inspect, image_files.has_colour, read_small):
            try:
                ask(io.BytesIO(damaged), "it")
            except UserError as error:
                assert str(error).startswith("it ")


def read_small(file: io.BytesIO, name: str) -> None:
    image = image_files.read(file, name, Preprocessing("fit", (8, 8, 3))).image
    assert image.shape == (8, 8, 3)


def test_a_large_jpeg_is_decoded_small_with_nearly_the_same_result() -> None:
    large = encoded(scene(4000, 3000), "JPEG", quality=90)
    with Image.open(io.BytesIO(large)) as picture:
        decoded = encoded(picture, "BMP")
    cases: list[tuple[Resize, tuple[int, int, int]]] = [("fit", (48, 64, 3)), ("crop", (64, 64, 1))]
    for resize, shape in cases:
        small, whole = (
            image_files.read(io.BytesIO(content), "it", Preprocessing(resize, shape)).image
            for content in (large, decoded)
        )
        assert deviation(small, whole) <= 3


def in_a_process(code: str, *arguments: str) -> tuple[str, str, int]:
    """Standard output and standard error of Python code, and its peak of memory in bytes."""
    ending = """
import resource
who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(max(resource.getrusage(each).ru_maxrss for each in who))
"""
    # A process starts with the peak of the one that starts it, which is large here and small for the shell.
    shell = ["sh", "-c", '"$0" "$@"; exit $?']
    done = subprocess.run(
        [*shell, sys.executable, "-W", "default", "-c", code + ending, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *lines, peak = done.stdout.splitlines()
    return "\n".join(lines), done.stderr, int(peak) * (1 if sys.platform == "darwin" else 1024)


READ = """
import signal, sys
import tarfile
from pathlib import Path
from pipeline.data import image_files
from pipeline.errors import UserError
for path in sys.argv[3:]:
    signal.alarm(int(sys.argv[2]))  # seconds; the process ends
    try:
        picture = image_files.read(Path(path), Path(path).name, image_files.Preprocessing(sys.argv[1], (64, 64, 3)))
        print(Path(path).name, picture.image[32, 32].tolist())
    except UserError as error:
        print(error)
"""


def test_nothing_of_pillow_or_its_libraries_reaches_standard_error(tmp_path: Path) -> None:
    damaged = bytearray(encoded(scene(40, 30), "TIFF", compression="tiff_adobe_deflate"))
    damaged[300:340] = bytes(40)
    (tmp_path / "a.tif").write_bytes(damaged)
    (tmp_path / "b.png").write_bytes(png((20_000, 10_000), 1, 0, bytes(2501 * 10_000)))
    (tmp_path / "c.png").write_bytes(png((2, 2), 8, 0, bytes(6), chunk(b"acTL", bytes(8))))
    webp = encoded(scene(40, 30), "TIFF", compression="raw").replace(
        struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 50001)
    )
    (tmp_path / "d.tif").write_bytes(webp)
    printed, said, _ = in_a_process(READ, "fit", "10", *(str(path) for path in sorted(tmp_path.iterdir())))
    assert said == ""
    assert [line.split()[0] for line in printed.splitlines()] == ["a.tif", "b.png", "c.png", "d.tif"]


def test_a_large_jpeg_is_never_whole_in_memory(tmp_path: Path) -> None:
    scene(8000, 6000).save(tmp_path / "a.jpg")
    _, _, peak = in_a_process(READ, "fit", "10", str(tmp_path / "a.jpg"))
    assert peak < 150_000_000  # of 48 megapixels with 4 bytes each


def rows_of(pixel: bytes, width: int, height: int) -> bytes:
    """Compressed rows of a PNG file."""
    packer = zlib.compressobj(1)
    return b"".join([packer.compress(b"\0" + pixel * width) for _ in range(height)]) + packer.flush()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "colour", "pixel", "resize", "expected"),
    [
        (8, 2, b"\x10\x80\xf0", "fit", [16, 128, 240]),
        (8, 6, b"\x10\x80\xf0\x80", "fit", [135, 191, 247]),
        (8, 4, b"\x10\x80", "crop", [135, 135, 135]),
        (16, 0, b"\x80\x80", "stretch", [128, 128, 128]),
        (8, 2, b"\x10\x80\xf0", "strokes", None),
    ],
)
def test_300_megapixels_are_read_in_bounded_memory(
    depth: int, colour: int, pixel: bytes, resize: str, expected: list[int] | None, tmp_path: Path
) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 15_000, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", rows_of(pixel, 20_000, 15_000))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    printed, said, peak = in_a_process(READ, resize, "200", str(tmp_path / "a.png"))
    assert (printed, said) == (f"a.png {expected}" if expected else "a.png is blank", "")
    assert peak < MAX_MEMORY


PREPARE = """
import csv, os, sys
from pathlib import Path
from pipeline.data import own_pictures
from pipeline.params import Data
folder, os.environ["DVC_ROOT"] = Path(sys.argv[1]), sys.argv[2]
paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
with (folder / "labels.csv").open("w", newline="") as table:
    csv.writer(table).writerows([("path", "label"), *((path, number % 2) for number, path in enumerate(paths))])
own = own_pictures.prepare(Data(dataset="folder", path=str(folder), labels="labels.csv", max_bad_fraction=0.9))
assert [row.path for row in own.rows] == paths
assert all(row.split or row.reason.startswith(row.path) for row in own.rows)
print(sum(bool(row.split) for row in own.rows), sum(not row.split for row in own.rows))
"""


@pytest.mark.slow
def test_the_odd_pictures_of_pillows_own_tests_are_read_or_refused(tmp_path: Path) -> None:
    wanted = ["--no-deps", "--no-binary", "pillow", f"pillow=={metadata.version('pillow')}"]
    command = [sys.executable, "-m", "pip", "download", *wanted, "--dest", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "connection broken" in done.stderr and done.returncode:
        pytest.skip(
            "reads the thousand odd pictures of Pillow's own tests, which are only in its source archive: other "
            "people's, so not copied into this repository, and pip cannot reach the package index from this machine"
        )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    paths = sorted(path for path in tmp_path.glob("*/Tests/images/**/*") if path.is_file())
    assert len(paths) > 1000
    printed, said, peak = in_a_process(READ, "fit", "10", *(str(path) for path in paths))
    lines = printed.splitlines()
    assert said == ""
    assert peak < MAX_MEMORY
    assert [line.startswith(path.name) for path, line in zip(paths, lines, strict=True)] == [True] * len(paths)
    read = sum(line.endswith("]") for line in lines)
    assert read > 650
    printed, said, peak = in_a_process(PREPARE, str(next(tmp_path.glob("*/Tests/images"))), str(tmp_path))
    used, refused = map(int, printed.splitlines()[-1].split())
    assert (used, used + refused) == (read, len(paths))
    assert said == ""
    assert peak < MAX_MEMORY


FACTS = {"resize": "fit", "image_shape": [20, 30, 3], "background": [255, 0, 9], "value_range": [0.5, 4000.0]}


def test_a_preprocessing_is_what_its_facts_say() -> None:
    assert Preprocessing.from_facts(FACTS) == Preprocessing("fit", (20, 30, 3), (255, 0, 9), (0.5, 4000.0))


@pytest.mark.parametrize(
    "changed",
    [
        {"resize": "melt"},
        {"image_shape": [20, 30]},
        {"image_shape": [20.0, 30.0, 3.0]},
        {"background": [999, -5, 0]},
        {"background": [10**30, 0, 0]},
        {"value_range": [5.0, 1.0]},
        {"value_range": [0.0, float("inf")]},
        {"value_range": [float("nan"), 1.0]},
        {"\x1b[31mx": 1},
    ],
)
def test_facts_that_cannot_be_are_refused_in_one_printable_line(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^\S.*\S$") as refused:
        Preprocessing.from_facts(FACTS | changed)
    assert str(refused.value).isprintable()
