"""The model registry: register a model once with its tags and card, find a version, load it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.data.image_files import Preprocessing
from pipeline.data.sources import DATASETS
from pipeline.data.splits import TEST, Dataset, read_dataset
from pipeline.errors import Fault, UserError, printable
from pipeline.model import metrics, novelty
from pipeline.model.cnn import CNN
from pipeline.model.model_file import TrainedModel
from pipeline.tracking import models, runs
from pipeline.tracking.gate import CHAMPION
from pipeline.tracking.lineage import DATA_SHA256, PARAMS_SHA256, RECIPE
from pipeline.tracking.runs import EVALUATION, MODEL_SHA256
from pipeline.tracking.store import equals, store_faults

TEST_SHA256, PREDICTIONS_SHA256 = "test.sha256", "predictions.sha256"
CLASS_NAMES, PARAMETERS, DATA_NAME = "class.names", "parameters", "data.name"
REGISTER = "`dvc repro -f -s evaluate`"  # the command that registers the model that is here
LACKING = f"the store lacks {{}} of {files.MODEL}, which DVC finds up to date: `dvc repro -f -s evaluate visualize`"
TAG_REMEDY = f"take another version, or write the tags again, where its model is {files.MODEL}, with {REGISTER}"
NO_VERSION = LACKING.format("any version")
# Tags of a version that say the same whichever run trained this model.
OF_THE_MODEL = (MODEL_SHA256, PARAMETERS, RECIPE, DATA_NAME, DATA_SHA256, PARAMS_SHA256)
MAX_DESCRIPTION_LENGTH = 5000  # characters, in the databases of MLflow

Value = TypeVar("Value")


@dataclass(frozen=True)
class Entry:
    """A logged model that is to be registered, with its evaluation.

    ``lineage`` are the tags of its run, ``scores`` those on the test images, ``correct`` (N,) bool says which of them
    it classifies correctly, ``card`` is Markdown. ``predictions_sha256`` is that of the predictions among the run's
    artifacts.
    """

    run_id: str
    model_id: str
    model_sha256: str
    predictions_sha256: str
    lineage: Mapping[str, str]
    recipe: Mapping[str, object]
    parameters: int
    scores: Mapping[str, object]
    correct: NDArray[np.bool_]
    card: str

    def origin_tags(self) -> dict[str, str]:
        """Tags that a version gets once, when it is created: where the model comes from."""
        facts = {MODEL_SHA256: self.model_sha256, PARAMETERS: str(self.parameters), RECIPE: json.dumps(self.recipe)}
        return {**self.lineage, **facts}

    def evaluation_tags(self, dataset: Dataset) -> dict[str, str]:
        """Tags that every evaluation writes again."""
        numbers = {f"test.{key}": str(value) for key, value in self.scores.items() if isinstance(value, int | float)}
        return {
            **numbers,
            PREDICTIONS_SHA256: self.predictions_sha256,
            TEST_SHA256: dataset.splits[TEST].sha256,
            CLASS_NAMES: json.dumps(dataset.class_names),
        }


def model_name(dataset: Dataset) -> str:
    """The name under which models of this data set are registered: the one in use, which may be a stand-in."""
    return f"{dataset.name}-cnn"


def write_version(name: str, entry: Entry, registered: ModelVersion | None, tags: Mapping[str, str]) -> ModelVersion:
    """Create a version with its tags and card, or update the one that is ``registered``."""
    origin = entry.origin_tags()
    if registered is None:
        version = _create(name, entry, {**origin, **tags})
    else:  # with what somebody may have deleted or changed
        of_the_model = {key: origin[key] for key in OF_THE_MODEL if key in origin}
        version = _update(registered, {**of_the_model, **tags}, _description(entry.card))
    _link_logged_model(entry.model_id, version)
    return version


def _create(name: str, entry: Entry, tags: dict[str, str]) -> ModelVersion:
    """Create a version with its tags and its card in one step."""
    client = MlflowClient()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name,
        f"models:/{entry.model_id}",
        entry.run_id,
        tags,
        description=_description(entry.card),
        model_id=entry.model_id,
    )


def _update(version: ModelVersion, tags: Mapping[str, str], description: str) -> ModelVersion:
    client = MlflowClient()
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    if version.description != description:
        client.update_model_version(version.name, version.version, description)
    return version


def _description(card: str) -> str:
    """As much of a card as a store takes for a description; all of it is among the run's artifacts."""
    if len(card) <= MAX_DESCRIPTION_LENGTH:
        return card
    rest = f"\n\nThe rest is in `{EVALUATION}/{files.CARD.name}` of the run."
    return card[: MAX_DESCRIPTION_LENGTH - len(rest)].rpartition("\n")[0] + rest


def _link_logged_model(model_id: str, version: ModelVersion) -> None:
    """Show on the page of the logged model which version it became."""
    linked = json.dumps([{"name": version.name, "version": version.version}])
    MlflowClient().set_logged_model_tags(model_id, {"mlflow.modelVersions": linked})


def aliases(name: str) -> dict[str, str]:
    """The version of each alias; none where no such model is registered."""
    try:
        found = MlflowClient().get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in found.items()}  # a database gives numbers, a server text


def versions(name: str) -> list[ModelVersion]:
    """All versions, the oldest first."""
    return _search(name)


def _search(name: str, *clauses: str) -> list[ModelVersion]:
    found = MlflowClient().search_model_versions(" and ".join((equals("name", name), *clauses)))
    return sorted((each for each in found if each.name == name), key=lambda version: int(version.version))


def champion(name: str) -> ModelVersion | None:
    """The current champion, if there is one."""
    number = aliases(name).get(CHAMPION)
    return MlflowClient().get_model_version(name, number) if number else None


def find_by_hash(name: str, model_sha256: str) -> ModelVersion | None:
    """The newest version of this model whose file is complete."""
    matching = _search(name, equals(f"tags.`{MODEL_SHA256}`", model_sha256))
    return next((version for version in reversed(matching) if is_complete(version)), None)


@store_faults()
def lacking(model_sha256: str) -> str | None:
    """What the store lacks of the model here, which dvc.lock has as evaluated, and the remedy. DVC does not notice."""
    run_id = runs.run_of_model(model_sha256)
    versions_of_it = MlflowClient().search_model_versions(equals(f"tags.`{MODEL_SHA256}`", model_sha256))
    if run_id is None or not versions_of_it:
        return NO_VERSION
    logged = {Path(artifact.path).name for artifact in MlflowClient().list_artifacts(run_id, "figures")}
    drawn = {path.name for path in files.own_figures()}
    return LACKING.format(f"{len(drawn - logged)} of {len(drawn)} figures") if drawn - logged else None


def is_complete(version: ModelVersion) -> bool:
    """Whether the model file of a version is there, with the hash that was registered."""
    return models.is_complete(_uri(version), version.tags.get(MODEL_SHA256, ""))


@store_faults()
def find(reference: str) -> ModelVersion:
    """The version that ``NAME@alias``, ``NAME/3``, an alias or a number refers to.

    An alias or a number alone refers to the prepared data set's model, or to the only one that is registered. Raises
    UserError where there is none.
    """
    given, _, rest = reference.replace("/", "@").rpartition("@")
    name = given or default_name()
    try:
        known = {alias: str(number) for alias, number in MlflowClient().get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(f"no model {printable(name)} is registered here; {_remedy(names())}") from error
    by_number = {str(version.version): version for version in versions(name)}
    number = known.get(rest, rest)
    if number not in by_number:
        there = f"it has: {', '.join([*by_number, *sorted(known)])}" if by_number else f"it has none; {_remedy([])}"
        raise UserError(f"{name} has no version {printable(rest)}; {there}")
    return MlflowClient().get_model_version(name, number)


def _remedy(registered: Sequence[str]) -> str:
    """What to do where a model is not registered. `dvc repro` has nothing to do after `dvc pull`."""
    if registered:
        return f"registered: {', '.join(registered)}"
    return f"{REGISTER} registers {files.MODEL}" if files.MODEL.exists() else "run `dvc repro` first"


@store_faults()
def names() -> list[str]:
    """The names of all registered models."""
    return sorted(model.name for model in MlflowClient().search_registered_models())


def default_name() -> str:
    """The name of the prepared data set's model, else of the only one that is registered. Raises UserError."""
    if (files.PREPARED / "dataset.json").exists():
        return model_name(read_dataset())
    registered = names()
    if len(registered) != 1:
        raise UserError(f"specify the model, as in NAME@champion; registered: {', '.join(registered) or 'none'}")
    return registered[0]


class Answers(NamedTuple):
    """A model's answers for N images: probabilities (N, classes), and whether each does not look like the training
    images; None where the model cannot tell.
    """

    probabilities: NDArray[np.float32]
    unlike_training: list[bool] | list[None]


@dataclass(frozen=True)
class Loaded:
    """A registered model in memory, and how pictures become images for it."""

    trained: TrainedModel
    preprocessing: Preprocessing

    @property
    def cnn(self) -> CNN:
        """The network alone."""
        return self.trained.cnn

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the probabilities."""
        return self.cnn.architecture.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that it takes."""
        return self.cnn.architecture.image_shape

    def classify(self, images: NDArray[np.uint8]) -> Answers:
        """The answers for images (N, H, W, C), the same as in `evaluate`. In one thread at a time.

        Raises Fault where they are not numbers.
        """
        outputs = novelty.outputs(self.cnn, torch.from_numpy(images))
        probabilities = metrics.finite(outputs.logits).softmax(dim=1).numpy()
        found = self.trained.novelty
        return Answers(probabilities, found.is_unlike(outputs).tolist() if found else [None] * len(images))


def described(file: str | None, probabilities: Mapping[str, float], unlike_training: bool | None) -> dict[str, object]:
    """The answer for a picture as JSON has it. ``probabilities`` are by class name, in the model's order."""
    label = max(probabilities, key=lambda name: probabilities[name])
    return {
        "file": file,
        "label": label,
        "probability": probabilities[label],
        "unlike_training": unlike_training,
        "probabilities": dict(probabilities),
    }


def require(version: ModelVersion, *tags: str) -> None:
    """Raises UserError for a version without one of these tags: it was not registered by `evaluate`."""
    for tag in tags:
        if tag not in version.tags:
            raise UserError(
                f"{version.name} version {version.version} has no tag {tag}: it was not registered by `evaluate`, or "
                f"somebody has deleted the tag; {TAG_REMEDY}"
            )


def read_tag(version: ModelVersion, tag: str, parse: Callable[[str], Value]) -> Value:
    """The value of a tag. Raises UserError where there is none, and Fault where ``parse`` raises ValueError."""
    require(version, tag)
    try:
        return parse(version.tags[tag])
    except (ValueError, RecursionError) as error:
        found = f"{version.name} version {version.version} has the tag {tag} '{printable(version.tags[tag])}'"
        raise Fault(f"{found}, which cannot be read: somebody has changed it; {TAG_REMEDY}") from error


@store_faults()
def load(version: ModelVersion) -> Loaded:
    """The model of a version, from the store into memory; see models.read."""
    require(version, MODEL_SHA256, DATA_NAME)
    trained = models.read(_uri(version), version.tags[MODEL_SHA256])
    return Loaded(trained, _preprocessing(trained, version))


def _preprocessing(trained: TrainedModel, version: ModelVersion) -> Preprocessing:
    """How pictures become images for a model; in older model files the data set's name says it."""
    shape = trained.cnn.architecture.image_shape
    if not trained.preprocessing:
        dataset = DATASETS.get(version.tags[DATA_NAME])
        return Preprocessing(dataset.resize if dataset else "crop", shape)
    try:
        found = Preprocessing.from_facts(trained.preprocessing)
        if found.image_shape != shape:
            raise ValueError(f"for images of {found.image_shape}, and the network takes {shape}")
    except ValueError as error:
        raise Fault(
            f"{version.name} version {version.version} does not say how pictures become images: {error}"
        ) from error
    return found


def _uri(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"
