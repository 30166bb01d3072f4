"""Who becomes champion, and how a model comes back out of the registry; on a real MLflow registry."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import evaluate, files
from pipeline.errors import Fault, UserError
from pipeline.images.splits import TEST, Dataset, LabelledImages, read_dataset, read_split
from pipeline.network import model_file
from pipeline.params import Promotion
from pipeline.tracking import models, registry
from pipeline.tracking.registry import Entry, Registration
from tests.conftest import QUICK, write_params

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
        (run,) = mlflow.search_runs(output_format="list")
        assert run.outputs is not None
        self.run_id, self.model_id = str(run.info.run_id), str(run.outputs.model_outputs[0].model_id)
        self.dataset = read_dataset()
        self.test = read_split(self.dataset, TEST)
        MlflowClient().delete_registered_model(NAME)

    def enter(self, model: str, errors: int, dataset: Dataset | None = None, parameters: int = 1000) -> Registration:
        """A model with the hash ``model`` that gets the first ``errors`` test images wrong."""
        right = np.arange(len(self.test)) >= errors
        rows = [{"actual": "a", "predicted": "a" if each else "b"} for each in right]
        run_id = mlflow.start_run().info.run_id  # each with predictions of its own
        mlflow.end_run()
        files.write_table(Path("kept/predictions.csv"), rows)
        MlflowClient().log_artifact(run_id, "kept/predictions.csv", "evaluation")
        entry = Entry(
            run_id=run_id,
            model_id=self.model_id,
            model_sha256=model * 64,
            predictions_sha256=files.sha256(Path("kept/predictions.csv").read_bytes()),
            lineage={"data.name": self.dataset.name},
            recipe={},
            parameters=parameters,
            scores={"ece": 0.01, "error_count": errors},
            right=right,
            card="a card",
        )
        return registry.register(entry, dataset or self.dataset, self.test, NO_RULES)


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
        assert key.startswith("mlflow.") or champion.tags[key] == value
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
    assert [(reign.version, reign.reason) for reign in registry.history(NAME)] == [
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
    assert decision.reason.startswith(f"version 1, the champion, models:/{NAME}/1 cannot be loaded: ")
    assert aliases()["champion"] == "1"


def test_a_model_of_the_fall_back_never_replaces_one_of_the_whole_set(entrance: Entrance) -> None:
    whole = replace(entrance.dataset, name="mnist", requested="mnist")
    entrance.enter("1", 50, whole)
    entrance.enter("2", 0, replace(entrance.dataset, requested="mnist"))
    champions = {name: MlflowClient().get_model_version_by_alias(name, "champion") for name in ("mnist-cnn", NAME)}
    assert champions["mnist-cnn"].tags["model.sha256"] == "1" * 64
    assert champions[NAME].tags["model.sha256"] == "2" * 64


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
    assert [reign.version for reign in registry.history(NAME)] == ["1", "2", "1", "3", "2"]
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
    probabilities = loaded.model.classify(test.images.numpy())
    assert loaded.class_names == tuple("0123456789")
    assert loaded.model.image_shape == (28, 28, 1)
    rows = files.read_table(files.PREDICTIONS, made_by="evaluate")
    assert [str(label) for label in probabilities.argmax(axis=1)] == [row["predicted"] for row in rows]
    alone = np.concatenate([loaded.model.classify(test.images[[index]].numpy()) for index in range(20)])
    np.testing.assert_allclose(alone, probabilities[:20], atol=1e-5)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('PWNED', 'w')",)


@pytest.mark.parametrize("way", ["model.pth", "another graph", "code", "another loader", "a file beside it"])
def test_a_model_that_brings_code_is_refused_and_never_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(tmp_path / "model")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # whatever somebody has set
    assert models.read(folder, "the model").image_shape == (28, 28, 1)
    match way:
        case "model.pth":
            (folder / "data/model.pth").write_bytes(pickle.dumps(Attack()))
        case "another graph":
            (folder / "data/model.pt2").write_bytes(pickle.dumps(Attack()))
        case "code":
            described = (folder / "MLmodel").read_text()
            (folder / "MLmodel").write_text(described.replace("    code: null", "    code: code"))
            (folder / "code").mkdir()
            (folder / "code/json.py").write_text("open('PWNED', 'w')")
        case "another loader":
            described = (folder / "MLmodel").read_text()
            (folder / "MLmodel").write_text(
                described.replace("loader_module: mlflow.pytorch", "loader_module: antigravity")
            )
        case "a file beside it":
            (folder / "data/pickle_module_info.txt").write_text("antigravity")
    with pytest.raises(Fault, match=r"^the model (is no exported graph alone|cannot be loaded)"):
        models.read(folder, "the model")
    assert not Path("PWNED").exists()


def test_the_floors_of_params_yaml_are_those_of_the_gate(finished_copy: Path) -> None:
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34825})
    evaluate.main()
    assert aliases() == {"challenger": "1"}
    report = json.loads(files.PROMOTION.read_text())
    assert report["reason"] == "its 34,826 parameters are more than evaluate.promotion.max_parameters 34,825"
    write_params(finished_copy, QUICK | {"evaluate.promotion.max_parameters": 34826})
    evaluate.main()
    assert aliases() == {"champion": "1"}
