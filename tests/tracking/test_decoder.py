"""The process that decodes pictures: the same images as everywhere else, and what bad pictures do to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipeline.data import image_files, own_pictures
from pipeline.data.image_files import Preprocessing
from pipeline.errors import Fault, UserError
from pipeline.params import Data
from pipeline.tracking.decoder import Decoder
from tests.conftest import REPOSITORY
from tests.data.test_image_files import encoded, scene, stored

COLOUR = Preprocessing("fit", (24, 24, 3), background=(9, 99, 199))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(COLOUR) as found:
        assert image(found)
        yield found


def image(decoder: Decoder, content: bytes = b"", name: str = "it") -> bytes:
    """What the decoder makes of a picture, by default a red one."""
    picture = content or encoded(Image.new("RGB", (9, 9), "red"))
    (found,) = decoder.images([(name, memoryview(picture))])
    return found.tobytes()


def process_of(decoder: Decoder) -> psutil.Process:
    return psutil.Process(decoder._process.pid)


def turned(number: int) -> bytes:
    """A colour photograph unlike the others, as a JPEG file that is upright by its EXIF orientation only."""
    orientation = 1 + number % 8
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = orientation
    upright = scene(90, 60).rotate(7 * number, fillcolor=(20 * number, 90, 0))
    return encoded(stored(upright, orientation), "JPEG", exif=exif, quality=95)


def test_a_picture_gives_the_same_bytes_in_training_in_predict_and_in_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In colour, turned by EXIF data, with transparent parts, and of 16 bits."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    folder = tmp_path / "things"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(12):
            (folder / label / f"{number}.jpg").write_bytes(turned(number + 12 * (label == "dog")))
    clear = scene(40, 70).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "cat/clear.png")
    deep = Image.linear_gradient("L").convert("I").point(lambda level: level * 200 + 3000).convert("I;16")
    deep.save(folder / "dog/deep.png")

    own = own_pictures.prepare(Data(dataset="folder", path=str(folder), near_duplicates=None))
    how = own.prepared.preprocessing
    assert how.image_shape[2] == 3
    assert how.value_range
    rows = [row for row in own.rows if row.split]
    assert len(rows) == 26
    with Decoder(how) as decoder:
        for row in rows:
            path = folder / row.path
            trained = own.prepared.splits[row.split].images[int(row.index)].numpy().tobytes()
            assert image(decoder, path.read_bytes()) == trained, path
            assert image_files.read(path, "it", how).image.tobytes() == trained, path


def test_a_picture_that_cannot_be_read_is_named_with_the_reason(decoder: Decoder) -> None:
    whole = turned(1)
    for content, reason in (
        (b"words", "part 2 is not a picture; allowed: AVIF, "),
        (whole[: len(whole) // 2], "part 2 cannot be read: image file is truncated"),
        (b"\0" * 1_000_000, "part 2 is not a picture"),
    ):
        with pytest.raises(UserError, match=reason):
            image(decoder, content, "part 2")
    assert image(decoder)


@pytest.mark.faults
def test_a_picture_for_which_there_is_no_memory_ends_nothing() -> None:
    large = encoded(Image.new("RGB", (6000, 6000)))  # 144 MB of pixels
    with Decoder(COLOUR, memory=150_000_000) as decoder:
        process = process_of(decoder)
        with pytest.raises(UserError, match="it cannot be read: there is not enough memory for it"):
            image(decoder, large)
        assert image(decoder)
        assert process == process_of(decoder)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_crashes_is_started_again(decoder: Decoder, number: signal.Signals) -> None:
    """Between two pictures, and with a picture: somebody else may have been the cause."""
    process_of(decoder).send_signal(number)
    assert image(decoder)
    process = process_of(decoder)
    process.suspend()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(image, decoder)
        time.sleep(0.2)
        process.send_signal(number)
        process.resume()
        assert asked.result(30)
    assert process != process_of(decoder)


@pytest.mark.faults
def test_a_picture_that_ends_the_decoder_twice_is_refused_and_the_next_is_read() -> None:
    with Decoder(COLOUR, memory=150_000_000) as decoder:  # less than the file has
        with pytest.raises(UserError, match="it cannot be read: the process that decodes it ended with exit code 1"):
            image(decoder, bytes(200_000_000))
        assert image(decoder)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", turned(2) + b"\0" * 1_000_000], ids=["small", "more than a pipe holds"])
def test_a_picture_that_takes_too_long_is_given_up(content: bytes) -> None:
    with Decoder(COLOUR, seconds=1) as decoder:
        assert image(decoder)
        process_of(decoder).suspend()
        with pytest.raises(UserError, match="it cannot be read: decoding took more than 1 s"):
            image(decoder, content)
        assert image(decoder)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("program", "reason"), [("/nowhere/python", "No such file or directory"), ("/bin/false", "with exit code 1")]
)
def test_a_decoder_that_cannot_be_started_is_no_fault_of_the_picture(
    monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(Fault, match=f"no picture can be decoded: .*{reason}"):
        image(Decoder(COLOUR))


@pytest.mark.faults
def test_the_decoder_ends_with_a_server_that_is_killed() -> None:
    code = """
import time
from pipeline.data.image_files import Preprocessing
from pipeline.tracking.decoder import Decoder
print(Decoder(Preprocessing("fit", (8, 8, 1)))._process.pid, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout
        decoder = psutil.Process(int(server.stdout.readline()))
        server.kill()
    psutil.wait_procs([decoder], timeout=30)
    assert not decoder.is_running() or decoder.status() == psutil.STATUS_ZOMBIE
