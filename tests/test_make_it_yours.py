"""docs/make-it-yours.md: each of its diffs applied to a copy of the repository, tested, and run with DVC.

The diffs fit the code as it is published. `make test` leaves these tests out, so that whoever changes the same lines
still sees a green suite; CI and `make slow` run them.
"""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import files, machine
from tests import forked
from tests.conftest import REPOSITORY, run_stage, write_params
from tests.test_clone import ONE_EPOCH, repro, succeed

pytestmark = pytest.mark.page
PAGE = (REPOSITORY / "docs/make-it-yours.md").read_text()
LOSS_TEST = "tests/model/test_training.py::test_a_loss_is_the_sum_over_the_images"
PARAMETERS = ("pipeline/params.py", "params.yaml")


@dataclass(frozen=True)
class Example:
    """A section of the page: which files its diff may change, and what switches it on."""

    title: str
    allowed: tuple[str, ...]
    parameters: dict[str, object] = field(default_factory=dict)
    until: str = "visualize"  # the last stage that shows it


EXAMPLES = {
    "augmentation": Example(
        "A noise augmentation",
        ("pipeline/model/augment.py", *PARAMETERS),
        {"train.augmentation.noise": 0.1},
        until="evaluate",
    ),
    "block": Example(
        "A depthwise separable convolution", ("pipeline/model/cnn.py", *PARAMETERS), {"model.separable": True}
    ),
    "metric": Example("Top-2 accuracy", ("pipeline/model/metrics.py", "pipeline/results.py"), until="evaluate"),
    "figure": Example("A figure", ("pipeline/figures/scores.py", "pipeline/explain/report.py")),
    "data set": Example(
        "Another data set", ("pipeline/data/sources.py",), {"data.dataset": "digits", "model.padding": 1}
    ),
    "loss": Example(
        "Focal loss", ("pipeline/model/training.py", *PARAMETERS), {"train.loss": "focal"}, until="evaluate"
    ),
}
each_example = pytest.mark.parametrize("name", EXAMPLES)


def diff_of(name: str) -> str:
    (section,) = re.findall(rf"^## {EXAMPLES[name].title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    change, test = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(change + test)


def changed_by(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)


def apply(name: str, folder: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "-"], cwd=folder, input=diff_of(name), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"docs/make-it-yours.md, {EXAMPLES[name].title}: its diff does not fit the code. Correct the page, or delete "
        f"it with this file if your project has grown away from it.\n{done.stderr}"
    )


def run_tests(folder: Path, *tests: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def copy_with(folder: Path, *names: str) -> Path:
    folder.mkdir()
    machine.copy_repository(folder)
    for name in names:
        apply(name, folder)
    return folder


@each_example
def test_it_touches_only_the_files_that_the_page_names(name: str) -> None:
    changed = [file for file in changed_by(diff_of(name)) if not file.startswith(("tests/", "docs/"))]
    assert set(changed) <= set(EXAMPLES[name].allowed)
    assert set(changed) != set()


def test_the_lines_that_the_readme_adds_are_those_of_the_page() -> None:
    diffs = re.findall(r"^```diff\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    added = [line for diff in diffs for line in diff.splitlines() if line.startswith("+")]
    assert len(added) >= len(EXAMPLES)
    assert [line for line in added if line not in PAGE.splitlines()] == []


def test_all_apply_one_after_the_other(tmp_path: Path) -> None:
    folder = copy_with(tmp_path / "copy", *EXAMPLES)
    assert "Gaussian noise" in (folder / "params.yaml").read_text()


@pytest.mark.slow
def test_their_tests_and_ours_pass_with_all_of_them(tmp_path: Path) -> None:
    folder = copy_with(tmp_path / "copy", *EXAMPLES)
    theirs = [file for name in EXAMPLES for file in changed_by(diff_of(name)) if file.startswith("tests/")]
    assert len(theirs) >= len(EXAMPLES)
    run_tests(folder, *theirs, "tests/test_params.py", "tests/test_recipe.py", "tests/model/test_augment.py", LOSS_TEST)


def repro_with(folder: Path, parameters: dict[str, object], until: str) -> str:
    """What `dvc repro` prints with these values in the committed params.yaml, up to a stage."""
    values = json.dumps(ONE_EPOCH | parameters)
    code = (
        "import json, sys; from pathlib import Path; from pipeline.params import with_values; "
        "path = Path('params.yaml'); path.write_bytes(with_values(path.read_bytes(), json.loads(sys.argv[1])))"
    )
    succeed(sys.executable, "-c", code, values, folder=folder)  # the copy's params.py knows the new parameter
    return repro(until, folder=folder)


def training_loss(folder: Path) -> float:
    (epoch,) = csv.DictReader((folder / files.HISTORY).read_text().splitlines())
    return float(epoch["train_loss"])


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / files.METRICS).read_text())
    return found


def shows_another_loss(folder: Path, printed: str, published: Path) -> None:
    assert training_loss(folder) != training_loss(published)


def shows_the_layer(folder: Path, printed: str, published: Path) -> None:
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith("conv2d")]
    assert rows == ["conv2d", "conv2d_1", "conv2d_2", "conv2d_3"]
    assert metrics(folder)["parameters"] < metrics(published)["parameters"]


def shows_the_metric(folder: Path, printed: str, published: Path) -> None:
    test = metrics(folder)["test"]
    assert test["accuracy"] < test["top_2_accuracy"] <= 1
    results = succeed(forked.python(), "-m", "pipeline.results", folder=folder)
    assert re.search(rf"top-2 accuracy\s+{test['top_2_accuracy']:.2%}", results)


def shows_the_figure(folder: Path, printed: str, published: Path) -> None:
    with Image.open(folder / files.FIGURES / "confidences.png") as picture:
        assert min(picture.size) > 100


def shows_the_classes(folder: Path, printed: str, published: Path) -> None:
    assert set(metrics(folder)["test"]["per_class"]) == set("0123456789")


SHOWS: dict[str, Callable[[Path, str, Path], None]] = {
    "augmentation": shows_another_loss,
    "block": shows_the_layer,
    "metric": shows_the_metric,
    "figure": shows_the_figure,
    "data set": shows_the_classes,
    "loss": shows_another_loss,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stages ran with none of the changes."""
    folder = tmp_path_factory.mktemp("published")
    write_params(folder, ONE_EPOCH)
    for stage in ("prepare", "train", "evaluate"):
        assert run_stage(stage, folder) == (0, "")
    return folder


@pytest.mark.slow
@each_example
def test_dvc_repro_shows_it(name: str, tmp_path: Path, published: Path) -> None:
    folder = copy_with(tmp_path / "copy", name)
    SHOWS[name](folder, repro_with(folder, EXAMPLES[name].parameters, EXAMPLES[name].until), published)
