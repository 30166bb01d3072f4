"""The process that decodes pictures: the same images as everywhere else, and what bad pictures do to it."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipeline.data import decoder as decoding
from pipeline.data import image_files, own_pictures
from pipeline.data.decoder import Decoder, Decoders, Request
from pipeline.data.image_files import ALLOWED, Preprocessing
from pipeline.errors import Fault, UserError
from pipeline.params import Data
from tests.conftest import REPOSITORY
from tests.data.test_image_files import encoded, scene, stored

COLOUR = Preprocessing("fit", (24, 24, 3), background=(9, 99, 199))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as found:
        assert image(found)
        yield found


def image(decoder: Decoder, content: bytes = b"", name: str = "it") -> bytes:
    """What the decoder makes of a picture, by default a red one."""
    picture = content or encoded(Image.new("RGB", (9, 9), "red"))
    return decoder.image(name, memoryview(picture), COLOUR).tobytes()


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
    with Decoder() as decoder:
        for row in rows:
            path = folder / row.path
            trained = own.prepared.splits[row.split].images[int(row.index)].numpy().tobytes()
            assert decoder.image("it", memoryview(path.read_bytes()), how).tobytes() == trained, path
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
    with Decoder(memory=150_000_000) as decoder:
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
        if number != signal.SIGKILL:  # which ends a suspended process too
            process.resume()
        assert asked.result(30)
    assert process != process_of(decoder)


@pytest.mark.faults
def test_a_picture_that_ends_the_decoder_twice_is_refused_and_the_next_is_read() -> None:
    with Decoder(memory=150_000_000) as decoder:  # less than the file has
        with pytest.raises(UserError, match="it cannot be read: the process that decodes it ended with exit code 1"):
            image(decoder, bytes(200_000_000))
        assert image(decoder)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", turned(2) + b"\0" * 1_000_000], ids=["small", "more than a pipe holds"])
def test_a_picture_that_takes_too_long_is_given_up(content: bytes) -> None:
    with Decoder(seconds=1) as decoder:
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
        image(Decoder())


@pytest.mark.faults
def test_the_decoder_ends_with_a_process_that_is_killed() -> None:
    code = """
import time
from pipeline.data.decoder import Decoder
print(Decoder()._process.pid, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        decoder = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([decoder], timeout=30)
    assert not decoder.is_running() or decoder.status() == psutil.STATUS_ZOMBIE


def save_pictures(folder: Path, count: int) -> list[Request]:
    """Pictures in files; the last but one is none."""
    requests = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        path.write_bytes(b"words" if number == count - 2 else turned(number))
        requests.append(Request(path.name, str(path), (COLOUR,)))
    return requests


def content_of(path: str) -> memoryview:
    return memoryview(Path(path).read_bytes())


def test_several_processes_answer_in_order_for_files_and_for_contents(tmp_path: Path) -> None:
    requests = save_pictures(tmp_path, 2 * decoding.TASK + 7)
    contents = [each._replace(source=partial(content_of, str(each.source))) for each in requests]
    with Decoders() as decoders:
        of_files = list(decoders.ask(decoding.image, requests))
        of_contents = list(decoders.ask(decoding.image, contents))
        facts = list(decoders.ask(decoding.facts, [Request(name, source) for name, source, _ in requests]))
    for number, (answer, other, fact) in enumerate(zip(of_files, of_contents, facts, strict=True)):
        if isinstance(fact, UserError):
            assert number == len(requests) - 2
            assert str(answer) == str(other) == str(fact) == f"{number}.jpg is not a picture; allowed: {ALLOWED}"
        else:
            assert answer == other == image_files.read(io.BytesIO(turned(number)), "it", COLOUR).image.tobytes()
            assert [each.size for each in decoding.facts_from([fact])] == [(90, 60)]


def test_a_content_that_cannot_be_had_is_a_refusal_of_its_picture_alone() -> None:
    def broken() -> memoryview:
        raise UserError("it is damaged in its zip")

    whole = memoryview(turned(0))
    with Decoder() as decoder:
        answers = decoder.ask(decoding.image, [Request("it", each, (COLOUR,)) for each in (whole, broken, whole)])
    assert str(answers[1]) == "it is damaged in its zip"
    assert answers[0] == answers[2] == image_files.read(io.BytesIO(whole), "it", COLOUR).image.tobytes()


@pytest.mark.faults
def test_a_picture_that_crashes_its_process_is_named_and_all_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault of a library in C does, with a module that each process imports at its start."""
    (tmp_path / "sitecustomize.py").write_text(CRASHES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    requests = save_pictures(tmp_path, 10)
    with Decoders() as decoders:
        answers = list(decoders.ask(decoding.image, requests))
    assert str(answers[3]) == "3.jpg cannot be read: the process that decodes it was ended by SIGSEGV"
    assert [isinstance(answer, bytes) for answer in answers] == [number not in (3, 8) for number in range(10)]


@pytest.mark.faults
def test_a_picture_that_takes_too_long_among_others_is_given_up_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        CRASHES.replace("os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(60)")
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    started = time.monotonic()
    with Decoder(seconds=2) as decoder:
        answers = decoder.ask(decoding.image, save_pictures(tmp_path, 10))
    assert str(answers[3]) == "3.jpg cannot be read: decoding took more than 2 s"
    assert [isinstance(answer, bytes) for answer in answers] == [number not in (3, 8) for number in range(10)]
    assert time.monotonic() - started < 20


@pytest.mark.faults
def test_what_the_disk_says_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read
    with Decoder() as decoder:
        for path, reason in (
            ("", f"it is a folder without pictures ({', '.join(image_files.SUFFIXES)})"),  # the one that one is in
            (str(tmp_path / "none.jpg"), "no such file"),
            (str(tmp_path / "bad.jpg"), "Input/output error"),
        ):
            for function in (decoding.digest, decoding.facts):
                assert str(decoder.ask(function, [Request("it", path)])[0]) == f"it cannot be read: {reason}"


@pytest.mark.faults
def test_a_process_that_is_killed_while_it_starts_is_started_again() -> None:
    with Decoder() as decoder:
        process_of(decoder).kill()
        assert image(decoder)


@pytest.mark.faults
def test_what_an_interrupted_request_would_have_answered_is_not_the_answer_of_the_next() -> None:
    def interrupted() -> memoryview:
        raise KeyboardInterrupt

    red, grey = (memoryview(encoded(Image.new(mode, (9, 9), 90))) for mode in ("RGB", "L"))
    with Decoder() as decoder:
        with pytest.raises(KeyboardInterrupt):
            decoder.ask(decoding.image, [Request("it", each, (COLOUR,)) for each in (red, interrupted)])
        assert image(decoder, bytes(grey)) == image_files.read(io.BytesIO(grey), "it", COLOUR).image.tobytes()


CRASHES = """
import os, signal, sys, time

def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith("3.jpg"):
        os.kill(os.getpid(), signal.SIGSEGV)

sys.addaudithook(audit)
"""


@pytest.mark.faults
def test_large_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of all processes together stays that of one picture: 26 megapixels in colour have 104 MB."""
    requests = []
    for number in range(4):
        Image.new("RGB", (6500, 4000), (number, 0, 0)).save(path := tmp_path / f"{number}.png", compress_level=1)
        requests.append(Request(path.name, str(path), (COLOUR,)))
    monkeypatch.setattr(decoding, "TASK", 1)
    with Decoders() as decoders, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: list(decoders.ask(decoding.image, requests)))
        peak = 0
        while not answers.done():
            sizes = [psutil.Process(each._process.pid).memory_info().rss for each in list(decoders._all)]
            peak = max(peak, sum(sizes))
            time.sleep(0.005)
        assert all(isinstance(answer, bytes) for answer in answers.result())
    assert 100_000_000 < peak < 60_000_000 * len(sizes) + 160_000_000
