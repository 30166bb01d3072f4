"""Which model becomes champion, and how an earlier one comes back; on a real MLflow registry."""

import itertools
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline import doctor, evaluate, files, models, train
from pipeline.data.image_files import Preprocessing
from pipeline.data.splits import TEST, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, UserError
from pipeline.model import metrics, model_file
from pipeline.tracking import gate, locks, promotion, registry, store
from pipeline.tracking.gate import Decision
from pipeline.tracking.registry import Entry
from tests.conftest import QUICK, write_params
from tests.rare_class import RECIPE, write_imbalanced
from tests.tracking.evaluating import change_model
from tests.tracking.registering import NAME, NO_RULES, Candidates, aliases, artifacts, version


@pytest.fixture
def candidates(finished_copy: Path) -> Candidates:
    return Candidates()


def test_the_same_model_twice_makes_no_second_version(finished_copy: Path) -> None:
    evaluate.main()
    before = version(1).tags
    evaluate.main()
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1
    assert aliases() == {"champion": "1"}
    assert version(1).tags == before
    assert json.loads(files.PROMOTION.read_text())["reason"] == "it was already the champion"


def test_the_model_with_fewer_errors_on_the_same_images_is_champion(candidates: Candidates) -> None:
    assert candidates.register("1", 50).decision.reason == "there was no champion"
    worse = candidates.register("2", 51)
    assert (worse.version, worse.decision.alias) == ("2", "challenger")
    assert aliases() == {"champion": "1", "challenger": "2"}
    better = candidates.register("3", 40)
    assert (better.version, better.decision.alias) == ("3", "champion")
    assert better.decision.reason == "40 test errors against 50 of version 1 (p = 0.002)"
    assert json.loads(version(3).tags["gate.table"])["only_challenger_right"] == 10
    assert float(version(3).tags["gate.p_value"]) == pytest.approx(2 / 2**10)
    assert version(3).tags["gate.against"] == "version 1"
    assert aliases() == {"champion": "3", "challenger": "2"}
    assert [(record.version, record.reason) for record in promotion.history(NAME)] == [
        ("1", "there was no champion"),
        ("3", "40 test errors against 50 of version 1 (p = 0.002)"),
    ]


@pytest.mark.slow
def test_the_metric_of_params_yaml_decides_who_is_champion(
    workspace: Path,
    digits: dict[str, LabelledImages],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that always says 3 and one that finds the 8s too, at the price of some 3s."""
    write_imbalanced(digits)
    balanced = QUICK | RECIPE | {"train.class_weights": "balanced"}
    for params in (QUICK | RECIPE, balanced):
        write_params(workspace, params)
        train.main()
        evaluate.main()
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert version(2).tags["gate.metric"] == "accuracy"
    assert "comparing its accuracy with the champion's" in capsys.readouterr().out
    write_params(workspace, balanced | {"evaluate.metric": "balanced_accuracy"})
    evaluate.main()
    assert aliases() == {"champion": "2"}
    decided = json.loads(files.PROMOTION.read_text())
    assert (decided["decision"], decided["metric"]) == ("champion", "balanced_accuracy")
    assert re.match(r"test balanced accuracy 0\.\d{4} against 0\.5000 of version 1 \(p = [\d.]+\)$", decided["reason"])
    assert version(2).tags["gate.metric"] == "balanced_accuracy"
    assert float(version(2).tags["gate.p_value"]) == decided["p_value"]
    printed = capsys.readouterr().out
    assert "comparing its balanced accuracy with the champion's" in printed
    assert decided["reason"] in printed
    beside = metrics.beside_accuracy(json.loads(files.METRICS.read_text())["test"])
    assert beside.endswith("always answering the most common class: 96.55%")
    assert f"\n{beside}\n" in printed
    monkeypatch.setattr(sys, "argv", ["models"])
    models.main()
    assert f"\n  by class                  {beside}\n" in capsys.readouterr().out


def test_a_challenger_that_is_scored_again_may_take_over(candidates: Candidates) -> None:
    candidates.register("1", 50)
    candidates.register("2", 60)
    again = candidates.register("2", 40)
    assert (again.version, again.decision.alias) == ("2", "champion")
    assert version(2).tags["gate.decision"] == "champion"
    assert aliases() == {"champion": "2"}


def test_a_champion_of_another_test_split_is_scored_on_the_present_one(candidates: Candidates) -> None:
    other = replace(candidates.dataset.splits[TEST], sha256="b" * 64)
    candidates.register(
        "1", 0
    )  # no errors on the split that it was tried on; its network makes some on the present one
    dataset = replace(candidates.dataset, splits=candidates.dataset.splits | {TEST: other})
    errors = json.loads(files.METRICS.read_text())["test"]["error_count"]
    assert errors > 1
    assert candidates.register("2", errors + 1, dataset).decision.reason.startswith(
        f"{errors + 1} test errors against {errors} of version 1"
    )
    assert candidates.register("3", errors - 1, dataset).decision.alias == "champion"


def test_changed_or_deleted_predictions_are_recomputed(candidates: Candidates) -> None:
    first = candidates.register("1", 0)
    errors = json.loads(files.METRICS.read_text())["test"]["error_count"]
    run = mlflow.get_run(str(version(first.version).run_id))
    kept = Path(str(run.info.artifact_uri).removeprefix("file://")) / "evaluation/predictions.csv"
    kept.write_text("actual,predicted\na,a\n")
    assert f"against {errors} of version 1" in candidates.register("2", errors + 1).decision.reason
    kept.unlink()
    assert f"against {errors} of version 1" in candidates.register("3", errors + 1).decision.reason


def test_a_champion_that_cannot_be_compared_stays(candidates: Candidates) -> None:
    candidates.register("1", 50)
    others = replace(candidates.dataset, class_names=("a", "b"))
    others = replace(others, splits=others.splits | {TEST: replace(others.splits[TEST], sha256="b" * 64)})
    decision = candidates.register("2", 0, others).decision
    assert (decision.alias, decision.reason) == ("challenger", "version 1, the champion, has different classes")
    shutil.rmtree("mlruns")
    decision = candidates.register("3", 0).decision
    assert decision.alias == "challenger"
    assert decision.reason.startswith(
        f"version 1, the champion, cannot be loaded: the files of models:/{NAME}/1 cannot be read: "
    )
    assert aliases()["champion"] == "1"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [
        ("parameters", "many", "has the tag parameters 'many', which cannot be read: somebody has changed it; take"),
        ("class.names", "0, 1", "has the tag class.names '0, 1', which cannot be read: somebody has changed it; take"),
        ("predictions.sha256", None, "has no tag predictions.sha256: it was not registered by `evaluate`, or somebody"),
    ],
)
def test_fault_36_a_champion_with_a_tag_that_somebody_has_changed_stays(
    candidates: Candidates, tag: str, value: str | None, reason: str
) -> None:
    candidates.register("1", 50)
    if value is None:
        MlflowClient().delete_model_version_tag(NAME, "1", tag)
    else:
        MlflowClient().set_model_version_tag(NAME, "1", tag, value)
    other = replace(candidates.dataset.splits[TEST], sha256="b" * 64)
    dataset = replace(candidates.dataset, splits=candidates.dataset.splits | {TEST: other})
    decision = candidates.register("2", 0, dataset).decision
    assert decision.alias == "challenger"
    assert decision.reason.startswith(f"version 1, the champion, cannot be compared: {NAME} version 1 {reason}")
    candidates.register("1", 50)  # which writes its tags again
    assert candidates.register("3", 0).decision.alias == "champion"


@pytest.mark.faults
def test_fault_36_predictions_of_other_images_than_their_tag_says_are_recomputed(candidates: Candidates) -> None:
    candidates.register("1", 50)
    errors = json.loads(files.METRICS.read_text())["test"]["error_count"]
    few = Path("kept/predictions.csv")
    files.write_table(few, [{"actual": "a", "predicted": "a"}] * 3)
    MlflowClient().log_artifact(str(version(1).run_id), str(few), "evaluation")
    MlflowClient().set_model_version_tag(NAME, "1", "predictions.sha256", files.sha256(few.read_bytes()))
    assert f"against {errors} of version 1" in candidates.register("2", errors + 1).decision.reason


def _damages(tags: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each tag deleted, with text that is no number, no JSON and no hash, and with JSON of another kind."""
    return itertools.product(tags, (None, "\u00b2 gar\nbage", "[[1]]"))


@pytest.mark.faults
@pytest.mark.slow
def test_fault_36_whatever_tag_of_a_version_is_changed_each_use_of_it_works_or_is_one_line(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.main()
    client, dataset, tags = MlflowClient(), read_dataset(), dict(version(1).tags)
    test = read_split(dataset, TEST)
    other = replace(dataset, splits=dataset.splits | {TEST: replace(dataset.splits[TEST], sha256="b" * 64)})
    entry = Entry("", "", "c" * 64, "", {}, {}, 1, {"ece": 0.01}, np.ones(len(test), dtype=bool), "")
    monkeypatch.setattr(sys, "argv", ["models"])

    def decide(dataset: Dataset) -> Decision:
        return promotion._decide(entry, None, version(1), dataset, test, NO_RULES)

    uses: list[Callable[[], object]] = [
        lambda: registry.load(registry.find("champion")),
        models.main,
        lambda: promotion.history(NAME),
        promotion.fallback,
        lambda: list(doctor._registry()),
        lambda: decide(dataset),
        lambda: decide(other),
    ]
    refused = set()
    for tag, value in _damages(tags):
        if value is None:
            client.delete_model_version_tag(NAME, "1", tag)
        else:
            client.set_model_version_tag(NAME, "1", tag, value)
        for use in uses:
            try:
                use()
            except (UserError, Fault) as error:
                refused.add(tag)
                assert "\n" not in str(error)
        client.set_model_version_tag(NAME, "1", tag, tags[tag])
    assert {"model.sha256", "recipe", "test.accuracy"} <= refused


def test_a_model_of_the_stand_in_never_replaces_one_of_the_whole_data_set(candidates: Candidates) -> None:
    whole = replace(candidates.dataset, name="mnist", requested="mnist")
    candidates.register("1", 50, whole)
    candidates.register("2", 0, replace(candidates.dataset, requested="mnist"))
    champions = {name: MlflowClient().get_model_version_by_alias(name, "champion") for name in ("mnist-cnn", NAME)}
    assert champions["mnist-cnn"].tags["model.sha256"] == candidates.model("1")
    assert champions[NAME].tags["model.sha256"] == candidates.model("2")


def test_a_champion_that_was_rolled_back_does_not_come_back_by_itself(candidates: Candidates) -> None:
    candidates.register("1", 50)
    with pytest.raises(UserError, match="has no earlier champion to roll back to"):
        promotion.roll_back(None)
    candidates.register("2", 40)
    assert str(promotion.roll_back(None).version) == "1"
    assert candidates.register("2", 40).decision.reason.startswith("it was rolled back on 20")
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert candidates.register("3", 45).decision.alias == "champion"
    with pytest.raises(UserError, match=f"{NAME} version 3 is already the champion"):
        promotion.roll_back("3")
    promotion.roll_back("2")  # it takes a person
    assert aliases() == {"champion": "2"}
    assert [record.version for record in promotion.history(NAME)] == ["1", "2", "1", "3", "2"]
    assert "gate.rolled_back" not in version(2).tags


def _change(artifacts: Path) -> None:
    path = artifacts / "extra_files/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.faults
@pytest.mark.parametrize("damage", [shutil.rmtree, _change])
def test_fault_23_a_damaged_champion_is_made_whole_by_the_next_evaluation(
    finished_copy: Path, damage: Callable[[Path], None]
) -> None:
    evaluate.main()
    damage(artifacts(1))
    evaluate.main()
    assert aliases() == {"champion": "2"}
    assert registry.load(version(2)).class_names == tuple("0123456789")
    assert version(2).tags["gate.reason"] == "it is the model of version 1, whose file is missing or damaged"
    MlflowClient().set_registered_model_alias(NAME, "champion", "1")  # as where the evaluation was killed before it
    evaluate.main()
    assert aliases() == {"champion": "2"}
    evaluate.main()  # of a whole champion
    assert aliases() == {"champion": "2"}
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 2


def test_without_a_champion_the_last_complete_one_is_the_fallback(candidates: Candidates) -> None:
    assert promotion.fallback() is None
    for model, errors in (("1", 50), ("2", 40), ("3", 30), ("4", 60)):
        candidates.register(model, errors)
    MlflowClient().delete_registered_model_alias(NAME, "champion")
    _change(artifacts(3))
    assert str(getattr(promotion.fallback(), "version", None)) == "2"  # and not the newest, the challenger
    assert str(promotion.roll_back("2").version) == "2"
    assert promotion.history(NAME)[-1].reason == "by hand"
    MlflowClient().delete_registered_model_alias(NAME, "champion")
    for number in ("1", "2"):
        MlflowClient().set_model_version_tag(NAME, number, "gate.rolled_back", "a while ago")
    assert str(getattr(promotion.fallback(), "version", None)) == "4"
    _change(artifacts(4))
    assert promotion.fallback() is None


@pytest.mark.faults
def test_fault_23_a_tracking_database_from_a_backup_is_completed(finished_copy: Path) -> None:
    """It does not know a champion newer than itself: that is registered again, with its alias and its history."""
    evaluate.main()
    better = files.MODEL.read_bytes()
    change_model(model_file.from_bytes(better), seed=3)
    MlflowClient().delete_registered_model(NAME)
    evaluate.main()
    shutil.copy("mlflow.db", "backup")
    files.write(files.MODEL, better)
    evaluate.main()
    assert aliases()["champion"] == "2"
    shutil.copy("backup", "mlflow.db")
    assert aliases() == {"champion": "1"}
    evaluate.main()
    assert aliases() == {"champion": "2"}
    assert version(2).tags["model.sha256"] == files.sha256(better)
    assert [record.version for record in promotion.history(NAME)] == ["1", "2"]


def test_an_alias_that_was_set_elsewhere_is_part_of_the_history(candidates: Candidates) -> None:
    candidates.register("1", 50)
    candidates.register("2", 60)
    MlflowClient().set_registered_model_alias(NAME, "champion", "2")  # as on MLflow's own page
    assert [record.version for record in promotion.history(NAME)] == ["1", "2"]
    candidates.register("3", 40)
    assert [(record.version, record.reason) for record in promotion.history(NAME)][1:] == [
        ("2", "the alias was set by hand"),
        ("3", "40 test errors against 60 of version 2 (p = 1.9e-06)"),
    ]


def test_two_rollbacks_go_back_two_champions(candidates: Candidates) -> None:
    for model, errors in (("1", 50), ("2", 40), ("3", 30)):
        candidates.register(model, errors)
    assert [str(promotion.roll_back(None).version) for _ in range(2)] == ["2", "1"]
    with pytest.raises(UserError, match="has no earlier champion to roll back to"):
        promotion.roll_back(None)
    MlflowClient().set_registered_model_alias(NAME, "champion", "3")
    MlflowClient().delete_model_version(NAME, "2")
    with pytest.raises(UserError, match="has no earlier champion to roll back to"):  # 1 and 2 were gone back from
        MlflowClient().set_model_version_tag(NAME, "1", "gate.rolled_back", "a while ago")
        promotion.roll_back(None)


def test_a_champion_for_images_of_another_size_cannot_be_compared(candidates: Candidates) -> None:
    candidates.register("1", 50)
    others = replace(candidates.dataset, preprocessing=Preprocessing("fit", (32, 32, 1)))
    others = replace(others, splits=others.splits | {TEST: replace(others.splits[TEST], sha256="b" * 64)})
    assert candidates.register("2", 0, others).decision.reason == "version 1, the champion, takes images of 28 x 28 x 1"


def test_a_champion_that_another_machine_sets_in_the_meantime_is_the_one_to_compare_with(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates.register("1", 50)
    decide = gate.decide

    def and_meanwhile_elsewhere(*arguments: Any) -> Decision:
        monkeypatch.setattr(gate, "decide", decide)
        monkeypatch.setattr(locks, "exclusive_lock", nullcontext)  # its lock is not known on another machine
        candidates.register("2", 10)
        return decide(*arguments)

    monkeypatch.setattr(gate, "decide", and_meanwhile_elsewhere)
    decision = candidates.register("3", 20).decision
    assert (decision.alias, decision.reason) == ("challenger", "20 test errors against 10 of version 2 (p = 0.002)")
    assert aliases() == {"champion": "2", "challenger": "3"}


@pytest.mark.faults
def test_fault_50_the_order_of_champions_is_not_that_of_a_clock_that_steps_back(candidates: Candidates) -> None:
    candidates.register("1", 50)
    candidates.register("2", 40)
    with closing(sqlite3.connect("mlflow.db")) as database, database:  # version 1 became champion "later"
        later = "UPDATE registered_model_tags SET key = replace(key, ?, '2999') WHERE value LIKE 'version 1:%'"
        database.execute(later, (str(datetime.now(UTC).year),))
    candidates.register("3", 30)
    assert [record.version for record in promotion.history(NAME)] == ["1", "2", "3"]
    assert promotion.history(NAME)[0].since.startswith("2999")
    assert str(promotion.roll_back(None).version) == "2"
    assert [record.version for record in promotion.history(NAME)] == ["1", "2", "3", "2"]


def test_records_of_an_earlier_release_come_first_in_the_order_of_their_times(candidates: Candidates) -> None:
    candidates.register("1", 50)
    candidates.register("2", 40)
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("UPDATE registered_model_tags SET key = 'champion.' || substr(key, 17)")
    candidates.register("3", 30)
    assert [record.version for record in promotion.history(NAME)] == ["1", "2", "3"]
    assert all(record.since.startswith("20") for record in promotion.history(NAME))


def test_two_clones_on_one_machine_wait_for_each_other_at_the_same_store(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.connect()
    assert locks._lock_file("gate") == workspace / "mlruns/.gate.lock"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / 'mlflow.db'}?timeout=20")
    paths = set()
    for clone in ("one", "other"):
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / clone))
        store.connect()
        paths.add(locks._lock_file("gate"))
    assert len(paths) == 1


def test_the_limits_of_params_yaml_are_those_of_the_gate(finished_copy: Path) -> None:
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34825})
    evaluate.main()
    assert aliases() == {"challenger": "1"}
    report = json.loads(files.PROMOTION.read_text())
    assert report["reason"] == "its 34,826 parameters are more than evaluate.promotion.max_parameters 34,825"
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34826})
    evaluate.main()
    assert aliases() == {"champion": "1"}
