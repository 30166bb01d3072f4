"""The README says what is so: its knobs are those of params.yaml, its targets and files exist."""

import json
import re

from bench import recipes
from tests.conftest import PARAMS, REPOSITORY

README = (REPOSITORY / "README.md").read_text()
LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):\s*(?P<value>[^#]*?)\s*#\s*(?P<comment>.*)$")


def knobs() -> list[str]:
    """The rows of the README's table of knobs, read off the published recipe and its comments."""
    rows, section = [], ""
    for line in PARAMS.read_text().splitlines():
        if re.fullmatch(r"\w+:", line):
            section = line[:-1] + "."
        elif found := LINE.match(line):
            name = (section if found["indent"] else "") + found["key"]
            value = f"`{found['value']}`" if found["value"] else ""
            comment = found["comment"].replace("|", "\\|")
            rows.append(f"| `{name}` | {value} | {comment} |")
    return rows


def test_the_table_of_knobs_is_that_of_params_yaml() -> None:
    assert len(knobs()) > 25
    assert "\n".join(knobs()) in README


def test_the_short_recipe_is_the_one_that_was_measured() -> None:
    command = re.search(r"^dvc exp run ((?:-S model|-S train|[^`])*?)(?=\n\n|\n```|#)", _speed(), flags=re.MULTILINE)
    assert command is not None
    words = command[1].replace("\\\n", " ").split()
    assert words[::2] == ["-S"] * len(recipes.SHORT)
    assert recipes.from_words(words[1::2]) == recipes.SHORT


def test_the_table_of_bounds_is_that_of_the_measurement() -> None:
    bounds = json.loads((REPOSITORY / "bench/results.json").read_text())["bounds"]
    for bound in bounds:
        figures = bound["figures"]
        spread = f" ({min(figures):.2f} ... {max(figures):.2f})" if len(figures) > 1 else ""
        must = f"{'at most' if bound['low'] else 'at least'} {bound['bound']:g}"
        measured = f"{bound['figure']:.2f} {bound['unit']}{spread}"
        assert f"| {bound['what']} | {measured} | {must} | {bound['aim']:g} |\n" in _speed()
    short = re.search(r"figures? falls? short: ([^.]*?),? since", _speed().replace("\n", " "))
    said = short[1] if short else ""
    assert said == ", ".join(bound["what"] for bound in bounds if not bound["holds"])


def test_every_bound_holds() -> None:
    bounds = json.loads((REPOSITORY / "bench/results.json").read_text())["bounds"]
    assert [bound["what"] for bound in bounds if not bound["holds"]] == []


def _speed() -> str:
    return README.split("\n## Speed\n")[1].split("\n## ")[0]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)) | set(re.findall(r"`make ([a-z]+)`", README))
    assert {"repro", "test", "lint", "ui"} <= named <= targets


def test_every_picture_and_every_file_of_the_pipeline_that_is_named_exists() -> None:
    named = re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`(pipeline/[\w/]+(?:\.py)?)`?", README)
    assert len(named) >= 9
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_pictures_are_kept_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (REPOSITORY / "docs").glob("*.png")}
    assert len(sizes) == 6
    assert max(sizes.values()) < 150_000
