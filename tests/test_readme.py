"""The README and docs/ are correct: links resolve, commands and parameters exist, figures were measured."""

import itertools
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import benchmarks_page, recipes
from pipeline import command_line
from pipeline.explain import report
from pipeline.params import Augmentation, Params, parse_yaml
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page: Path, language: str) -> list[str]:
    """The contents of the blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command, in blocks and in the text, without its comment and what follows a pipe."""
    lines = "\n".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:make|dvc|python) [^`\n]*)`", page.read_text())
    for line in [*lines, *inline]:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        yield [word for word in words if word != "\\"]


def test_the_readme_takes_no_more_than_an_hour() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 220


@each_page
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if "://" not in target:
            linked = page.parent / name if name else page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
                known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in known | set(re.findall(r'<a name="(\w+)">', linked.read_text())), target


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = [words[words.index("make") + 1] for words in commands(page) if "make" in words[:2]]
    assert set(named) <= targets


@each_page
def test_commands_accept_the_arguments_that_are_shown(page: Path) -> None:
    for words in commands(page):
        if words[:2] != ["python", "-m"]:
            continue
        module, *given = words[2:]
        assert find_spec(module), module
        if module.removeprefix("pipeline.") in command_line.DESCRIPTIONS:
            end = next((at for at, word in enumerate(given) if set(word) <= set("<>|&;")), len(given))
            command_line.parse(module.removeprefix("pipeline."), given[:end])


@each_page
def test_parameters_that_are_set_exist(page: Path) -> None:
    for words in commands(page):
        if words[:3] == ["dvc", "exp", "run"]:
            for flag, word in itertools.pairwise(words):
                if flag == "-S" and "--queue" in words:  # several values, separated by commas
                    path, values = word.split("=")
                    for value in values.split(","):
                        Params().changed(recipes.from_words([f"{path}={value}"]))
                elif flag == "-S":
                    Params().changed(recipes.from_words([word]))


def test_the_ranges_that_tuning_shows_are_accepted() -> None:
    first, *others = fenced(REPOSITORY / "docs/tuning.md", "yaml")
    ranges = parse_yaml(first.encode(), Path("docs/tuning.md"))
    assert isinstance(ranges, dict)
    content = Params().model_dump(mode="json", exclude_unset=True) | {"tune": {"space": ranges}}
    assert set(Params.model_validate(content).tune.space) == set(ranges)
    assert len(others) == 2
    for block in others:
        Params.model_validate(parse_yaml(block.encode(), Path("docs/tuning.md"))).check_space()


def test_the_page_of_augmentations_shows_parameters_and_ranges_that_are_accepted() -> None:
    page = REPOSITORY / "docs/augmentation.md"
    uses, speed = re.findall(r"(?:^\| .*\n)+", page.read_text(), flags=re.MULTILINE)[1::2]
    for table in (uses, speed):
        named = set(re.findall(r"^\| `?(\w+)`? \|", table, flags=re.MULTILINE)) - {"all"}
        assert named <= set(Augmentation.model_fields)
        assert len(named) >= 11
    (block,) = fenced(page, "yaml")
    Params.model_validate(parse_yaml(block.encode(), page)).check_space()


def test_the_parameters_that_the_page_of_own_pictures_shows_are_accepted() -> None:
    page = REPOSITORY / "docs/your-own-pictures.md"
    blocks = [parse_yaml(block.encode(), page) for block in fenced(page, "yaml")]
    assert {"train", "evaluate"} in [set(block) for block in blocks if isinstance(block, dict)]
    for block in blocks:
        Params.model_validate(block)


def test_make_help_lists_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))


def test_benchmarks_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert (REPOSITORY / "docs/benchmarks.md").read_text() == benchmarks_page.page()


def test_the_readme_s_figures_are_in_the_benchmarks() -> None:
    section = PAGES[0].read_text().split("\n## Results and speed\n")[1].split("\n## ")[0]
    figures = set(re.findall(r"\d[\d.,]*\d", section))
    benchmarks = (REPOSITORY / "docs/benchmarks.md").read_text()
    assert len(figures) >= 8
    assert {figure for figure in figures if figure not in benchmarks} == set()


def test_the_table_of_the_tuned_network_is_that_of_the_benchmarks() -> None:
    rows = re.findall(r"^\| \d+, \d+ \|.*$", (REPOSITORY / "docs/tuning.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 2
    assert all(row in (REPOSITORY / "docs/benchmarks.md").read_text() for row in rows)


def test_the_walk_shows_figures_that_are_drawn_and_the_pooling_that_was_measured() -> None:
    walk = (REPOSITORY / "docs/what-the-cnn-learned.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.png\)", walk)) <= set(report.FIGURES) | {"accuracy_after_shifts"}
    rows = re.findall(r"^\| (?:\w+ pooling|no pooling, .*?) \|.*$", walk, flags=re.MULTILINE)
    assert len(rows) == 4
    assert all(row in (REPOSITORY / "docs/benchmarks.md").read_text() for row in rows)


def test_pictures_are_kept_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (REPOSITORY / "docs").glob("*.png")}
    assert sizes
    assert max(sizes.values()) < 150_000
