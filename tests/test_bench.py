"""The measurements in bench/: their arithmetic, their recipes, their verdicts, and what they found."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from bench import (
    arithmetic,
    augmentation,
    benchmarks_page,
    choose,
    measurement,
    networks,
    overhead,
    pooling,
    recipes,
    rounds,
    seeds,
    speed,
    stages,
    tuning,
)
from bench.contenders import dataloader_loop, in_memory_loop
from bench.measurement import Bound, conclude
from pipeline import files
from pipeline.data.splits import LabelledImages
from pipeline.errors import Fault, UserError
from pipeline.model import metrics
from pipeline.model.cnn import CNN, Architecture, parameter_count
from pipeline.params import Augmentation
from tests import rare_class
from tests.conftest import REPOSITORY

PUBLISHED = Architecture((28, 28, 1), tuple("0123456789"), (32, 64))


def test_the_operations_of_the_published_network_are_those_counted_by_hand() -> None:
    first, second, dense = 24 * 24 * 32 * 9, 10 * 10 * 64 * 32 * 9, 1600 * 10
    forward, back = first + second + dense, first + 2 * second + 2 * dense
    assert arithmetic.needed_operations(PUBLISHED, train=1, validation=0) == 2 * (forward + back)
    assert arithmetic.needed_operations(PUBLISHED, train=0, validation=1) == 2 * forward
    # 54,000 and 6,000 images at the 149 GFLOP/s of a slower machine: 4.4 seconds.
    assert arithmetic.needed_operations(PUBLISHED, 54_000, 6_000) / 149e9 == pytest.approx(4.4, abs=0.1)
    # With the gradients alone of 100 and 50 values an image that are not zero.
    back = 100 * 9 + 2 * 50 * 32 * 9 + 2 * dense
    assert arithmetic.needed_operations(PUBLISHED, train=1, validation=0, live=[100, 50]) == 2 * (forward + back)


def test_the_operations_of_a_residual_network_are_those_counted_by_hand() -> None:
    a = Architecture(
        (9, 12, 3), tuple("ab"), (4,), convolutions=2, padding="same", residual=True, head="average", dense=5
    )
    pooled = 8 * 12  # the ninth row is in no window of the pooling
    first, second, shortcut, dense = 9 * 12 * 4 * 27, pooled * 4 * 36, pooled * 4 * 3, 4 * 5 + 5 * 2
    forward, back = first + second + shortcut + dense, first + 2 * second + shortcut + 2 * dense
    assert arithmetic.needed_operations(a, train=1, validation=0) == 2 * (forward + back)
    cnn = CNN(a, torch.Generator().manual_seed(0))
    some = LabelledImages(torch.full((5, 9, 12, 3), 99, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    live = arithmetic.live_gradients(cnn, some, torch.Generator().manual_seed(0))
    assert len(live) == 3
    assert live[1] == live[2]  # a sum passes its gradient to both
    back_of_live = live[0] * 27 + 2 * live[1] * 36 + live[2] * 3 + 2 * dense
    assert arithmetic.needed_operations(a, 1, 0, live) == round(2 * (forward + back_of_live))


def test_pooling_dropout_and_relu_leave_few_gradients(digits: dict[str, LabelledImages]) -> None:
    cnn = CNN(PUBLISHED, torch.Generator().manual_seed(0))
    first, second = arithmetic.live_gradients(cnn, digits["train"][:100], torch.Generator().manual_seed(0))
    # The second convolution has 11 x 11 x 64 values; a window of four has one argmax, and dropout stops half of them.
    assert 0 < second < 5 * 5 * 64 * 0.55
    assert 0 < first <= 13 * 13 * 32
    assert second < cnn.architecture.filters[1] * 121 / 8


def test_the_others_train_the_same_network() -> None:
    assert sum(parameter.numel() for parameter in dataloader_loop.network().parameters()) == 34_826


def test_overrides_survive_a_round_trip_through_the_command_line() -> None:
    overrides = {
        "model.batch_norm": True,
        "train.threads": None,
        "train.learning_rate": 0.015,
        "train.schedule": "one-cycle",
    }
    assert recipes.from_words(recipes.as_words(overrides)) == overrides
    params = recipes.published().changed(recipes.SHORT)
    assert (params.train.epochs, params.train.schedule, params.model.dropout) == (4, "one-cycle", 0.1)
    assert params.model.filters == recipes.published().model.filters
    with pytest.raises(ValueError, match=r"train\.epoch is not a parameter"):
        params.changed({"train.epoch": 3})


@pytest.mark.parametrize(("epochs", "recipe"), [(4, recipes.SHORT), (2, recipes.SHORTEST)])
def test_the_short_recipes_are_the_best_of_their_candidates(epochs: int, recipe: dict[str, object]) -> None:
    chosen = json.loads((REPOSITORY / "bench/candidates.json").read_text())[f"{epochs} epochs"]
    screened = [score["overrides"] for score in chosen["screened"]]  # the best first
    assert sorted(map(str, screened)) == sorted(map(str, choose.candidates(epochs)))
    finalists = chosen["decided"]
    assert all(score["overrides"] in screened[: len(finalists)] for score in finalists)
    best = max(finalists, key=lambda score: float(score["validation_accuracy"]))
    published = recipes.published()
    assert published.changed(best["overrides"]) == published.changed(recipe)


@pytest.mark.parametrize(("figures", "low", "holds"), [((1.5, 1.7, 9), False, True), ((1.5, 1.7, 9), True, False)])
def test_the_median_decides_whether_a_bound_holds(
    figures: tuple[float, ...], low: bool, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = Bound("an epoch", figures, 1.6, 2, "x", low=low)
    assert bound.holds == holds
    if holds:
        conclude([bound])
    else:
        with pytest.raises(SystemExit, match=r"^1$"):
            conclude([bound, Bound("another", (1,), 0, 0, "s")])
    line, *others = capsys.readouterr().out.splitlines()
    assert ("holds" if holds else "FALLS SHORT") in line
    assert "1.70 x" in line
    assert "(1.50 ... 9.00)" in line
    assert len(others) == (0 if holds else 1)  # a bound that falls short does not hide those after it


def test_mlflow_s_share_is_what_it_adds_to_a_short_stage_of_a_whole_one() -> None:
    whole = [stages.Pair(20, 19, 1000), stages.Pair(40, 39, 1100)]
    short = [[stages.Pair(5, 4, 900)], [stages.Pair(5.2, 4, 900)]]
    repro, share, memory = speed.stage_bounds(stages.Stages(whole, short, [18.0, 19.0]))
    assert share.figures == pytest.approx((5, 3))
    assert repro.figure == 18.5
    assert memory.figures == (1, 1.1)


@pytest.mark.slow
def test_training_without_mlflow_gives_the_model_of_the_stage(
    prepared: Path, migrated_database: Path, tmp_path: Path
) -> None:
    workspace = shutil.copytree(prepared, tmp_path / "workspace")
    shutil.copy(migrated_database, workspace)
    models, programs = [], ("pipeline.train", "bench.contenders.convtrack_untracked")
    for program in programs:
        stages.in_folder(workspace, "-m", program)
        models.append((workspace / files.MODEL).read_bytes())
    assert models[0] == models[1]
    imports = f"import sys, {programs[1]}; print('{{\"mlflow\":', int('mlflow' in sys.modules), '}}')"
    assert stages.in_folder(workspace, "-c", imports).rows == [{"mlflow": 0}]


def test_a_process_is_measured_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "not here")
    program = """
import json, os, time
held = bytearray(200 * 10**6)
time.sleep(0.2)
print("a line", json.dumps({"outside": 1}), sep="\\n")
print(json.dumps({"uri": "MLFLOW_TRACKING_URI" in os.environ, "given": os.environ["GIVEN"] == "1"}))
"""
    small, large = (measurement.run([sys.executable, "-c", each], tmp_path, GIVEN="1") for each in ("", program))
    assert large.rows == [{"outside": 1}, {"uri": False, "given": True}]
    assert small.rows == []
    assert large.seconds > 0.2
    assert large.peak_mb > 200 > small.peak_mb  # whatever this process has
    with pytest.raises(subprocess.CalledProcessError):
        measurement.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_the_shortest_recipe_is_compared_by_whole_processes() -> None:
    studies = {name: {"test_accuracy": {"mean": 0.9925}} for name in speed.SEEDS}
    whole = {"Keras, 15 epochs": [80, 90], "shortest recipe": [8, 10], "short recipe": [12, 12]}
    bounds = {bound.what: bound.figures for bound in speed.recipe_bounds(studies, whole)}
    assert bounds["whole process: 15 epochs of Keras against the shortest recipe"] == (10, 9)
    assert bounds["test accuracy of the short recipe, mean of 10 seeds"] == pytest.approx((99.25,))


def test_the_dataloader_is_judged_by_its_faster_number_of_workers() -> None:
    seconds = dict.fromkeys(rounds.CONTENDERS, 1.0) | {"DataLoader loop": 8.0, "DataLoader loop, 2 workers": 6.0}
    turns = {name: [rounds.Turn([each], 0.99, 1000)] for name, each in seconds.items()}
    bounds = {bound.what: bound.figure for bound in speed.epoch_bounds(turns, [100e9], 80 * 10**9)}
    assert bounds["epoch, float32, against the DataLoader loop"] == 6
    assert bounds["share of the float32 peak, zero gradients counted as work"] == 80


@pytest.mark.parametrize(("accuracy", "learns"), [(0.98, True), (0.9, False)])
def test_a_contender_that_does_not_learn_is_a_fault(accuracy: float, learns: bool) -> None:
    lines = [{"seconds": 9.0, "validation_accuracy": 0.5}, {"seconds": 7.0, "validation_accuracy": accuracy}]
    program = "; ".join(f"print({json.dumps(json.dumps(line))})" for line in lines)
    contender = rounds.Contender(lambda data, epochs: [sys.executable, "-c", program])
    if learns:
        assert rounds.take_turn(contender, Path(), 1) == rounds.Turn([7.0], accuracy, ANY)
    else:
        with pytest.raises(Fault, match=r"does not learn: validation accuracy 90\.00%"):
            rounds.take_turn(contender, Path(), 1)


def test_studies_are_compared_round_by_round_by_their_two_workers() -> None:
    two, one = tuning.OURS
    rates = {two: [600.0, 660.0, 900.0], one: [500.0, 600.0, 900.0], tuning.PLAIN: [100.0, 110.0, 75.0]}
    plain, workers = tuning.bounds_of(rates | {tuning.KEPT: [1.0]})
    assert plain.figures == (6, 6, 12)
    assert workers.figures == pytest.approx((1.2, 1.1, 1.0))
    assert plain.holds
    assert workers.holds
    assert not tuning.bounds_of(rates | {two: [590.0] * 3})[0].holds


@pytest.mark.slow
def test_the_plain_study_tries_the_values_that_it_is_given(digits: dict[str, LabelledImages], tmp_path: Path) -> None:
    data, values = tmp_path / "images.npz", [{"model.filters.0": f, "model.filters.1": 8} for f in (8, 16)]
    rounds.write_images(data, digits["train"][:1000], digits["validation"])
    assert tuning.plain_study(data, [each | {"model.dropout": 0.1} for each in values]) > 0
    with pytest.raises(subprocess.CalledProcessError):
        tuning.plain_study(data, [{"model.filters.0": 8, "model.filters.1": 0, "model.dropout": 0.1}])


def test_overhead_is_a_share_of_a_bare_epoch() -> None:
    rows = [(2.0, 0, 0.1), (2.2, 0.1, 0.3), (2.0, 0, 0.1), (2.0, 0.02, 0.1)]
    rows += [(2.0, 0, 0.1), (2.1, 0.3, 0.1), (4.0, 0, 0.1), (4.4, 0.02, 0.12), (4.0, 0, 0.1)]  # something else at work
    ways = (*overhead.TURN, *overhead.TURN, overhead.BARE)
    epochs = [overhead.Timed(way, *row) for way, row in zip(ways, rows, strict=True)]
    bare = 100 * 5 / (2 + 2 + 2 + 4 + 4)  # per cent a second
    assert overhead.costs(epochs, overhead.LIVE) == pytest.approx([0.3 * bare, 0.3 * bare])
    assert overhead.costs(epochs, overhead.CHECKPOINT) == pytest.approx([0.02 * bare, 0.04 * bare])
    assert overhead.longer(epochs, overhead.LIVE) == pytest.approx([10, -30])
    assert overhead.longer(epochs, overhead.CHECKPOINT) == pytest.approx([0, 10])


@pytest.fixture
def committed(workspace: Path) -> Path:
    """The workspace with a commit: a measurement notes of which one its figures are."""
    for words in (["init"], ["-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], capture_output=True, check=True)
    return workspace


@pytest.mark.slow
def test_checkpoints_and_live_images_are_timed_in_one_training(
    committed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in committed.iterdir()}
    monkeypatch.setattr(sys, "argv", ["overhead", "--times", "2", "--output", "overhead.json"])
    monkeypatch.setattr(overhead, "MOST", 1000)  # of epochs of a quarter of a second
    overhead.main()
    found = json.loads(Path("overhead.json").read_text())
    assert [each["way"] for each in found["epochs"]] == [*overhead.TURN, *overhead.TURN, overhead.BARE]
    for each in found["epochs"]:
        assert (each["waited"] > 0) == (each["way"] != overhead.BARE)
        assert each["seconds"] > max(each["waited"], each["sent"]) > 0
    assert [bound["what"] for bound in found["bounds"]] == [f"{way} after each epoch" for way in overhead.TURN[1::2]]
    assert re.search(r"live images after each epoch: .* % \+- .* of it, n = 2\n", capsys.readouterr().out)
    assert {path.name for path in committed.iterdir()} == before | {"overhead.json"}


def test_seeds_give_every_score_and_those_of_other_images_do_not_replace_the_published_ones(
    committed: Path,
    digits: dict[str, LabelledImages],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rare_class.write_imbalanced(digits)
    seeds.OUTPUT.parent.mkdir()
    seeds.OUTPUT.write_text("published")
    words = ["seeds", "--seeds", "2", *recipes.as_words(rare_class.RECIPE)]
    for more in ([], ["--output", "found.json"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        seeds.main()
    assert seeds.OUTPUT.read_text() == "published"
    found = json.loads(Path("found.json").read_text())
    assert found["test_baseline_accuracy"] == pytest.approx(140 / 145)
    assert [row["seed"] for row in found["rows"]] == [0, 1]
    printed = capsys.readouterr().out
    for name in metrics.METRICS:
        reached = [row[f"test_{name}"] for row in found["rows"]]
        assert found["summary"][f"test_{name}"] == {
            "mean": pytest.approx(statistics.fmean(reached)),
            "deviation": pytest.approx(statistics.stdev(reached)),
        }
        assert printed.count(f"test_{name}: mean ") == 2
    assert found["summary"]["test_balanced_accuracy"]["mean"] == 0.5  # it always says 3
    assert found["summary"]["test_accuracy"]["mean"] == found["test_baseline_accuracy"]
    assert printed.count("always answering the most common class: test_accuracy 0.96552\n") == 2


def test_every_augmentation_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(augmentation, "SHAPES", ((8, 9, 1), (9, 8, 3)))
    monkeypatch.setattr(sys, "argv", ["augmentation", "--times", "3"])
    augmentation.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    figures = {name: list(map(float, numbers)) for name, *numbers in (row.strip("| ").split(" | ") for row in rows)}
    *alone, geometry, together = figures
    assert (geometry, together) == ("rotation + scale + shear + elastic", "all")
    assert set(alone) <= set(Augmentation.model_fields)
    assert len(alone) >= 11
    assert all(len(row) == 2 and min(row) > 0 for row in figures.values())


def test_the_page_of_mnist_takes_no_figures_of_other_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns(".*"))
    monkeypatch.chdir(tmp_path)
    path = Path("bench/pooling.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "own"}))
    with pytest.raises(UserError, match=r"is unchanged: bench/pooling\.json has figures of own, .* restore"):
        benchmarks_page.main()


@pytest.mark.slow
def test_pooling_is_compared_over_seeds(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pooling", "--seeds", "2", "--output", "pooling.json", "--picture", "shifts.png", "train.epochs=2"]
    monkeypatch.setattr(sys, "argv", words)
    pooling.main()
    found = json.loads(Path("pooling.json").read_text())
    assert list(found["kinds"]) == list(pooling.KINDS)
    for kind in found["kinds"].values():
        assert [len(row) for row in kind["rows"]] == [len(pooling.SHIFTS)] * 2
        assert kind["mean"][0] == pytest.approx((kind["rows"][0][0] + kind["rows"][1][0]) / 2)
        assert kind["mean"][0] > 0.7 > kind["mean"][-1]  # it learned, and half a dozen pixels are too many
    sizes = {name: kind["parameters"] for name, kind in found["kinds"].items()}
    assert sizes["max pooling"] == sizes["mean pooling"] == 34_826
    assert sizes["no pooling, stride 1"] == 34_826 - 16_000 + 24 * 24 * 64 * 10
    assert Path("shifts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", ["results.json", "tuning.json", "overhead.json"])
def test_every_measured_figure_keeps_its_bound(file: str) -> None:
    rows = json.loads((REPOSITORY / "bench" / file).read_text())["bounds"]
    fields = ("what", "figures", "bound", "aim", "unit", "low")
    bounds = [Bound(**{field: row[field] for field in fields}) for row in rows]
    assert [bound.what for bound in bounds if not bound.holds] == []
    assert all(figure > 0 for bound in bounds for figure in bound.figures)


def test_the_winner_of_the_study_is_better_on_the_test_images_by_more_than_chance() -> None:
    default, tuned = (
        [row["test_accuracy"] for row in json.loads((REPOSITORY / "bench" / file).read_text())["rows"]]
        for file in ("seeds.json", "tuned.json")
    )
    assert len(default) == len(tuned) == 10
    error = math.sqrt((statistics.variance(default) + statistics.variance(tuned)) / 10)
    assert statistics.fmean(tuned) - statistics.fmean(default) > 2 * error


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_plain_loop_trains_the_same_network(name: str) -> None:
    given = networks.NETWORKS[name]
    plain = in_memory_loop.network(given)
    layers = given.model.model_dump() | {"filters": given.model.filter_counts()}
    architecture = Architecture(given.image_shape, tuple(map(str, range(given.classes))), **layers)
    assert sum(parameter.numel() for parameter in plain.parameters()) == parameter_count(architecture)
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    height, width, channels = given.image_shape
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    in_memory_loop.epoch(plain, torch.optim.Adam(plain.parameters()), images, torch.tensor([0, 1]))
    assert any(not torch.equal(*pair) for pair in zip(before, plain.parameters(), strict=True))
