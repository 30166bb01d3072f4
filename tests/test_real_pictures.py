"""docs/real-pictures.md: its commands fetch pictures that nobody here made, and its parameters train on them."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import files
from pipeline.explain import report
from tests.conftest import REPOSITORY, write_params
from tests.test_clone import clone, repro, run

__all__ = ["clone"]
pytestmark = pytest.mark.slow
PAGE = (REPOSITORY / "docs/real-pictures.md").read_text()
QUICK = {"train.epochs": 1, "model.filters": [4, 8, 8, 8], "visualize.maximisation.steps": 3}


def section(title: str) -> tuple[list[str], dict[str, Any]]:
    """The commands of a section, and its parameters."""
    (text,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    (parameters,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), YAML(typ="safe").load(parameters)


def dotted(parameters: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {f"{name}.{key}": value for name, values in parameters.items() for key, value in values.items()}


# The programs that fetch pictures are no Python packages, and not every system has them. What is missing in CI is
# installed there (.ci/run).
def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None,
        reason=f"trains on other people's pictures, which may not be copied into this repository; their package is "
        f"fetched by {program}, which this system does not have and pip cannot install",
    )


UNREACHABLE = re.compile("connection broken|Could not resolve|Could not connect|ENOTFOUND|EAI_AGAIN|ECONNREFUSED")


def fetched(title: str, clone: Path) -> dict[str, object]:
    """Run the commands of a section in the clone: the parameters that go with them."""
    (command,), parameters = section(title)
    done = run("bash", "-euc", command, folder=clone)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(
            "trains on other people's pictures, which may not be copied into this repository, and the server that "
            "publishes their package cannot be reached from this machine"
        )
    assert done.returncode == 0, done.stderr
    return dotted(parameters)


def trained_on(title: str, clone: Path, until: str = "evaluate") -> list[dict[str, str]]:
    """The rows of images.csv, after the stages have run in the clone on the pictures of a section."""
    write_params(clone, fetched(title, clone) | QUICK)
    repro(until, folder=clone)
    return files.read_table(clone / files.IMAGES, made_by="prepare")


def scores(clone: Path) -> dict[str, Any]:
    return dict(json.loads((clone / files.METRICS).read_text())["test"])


def test_solar_cells_from_a_table(clone: Path) -> None:
    rows = trained_on("Solar cells", clone)
    assert Counter(row["label"] for row in rows) == {"functional": 1803, "defective": 821}
    assert all(row["split"] for row in rows)
    assert {(row["width"], row["height"], row["mode"]) for row in rows} == {("300", "300", "L")}
    assert scores(clone)["balanced_accuracy"] > 0.4


@needs("apt-get")
def test_stamps_in_nested_folders(clone: Path) -> None:
    rows = trained_on("Stamps", clone)
    assert len(rows) == 796
    assert {row["label"] for row in rows} == set(scores(clone)["per_class"])
    assert len(scores(clone)["per_class"]) == 16
    assert all(row["path"].endswith(".png") for row in rows)


@needs("npm")
def test_emoji_of_a_vendor_that_the_model_has_not_seen(clone: Path) -> None:
    rows = trained_on("Emoji", clone, until="visualize")
    assert len(rows) == 5715
    vendors = {(row["split"], row["group"]) for row in rows}
    assert len(vendors) == len({split for split, _ in vendors}) == len({vendor for _, vendor in vendors}) == 3
    assert len(scores(clone)["per_class"]) == 9
    assert {path.stem for path in (clone / files.FIGURES).iterdir()} >= set(report.FIGURES)
