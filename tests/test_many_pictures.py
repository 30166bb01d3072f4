"""Many pictures: the speed of `prepare`, the memory of `prepare` and `train`, and what one more picture costs.

With 5,000 pictures, or as many as the environment variable MANY_PICTURES says: `make many-pictures` has 100,000.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipeline import files, recipe
from pipeline.data.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.params import Params
from tests.conftest import REPOSITORY, write_params

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("MANY_PICTURES", "5000"))
CLASSES, SIDE, PART = 10, 64, 1000
ALONE = "MANY_PICTURES" in os.environ
MAX_MB = 1500
MAX_MB_TO_PREPARE = min(MAX_MB, 500 + COUNT / 200)  # less than it would be with the images in memory
PARAMS = {"data.dataset": "folder", "train.epochs": 1}
# Memory in use is what the system cannot take back: the pages of mapped files do not count. It is that of the stage and
# of the processes that decode for it.
PROGRAM = """
import json, os, runpy, sys, threading, time
from pathlib import Path

peaks = {"RssAnon": 0, "VmRSS": 0}

def watch():
    own = os.getpid()
    while True:
        found = dict.fromkeys(peaks, 0)
        children = []
        for file in Path(f"/proc/{own}/task").glob("*/children"):
            try:
                children += file.read_text().split()
            except OSError:  # the thread has ended
                continue
        for process in [own, *children]:
            try:
                # One that has been forked, and is about to become another program, still has the memory of this one.
                if process != own and b"decoder" + b".serve" not in Path(f"/proc/{process}/cmdline").read_bytes():
                    continue
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
            except OSError:  # it has ended
                continue
            for name, _, value in (line.partition(":") for line in lines):
                if name in found:
                    found[name] += int(value.split()[0])
        for name, value in found.items():
            peaks[name] = max(peaks[name], value)
        time.sleep(0.05)  # more often, it would slow down what it watches

threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter(), sum(os.times()[:4])
module = runpy.run_module("pipeline." + sys.argv[1])
loaded = time.perf_counter(), sum(os.times()[:4])
module["main"]()
now = time.perf_counter(), sum(os.times()[:4])
print(json.dumps({
    "in_use_mb": peaks["RssAnon"] / 1000, "resident_mb": peaks["VmRSS"] / 1000,
    "seconds": now[0] - loaded[0], "processor_seconds": now[1] - loaded[1],
}))
"""


class Measured(NamedTuple):
    """Of a stage: the peak of the memory in use and of all resident pages, and its time without the imports.

    Resident pages that processes share, those of libraries, are counted for each of them.
    """

    in_use_mb: float
    resident_mb: float
    seconds: float
    processor_seconds: float
    output: str


def save_pictures(folder: Path, start: int, stop: int) -> None:
    """Smooth random textures; the hue says the class."""
    random = np.random.default_rng(start)
    for number in range(start, stop):
        brightness = Image.fromarray(random.integers(0, 256, (5, 5), dtype=np.uint8)).resize((SIDE, SIDE))
        hue = (number % CLASSES * 256 // CLASSES + int(random.integers(-8, 9))) % 256
        bands = [Image.new("L", (SIDE, SIDE), level) for level in (hue, 150)]
        picture = Image.merge("HSV", [*bands, brightness]).convert("RGB")
        picture.save(folder / str(number % CLASSES) / f"{number}.jpg", quality=85)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace, and the pictures in it."""
    made = tmp_path_factory.mktemp("many")
    for label in range(CLASSES):
        (made / "hues" / str(label)).mkdir(parents=True)
    with ProcessPoolExecutor(2) as pool:
        parts = [pool.submit(save_pictures, made / "hues", n, min(COUNT, n + PART)) for n in range(0, COUNT, PART)]
        for part in parts:
            part.result()
    write_params(made, PARAMS | {"data.path": str(made / "hues")})
    return made


def measured(stage: str, folder: Path) -> Measured:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, stage],
        cwd=folder,
        env=os.environ | {"DVC_ROOT": str(folder), "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    output, _, facts = done.stdout.strip().rpartition("\n")
    found = Measured(**json.loads(facts), output=output)
    print(f"{stage}: {found[:-1]}, load {os.getloadavg()[0]:.1f}")
    return found


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Measured:
    return measured("prepare", folder)


def test_so_many_a_second_are_prepared_whose_images_are_not_in_memory(prepared: Measured) -> None:
    assert f"{CLASSES} classes -> data/prepared" in prepared.output
    assert prepared.in_use_mb < MAX_MB_TO_PREPARE
    if ALONE:
        assert COUNT / prepared.seconds >= 1000
    else:  # the processors are shared with other tests
        assert COUNT / prepared.processor_seconds >= 200


def test_one_more_picture_costs_no_second_look_at_the_others(prepared: Measured, folder: Path) -> None:
    before = files.read_table(folder / files.IMAGES, "prepare")
    save_pictures(folder / "hues", COUNT, COUNT + 1)
    again = measured("prepare", folder)
    rows = {row["path"]: row["split"] for row in files.read_table(folder / files.IMAGES, "prepare")}
    assert len(rows) == COUNT + 1
    assert all(rows[row["path"]] == row["split"] for row in before)
    assert again.in_use_mb < MAX_MB_TO_PREPARE
    if ALONE:
        assert again.seconds < 30
    else:
        assert again.processor_seconds < 0.9 * prepared.processor_seconds  # most of it are the libraries' imports


def test_an_epoch_learns_from_a_split_that_stays_on_the_disk(prepared: Measured, folder: Path) -> None:
    write_params(folder, PARAMS | {"data.path": str(folder / "hues"), "data.memory_limit": 0.01})
    trained = measured("train", folder)
    assert trained.in_use_mb < MAX_MB
    assert trained.resident_mb < MAX_MB  # also those that the system could take back
    (epoch,) = files.read_table(folder / files.HISTORY, "train")
    assert float(epoch["validation_accuracy"]) > 0.5


def test_an_epoch_takes_as_long_from_the_disk_as_from_memory(prepared: Measured, folder: Path) -> None:
    """With its pages in the system's cache; on a machine that has other things to do, epochs differ by more."""
    dataset, params = read_dataset(folder / files.PREPARED), Params().changed({"train.epochs": 1})
    recipe.device_for(params)
    seconds: dict[float, list[float]] = {0: [], math.inf: []}
    losses = set[float]()
    for limit in [0, math.inf] * 2:
        train, validation = (
            read_split(dataset, split, folder / files.PREPARED, limit) for split in (TRAIN, VALIDATION)
        )
        (epoch,) = recipe.fit(recipe.build(params, dataset), train, validation, params)
        seconds[limit].append(epoch.seconds)
        losses.add(epoch.validation_loss)
    print(f"seconds of an epoch, by data.memory_limit: {seconds}, load {os.getloadavg()[0]:.1f}")
    assert len(losses) == 1
    assert min(seconds[math.inf]) / min(seconds[0]) > (0.8 if ALONE else 0.5)
