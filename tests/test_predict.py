"""`python -m pipeline.predict` as its users meet it."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline import predict
from pipeline.data import strokes
from pipeline.data.splits import TEST, read_dataset, read_split
from pipeline.tracking import registry, store
from tests import forked, unlike
from tests.conftest import run_command
from tests.drawn import all_of_them, drawn


@pytest.fixture
def folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(good))
    monkeypatch.chdir(good)
    return good


def test_digits_from_outside_come_out_right(folder: Path) -> None:
    """By the model that has seen 3,644 digits, most of them; CI asks that of all of MNIST, too."""
    store.connect()
    model = registry.load(registry.find("champion"))
    answers = []
    for name, digit, picture in all_of_them():
        image = strokes.centred(picture, model.image_shape, name)
        answers.append(int(model.classify(image[None]).probabilities.argmax()) == digit)
    assert sum(answers) >= 0.85 * len(answers)


def test_a_line_for_each_picture_and_one_for_each_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    drawn(3, 20).save(tmp_path / "three.png")
    drawn(0, 20).save(tmp_path / "zero.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"broken")
    done = run_command("predict", str(tmp_path), "missing.png", folder=folder)
    lines = done.stdout.decode().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"{tmp_path}/three.png", "3"], [f"{tmp_path}/zero.jpg", "0"]]
    assert all(re.search(r"  \d+\.\d%(  \(or \d, \d+\.\d%\))?$", line) for line in lines)
    assert done.stderr.decode().splitlines() == [
        f"error: {tmp_path}/broken.png is not a picture; allowed: AVIF, BMP, GIF, HEIC, ICO, JPEG, PNG, TIFF, WEBP",
        "error: missing.png cannot be read: no such file",
        "error: 2 of 4 pictures could not be read",
    ]
    assert done.returncode == 2


def test_json_has_all_probabilities_and_a_picture_may_come_from_standard_input(folder: Path, tmp_path: Path) -> None:
    drawn(7, 20).save(tmp_path / "seven.png")
    content = (tmp_path / "seven.png").read_bytes()
    done = run_command("predict", "-", "--json", "--model", "mnist-5k-cnn/1", folder=folder, stdin=content)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["file"], answer["label"]) == ("-", "7")
    assert set(answer["probabilities"]) == set("0123456789")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["probability"] == max(answer["probabilities"].values())


def test_a_folder_gives_a_table_that_programs_can_read(folder: Path, tmp_path: Path) -> None:
    names = ['a, b\n"c".png', "plain.jpg", os.fsdecode(b"z\xe9ro.png")]
    for name, digit in zip(names, (3, 7, 0), strict=True):
        drawn(digit, 20).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"broken")
    done = run_command("predict", "--csv", str(tmp_path), folder=folder)
    assert done.returncode == 2
    assert b"1 of 4 pictures could not be read" in done.stderr
    head, *rows = csv.reader(io.StringIO(done.stdout.decode()))
    assert head == ["file", "label", "probability", "second_label", "second_probability", "unlike_training"]
    assert [row[0] for row in rows] == [f"{tmp_path}/{name}" for name in (*names[:2], "z\\udce9ro.png")]
    assert [row[1] for row in rows] == ["3", "7", "0"]
    assert all(float(row[2]) > float(row[4]) > 0 and row[1] != row[3] and row[5] == "False" for row in rows)


def test_the_table_of_a_model_with_one_class_has_no_second_guess(capsys: pytest.CaptureFixture[str]) -> None:
    predict._table()("x.png", {"the only class": 1.0}, None)
    assert capsys.readouterr().out.splitlines()[1] == "x.png,the only class,1.0,,,"


def test_what_is_asked_is_what_evaluate_saw(folder: Path, tmp_path: Path) -> None:
    """The test images as files: nearly all get the label that predictions.csv has."""
    test = read_split(read_dataset(), TEST)
    for index in range(100):
        Image.fromarray(test.images[index, ..., 0].numpy()).save(tmp_path / f"{index:03}.png")
    done = run_command("predict", str(tmp_path), folder=folder)
    labels = [line.split("  ")[1] for line in done.stdout.decode().splitlines()]
    predicted = [line.split(",")[2] for line in Path("reports/predictions.csv").read_text().splitlines()[1:101]]
    assert sum(a == b for a, b in zip(labels, predicted, strict=True)) >= 97


@pytest.mark.faults
def test_endless_standard_input_is_refused(folder: Path) -> None:
    code = "from pipeline import predict; predict.MAX_STDIN = 1000; from pipeline.errors import run_command; " + (
        "run_command(predict.main)"
    )
    environment = os.environ | {"DVC_ROOT": str(folder)}
    with Path("/dev/zero").open("rb") as endless:
        process = forked.Popen(
            [sys.executable, "-c", code, "-"], cwd=folder, env=environment, stdin=endless, stderr=subprocess.PIPE
        )
    first, *_ = process.communicate()[1].decode().splitlines()
    assert first == "error: standard input has more than 1,000 bytes; name the file instead"
    assert process.returncode == 2


@pytest.mark.faults
def test_an_interrupt_ends_it_while_it_waits_for_standard_input(folder: Path) -> None:
    code = """
from pipeline import predict
from pipeline.errors import run_command

def told(read=predict._from_stdin):
    print("waiting", flush=True)
    return read()

predict._from_stdin = told
run_command(predict.main)
"""
    process = forked.Popen(
        [sys.executable, "-c", code, "-"], cwd=folder, env=os.environ | {"DVC_ROOT": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert process.communicate()[1] == b"interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "9", "x.png"], "error: mnist-5k-cnn has no version 9; it has: 1, champion\n"),
    ],
)
def test_an_unknown_version_is_one_line(folder: Path, arguments: list[str], line: str) -> None:
    done = run_command("predict", *arguments, folder=folder)
    assert (done.returncode, done.stderr.decode()) == (2, line)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models", "models cannot be read: it is a folder without pictures ("),
        ("a\nb.png", "a\\nb.png cannot be read: no such file"),
        ("\x1b[31mred.png", "\\x1b[31mred.png cannot be read: no such file"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\udce9.png cannot be read: no such file"),
        ("x" * 10_000, f"{'x' * 300}... cannot be read: File name too long"),
    ],
)
def test_fault_28_an_unreadable_file_is_one_line_and_the_others_are_classified(
    folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    drawn(3, 20).save(tmp_path / "three.png")
    done = run_command("predict", name, str(tmp_path / "three.png"), folder=folder)
    first, last = done.stderr.decode().splitlines()
    assert first.startswith(f"error: {message}")
    assert last == "error: 1 of 2 pictures could not be read"
    assert done.stdout.decode().startswith(f"{tmp_path}/three.png  3  ")


@pytest.mark.slow
@pytest.mark.faults
def test_fault_28_names_are_escaped_where_there_is_a_picture_too(folder: Path, tmp_path: Path) -> None:
    for name in (b"two\nlines.png", b"caf\xe9.png"):
        drawn(3, 20).save(tmp_path / os.fsdecode(name))
    done = run_command("predict", str(tmp_path), folder=folder)
    assert [line.split("  ")[:2] for line in done.stdout.decode().splitlines()] == [
        [f"{tmp_path}/caf\\udce9.png", "3"],
        [f"{tmp_path}/two\\nlines.png", "3"],
    ]
    done = run_command("predict", "--json", str(tmp_path), folder=folder)
    paths = [json.loads(line)["file"] for line in done.stdout.decode().splitlines()]
    assert paths == [f"{tmp_path}/{os.fsdecode(b'caf' + bytes([0xE9]))}.png", f"{tmp_path}/two\nlines.png"]


def test_a_picture_given_twice_is_listed_twice(folder: Path, tmp_path: Path) -> None:
    drawn(3, 20).save(tmp_path / "three.png")
    done = run_command("predict", *[str(tmp_path / "three.png")] * 2, folder=folder)
    assert len(done.stdout.splitlines()) == 2


def test_the_second_guess_is_shown_if_it_is_close() -> None:
    close = predict._as_line("x.png", {"3": 0.8, "5": 0.15, "8": 0.05}, unlike_training=None)
    assert close == "x.png  3  80.0%  (or 5, 15.0%)"
    assert predict._as_line("x.png", {"3": 0.95, "5": 0.05}, unlike_training=False) == "x.png  3  95.0%"
    assert predict._as_line("x.png", {"the only class": 1.0}, unlike_training=None) == "x.png  the only class  100.0%"


def test_a_picture_that_does_not_look_like_the_training_images_is_marked(folder: Path, tmp_path: Path) -> None:
    drawn(3, 20).save(tmp_path / "three.png")
    next(unlike.pictures("two_digits")).save(tmp_path / "two digits.png")
    table, json_lines = (run_command("predict", str(tmp_path), *more, folder=folder) for more in ([], ["--json"]))
    three, two = table.stdout.decode().splitlines()
    assert "look" not in three
    assert two.endswith("  does not look like the training images")
    assert [json.loads(line)["unlike_training"] for line in json_lines.stdout.splitlines()] == [False, True]
