"""Picture files from anywhere -> images (H, W, C) uint8 like those that the network was trained on.

The content of a file decides what it is, not its suffix. Of several frames or pages the first is read. ICC profiles are
ignored: the pixels are taken as sRGB.
"""

import ctypes
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from pydantic import TypeAdapter, ValidationError

from pipeline.data import strokes
from pipeline.data.file_trees import is_system, open_regular
from pipeline.errors import UserError, printable

FORMATS = tuple(
    plugin.format
    for plugin in (
        AvifImagePlugin.AvifImageFile, BmpImagePlugin.BmpImageFile, GifImagePlugin.GifImageFile,
        IcoImagePlugin.IcoImageFile, JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile,
        TiffImagePlugin.TiffImageFile, WebPImagePlugin.WebPImageFile,
    )
)  # fmt: skip
MODULES = {"pillow": "PIL", "pillow-heif": "pillow_heif"}
HEIF = "HEIF"  # read by pillow_heif, if that is installed
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
ALLOWED = ", ".join(sorted((*FORMATS, "HEIC")))
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif",
            ".tiff", ".webp")  # fmt: skip
# What Pillow raises for truncated or corrupted files.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, RuntimeError, ArithmeticError,
    AssertionError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
# Tags of EXIF and TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, SAMPLES_PER_PIXEL, ROWS_PER_STRIP = 258, 262, 274, 277, 278
TILE_WIDTH, TILE_LENGTH = 322, 323
MAX_PIXELS = 300_000_000
MAX_MEMORY = 1_250_000_000  # bytes that decoding may take
LARGE = 25_000_000  # pixels; processes that decode together take turns with more
TILE = 1024  # pixels; a larger picture is converted in parts, so that there is no second copy of it
REDUCING_GAP = 3  # the result is within a few grey levels of that without reducing
MAX_STROKE_PIXELS = 16_000_000  # larger pictures are reduced before the character is looked for
GREY_MODES = ("1", "L", "LA", "La")  # and those of more than 8 bits
Resize = Literal["fit", "crop", "stretch", "strokes"]
Size = tuple[int, int]  # width, height in pixels
File = str | Path | IO[bytes]  # a binary file can be read from any position
Number = TypeVar("Number", int, float)
large_pictures: Callable[[], AbstractContextManager[None]] = nullcontext  # how a process takes its turn with one


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an image of the network. Stored with the model; whatever reads a picture for it uses this.

    ``resize`` is a name in RESIZE, ``image_shape`` is (H, W, C) with 1 or 3 channels. ``background`` (red, green, blue)
    is what shows through transparent parts, and what "fit" fills the image up with. ``value_range`` holds the values of
    black and white in pictures of more than 8 bits. Without it these are 0 and 65,535 for 16 bits, or what the file
    says for fewer; 0 and 1 for fractions if all are between them; otherwise the lowest and highest of the picture.
    """

    resize: Resize
    image_shape: tuple[int, int, int]
    background: tuple[int, int, int] = (255, 255, 255)
    value_range: tuple[float, float] | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Self:
        """The one whose fields, as JSON has them, are ``facts``. Raises ValueError where it cannot be."""
        try:
            found = TypeAdapter(cls).validate_json(json.dumps(facts), strict=True, extra="forbid")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from None
        lowest, highest = found.value_range or (0, 0)
        if not all(0 <= level <= 255 for level in found.background) or not -math.inf < lowest <= highest < math.inf:
            raise ValueError("colours are from 0 to 255, and ranges finite, the lower value first")
        return found

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """Pillow's mode for the number of channels."""
        return "L" if self.image_shape[2] == 1 else "RGB"

    def filled(self, size: Size) -> tuple[int, int, int, int]:
        """The part of the image, as left, top, right, bottom, that a picture of this size fills."""
        height, width, _ = self.image_shape
        if self.resize != "fit":
            return 0, 0, width, height
        scale = min(width / size[0], height / size[1])
        across, down = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down

    def plain(self, size: Size) -> Image.Image:
        """A picture of nothing but the background."""
        return Image.new("RGB", size, self.background).convert(self.mode)


class Picture(NamedTuple):
    """What a file held: an image (H, W, C) uint8, and what ``Facts`` says of the file."""

    image: NDArray[np.uint8]
    format: str
    size: Size
    mode: str
    frames: int


class Facts(NamedTuple):
    """Pillow's names of a file's format and mode, its size upright, and how many frames or pages it has.

    ``lowest`` and ``highest`` are the range of its values, if these have more than 8 bits.
    """

    format: str
    size: Size
    mode: str
    frames: int
    lowest: float | None = None
    highest: float | None = None


def version() -> str:
    """What the pixels of an image depend on besides its file: this code and the libraries that it uses."""
    libraries = [f"{name} {metadata.version(name)}" for name in ("pillow", "pillow-heif") if find_spec(MODULES[name])]
    code = b"".join(Path(file).read_bytes() for file in (__file__, strokes.__file__))
    return " ".join([hashlib.sha256(code).hexdigest(), *libraries])


def pictures(folder: Path) -> list[Path]:
    """The picture files in a folder and in the folders inside it, by their suffixes, in alphabetical order.

    Without those that a system or a program has put there.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if not any(map(is_system, path.relative_to(folder).parts)))


def read(file: File, name: str, preprocessing: Preprocessing) -> Picture:
    """A picture as an image of the network, turned upright. The same bytes always give the same image.

    Raises UserError with ``name`` and the reason where a file cannot be read as a whole.
    """
    with _picture(file, name) as picture:
        mode, frames = picture.mode, _frames(picture)
        upright = Upright(picture, name, preprocessing)
        image = np.array(RESIZE[preprocessing.resize](upright)).reshape(preprocessing.image_shape)
        return Picture(image, str(picture.format), upright.size, mode, frames)


def inspect(file: File, name: str) -> Facts:
    """What a file holds. Of 8-bit pictures only the header is read. Raises UserError as ``read`` does."""
    with _picture(file, name) as picture:
        size = _turned(picture.size, _orientation(picture))
        facts = Facts(str(picture.format), size, picture.mode, _frames(picture))
        if not _is_deep(picture.mode):
            return facts
        picture.load()
        lowest, highest = _extremes(picture)
        return facts._replace(lowest=lowest, highest=highest)


def has_colour(file: File, name: str) -> bool:
    """Whether a pixel is not grey, over a white background. Raises UserError as ``read`` does."""
    in_colour = Preprocessing("stretch", (1, 1, 3))
    with _picture(file, name) as picture:
        if picture.mode in GREY_MODES or _is_deep(picture.mode):
            return False
        picture.load()
        for _, part in _parts(picture, (TILE, TILE)):
            pixels = np.asarray(_converted(part, in_colour, None))
            if (pixels != pixels[..., :1]).any():
                return True
        return False


class Upright:
    """An open picture, as it looks when it is upright. ``name`` is for messages."""

    def __init__(self, picture: ImageFile.ImageFile, name: str, preprocessing: Preprocessing) -> None:
        self._picture, self.name, self.preprocessing = picture, name, preprocessing
        self._is_jpeg = isinstance(picture, JpegImagePlugin.JpegImageFile)
        if not self._is_jpeg:  # only JPEG can be decoded at a smaller size
            picture.load()
        self._orientation = _orientation(picture)
        self.size: Size = _turned(picture.size, self._orientation)

    def scaled(self, size: Size, middle: tuple[float, float] | None = None, gap: int = REDUCING_GAP) -> Image.Image:
        """The picture, or the ``middle`` part of this width and height, as a picture of ``size`` in L or RGB.

        To save time and memory it is first reduced by averaging, to ``gap`` times the size or more. May be called once:
        the pixels of the file are given up.
        """
        picture, stored, part = self._picture, self._picture.size, middle or self.size
        shrink = _turned((part[0] / size[0], part[1] / size[1]), self._orientation)
        enough = [max(1, int(gap * whole / each)) for whole, each in zip(stored, shrink, strict=True)]
        drafted = picture.draft(None, (enough[0], enough[1])) if self._is_jpeg else None
        decoded = drafted[1][2:] if drafted else stored  # may be fractions: the last pixels stand for less
        picture.load()
        factors = [
            max(1, int(each * now / whole / gap)) for each, now, whole in zip(shrink, decoded, stored, strict=True)
        ]
        reduced = self._reduced((factors[0], factors[1]))
        Image.Image.close(picture)  # not the file, which may be the caller's
        extent = _turned((decoded[0] / factors[0], decoded[1] / factors[1]), self._orientation)
        if self._orientation in TRANSPOSE:
            reduced = reduced.transpose(TRANSPOSE[self._orientation])
        left = reduced.width - extent[0] if self._orientation in (2, 3, 6, 7) else 0
        top = reduced.height - extent[1] if self._orientation in (3, 4, 7, 8) else 0
        across = extent[0] * (1 - part[0] / self.size[0]) / 2
        down = extent[1] * (1 - part[1] / self.size[1]) / 2
        box = left + across, top + down, left + extent[0] - across, top + extent[1] - down
        return reduced.resize(size, Image.Resampling.LANCZOS, box=box)

    def _reduced(self, factors: Size) -> Image.Image:
        """The stored picture in L or RGB, each pixel the mean of as many pixels as ``factors`` say."""
        picture, preprocessing = self._picture, self.preprocessing
        values = _black_and_white(picture, preprocessing.value_range) if _is_deep(picture.mode) else None
        sides = max(1, TILE // factors[0]) * factors[0], max(1, TILE // factors[1]) * factors[1]
        if picture.width <= sides[0] and picture.height <= sides[1]:
            return _converted(picture, preprocessing, values).reduce(factors)
        size = math.ceil(picture.width / factors[0]), math.ceil(picture.height / factors[1])
        reduced = Image.new(preprocessing.mode, size)
        for (left, top), part in _parts(picture, sides):
            converted = _converted(part, preprocessing, values).reduce(factors)
            reduced.paste(converted, (left // factors[0], top // factors[1]))
        return reduced


def _fit(picture: Upright) -> Image.Image:
    """Scaled to fit inside the image; the background fills what is left. Nothing is cut off."""
    height, width, _ = picture.preprocessing.image_shape
    left, top, right, bottom = picture.preprocessing.filled(picture.size)
    if (right - left, bottom - top) == (width, height):
        return picture.scaled((width, height))
    image = picture.preprocessing.plain((width, height))
    image.paste(picture.scaled((right - left, bottom - top)), (left, top))
    return image


def _crop(picture: Upright) -> Image.Image:
    """Scaled to fill the image; what does not fit, on two sides, is cut off."""
    height, width, _ = picture.preprocessing.image_shape
    across, down = picture.size
    if across * height > down * width:
        return picture.scaled((width, height), (down * width / height, down))
    return picture.scaled((width, height), (across, across * height / width))


def _stretch(picture: Upright) -> Image.Image:
    """Scaled to fill the image, whatever that does to the proportions."""
    height, width, _ = picture.preprocessing.image_shape
    return picture.scaled((width, height))


def _strokes(picture: Upright) -> NDArray[np.uint8]:
    """A drawn or written character, like those of MNIST."""
    across, down = picture.size
    scale = min(1.0, math.sqrt(MAX_STROKE_PIXELS / (across * down)))
    sheet = picture.scaled((max(1, round(across * scale)), max(1, round(down * scale))), gap=1)
    return strokes.centred(sheet, picture.preprocessing.image_shape, picture.name)


RESIZE: Mapping[Resize, Callable[[Upright], Image.Image | NDArray[np.uint8]]] = {
    "fit": _fit,
    "crop": _crop,
    "stretch": _stretch,
    "strokes": _strokes,
}
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


@contextmanager
def opened(file: File, name: str) -> Iterator[IO[bytes]]:
    """A file at its beginning. A path to what is not a file, or cannot be read, is a UserError."""
    if not isinstance(file, str | Path):
        file.seek(0)
        yield file
        return
    try:
        content = open_regular(file, name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error
    with content:
        yield content


@contextmanager
def _picture(file: File, name: str) -> Iterator[ImageFile.ImageFile]:
    """A picture of at most MAX_PIXELS whose pixels are not decoded yet. What goes wrong with it is a UserError."""
    try:
        # Pillow would map a file that it opens itself into memory, and crash if that became shorter meanwhile.
        with opened(file, name) as content, _identified(content, name) as picture, _turn(picture):
            yield picture
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read: it is damaged, or of a kind that Pillow does not know") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels") from error
    except DAMAGED as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error


def _turn(picture: ImageFile.ImageFile) -> AbstractContextManager[None]:
    return large_pictures() if picture.width * picture.height > LARGE else nullcontext()


def _identified(content: IO[bytes], name: str) -> ImageFile.ImageFile:
    _set_up_pillow()
    start = content.read(64)
    if not start:
        raise UserError(f"{name} is empty")
    found = HEIF if _is_heif(start) else next((each for each in FORMATS if _accepts(each, start)), None)
    if found is None:
        raise UserError(f"{name} is not a picture; allowed: {ALLOWED}")
    if found == HEIF and HEIF not in Image.OPEN:
        _register_heif(name)
    picture = Image.open(content, formats=[found])
    if picture.tile and picture.tile[0].args == "RGB;16B" and "transparency" in picture.info:
        # Pillow keeps the upper 8 bits of the pixels.
        picture.info["transparency"] = tuple(value >> 8 for value in picture.info["transparency"])
    pixels = picture.width * picture.height
    if not pixels:
        raise UserError(f"{name} has no pixels: {picture.width} x {picture.height}")
    if pixels > (most := min(MAX_PIXELS, int(MAX_MEMORY / _bytes_per_pixel(picture)))):
        size = f"{picture.width} x {picture.height}"
        raise UserError(f"{name} has {size} pixels; allowed for this kind of {found}: {most:,}")
    return picture


@functools.cache
def _set_up_pillow() -> None:
    """Not at import, and not for each picture: a filter that one thread sets for a while holds for all of them."""
    Image.preinit()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # twice as many are an error
    warnings.filterwarnings("ignore", module=r"PIL\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    libraries = ctypes.CDLL(importlib.import_module("PIL._imaging").__file__)
    with suppress(AttributeError):  # where Pillow has no libtiff of its own, or none at all
        libraries.TIFFSetErrorHandler(None)  # else it writes to standard error


def _accepts(picture_format: str, start: bytes) -> bool:
    accept = Image.OPEN[picture_format][1]
    return accept is not None and bool(accept(start[:16]))


def _is_heif(start: bytes) -> bool:
    """The file type box of ISO media files: its size, "ftyp", the major brand, a version, and other brands."""
    if start[4:8] != b"ftyp":
        return False
    end = min(len(start), int.from_bytes(start[:4], "big"))
    return not HEIF_BRANDS.isdisjoint([start[8:12], *(start[place : place + 4] for place in range(16, end, 4))])


def _register_heif(name: str) -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise UserError(f"{name} is a HEIC picture, which needs another package: pip install pillow-heif") from error


def _bytes_per_pixel(picture: ImageFile.ImageFile) -> float:
    """What decoding takes at most: Pillow's own pixels, and what it or a library keeps beside them."""
    own = {"1": 1, "L": 1, "P": 1}.get(picture.mode, 4)
    if picture.format in ("AVIF", HEIF, "WEBP"):
        return own + 12  # the canvas, the frame before it, and a copy
    if isinstance(picture, JpegImagePlugin.JpegImageFile) and "progressive" in picture.info:
        return own + 2 * picture.layers  # the coefficients
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        samples = picture.tag_v2.get(SAMPLES_PER_PIXEL, 1) * picture.tag_v2.get(BITS_PER_SAMPLE, (1,))[0] / 8
        strip = max(4, samples) * _part_at_once(picture) if picture.use_load_libtiff else 0
        turned = own if picture.tag_v2.get(ORIENTATION, 1) != 1 else 0  # by Pillow, as a whole
        return own + max(float(strip), turned)
    return own


def _part_at_once(picture: TiffImagePlugin.TiffImageFile) -> float:
    """The share of a TIFF picture that is unpacked together: a tile or a strip, or all of it."""
    if TILE_WIDTH in picture.tag_v2:
        pixels = picture.tag_v2[TILE_WIDTH] * picture.tag_v2.get(TILE_LENGTH, picture.height)
        return float(min(1, pixels / (picture.width * picture.height)))
    return float(min(1, picture.tag_v2.get(ROWS_PER_STRIP, picture.height) / picture.height))


def _frames(picture: ImageFile.ImageFile) -> int:
    return int(getattr(picture, "n_frames", 1))


def _orientation(picture: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8. Pillow itself turns TIFF pictures."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        # That of PNG pictures would decode all pixels.
        found = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except DAMAGED:
        return 1
    return found if found in TRANSPOSE else 1


def _turned(sides: tuple[Number, Number], orientation: int) -> tuple[Number, Number]:
    """Width and height of an upright picture from those that are stored, and the other way round."""
    return sides[::-1] if orientation >= 5 else sides


def _is_deep(mode: str) -> bool:
    return mode.startswith(("I", "F"))


def _parts(picture: Image.Image, sides: Size) -> Iterator[tuple[Size, Image.Image]]:
    """The picture in parts of at most these sides, each with its left and top edge."""
    for top, left in itertools.product(range(0, picture.height, sides[1]), range(0, picture.width, sides[0])):
        right, bottom = min(left + sides[0], picture.width), min(top + sides[1], picture.height)
        yield (left, top), picture.crop((left, top, right, bottom))


def _converted(picture: Image.Image, preprocessing: Preprocessing, values: tuple[float, float] | None) -> Image.Image:
    """In L or RGB, over the background. ``values`` are those of black and white, for more than 8 bits."""
    clear = picture.info.get("transparency")
    if values:
        black, white = values
        levels = np.asarray(picture, dtype=np.float64)
        grey = np.nan_to_num((levels - black) * (255 / (white - black or 1))).clip(0, 255).round().astype(np.uint8)
        image = Image.fromarray(grey).convert(preprocessing.mode)
        if isinstance(clear, int):
            image = Image.composite(preprocessing.plain(picture.size), image, Image.fromarray(levels == clear))
        return image
    if picture.has_transparency_data:
        under = Image.new("RGBA", picture.size, preprocessing.background)
        over = picture.convert("LA") if picture.mode == "La" else picture
        return Image.alpha_composite(under, over.convert("RGBA")).convert("RGB").convert(preprocessing.mode)
    if picture.mode == preprocessing.mode:
        return picture
    return (picture if picture.mode in ("1", "L") else picture.convert("RGB")).convert(preprocessing.mode)


def _black_and_white(picture: ImageFile.ImageFile, given: tuple[float, float] | None) -> tuple[float, float]:
    """The values that are black and white in a picture of more than 8 bits, where ``given`` are those of a folder."""
    tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
    if given:
        lowest, highest = given
    elif picture.mode.startswith("I;16"):
        lowest, highest = 0, 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    else:
        lowest, highest = _extremes(picture)
        if picture.mode == "F" and lowest >= 0 and highest <= 1:
            lowest, highest = 0, 1
    return (highest, lowest) if tags.get(PHOTOMETRIC) == 0 else (lowest, highest)  # Pillow inverts 8 bits only


def _extremes(picture: Image.Image) -> tuple[float, float]:
    """The lowest and the highest value that is a number."""
    lowest, highest = math.inf, -math.inf
    for _, part in _parts(picture, (TILE, TILE)):
        values = np.asarray(part)
        if (numbers := values[np.isfinite(values)]).size:
            lowest, highest = min(lowest, float(numbers.min())), max(highest, float(numbers.max()))
    if lowest > highest:
        raise ValueError("none of its values is a number")
    return lowest, highest


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return f"it is a folder without pictures ({', '.join(SUFFIXES)})"
        case MemoryError():
            return "there is not enough memory for it"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return printable(str(error)) or "it is damaged"
