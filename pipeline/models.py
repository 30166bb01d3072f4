"""Show where a registered model comes from and who was champion when, or roll back to an earlier champion.

    python -m pipeline.models [MODEL]              where it comes from; would this checkout train it again?
    python -m pipeline.models [MODEL] --history    who was champion when, and why
    python -m pipeline.models [MODEL] --rollback   make MODEL the champion, by default the previous champion

MODEL is an alias or a version, with or without its name: champion (the default), challenger, 3, NAME@champion, NAME/3.
"""

from collections.abc import Mapping

from pipeline import command_line, files, machine, recipe
from pipeline.data.splits import read_dataset
from pipeline.errors import printable, run_command
from pipeline.model import metrics
from pipeline.params import read_params
from pipeline.tracking import lineage, promotion, registry, store
from pipeline.tracking.gate import CHAMPION

NEEDED = (
    lineage.RECIPE,
    "model.sha256",
    "data.sha256",
    "data.name",
    "params.sha256",
    "test.accuracy",
    "test.error_count",
)
SCORES = ("accuracy", *metrics.BESIDE_ACCURACY)  # of the test images; versions of earlier releases have only the first


def main() -> None:
    """Look the model up in the registry, and print what is asked for, or set the alias."""
    arguments = command_line.parse("models")
    store.connect()
    if arguments.rollback:
        version = promotion.roll_back(arguments.model)
        print(f"{version.name} version {version.version} is the champion")
        return
    version = registry.find(arguments.model or CHAMPION)
    if arguments.history:
        for record in promotion.history(version.name):
            print(f"{record.since}  version {record.version}: {record.reason}")
    else:
        registry.require(version, *NEEDED)
        scores = {
            key: registry.read_tag(version, f"test.{key}", float) for key in SCORES if f"test.{key}" in version.tags
        }
        trained_with = registry.read_tag(version, lineage.RECIPE, lineage.json_object)
        print(f"{version.name} version {version.version}\n")
        facts = _facts(version.tags, scores, trained_with)
        print("\n".join(f"{name:<28}{fact}" for name, fact in facts.items()))
        print()
        print("\n".join(_verdict(version.tags)))


def _facts(tags: Mapping[str, str], scores: Mapping[str, float], trained_with: Mapping[str, object]) -> dict[str, str]:
    """The tags of a version as text; "unknown" for missing ones that are not NEEDED."""
    tags = {key: printable(tag) for key, tag in tags.items()}
    known = {key: tags.get(key, "unknown") for key in (*machine.FACTS, "git.commit", "gate.decision", "gate.reason")}
    dirty = " with uncommitted changes" if tags.get("git.dirty") == "true" else ""
    experiment = f" (experiment {tags['dvc.exp']})" if "dvc.exp" in tags else ""
    return {
        "model": f"SHA-256 {tags['model.sha256']}",
        "test": f"accuracy {scores['accuracy']:.2%}, errors: {tags['test.error_count']}",
        "  by class": metrics.beside_accuracy(scores) if set(scores) == set(SCORES) else "unknown",
        "gate": f"{known['gate.decision']}: {known['gate.reason']}",
        "commit": f"{known['git.commit']}{dirty}{experiment}",
        "data": f"{tags['data.name']}, SHA-256 {tags['data.sha256']}",
        "parameters": f"SHA-256 {tags['params.sha256']}",
        **{f"  {printable(name)}": printable(str(value)) for name, value in trained_with.items()},
        "machine": ", ".join(f"{key} {known[key]}" for key in machine.FACTS),
    }


def _verdict(tags: Mapping[str, str]) -> list[str]:
    """Whether this checkout would train the same model again, and what differs."""
    params = read_params()
    differences = [f"  {kind}: {what}" for kind, what in lineage.differences(tags, params.recipe, _prepared_sha256())]
    if differences:
        return ["This checkout would train a different model:", *differences]
    if lineage.code_of(tags) is None:
        why = f"its tag {lineage.CODE} cannot be read" if lineage.CODE in tags else "DVC restored it from a cache"
        return [f"It is unknown whether this checkout would train the same model: {why}."]
    others = [f"  {what}" for what in lineage.other_machine(tags, recipe.device_for(params))]
    if others:
        return [
            "This checkout would train the same model except for the last bits, since the machine is different:",
            *others,
        ]
    return ["This checkout would train the same model again."]


def _prepared_sha256() -> str | None:
    return read_dataset().sha256 if (files.PREPARED / "dataset.json").exists() else None


if __name__ == "__main__":
    run_command(main)
