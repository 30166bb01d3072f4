"""Promotion: compare a model with the champion, move the alias, record the champions, roll back.

The alias `champion` says who is champion now; tags of the registered model record who was, since when and why. MLflow
cannot write both in one step. The alias is set first, so a missing record is noticed by comparing the two.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline import files
from pipeline.data.splits import TEST, Dataset, LabelledImages
from pipeline.errors import Fault, UserError
from pipeline.params import Evaluate
from pipeline.tracking import gate, locks, registry
from pipeline.tracking.gate import CHALLENGER, CHAMPION, Decision, ScoredModel
from pipeline.tracking.registry import CLASS_NAMES, PARAMETERS, PREDICTIONS_SHA256, TEST_SHA256, Entry, Value
from pipeline.tracking.runs import EVALUATION, MODEL_SHA256
from pipeline.tracking.store import store_faults

WAS_CHAMPION = "it was already the champion"
ROLLED_BACK = "gate.rolled_back"  # since when; evaluating the version again does not make it champion
# Tags of the registered model, followed by a number and the time: who became champion, and why. The number gives the
# order, since clocks step back; records of earlier releases have none.
CHAMPION_TAG = "champion."


@dataclass(frozen=True)
class Registration:
    """The version that a model was registered as, and what the gate decided."""

    name: str
    version: str
    decision: Decision

    def as_report(self) -> dict[str, object]:
        """The content of promotion.json."""
        return {"model": self.name, "version": self.version, **self.decision.as_dict()}


@store_faults()
def register(entry: Entry, dataset: Dataset, test: LabelledImages, rules: Evaluate) -> Registration:
    """Register a logged model and decide between champion and challenger.

    A model whose hash is registered already gets no second version, unless the file of the first is gone or damaged.
    If the process is killed between two steps, the old champion stays, every version has its tags, and doing it again
    completes it.
    """
    name = registry.model_name(dataset)
    with locks.exclusive_lock("gate"):  # MLflow cannot compare an alias and set it in one step
        _complete_records(name)
        while True:
            champion = registry.champion(name)
            registered = registry.find_by_hash(name, entry.model_sha256)
            decision = _decide(entry, registered, champion, dataset, test, rules)
            if registry.aliases(name).get(CHAMPION) == (champion and str(champion.version)):
                break  # otherwise another machine has just changed the champion: compare with the new one
        tags = entry.evaluation_tags(dataset)
        if decision.reason != WAS_CHAMPION:  # a champion keeps the tags from when it became one
            tags |= _decision_tags(decision, champion)
        version = registry.write_version(name, entry, registered, tags)
        if decision.alias == CHAMPION:
            _set_champion(version, decision.reason)
        else:
            MlflowClient().set_registered_model_alias(name, CHALLENGER, version.version)
    return Registration(name, str(version.version), decision)


def _decide(
    entry: Entry,
    registered: ModelVersion | None,
    champion: ModelVersion | None,
    dataset: Dataset,
    test: LabelledImages,
    rules: Evaluate,
) -> Decision:
    challenger, ece = ScoredModel(entry.correct, entry.parameters), float(str(entry.scores["ece"]))
    labels = test.labels.numpy()
    if champion is None:
        return gate.decide(challenger, ece, None, "", labels, rules)
    number = str(champion.version)
    if registered is not None and number == str(registered.version):
        return Decision(CHAMPION, WAS_CHAMPION)
    if champion.tags.get(MODEL_SHA256) == entry.model_sha256 and not registry.is_complete(champion):
        return Decision(CHAMPION, f"it is the model of version {number}, whose file is missing or damaged")
    if registered is not None and ROLLED_BACK in registered.tags:
        return Decision(CHALLENGER, f"it was rolled back on {registered.tags[ROLLED_BACK]}")
    try:
        current = ScoredModel(_correct(champion, dataset, test), _read_tag(champion, PARAMETERS, int))
    except _CannotCompareError as error:
        return Decision(CHALLENGER, f"version {number}, the champion, {error}")
    return gate.decide(challenger, ece, current, number, labels, rules)


class _CannotCompareError(Exception):
    """Why a model cannot be scored on the current test images."""


def _read_tag(version: ModelVersion, tag: str, parse: Callable[[str], Value]) -> Value:
    try:
        return registry.read_tag(version, tag, parse)
    except (Fault, UserError) as error:
        raise _CannotCompareError(f"cannot be compared: {error}") from error


def _correct(version: ModelVersion, dataset: Dataset, test: LabelledImages) -> NDArray[np.bool_]:
    """Which of the test images (N,) a registered model classifies correctly: from its predictions, else scored now."""
    scored_on, predictions = (_read_tag(version, tag, str) for tag in (TEST_SHA256, PREDICTIONS_SHA256))
    if scored_on == dataset.splits[TEST].sha256:
        logged = _logged_predictions(version, predictions)
        if logged is not None and len(logged) == len(test):
            return logged
    if _read_tag(version, CLASS_NAMES, json.loads) != list(dataset.class_names):
        raise _CannotCompareError("has different classes")
    try:
        loaded = registry.load(version)
    except (Fault, UserError) as error:
        raise _CannotCompareError(f"cannot be loaded: {error}") from error
    if loaded.image_shape != dataset.image_shape:
        raise _CannotCompareError(f"takes images of {' x '.join(map(str, loaded.image_shape))}")
    try:
        probabilities = loaded.classify(test.images.numpy()).probabilities
    except Fault as error:
        raise _CannotCompareError(f"cannot be scored: {error}") from error
    correct: NDArray[np.bool_] = probabilities.argmax(axis=1) == test.labels.numpy()
    return correct


def _logged_predictions(version: ModelVersion, sha256: str) -> NDArray[np.bool_] | None:
    """Which of the predictions logged to its run are correct; None if they are missing or have another SHA-256."""
    with TemporaryDirectory(prefix="convtrack-") as folder:
        try:
            path = MlflowClient().download_artifacts(
                str(version.run_id), f"{EVALUATION}/{files.PREDICTIONS.name}", folder
            )
            content = Path(path).read_bytes()
        except (MlflowException, OSError):
            return None
    if files.sha256(content) != sha256:
        return None
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return np.array([row["actual"] == row["predicted"] for row in rows])


def _decision_tags(decision: Decision, champion: ModelVersion | None) -> dict[str, str]:
    against = f"version {champion.version}" if champion else "none"
    facts = {"against": against, "metric": "none", "p_value": "none", "table": "none", **decision.as_dict()}
    return {f"gate.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _set_champion(version: ModelVersion, reason: str) -> None:
    """Move the alias to a version, if it is not there yet, and record it."""
    client = MlflowClient()
    aliases = registry.aliases(version.name)
    if aliases.get(CHAMPION) != str(version.version):
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
        _write_record(version, reason)
    if aliases.get(CHALLENGER) == str(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)


@dataclass(frozen=True)
class ChampionRecord:
    """Since when (UTC) which version was champion, and why."""

    since: str
    version: str
    reason: str


@store_faults()
def history(name: str) -> list[ChampionRecord]:
    """The champions from the first to the current one."""
    records = _written_records(name)
    champion = registry.champion(name)
    if champion and _is_missing(champion, records):
        records.append(ChampionRecord(_now()[:19], str(champion.version), _reason(champion)))
    return records


def _written_records(name: str) -> list[ChampionRecord]:
    return [record for _, record in _numbered_records(name)]


def _numbered_records(name: str) -> list[tuple[int, ChampionRecord]]:
    """The records in their order, with their numbers."""
    records = []
    for key, text in MlflowClient().get_registered_model(name).tags.items():
        if key.startswith(CHAMPION_TAG):
            first, _, rest = key.removeprefix(CHAMPION_TAG).partition(" ")
            number, since = (int(first), rest) if first.isdecimal() else (0, f"{first} {rest}")
            version, _, reason = text.removeprefix("version ").partition(": ")
            records.append((number, since, ChampionRecord(since[:19], version, reason)))
    return [(number, record) for number, _, record in sorted(records, key=lambda each: each[:2])]


def _write_record(version: ModelVersion, reason: str) -> None:
    number = max((number for number, _ in _numbered_records(version.name)), default=0) + 1
    key = f"{CHAMPION_TAG}{number:06d} {_now()}"
    MlflowClient().set_registered_model_tag(version.name, key, f"version {version.version}: {reason}")


def _complete_records(name: str) -> None:
    """Write the last record if it is missing."""
    champion = registry.champion(name)
    if champion and _is_missing(champion, _written_records(name)):
        _write_record(champion, _reason(champion))


def _is_missing(champion: ModelVersion, records: Sequence[ChampionRecord]) -> bool:
    """Whether the alias was set without a record: by a process that was then killed, or by hand."""
    return not records or records[-1].version != str(champion.version)


def _reason(champion: ModelVersion) -> str:
    """Why a champion without a record has the alias."""
    decided = champion.tags.get("gate.decision") == CHAMPION
    return champion.tags.get("gate.reason", "unknown") if decided else "the alias was set by hand"


@store_faults()
def roll_back(reference: str | None) -> ModelVersion:
    """Make a version the champion, by default the previous champion.

    Evaluating the replaced one again does not bring it back; a new model can still take over. A version that cannot be
    loaded never becomes champion.
    """
    client = MlflowClient()
    with locks.exclusive_lock("gate"):
        referred = registry.find(reference or CHAMPION)
        _complete_records(referred.name)
        version = referred if reference else _champion_before(referred)
        present = registry.aliases(version.name).get(CHAMPION)
        if present == str(version.version):
            raise UserError(f"{version.name} version {present} is already the champion")
        registry.load(version)
        if present is not None:
            client.set_model_version_tag(version.name, present, ROLLED_BACK, _now())
        _set_champion(version, "by hand" if present is None else f"by hand, replacing version {present}")
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(version.name, version.version, ROLLED_BACK)
    return version


def _champion_before(present: ModelVersion) -> ModelVersion:
    """The last of the earlier champions that is still there and was not itself rolled back."""
    eligible = _not_rolled_back(present.name)
    eligible.pop(str(present.version), None)
    earlier = [record.version for record in history(present.name) if record.version in eligible]
    if not earlier:
        raise UserError(f"{present.name} has no earlier champion to roll back to; give a version before --rollback")
    return eligible[earlier[-1]]


@store_faults()
def fallback() -> ModelVersion | None:
    """The version to make champion by hand if the champion is damaged or missing; see find for the model's name.

    The last champion whose file is complete, else the newest such version; never one that was rolled back.
    """
    name = registry.default_name()
    eligible = _not_rolled_back(name)
    champions = [record.version for record in history(name) if record.version in eligible] if eligible else []
    best_first = [eligible[number] for number in reversed([*eligible, *champions])]
    return next((version for version in best_first if registry.is_complete(version)), None)


def _not_rolled_back(name: str) -> dict[str, ModelVersion]:
    """The versions that may become champion by their numbers, the oldest first."""
    return {str(each.version): each for each in registry.versions(name) if ROLLED_BACK not in each.tags}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
