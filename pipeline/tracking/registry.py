"""The model registry: register a model once, let it pass the champion gate, load it, go back to an earlier champion."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.data.splits import TEST, Dataset, LabelledImages, read_dataset
from pipeline.errors import Fault, UserError, printable
from pipeline.model import metrics
from pipeline.model.cnn import CNN
from pipeline.params import Promotion
from pipeline.tracking import gate, models, runs
from pipeline.tracking.gate import CHALLENGER, CHAMPION, Decision, Scored
from pipeline.tracking.lineage import RECIPE
from pipeline.tracking.runs import EVALUATION, MODEL_SHA256
from pipeline.tracking.store import store_faults

TEST_SHA256, PREDICTIONS_SHA256 = "test.sha256", "predictions.sha256"
CLASS_NAMES, PARAMETERS, DATA_NAME = "class.names", "parameters", "data.name"
LONGEST_DESCRIPTION = 5000  # characters, in the databases of MLflow
WAS_CHAMPION = "it was the champion already"
ROLLED_BACK = "gate.barred"  # since when a version that was rolled back is kept from coming back by itself
CHAMPION_RECORD = "champion."  # tags of the registered model: when, and who became champion


@dataclass(frozen=True)
class Entry:
    """A logged model that asks to be registered, and all that can be said of it.

    ``lineage`` are the tags of its run, ``scores`` those on the test images, ``right`` (N,) bool tells which of them it
    gets right, ``card`` is Markdown. ``predictions_sha256`` is of the file of predictions among the run's artifacts.
    """

    run_id: str
    model_id: str
    model_sha256: str
    predictions_sha256: str
    lineage: Mapping[str, str]
    recipe: Mapping[str, object]
    parameters: int
    scores: Mapping[str, object]
    right: NDArray[np.bool_]
    card: str

    def origin(self) -> dict[str, str]:
        """Tags that its version gets once: they are of the run that it came from."""
        facts = {MODEL_SHA256: self.model_sha256, PARAMETERS: str(self.parameters), RECIPE: json.dumps(self.recipe)}
        return {**self.lineage, **facts}

    def findings(self, dataset: Dataset) -> dict[str, str]:
        """Tags that every evaluation writes anew."""
        numbers = {f"test.{key}": str(value) for key, value in self.scores.items() if isinstance(value, int | float)}
        return {
            **numbers,
            PREDICTIONS_SHA256: self.predictions_sha256,
            TEST_SHA256: dataset.splits[TEST].sha256,
            CLASS_NAMES: json.dumps(dataset.class_names),
        }


@dataclass(frozen=True)
class Registration:
    """What became of a model: its version, and what the gate decided."""

    name: str
    version: str
    decision: Decision

    def as_report(self) -> dict[str, object]:
        """The content of promotion.json."""
        return {"model": self.name, "version": self.version, **self.decision.as_row()}


def model_name(dataset: Dataset) -> str:
    """The name under which models of this data set are registered: of what was really used, not of what was asked."""
    return f"{dataset.name}-cnn"


@store_faults()
def register(entry: Entry, dataset: Dataset, test: LabelledImages, rules: Promotion) -> Registration:
    """Register a logged model and decide between champion and challenger.

    A model whose hash is registered already gets no second version, unless the file of the first is gone or damaged.
    Whatever is killed between two steps, the old champion stands, no version is without its tags, and doing it again
    completes it.
    """
    name = model_name(dataset)
    with _gate_closed():
        _complete_history(name)
        while True:
            champion = _champion(name)
            present = _registered(name, entry.model_sha256)
            decision = _decide(entry, present, champion, dataset, test, rules)
            if _champion_number(name) == (champion and str(champion.version)):
                break  # else another machine has crowned one in the meantime, and that is whom to compare with
        tags = entry.findings(dataset)
        if decision.reason != WAS_CHAMPION:  # else those of the day when it became champion stay
            tags |= _gate_tags(decision, champion)
        version = _update(present, tags, entry.card) if present else _create(name, entry, entry.origin() | tags)
        _link(entry.model_id, version)
        if decision.alias == CHAMPION:
            _set_champion(version, decision.reason)
        else:
            MlflowClient().set_registered_model_alias(name, CHALLENGER, version.version)
    return Registration(name, str(version.version), decision)


@contextmanager
def _gate_closed() -> Iterator[None]:
    """One gate at a time on this machine: MLflow cannot compare an alias and set it in one step."""
    with runs.one_at_a_time("gate"):
        yield


def _registered(name: str, model_sha256: str) -> ModelVersion | None:
    """The newest version of this model, if there is one whose file is whole."""
    found = MlflowClient().search_model_versions(f"name = '{name}' and tags.`{MODEL_SHA256}` = '{model_sha256}'")
    newest_first = sorted(found, key=lambda version: -int(version.version))
    return next((version for version in newest_first if _is_whole(version)), None)


def _is_whole(version: ModelVersion) -> bool:
    return models.is_whole(_uri(version), version.tags.get(MODEL_SHA256, ""))


def _aliases(name: str) -> dict[str, str]:
    """The version of each alias; none where no such model is registered."""
    try:
        aliases = MlflowClient().get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in aliases.items()}  # a number from a database, text from a server


def _champion_number(name: str) -> str | None:
    return _aliases(name).get(CHAMPION)


def _champion(name: str) -> ModelVersion | None:
    number = _champion_number(name)
    return MlflowClient().get_model_version(name, number) if number else None


def _decide(
    entry: Entry,
    present: ModelVersion | None,
    champion: ModelVersion | None,
    dataset: Dataset,
    test: LabelledImages,
    rules: Promotion,
) -> Decision:
    challenger, ece = Scored(entry.right, entry.parameters), float(str(entry.scores["ece"]))
    if champion is None:
        return gate.decide(challenger, ece, None, "", rules)
    number = str(champion.version)
    if present is not None and number == str(present.version):
        return Decision(CHAMPION, WAS_CHAMPION)
    if champion.tags.get(MODEL_SHA256) == entry.model_sha256 and not _is_whole(champion):
        return Decision(CHAMPION, f"it is the model of version {number}, whose file is gone or damaged")
    if present is not None and ROLLED_BACK in present.tags:
        return Decision(CHALLENGER, f"it was rolled back on {present.tags[ROLLED_BACK]}")
    try:
        before = Scored(_right(champion, dataset, test), int(champion.tags[PARAMETERS]))
    except _CannotCompareError as error:
        return Decision(CHALLENGER, f"version {number}, the champion, {error}")
    return gate.decide(challenger, ece, before, number, rules)


class _CannotCompareError(Exception):
    """Why a model cannot be scored on the present test images."""


def _right(version: ModelVersion, dataset: Dataset, test: LabelledImages) -> NDArray[np.bool_]:
    """Which of the test images (N,) a registered model gets right: as it was written down, else scored anew."""
    missing = [tag for tag in (TEST_SHA256, PREDICTIONS_SHA256, CLASS_NAMES, PARAMETERS) if tag not in version.tags]
    if missing:
        raise _CannotCompareError(f"was not registered by `evaluate` (it has no tag {missing[0]})")
    if version.tags[TEST_SHA256] == dataset.splits[TEST].sha256 and (kept := _kept_predictions(version)) is not None:
        return kept
    if json.loads(version.tags[CLASS_NAMES]) != list(dataset.class_names):
        raise _CannotCompareError("tells other classes apart")
    try:
        loaded = load(version)
    except (Fault, UserError) as error:
        raise _CannotCompareError(str(error)) from error
    if loaded.image_shape != dataset.image_shape:
        raise _CannotCompareError(f"takes images of {' x '.join(map(str, loaded.image_shape))}")
    probabilities = loaded.classify(test.images.numpy())
    right: NDArray[np.bool_] = probabilities.argmax(axis=1) == test.labels.numpy()
    return right


def _kept_predictions(version: ModelVersion) -> NDArray[np.bool_] | None:
    """From the artifacts of its run; None where they are gone, or are of another evaluation."""
    with TemporaryDirectory(prefix="convtrack-") as folder:
        try:
            path = MlflowClient().download_artifacts(
                str(version.run_id), f"{EVALUATION}/{files.PREDICTIONS.name}", folder
            )
            content = Path(path).read_bytes()
        except (MlflowException, OSError):
            return None
    if files.sha256(content) != version.tags[PREDICTIONS_SHA256]:
        return None
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return np.array([row["actual"] == row["predicted"] for row in rows])


def _gate_tags(decision: Decision, champion: ModelVersion | None) -> dict[str, str]:
    against = f"version {champion.version}" if champion else "none"
    facts = {"against": against, "p_value": "none", "table": "none", **decision.as_row()}
    return {f"gate.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _create(name: str, entry: Entry, tags: Mapping[str, str]) -> ModelVersion:
    """A version with its tags and its card in one step."""
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
        dict(tags),
        description=_described(entry.card),
        model_id=entry.model_id,
    )


def _update(version: ModelVersion, tags: Mapping[str, str], card: str) -> ModelVersion:
    client = MlflowClient()
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    if version.description != _described(card):
        client.update_model_version(version.name, version.version, _described(card))
    return version


def _described(card: str) -> str:
    """As much of a card as a store takes for a description; the whole of it is among the run's artifacts."""
    if len(card) <= LONGEST_DESCRIPTION:
        return card
    rest = f"\n\nThe rest is in `{EVALUATION}/{files.CARD.name}` of the run."
    return card[: LONGEST_DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def _link(model_id: str, version: ModelVersion) -> None:
    """On the page of the logged model, the version that it became."""
    linked = json.dumps([{"name": version.name, "version": version.version}])
    MlflowClient().set_logged_model_tags(model_id, {"mlflow.modelVersions": linked})


def _set_champion(version: ModelVersion, reason: str) -> None:
    """Make a version the champion. An entry of the history that is not written is seen to be missing."""
    client = MlflowClient()
    aliases = _aliases(version.name)
    if aliases.get(CHAMPION) != str(version.version):
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
        client.set_registered_model_tag(version.name, CHAMPION_RECORD + _now(), f"version {version.version}: {reason}")
    if aliases.get(CHALLENGER) == str(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)


@dataclass(frozen=True)
class ChampionRecord:
    """An entry of the history of champions: when (UTC), which version, and why."""

    since: str
    version: str
    reason: str


@store_faults()
def history(name: str) -> list[ChampionRecord]:
    """The champions from the first to the present one."""
    written = _written_history(name)
    return [*written, *_unwritten(written, _champion(name))]


def _written_history(name: str) -> list[ChampionRecord]:
    records = []
    tags = MlflowClient().get_registered_model(name).tags
    for key in sorted(key for key in tags if key.startswith(CHAMPION_RECORD)):
        version, _, reason = tags[key].removeprefix("version ").partition(": ")
        records.append(ChampionRecord(key.removeprefix(CHAMPION_RECORD)[:19], version, reason))
    return records


def _unwritten(written: Sequence[ChampionRecord], champion: ModelVersion | None) -> list[ChampionRecord]:
    """The last entry, where it is missing: its gate was killed, or somebody set the alias elsewhere."""
    if champion is None or (written and written[-1].version == str(champion.version)):
        return []
    decided = champion.tags.get("gate.decision") == CHAMPION
    reason = champion.tags["gate.reason"] if decided else "the alias was set by hand"
    return [ChampionRecord(_now()[:19], str(champion.version), reason)]


def _complete_history(name: str) -> None:
    """Write the entry that is missing, if one is."""
    champion = _champion(name)
    if champion is not None:  # else there may be no such model yet, and no history
        for record in _unwritten(_written_history(name), champion):
            MlflowClient().set_registered_model_tag(
                name, CHAMPION_RECORD + _now(), f"version {record.version}: {record.reason}"
            )


@store_faults()
def roll_back(reference: str | None) -> ModelVersion:
    """Make a version the champion, by default the champion before the present one.

    The present one is kept from coming back when it is evaluated again; a new model is not. A version that cannot be
    loaded becomes no champion.
    """
    client = MlflowClient()
    with _gate_closed():
        present = find(reference or CHAMPION)
        _complete_history(present.name)
        version = present if reference else _champion_before(present)
        number = _champion_number(version.name)
        if number == str(version.version):
            raise UserError(f"{version.name} version {number} is the champion already")
        load(version)
        if number is not None:
            client.set_model_version_tag(version.name, number, ROLLED_BACK, _now())
        _set_champion(version, "by hand" if number is None else f"by hand, in the place of version {number}")
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(version.name, version.version, ROLLED_BACK)
    return version


def _champion_before(present: ModelVersion) -> ModelVersion:
    """The last of the earlier champions that is still there and was not itself rolled back."""
    there = _not_rolled_back(present.name)
    there.pop(str(present.version), None)
    earlier = [record.version for record in history(present.name) if record.version in there]
    if not earlier:
        raise UserError(f"{present.name} has had no other champion to go back to; name a version before --rollback")
    return there[earlier[-1]]


@store_faults()
def to_go_back_to() -> ModelVersion | None:
    """Whom to make champion by hand where the champion is damaged, or there is none: see find for the name.

    The last champion whose file is whole, else the newest such version; none that was rolled back.
    """
    name = _default_name()
    there = _not_rolled_back(name)
    champions = [record.version for record in history(name) if record.version in there] if there else []
    last_first = [there[number] for number in reversed([*sorted(there, key=int), *champions])]
    return next((version for version in last_first if _is_whole(version)), None)


def _not_rolled_back(name: str) -> dict[str, ModelVersion]:
    """The versions that may become champion, by their numbers."""
    found = MlflowClient().search_model_versions(f"name = '{name}'")
    return {str(version.version): version for version in found if ROLLED_BACK not in version.tags}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


@store_faults()
def find(reference: str) -> ModelVersion:
    """The version that is meant by ``NAME@alias``, ``NAME/3``, or by an alias or a number alone.

    Alone they are of the prepared data set's model, or of the only one that is registered. Raises UserError where there
    is none.
    """
    client = MlflowClient()
    before, _, rest = reference.replace("/", "@").rpartition("@")
    name = before or _default_name()
    try:
        aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        registered = ", ".join(names())
        there = f"registered: {registered}" if registered else "run `dvc repro` first"
        raise UserError(f"no model {printable(name)} is registered here; {there}") from error
    numbers = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    number = aliases.get(rest, rest)
    if number not in numbers:
        there = ", ".join([*sorted(numbers, key=int), *sorted(aliases)])
        raise UserError(f"{name} has no version {printable(rest)}; it has: {there}")
    return client.get_model_version(name, number)


@store_faults()
def names() -> list[str]:
    """Of all registered models."""
    return sorted(model.name for model in MlflowClient().search_registered_models())


def _default_name() -> str:
    if (files.PREPARED / "dataset.json").exists():
        return model_name(read_dataset())
    registered = names()
    if len(registered) != 1:
        raise UserError(f"name the model, as in NAME@champion; registered: {', '.join(registered) or 'none'}")
    return registered[0]


@dataclass(frozen=True)
class Loaded:
    """A registered model in memory, and the name of the data set that it is of."""

    cnn: CNN
    data_name: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the probabilities."""
        return self.cnn.architecture.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that it takes."""
        return self.cnn.architecture.image_shape

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (N, classes) of images (N, H, W, C), as `evaluate` has them."""
        probabilities = metrics.predict_logits(self.cnn, torch.from_numpy(images)).softmax(dim=1).numpy()
        return cast(NDArray[np.float32], probabilities)


def require(version: ModelVersion, *tags: str) -> None:
    """Raises UserError for a version without one of these tags: somebody has registered it in another way."""
    for tag in tags:
        if tag not in version.tags:
            raise UserError(f"{version.name} version {version.version} has no tag {tag}: `evaluate` gives it one")


@store_faults()
def load(version: ModelVersion) -> Loaded:
    """The model of a version, from the store into memory; see models.read."""
    require(version, MODEL_SHA256, DATA_NAME)
    return Loaded(models.read(_uri(version), version.tags[MODEL_SHA256]).cnn, version.tags[DATA_NAME])


def _uri(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"
