"""Who becomes champion; on a real MLflow registry."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline import evaluate, files
from pipeline.images.splits import TEST, read_dataset
from pipeline.tracking import registry
from pipeline.tracking.registry import register

NAME = "mnist-5k-cnn"
TEST_SPLIT = "a" * 64


@pytest.fixture
def logged(finished_copy: Path) -> tuple[str, str]:
    """A run and its logged model, not registered yet under the names used here."""
    evaluate.main()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.outputs is not None
    return str(run.info.run_id), str(run.outputs.model_outputs[0].model_id)


def aliases(name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in MlflowClient().get_registered_model(name).aliases.items()}


def test_the_evaluated_model_is_registered_with_all_that_can_be_said_of_it(finished: Path) -> None:
    version = MlflowClient().get_model_version_by_alias(NAME, "champion")
    dataset = read_dataset()
    (run,) = mlflow.search_runs(output_format="list")
    assert str(version.version) == "1"
    assert version.run_id == run.info.run_id
    assert version.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert version.tags["test.sha256"] == dataset.splits[TEST].sha256
    assert version.tags["test.error_count"] == str(int(run.data.metrics["test_error_count"]))
    for key in ("data.name", "data.sha256", "params.sha256"):
        assert version.tags[key] == run.data.tags[key]


def test_the_same_model_twice_makes_no_second_version(finished_copy: Path) -> None:
    evaluate.main()
    evaluate.main()
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1
    assert aliases(NAME) == {"champion": "1"}


def test_the_champion_is_who_makes_the_fewest_errors_on_the_same_images(logged: tuple[str, str]) -> None:
    def enter(model: str, error_count: int, test: str = TEST_SPLIT) -> tuple[str, str, str]:
        entered = register(*logged, "gate", model_sha256=model * 64, test_sha256=test, error_count=error_count)
        return entered.version, entered.alias, entered.reason

    assert enter("1", 50) == ("1", "champion", "there was no champion")
    assert enter("2", 51) == ("2", "challenger", "51 test errors against 50 of version 1")
    assert aliases("gate") == {"champion": "1", "challenger": "2"}
    assert enter("3", 50) == ("3", "champion", "50 test errors against 50 of version 1")
    assert aliases("gate") == {"champion": "3", "challenger": "2"}
    assert enter("4", 10, test="b" * 64) == (
        "4",
        "challenger",
        "the champion (version 3) was scored on another test split",
    )
    assert enter("3", 50) == ("3", "champion", "it was the champion already")
    assert aliases("gate") == {"champion": "3", "challenger": "4"}


def test_a_challenger_that_is_scored_again_may_take_over(logged: tuple[str, str]) -> None:
    arguments = {"test_sha256": TEST_SPLIT}
    register(*logged, "again", model_sha256="1" * 64, error_count=50, **arguments)
    register(*logged, "again", model_sha256="2" * 64, error_count=60, **arguments)
    assert aliases("again") == {"champion": "1", "challenger": "2"}
    again = register(*logged, "again", model_sha256="2" * 64, error_count=40, **arguments)
    assert (again.version, again.alias) == ("2", registry.CHAMPION)
    assert aliases("again") == {"champion": "2"}
