"""The README says what is so: its figures are those that were measured, its targets and files exist."""

import json
import math
import re
import statistics

import pytest

from bench import overhead, recipes
from bench.bounds import Bound
from pipeline.explain import report
from pipeline.model.cnn import Architecture, parameter_count
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_short_recipes_are_those_that_were_measured() -> None:
    commands = re.findall(r"^```bash\ndvc exp run ([^`]*)```", _speed(), flags=re.MULTILINE)
    for command, recipe in zip(commands, (recipes.SHORT, recipes.SHORTEST), strict=True):
        words = command.replace("\\\n", " ").split()
        assert words[::2] == ["-S"] * len(recipe)
        assert recipes.from_words(words[1::2]) == recipe


MEASURED = pytest.mark.parametrize(("section", "file"), [("Speed", "results.json"), ("Tuning", "tuning.json")])


@MEASURED
def test_the_table_of_bounds_is_that_of_the_measurement(section: str, file: str) -> None:
    bounds = json.loads((REPOSITORY / "bench" / file).read_text())["bounds"]
    for bound in bounds:
        figures = bound["figures"]
        spread = f" ({min(figures):.2f} ... {max(figures):.2f})" if len(figures) > 1 else ""
        must = f"{'at most' if bound['low'] else 'at least'} {bound['bound']:g}"
        measured = f"{bound['figure']:.2f} {bound['unit']}{spread}"
        assert f"| {bound['what']} | {measured} | {must} | {bound['aim']:g} |\n" in _section(section)
    short = re.search(r"figures? falls? short: ([^.]*?),? since", _section(section).replace("\n", " "))
    said = short[1] if short else ""
    assert said == ", ".join(bound["what"] for bound in bounds if not bound["holds"])


@pytest.mark.parametrize("file", ["results.json", "tuning.json", "overhead.json"])
def test_every_bound_holds(file: str) -> None:
    rows = json.loads((REPOSITORY / "bench" / file).read_text())["bounds"]
    fields = ("what", "figures", "bound", "aim", "unit", "low")
    bounds = [Bound(**{field: row[field] for field in fields}) for row in rows]
    assert [bound.what for bound in bounds if not bound.holds] == []
    assert all(figure > 0 for bound in bounds for figure in bound.figures)


def test_the_table_of_epochs_is_that_of_the_measurement() -> None:
    turns = json.loads((REPOSITORY / "bench/results.json").read_text())["turns"]
    table = _speed().split("\n\n")[0]
    assert table.count("\n| ") == len(turns) + 1
    for each in turns.values():
        seconds = [second for turn in each for second in turn["seconds"]]
        memory = max(turn["peak_mb"] for turn in each) / 1000
        row = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} ... {max(seconds):.2f}) | {memory:.2f} GB |"
        assert row in table


def test_what_live_images_and_checkpoints_cost_is_that_of_the_measurement() -> None:
    epochs = [overhead.Timed(**each) for each in json.loads((REPOSITORY / "bench/overhead.json").read_text())["epochs"]]
    told = []
    for way in (overhead.LIVE, overhead.CHECKPOINT):
        costs = overhead.costs(epochs, way)
        assert len(costs) == 20
        told.append(f"{statistics.fmean(costs):.2f} % ± {statistics.stdev(costs) / math.sqrt(20):.2f}")
    live, checkpoint = told
    said = " ".join(README.split())
    assert (
        f"They take {live} of an epoch's time (n = 20; the checkpoint after it {checkpoint}: `make overhead`)" in said
    )


def test_the_table_of_studies_is_that_of_the_measurement() -> None:
    rates = json.loads((REPOSITORY / "bench/tuning.json").read_text())["trials_an_hour"]
    *three, kept = rates.values()
    for each in three:
        assert f" | {statistics.median(each):.0f} ({min(each):.0f} ... {max(each):.0f}) |\n" in _section("Tuning")
    assert f"The plain study makes {kept[0]:.0f} where it may keep the memory" in _section("Tuning")


def test_the_winner_of_the_study_is_better_on_the_test_images_by_more_than_chance() -> None:
    rows, accuracies = [], []
    for file in ("seeds.json", "tuned.json"):
        measured = json.loads((REPOSITORY / "bench" / file).read_text())
        model = recipes.published().changed(recipes.from_words(measured["knobs"])).model
        parameters = parameter_count(Architecture((28, 28, 1), tuple("0123456789"), **model.model_dump()))
        accuracies.append([row["test_accuracy"] for row in measured["rows"]])
        mean, deviation = statistics.fmean(accuracies[-1]), statistics.stdev(accuracies[-1])
        filters = ", ".join(map(str, model.filters))
        rows.append(f"| {filters} | {model.dropout} | {parameters:,} | {mean:.4f} ± {deviation:.4f} | 10 |\n")
    assert all(row in _section("Tuning") for row in rows)
    default, tuned = accuracies
    assert len(default) == len(tuned) == 10
    error = math.sqrt((statistics.variance(default) + statistics.variance(tuned)) / 10)
    assert statistics.fmean(tuned) - statistics.fmean(default) > 2 * error


def _speed() -> str:
    return _section("Speed")


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)", README))
    assert {"repro", "test", "lint", "ui"} <= named <= targets


def test_every_picture_and_every_file_of_the_pipeline_that_is_named_exists() -> None:
    named = re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`(pipeline/[\w/]+(?:\.py)?)`?", README)
    assert len(named) >= 9
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_walk_shows_pictures_that_are_drawn() -> None:
    walk = (REPOSITORY / "docs/what-the-cnn-learned.md").read_text()
    shown = set(re.findall(r"\]\((\w+)\.png\)", walk)) | {"learning_curves"}  # that one is the README's
    assert shown <= set(report.FIGURES) | {"accuracy_after_shifts"}  # that one is of make pooling
    assert all((REPOSITORY / f"docs/{name}.png").exists() for name in shown)


def test_the_walk_tells_of_pooling_what_was_measured() -> None:
    walk = (REPOSITORY / "docs/what-the-cnn-learned.md").read_text()
    measured = json.loads((REPOSITORY / "bench/pooling.json").read_text())
    assert (measured["dataset"], measured["knobs"], measured["seeds"]) == ("mnist", [], 5)
    for kind, each in measured["kinds"].items():
        shifts = [measured["shifts"].index(pixels) for pixels in (0, 2, 4)]
        cells = [f"{100 * each['mean'][index]:.2f} ± {100 * each['deviation'][index]:.2f}" for index in shifts]
        assert f"| {kind} | {each['parameters']:,} | {' | '.join(cells)} |\n" in walk


def test_pictures_are_kept_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (REPOSITORY / "docs").glob("*.png")}
    assert sizes
    assert max(sizes.values()) < 150_000
