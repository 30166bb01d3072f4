"""The model registry: register a model once, let it pass the champion gate, load it, go back to an earlier champion."""

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import Fault, UserError
from pipeline.images.splits import TEST, Dataset, LabelledImages, read_dataset
from pipeline.params import Promotion
from pipeline.tracking import gate, models
from pipeline.tracking.gate import CHALLENGER, CHAMPION, Decision, Scored
from pipeline.tracking.lineage import RECIPE
from pipeline.tracking.runs import EVALUATION, MODEL_SHA256, store_faults

TEST_SHA256, PREDICTIONS_SHA256 = "test.sha256", "predictions.sha256"
CLASS_NAMES, PARAMETERS, DATA_NAME = "class.names", "parameters", "data.name"
WAS_CHAMPION = "it was the champion already"
BARRED = "gate.barred"  # since when a version that was rolled back is kept from coming back by itself
REIGN = "champion."  # tags of the registered model: when, and who became champion


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

    def tags(self, dataset: Dataset) -> dict[str, str]:
        """For its version."""
        numbers = {f"test.{key}": str(value) for key, value in self.scores.items() if isinstance(value, int | float)}
        return {
            **self.lineage,
            **numbers,
            MODEL_SHA256: self.model_sha256,
            PREDICTIONS_SHA256: self.predictions_sha256,
            TEST_SHA256: dataset.splits[TEST].sha256,
            CLASS_NAMES: json.dumps(dataset.class_names),
            PARAMETERS: str(self.parameters),
            RECIPE: json.dumps(self.recipe),
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

    A model whose hash is registered already gets no second version. Whatever is killed between two steps, the old
    champion stands, no version is without its tags, and doing it again completes it.
    """
    name = model_name(dataset)
    with _gate_closed():
        present, champion = _registered(name, entry.model_sha256), _champion(name)
        decision = _decide(entry, present, champion, dataset, test, rules)
        tags = entry.tags(dataset)
        if decision.reason != WAS_CHAMPION:  # else those of the day when it became champion stay
            tags |= _gate_tags(decision, champion)
        version = _update(present, tags, entry.card) if present else _create(name, entry, tags)
        _link(entry.model_id, version)
        if decision.alias == CHAMPION:
            _crown(version, decision.reason)
        else:
            MlflowClient().set_registered_model_alias(name, CHALLENGER, version.version)
    return Registration(name, str(version.version), decision)


@contextmanager
def _gate_closed() -> Iterator[None]:
    """One gate at a time on this machine: MLflow cannot compare an alias and set it in one step."""
    path = files.root() / "mlruns" / ".gate.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel, however this process ends
        yield


def _registered(name: str, model_sha256: str) -> ModelVersion | None:
    found = MlflowClient().search_model_versions(f"name = '{name}' and tags.`{MODEL_SHA256}` = '{model_sha256}'")
    return found[0] if found else None


def _aliases(name: str) -> dict[str, str]:
    """The version of each alias; none where no such model is registered."""
    try:
        aliases = MlflowClient().get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in aliases.items()}  # a number from a database, text from a server


def _champion(name: str) -> ModelVersion | None:
    number = _aliases(name).get(CHAMPION)
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
    if present is not None and BARRED in present.tags:
        return Decision(CHALLENGER, f"it was rolled back on {present.tags[BARRED]}")
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
        probabilities = load(version).model.classify(test.images.numpy())
    except (Fault, UserError) as error:
        raise _CannotCompareError(str(error)) from error
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
        name, f"models:/{entry.model_id}", entry.run_id, dict(tags), description=entry.card, model_id=entry.model_id
    )


def _update(version: ModelVersion, tags: Mapping[str, str], card: str) -> ModelVersion:
    client = MlflowClient()
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    if version.description != card:
        client.update_model_version(version.name, version.version, card)
    return version


def _link(model_id: str, version: ModelVersion) -> None:
    """On the page of the logged model, the version that it became."""
    linked = json.dumps([{"name": version.name, "version": version.version}])
    MlflowClient().set_logged_model_tags(model_id, {"mlflow.modelVersions": linked})


def _crown(version: ModelVersion, reason: str) -> None:
    """Make a version the champion. The history comes first: one entry too few would never be noticed."""
    client = MlflowClient()
    aliases = _aliases(version.name)
    if aliases.get(CHAMPION) != str(version.version):
        client.set_registered_model_tag(version.name, REIGN + _now(), f"version {version.version}: {reason}")
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
    if aliases.get(CHALLENGER) == str(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)


@dataclass(frozen=True)
class Reign:
    """An entry of the history of champions: when (UTC), which version, and why."""

    since: str
    version: str
    reason: str


@store_faults()
def history(name: str) -> list[Reign]:
    """The champions from the first to the present one."""
    tags = MlflowClient().get_registered_model(name).tags
    reigns: list[Reign] = []
    for key in sorted(key for key in tags if key.startswith(REIGN)):
        version, _, reason = tags[key].removeprefix("version ").partition(": ")
        if not reigns or reigns[-1].version != version:  # an entry whose alias was never set is written once more
            reigns.append(Reign(key.removeprefix(REIGN)[:19], version, reason))
    return reigns


@store_faults()
def roll_back(reference: str | None) -> ModelVersion:
    """Make a version the champion, by default the champion before the present one.

    The present one is kept from coming back when it is evaluated again; a new model is not.
    """
    client = MlflowClient()
    with _gate_closed():
        version = find(reference) if reference else _champion_before(find(CHAMPION))
        present = _aliases(version.name).get(CHAMPION)
        if present == str(version.version):
            raise UserError(f"{version.name} version {present} is the champion already")
        if present is not None:
            client.set_model_version_tag(version.name, present, BARRED, _now())
        _crown(version, f"by hand, in the place of version {present}")
        if BARRED in version.tags:
            client.delete_model_version_tag(version.name, version.version, BARRED)
    return version


def _champion_before(present: ModelVersion) -> ModelVersion:
    others = [reign.version for reign in history(present.name) if reign.version != str(present.version)]
    if not others:
        raise UserError(f"{present.name} has had no other champion to go back to; name a version before --rollback")
    return find(f"{present.name}/{others[-1]}")


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
    registered = sorted(model.name for model in client.search_registered_models())
    name = before or _default_name(registered)
    if name not in registered:
        there = f"registered: {', '.join(registered)}" if registered else "run `dvc repro` first"
        raise UserError(f"no model {name} is registered here; {there}")
    aliases = _aliases(name)
    numbers = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    number = aliases.get(rest, rest)
    if number not in numbers:
        there = ", ".join([*sorted(numbers, key=int), *sorted(aliases)])
        raise UserError(f"{name} has no version {rest}; it has: {there}")
    return client.get_model_version(name, number)


def _default_name(registered: Sequence[str]) -> str:
    if (files.PREPARED / "dataset.json").exists():
        return model_name(read_dataset())
    if len(registered) != 1:
        raise UserError(f"name the model, as in NAME@champion; registered: {', '.join(registered) or 'none'}")
    return registered[0]


@dataclass(frozen=True)
class Loaded:
    """A registered model in memory, and what its version says of it."""

    model: models.Exported
    class_names: tuple[str, ...]
    data_name: str


@store_faults()
def load(version: ModelVersion) -> Loaded:
    """The model of a version, from the store into memory; see models.read."""
    missing = [tag for tag in (CLASS_NAMES, DATA_NAME) if tag not in version.tags]
    if missing:
        raise UserError(f"{version.name} version {version.version} has no tag {missing[0]}: `evaluate` gives it one")
    with TemporaryDirectory(prefix="convtrack-") as folder:
        model = models.read(fetched(version, Path(folder)), _uri(version))
    return Loaded(model, tuple(json.loads(version.tags[CLASS_NAMES])), version.tags[DATA_NAME])


def fetched(version: ModelVersion, folder: Path) -> Path:
    """The files of a version, copied into ``folder``; a Fault where they are gone."""
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=_uri(version), dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise Fault(f"the files of {_uri(version)} cannot be had: {str(error).splitlines()[0]}") from error


def _uri(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"
