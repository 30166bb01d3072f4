"""Who becomes champion, and how a model comes back out of the registry; on a real MLflow registry."""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from pipeline import evaluate, files
from pipeline.data.splits import TEST, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, UserError
from pipeline.model import model_file
from pipeline.model.metrics import wilson_interval
from pipeline.params import Promotion
from pipeline.tracking import gate, registry, runs, serving
from pipeline.tracking.gate import Decision
from pipeline.tracking.registry import Entry, Registration
from tests.conftest import QUICK, run_command, say_of_the_data, write_params
from tests.tracking.evaluating import change_model

NAME = "mnist-5k-cnn"
NO_RULES = Promotion(min_accuracy=None, max_ece=None, max_parameters=None, alpha=None)


def version(number: int | str) -> ModelVersion:
    return MlflowClient().get_model_version(NAME, str(number))


def aliases() -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(NAME).aliases.items()}


class Entrance:
    """Models that enter the registry as `evaluate` would have them enter, with other predictions."""

    def __init__(self) -> None:
        evaluate.main()
        self.saved = model_file.from_bytes(files.MODEL.read_bytes())
        self.dataset = read_dataset()
        self.test = read_split(self.dataset, TEST)
        MlflowClient().delete_registered_model(NAME)

    def enter(self, model: str, errors: int, dataset: Dataset | None = None, parameters: int = 1000) -> Registration:
        """A model with the recipe ``model`` that gets the first ``errors`` test images wrong."""
        right = np.arange(len(self.test)) >= errors
        rows = [{"actual": "a", "predicted": "a" if each else "b"} for each in right]
        run_id = mlflow.start_run().info.run_id  # each with predictions of its own
        mlflow.end_run()
        files.write_table(Path("kept/predictions.csv"), rows)
        MlflowClient().log_artifact(run_id, "kept/predictions.csv", "evaluation")
        self.model(model)
        logged = mlflow.initialize_logged_model(name="model", source_run_id=run_id).model_id
        MlflowClient().log_model_artifact(logged, "kept/model.safetensors", "extra_files")
        MlflowClient().finalize_logged_model(logged, "READY")
        entry = Entry(
            run_id=run_id,
            model_id=logged,
            model_sha256=self.model(model),
            predictions_sha256=files.sha256(Path("kept/predictions.csv").read_bytes()),
            lineage={"data.name": self.dataset.name},
            recipe={},
            parameters=parameters,
            scores={"ece": 0.01, "error_count": errors},
            right=right,
            card="a card",
        )
        return registry.register(entry, dataset or self.dataset, self.test, NO_RULES)

    def model(self, model: str) -> str:
        """The SHA-256 of such a model's file, which it writes: the network is the same in all."""
        content = model_file.to_bytes(self.saved.cnn, self.saved.data, {"model": model})
        files.write(Path("kept/model.safetensors"), content)
        return files.sha256(content)


@pytest.fixture
def entrance(finished_copy: Path) -> Entrance:
    return Entrance()


def test_the_evaluated_model_is_registered_with_all_that_can_be_said_of_it(finished: Path) -> None:
    champion = MlflowClient().get_model_version_by_alias(NAME, "champion")
    dataset = read_dataset()
    (run,) = mlflow.search_runs(output_format="list")
    assert str(champion.version) == "1"
    assert champion.run_id == run.info.run_id
    assert champion.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert champion.tags["test.sha256"] == dataset.splits[TEST].sha256
    assert champion.tags["predictions.sha256"] == files.sha256(files.PREDICTIONS.read_bytes())
    assert json.loads(champion.tags["class.names"]) == list("0123456789")
    assert json.loads(champion.tags["recipe"]) == model_file.from_bytes(files.MODEL.read_bytes()).recipe
    assert champion.tags["gate.decision"] == "champion"
    for key, value in run.data.tags.items():
        if key.startswith(("mlflow.", "process")):  # of the run, and nothing of the model
            assert key not in champion.tags
        else:
            assert champion.tags[key] == value
    scores = json.loads(files.METRICS.read_text())["test"]
    for key in ("accuracy", "loss", "ece", "error_count"):
        assert champion.tags[f"test.{key}"] == str(scores[key])


def test_the_card_says_what_metrics_and_data_say(finished: Path) -> None:
    card = str(version(1).description)
    metrics, dataset = json.loads(files.METRICS.read_text()), read_dataset()
    assert f"| accuracy | {metrics['test']['accuracy']:.2%} |" in card
    assert f"| expected calibration error | {metrics['test']['ece']:.4f} |" in card
    for change, accuracy in metrics["test"]["robustness"].items():
        assert f"| accuracy, {change.replace('_', ' ')} | {accuracy:.2%} |" in card
    for name, score in metrics["test"]["per_class"].items():
        assert f"| {name} | {dataset.splits[TEST].per_class[name]:,} | {score['recall']:.2%} |" in card
    assert f"SHA-256 `{dataset.sha256}`" in card
    assert "conv2d_1          (11, 11, 64)            18,496" in card
    assert "| model.dropout | 0.5 |" in card
    low, high = wilson_interval(1000 - metrics["test"]["error_count"], 1000)
    assert f"| {low:.2%} ... {high:.2%} |" in card
    for split, facts in dataset.splits.items():
        assert f"| {split} | {facts.count:,} |" in card
        assert facts.sha256[:16] in card
    assert "It knows nothing but these classes" in card
    commit = version(1).tags.get("git.commit")
    assert f"`git checkout {commit}`" in card if commit else "there was no git" in card
    assert Path("reports/model_card.md").read_text() == card
    assert len(card) < 5000  # what the databases of MLflow take


@pytest.mark.faults
def test_fault_28_the_card_of_a_stand_in_says_so_and_names_are_shown_as_they_are(finished_copy: Path) -> None:
    say_of_the_data(requested="mnist", source="<script>alert(1)</script> | *bold*")
    evaluate.main()
    card = str(version(1).description)
    assert "**mnist-5k stood in for mnist**, which could not be had." in card
    assert "&lt;script&gt;alert\\(1\\)&lt;/script&gt; \\| \\*bold\\*" in card


def test_the_same_model_twice_makes_no_second_version(finished_copy: Path) -> None:
    evaluate.main()
    before = version(1).tags
    evaluate.main()
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1
    assert aliases() == {"champion": "1"}
    assert version(1).tags == before
    assert json.loads(files.PROMOTION.read_text())["reason"] == "it was the champion already"


def test_the_champion_is_who_makes_fewer_errors_on_the_same_images(entrance: Entrance) -> None:
    assert entrance.enter("1", 50).decision.reason == "there was no champion"
    worse = entrance.enter("2", 51)
    assert (worse.version, worse.decision.alias) == ("2", "challenger")
    assert aliases() == {"champion": "1", "challenger": "2"}
    better = entrance.enter("3", 40)
    assert (better.version, better.decision.alias) == ("3", "champion")
    assert better.decision.reason == "40 test errors against 50 of version 1 (p = 0.002)"
    assert json.loads(version(3).tags["gate.table"])["only_challenger_right"] == 10
    assert float(version(3).tags["gate.p_value"]) == pytest.approx(2 / 2**10)
    assert version(3).tags["gate.against"] == "version 1"
    assert aliases() == {"champion": "3", "challenger": "2"}
    assert [(record.version, record.reason) for record in registry.history(NAME)] == [
        ("1", "there was no champion"),
        ("3", "40 test errors against 50 of version 1 (p = 0.002)"),
    ]


def test_a_challenger_that_is_scored_again_may_take_over(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    entrance.enter("2", 60)
    again = entrance.enter("2", 40)
    assert (again.version, again.decision.alias) == ("2", "champion")
    assert version(2).tags["gate.decision"] == "champion"
    assert aliases() == {"champion": "2"}


def test_a_champion_of_another_test_split_is_scored_on_the_present_one(entrance: Entrance) -> None:
    other = replace(entrance.dataset.splits[TEST], sha256="b" * 64)
    entrance.enter("1", 0)  # no errors on the split that it was tried on; its network makes some on the present one
    dataset = replace(entrance.dataset, splits=entrance.dataset.splits | {TEST: other})
    errors = json.loads(files.METRICS.read_text())["test"]["error_count"]
    assert errors > 1
    assert entrance.enter("2", errors + 1, dataset).decision.reason.startswith(
        f"{errors + 1} test errors against {errors} of version 1"
    )
    assert entrance.enter("3", errors - 1, dataset).decision.alias == "champion"


def test_predictions_that_were_changed_or_deleted_are_made_anew(entrance: Entrance) -> None:
    first = entrance.enter("1", 0)
    errors = json.loads(files.METRICS.read_text())["test"]["error_count"]
    run = mlflow.get_run(str(version(first.version).run_id))
    kept = Path(str(run.info.artifact_uri).removeprefix("file://")) / "evaluation/predictions.csv"
    kept.write_text("actual,predicted\na,a\n")
    assert f"against {errors} of version 1" in entrance.enter("2", errors + 1).decision.reason
    kept.unlink()
    assert f"against {errors} of version 1" in entrance.enter("3", errors + 1).decision.reason


def test_a_champion_that_cannot_be_compared_stays(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    others = replace(entrance.dataset, class_names=("a", "b"))
    others = replace(others, splits=others.splits | {TEST: replace(others.splits[TEST], sha256="b" * 64)})
    decision = entrance.enter("2", 0, others).decision
    assert (decision.alias, decision.reason) == ("challenger", "version 1, the champion, tells other classes apart")
    shutil.rmtree("mlruns")
    decision = entrance.enter("3", 0).decision
    assert decision.alias == "challenger"
    assert decision.reason.startswith(f"version 1, the champion, the files of models:/{NAME}/1 cannot be had: ")
    assert aliases()["champion"] == "1"


def test_a_model_of_the_fall_back_never_replaces_one_of_the_whole_set(entrance: Entrance) -> None:
    whole = replace(entrance.dataset, name="mnist", requested="mnist")
    entrance.enter("1", 50, whole)
    entrance.enter("2", 0, replace(entrance.dataset, requested="mnist"))
    champions = {name: MlflowClient().get_model_version_by_alias(name, "champion") for name in ("mnist-cnn", NAME)}
    assert champions["mnist-cnn"].tags["model.sha256"] == entrance.model("1")
    assert champions[NAME].tags["model.sha256"] == entrance.model("2")


def test_a_champion_that_was_rolled_back_does_not_come_back_by_itself(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    with pytest.raises(UserError, match="has had no other champion to go back to"):
        registry.roll_back(None)
    entrance.enter("2", 40)
    assert str(registry.roll_back(None).version) == "1"
    assert entrance.enter("2", 40).decision.reason.startswith("it was rolled back on 20")
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert entrance.enter("3", 45).decision.alias == "champion"
    with pytest.raises(UserError, match=f"{NAME} version 3 is the champion already"):
        registry.roll_back("3")
    registry.roll_back("2")  # it takes a person
    assert aliases() == {"champion": "2"}
    assert [record.version for record in registry.history(NAME)] == ["1", "2", "1", "3", "2"]
    assert "gate.barred" not in version(2).tags


def test_a_version_is_found_by_alias_and_number(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    entrance.enter("2", 60)
    for reference in ("challenger", "2", f"{NAME}@challenger", f"{NAME}/2"):
        assert str(registry.find(reference).version) == "2"
    with pytest.raises(UserError, match=f"{NAME} has no version 7; it has: 1, 2, challenger, champion"):
        registry.find("7")
    with pytest.raises(UserError, match=f"no model other is registered here; registered: {NAME}"):
        registry.find("other@champion")
    shutil.rmtree("data")
    assert str(registry.find("champion").version) == "1"  # the only model there is


def test_a_model_comes_back_and_answers_as_before(finished: Path) -> None:
    loaded = registry.load(version(1))
    test: LabelledImages = read_split(read_dataset(), TEST)
    probabilities = loaded.classify(test.images.numpy())
    assert loaded.class_names == tuple("0123456789")
    assert loaded.image_shape == (28, 28, 1)
    rows = files.read_table(files.PREDICTIONS, made_by="evaluate")
    assert [str(label) for label in probabilities.argmax(axis=1)] == [row["predicted"] for row in rows]
    alone = np.concatenate([loaded.classify(test.images[[index]].numpy()) for index in range(20)])
    np.testing.assert_allclose(alone, probabilities[:20], atol=1e-5)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('PWNED', 'w')",)


def _artifacts(number: int) -> Path:
    """Where the store keeps the files of a version."""
    model_id = str(version(number).source).removeprefix("models:/")
    return Path(str(MlflowClient().get_logged_model(model_id).artifact_location).removeprefix("file://"))


def _pickled_graph(path: Path) -> None:
    path.write_bytes(pickle.dumps(Attack()))


def _graph_whose_shapes_are_code(path: Path) -> None:
    """torch.export.load evaluates the expressions of shapes: what is in this one would be run."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (described,) = (name for name in records if name.endswith("models/model.json"))
    attack = b"__import__('pathlib').Path('PWNED').touch()"
    records[described], count = re.subn(rb'("expr_str": ?)"[^"]+"', rb'\1"' + attack + b'"', records[described])
    assert count > 0
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("change", [_pickled_graph, _graph_whose_shapes_are_code])
def test_fault_26_a_graph_that_brings_code_is_never_even_read(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    evaluate.main()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # whatever somebody has set
    change(_artifacts(1) / "data/model.pt2")
    test = read_split(read_dataset(), TEST)[:5]
    for command, *arguments in (["export", "--format", "pt2"], ["predict", "--json", "picture.png"]):
        Image.fromarray(test.images[0, ..., 0].numpy()).save("picture.png")
        done = run_command(command, *arguments, folder=finished_copy)
        assert done.returncode == 0, done.stderr
    serving.application(version(1), "127.0.0.1")
    assert not list(finished_copy.rglob("PWNED"))


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("way", ["pickle", "another model", "a changed weight", "none"])
def test_fault_26_a_model_file_that_is_not_the_registered_one_is_refused(finished_copy: Path, way: str) -> None:
    evaluate.main()
    path = _artifacts(1) / "extra_files/model.safetensors"
    content = path.read_bytes()
    match way:
        case "pickle":
            path.write_bytes(pickle.dumps(Attack()))
        case "another model":
            path.write_bytes(model_file.to_bytes(model_file.from_bytes(content).cnn))
        case "a changed weight":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "none":
            path.unlink()
    reason = "cannot be had" if way == "none" else r"is not the one that was registered \(another SHA-256\)"
    for use in (registry.load, partial(serving.application, host="127.0.0.1")):
        with pytest.raises(Fault, match=reason):
            use(version(1))
    done = run_command("predict", "x.png", folder=finished_copy)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert not list(finished_copy.rglob("PWNED"))


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
    damage(_artifacts(1))
    evaluate.main()
    assert aliases() == {"champion": "2"}
    assert registry.load(version(2)).class_names == tuple("0123456789")
    assert version(2).tags["gate.reason"] == "it is the model of version 1, whose file is gone or damaged"
    MlflowClient().set_registered_model_alias(NAME, "champion", "1")  # as where the evaluation was killed before it
    evaluate.main()
    assert aliases() == {"champion": "2"}
    evaluate.main()  # of a whole champion
    assert aliases() == {"champion": "2"}
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 2


def test_where_there_is_no_champion_the_last_whole_one_can_be_gone_back_to(entrance: Entrance) -> None:
    assert registry.to_go_back_to() is None
    for model, errors in (("1", 50), ("2", 40), ("3", 30), ("4", 60)):
        entrance.enter(model, errors)
    MlflowClient().delete_registered_model_alias(NAME, "champion")
    _change(_artifacts(3))
    assert str(getattr(registry.to_go_back_to(), "version", None)) == "2"  # and not the newest, the challenger
    assert str(registry.roll_back("2").version) == "2"
    assert registry.history(NAME)[-1].reason == "by hand"
    MlflowClient().delete_registered_model_alias(NAME, "champion")
    for number in ("1", "2"):
        MlflowClient().set_model_version_tag(NAME, number, "gate.barred", "a while ago")
    assert str(getattr(registry.to_go_back_to(), "version", None)) == "4"
    _change(_artifacts(4))
    assert registry.to_go_back_to() is None


@pytest.mark.faults
def test_fault_23_a_tracking_database_from_a_backup_is_completed(finished_copy: Path) -> None:
    """The champion of after the backup is unknown to it: it is registered anew, with its alias and its history."""
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
    assert [record.version for record in registry.history(NAME)] == ["1", "2"]


def test_an_alias_that_was_set_elsewhere_is_part_of_the_history(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    entrance.enter("2", 60)
    MlflowClient().set_registered_model_alias(NAME, "champion", "2")  # as on MLflow's own page
    assert [record.version for record in registry.history(NAME)] == ["1", "2"]
    entrance.enter("3", 40)
    assert [(record.version, record.reason) for record in registry.history(NAME)][1:] == [
        ("2", "the alias was set by hand"),
        ("3", "40 test errors against 60 of version 2 (p = 1.9e-06)"),
    ]


def test_going_back_twice_goes_back_two_champions(entrance: Entrance) -> None:
    for model, errors in (("1", 50), ("2", 40), ("3", 30)):
        entrance.enter(model, errors)
    assert [str(registry.roll_back(None).version) for _ in range(2)] == ["2", "1"]
    with pytest.raises(UserError, match="has had no other champion to go back to"):
        registry.roll_back(None)
    MlflowClient().set_registered_model_alias(NAME, "champion", "3")
    MlflowClient().delete_model_version(NAME, "2")
    with pytest.raises(UserError, match="has had no other champion to go back to"):  # 1 and 2 were gone back from
        MlflowClient().set_model_version_tag(NAME, "1", "gate.barred", "a while ago")
        registry.roll_back(None)


def test_a_champion_for_images_of_another_size_cannot_be_compared(entrance: Entrance) -> None:
    entrance.enter("1", 50)
    others = replace(entrance.dataset, image_shape=(32, 32, 1))
    others = replace(others, splits=others.splits | {TEST: replace(others.splits[TEST], sha256="b" * 64)})
    assert entrance.enter("2", 0, others).decision.reason == "version 1, the champion, takes images of 28 x 28 x 1"


def test_a_champion_that_another_machine_crowns_in_the_meantime_is_who_counts(
    entrance: Entrance, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrance.enter("1", 50)
    decide = gate.decide

    def and_meanwhile_elsewhere(*arguments: Any) -> Decision:
        monkeypatch.setattr(gate, "decide", decide)
        monkeypatch.setattr(registry, "_gate_closed", nullcontext)  # another machine knows nothing of this one's lock
        entrance.enter("2", 10)
        return decide(*arguments)

    monkeypatch.setattr(gate, "decide", and_meanwhile_elsewhere)
    decision = entrance.enter("3", 20).decision
    assert (decision.alias, decision.reason) == ("challenger", "20 test errors against 10 of version 2 (p = 0.002)")
    assert aliases() == {"champion": "2", "challenger": "3"}


def test_two_clones_on_one_machine_wait_for_each_other_at_the_same_store(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.connect()
    assert runs._lock("gate") == workspace / "mlruns/.gate.lock"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / 'mlflow.db'}?timeout=20")
    locks = set()
    for clone in ("one", "other"):
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / clone))
        runs.connect()
        locks.add(runs._lock("gate"))
    assert len(locks) == 1


def test_a_card_that_is_too_long_for_the_store_is_whole_among_the_artifacts(
    entrance: Entrance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry._described("short") == "short"
    long = "\n".join(["a line of a card"] * 1000)
    described = registry._described(long)
    assert 4900 < len(described) <= 5000
    assert described.endswith("a line of a card\n\nThe rest is in `evaluation/model_card.md` of the run.")


def test_the_floors_of_params_yaml_are_those_of_the_gate(finished_copy: Path) -> None:
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34825})
    evaluate.main()
    assert aliases() == {"challenger": "1"}
    report = json.loads(files.PROMOTION.read_text())
    assert report["reason"] == "its 34,826 parameters are more than evaluate.promotion.max_parameters 34,825"
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34826})
    evaluate.main()
    assert aliases() == {"champion": "1"}
