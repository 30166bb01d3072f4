"""The model card: what a registered model is and how good it is, in Markdown (Mitchell et al., 2019)."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.splits import SPLITS, TEST, Dataset
from pipeline.model.cnn import summary
from pipeline.model.metrics import wilson_interval
from pipeline.model.model_file import TrainedModel


def model_card(dataset: Dataset, saved: TrainedModel, metrics: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """The card of a model: ``metrics`` is the content of metrics.json, ``tags`` are those of the run that made it."""
    return "\n\n".join(
        [
            *_purpose(dataset),
            "## Data",
            *_data(dataset),
            "## Recipe",
            _table(("parameter", "value"), saved.recipe.items()),
            "## Architecture",
            f"```text\n{summary(saved.cnn.architecture)}\n```",
            f"## Metrics on the {dataset.splits[TEST].count:,} test images",
            *_scores(dataset, metrics),
            "## Limits",
            _limits(dataset),
            "## How to reproduce it",
            _reproduction(tags),
        ]
    )


def _purpose(dataset: Dataset) -> list[str]:
    height, width, channels = dataset.image_shape
    colours = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    return [
        f"A convolutional network that distinguishes {len(dataset.class_names)} classes in {colours} images of "
        f"{height} x {width} pixels: {', '.join(map(_text, dataset.class_names))}.",
        "It takes images (N, H, W, C) as bytes, from 0 (black) to 255 (white), and returns a probability per class.",
    ]


def _data(dataset: Dataset) -> list[str]:
    rows = [
        (
            split,
            f"{facts.count:,}",
            f"{min(facts.per_class.values()):,} ... {max(facts.per_class.values()):,}",
            f"`{facts.sha256[:16]}`",
        )
        for split, facts in ((split, dataset.splits[split]) for split in SPLITS)
    ]
    return [
        f"{_text(dataset.label)}, from {_text(dataset.source)}; SHA-256 `{dataset.sha256}`.",
        _table(("split", "images", "per class", "SHA-256 of its file"), rows),
    ]


def _scores(dataset: Dataset, metrics: Mapping[str, Any]) -> list[str]:
    test, count = metrics["test"], dataset.splits[TEST].count
    rows = [
        ("accuracy", f"{test['accuracy']:.2%}", _interval(count - test["error_count"], count)),
        ("balanced accuracy: the mean recall of the classes", f"{test['balanced_accuracy']:.2%}", ""),
        ("macro F1", f"{test['macro_f1']:.4f}", ""),
        ("accuracy of always answering the most common class", f"{test['baseline_accuracy']:.2%}", ""),
        ("cross-entropy", f"{test['loss']:.4f} nats", ""),
        ("expected calibration error", f"{test['ece']:.4f}", ""),
        *_novelty(test, count),
        *(
            (f"accuracy, {change.replace('_', ' ')}", f"{accuracy:.2%}", _interval(round(accuracy * count), count))
            for change, accuracy in test["robustness"].items()
        ),
    ]
    per_class = dataset.splits[TEST].per_class
    recalls = [
        (
            _text(name),
            f"{per_class[name]:,}",
            f"{score['recall']:.2%}",
            _interval(round(score["recall"] * per_class[name]), per_class[name]),
        )
        for name, score in test["per_class"].items()
    ]
    return [
        _table(("", "measured", "95 % confidence"), rows),
        _table(("class", "images", "recall", "95 % confidence"), recalls),
        "The intervals (Wilson) show the uncertainty that comes from the choice of test images.",
    ]


def _novelty(test: Mapping[str, Any], count: int) -> list[tuple[str, str, str]]:
    """The row of test images that are marked as unlike the training images; none where the model cannot tell."""
    if (share := test.get("unlike_training")) is None:
        return []
    return [
        ("test images marked as unlike the training images", f"{share:.2%}", _interval(round(share * count), count))
    ]


def _interval(right: int, count: int) -> str:
    low, high = wilson_interval(right, count)
    return f"{low:.2%} ... {high:.2%}"


def _limits(dataset: Dataset) -> str:
    lines = [
        "It knows only these classes: any other image is assigned to one of them too, often with high confidence. "
        "`predict` and `serve` say which pictures do not look like the training images; they miss some.",
        "It expects images like those it was trained on, in size, framing and contrast; the rows above that begin with "
        "*accuracy,* show how much it loses on others.",
        "It comes from one training run; with another seed it would make different mistakes.",
    ]
    if dataset.name != dataset.requested:
        lines.insert(0, f"**{_text(dataset.name)} stood in for {_text(dataset.requested)}**, which was not available.")
    return "\n".join(f"- {line}" for line in lines)


def _reproduction(tags: Mapping[str, str]) -> str:
    if "git.commit" not in tags:
        return (
            "DVC restored it from a cache, or git was not available: its code and machine are unknown. "
            "Run `dvc repro` with the recipe above."
        )
    dirty = " There were uncommitted changes." if tags.get("git.dirty") == "true" else ""
    machine = ", ".join(
        f"{key} {tags[key]}"
        for key in ("torch.version", "numba.version", "numba.target", "cpu.capability", "cpu.threads")
        if key in tags
    )
    return (
        f"`git checkout {tags['git.commit']}`, the recipe above in params.yaml, then `dvc repro`.{dirty} "
        f"A machine like this one gives the same bytes: {machine}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _text(name: str) -> str:
    """A name from outside, escaped so that Markdown shows it as it is."""
    escaped = html.escape(" ".join(name.split()))
    return "".join(f"\\{character}" if character in "\\`*_{}[]()#+!|~" else character for character in escaped)
