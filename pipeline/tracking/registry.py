"""The model registry: register a run's model once, and let only a model that is as good become champion."""

from dataclasses import dataclass

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.tracking.runs import MODEL_SHA256, store_faults

CHAMPION, CHALLENGER = "champion", "challenger"
TEST_SHA256, TEST_ERRORS = "test.sha256", "test.error_count"


@dataclass(frozen=True)
class Registration:
    """What became of a model: its version, the alias it holds now, and why."""

    name: str
    version: str
    alias: str
    reason: str


@store_faults()
def register(
    run_id: str, model_id: str, name: str, *, model_sha256: str, test_sha256: str, error_count: int
) -> Registration:
    """Register the run's logged model under ``name`` and decide between champion and challenger.

    A model whose hash is registered already gets no second version. ``error_count`` is that on the test split whose
    file has the hash ``test_sha256``.
    """
    tags = {MODEL_SHA256: model_sha256, TEST_SHA256: test_sha256, TEST_ERRORS: str(error_count), **_lineage(run_id)}
    version = _registered(name, model_sha256, tags) or mlflow.register_model(f"models:/{model_id}", name, tags=tags)
    alias, reason = _decide(version, _champion(name), test_sha256, error_count)
    _set_alias(version, alias)
    return Registration(name, str(version.version), alias, reason)


def _registered(name: str, model_sha256: str, tags: dict[str, str]) -> ModelVersion | None:
    """The version that has this model already, with its tags brought up to date."""
    found = MlflowClient().search_model_versions(f"name = '{name}' and tags.`{MODEL_SHA256}` = '{model_sha256}'")
    if not found:
        return None
    for key, value in tags.items():
        MlflowClient().set_model_version_tag(name, found[0].version, key, value)
    return found[0]


def _lineage(run_id: str) -> dict[str, str]:
    tags = MlflowClient().get_run(run_id).data.tags
    return {key: tags[key] for key in ("data.name", "data.sha256", "params.sha256", "git.commit") if key in tags}


def _champion(name: str) -> ModelVersion | None:
    number = MlflowClient().get_registered_model(name).aliases.get(CHAMPION)
    return MlflowClient().get_model_version(name, number) if number else None


def _decide(
    version: ModelVersion, champion: ModelVersion | None, test_sha256: str, error_count: int
) -> tuple[str, str]:
    """The alias that ``version`` deserves, and the reason."""
    if champion is None:
        return CHAMPION, "there was no champion"
    if str(champion.version) == str(version.version):  # a number from a database, text from a server
        return CHAMPION, "it was the champion already"
    before = champion.tags.get(TEST_ERRORS)
    if champion.tags.get(TEST_SHA256) != test_sha256 or before is None:
        return CHALLENGER, f"the champion (version {champion.version}) was scored on another test split"
    compared = f"{error_count} test errors against {before} of version {champion.version}"
    return (CHAMPION if error_count <= int(before) else CHALLENGER), compared


def _set_alias(version: ModelVersion, alias: str) -> None:
    client = MlflowClient()
    client.set_registered_model_alias(version.name, alias, version.version)
    challenger = client.get_registered_model(version.name).aliases.get(CHALLENGER)
    if alias == CHAMPION and str(challenger) == str(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)
