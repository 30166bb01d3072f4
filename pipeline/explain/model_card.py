"""The model card: what a registered model is and how good it is, in Markdown (Mitchell et al., 2019)."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.splits import SPLITS, TEST, Dataset
from pipeline.errors import counted
from pipeline.model.cnn import summary as summary_of_layers
from pipeline.model.metrics import wilson_interval
from pipeline.model.model_file import TrainedModel

MAX_CLASSES = 20  # that a table lists one by one, and a sentence names
ENDS = 5  # of more classes, those with the most and the fewest images


def model_card(
    dataset: Dataset,
    summary: Mapping[str, Any],
    saved: TrainedModel,
    metrics: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """The card of a model.

    ``summary`` is the content of data_summary.json, ``metrics`` that of metrics.json, and ``tags`` are those of the run
    that made the model.
    """
    return "\n\n".join(
        [
            *_purpose(dataset),
            "## Data",
            *_data(dataset),
            *_classes(summary),
            "## Recipe",
            _table(("parameter", "value"), saved.recipe.items()),
            "## Architecture",
            f"```text\n{summary_of_layers(saved.cnn.architecture)}\n```",
            f"## Metrics on the {counted(dataset.splits[TEST].count, 'test image')}",
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
        f"{height} x {width} pixels: {_names(dataset.class_names)}.",
        "It takes images (N, H, W, C) as bytes, from 0 (black) to 255 (white), and returns a probability per class.",
    ]


def _names(class_names: Sequence[str]) -> str:
    more = len(class_names) - MAX_CLASSES
    return ", ".join(map(_text, class_names[:MAX_CLASSES])) + (f" and {more:,} more" if more > 0 else "")


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


def _classes(summary: Mapping[str, Any]) -> list[str]:
    """A table of the classes, of many only those with the most and the fewest images; and what may be wrong."""
    classes = [{"number": number} | facts for number, facts in enumerate(summary["classes"])]
    columns = ["number", "class", *SPLITS]
    if any(facts["unreadable"] for facts in classes):
        columns.append("unreadable")
    sizes = [column for column, value in classes[0].items() if isinstance(value, list)]
    if len({tuple(facts[size]) for facts in classes for size in sizes}) > 1:
        columns += sizes
    shown, between = _largest_and_smallest(classes)
    warnings = [f"- {_text(warning)}" for warning in summary["warnings"]]
    return [
        _table(columns, [[_cell(facts[column]) for column in columns] for facts in shown]),
        *([between] if between else []),
        *(["What may be wrong with these images:", "\n".join(warnings)] if warnings else []),
    ]


def _largest_and_smallest(classes: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The classes to show, and a sentence about the others."""
    if len(classes) <= MAX_CLASSES:
        return classes, ""
    by_count = sorted(classes, key=_count, reverse=True)
    most, fewest = (_count(by_count[place]) for place in (ENDS, -ENDS - 1))
    each = f"{most:,}" if most == fewest else f"{fewest:,} to {most:,}"
    return [*by_count[:ENDS], *by_count[-ENDS:]], (
        f"These are the classes with the most and the fewest images. The other {len(classes) - 2 * ENDS:,} have "
        f"{each} each; `data_summary.json` of the run lists all."
    )


def _count(facts: Mapping[str, Any]) -> int:
    return sum(facts[split] for split in SPLITS)


def _cell(value: object) -> str:
    """A name, a number of images, or a size [width, height] as one cell."""
    match value:
        case [width, height]:
            return f"{width} x {height}"
        case int():
            return f"{value:,}"
        case _:
            return _text(str(value))


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
    shown, others = _lowest_recalls(test["per_class"])
    recalls = [
        (
            _text(name),
            f"{per_class[name]:,}",
            f"{score['recall']:.2%}",
            _interval(round(score["recall"] * per_class[name]), per_class[name]),
        )
        for name, score in shown.items()
    ]
    return [
        _table(("", "measured", "95 % confidence"), rows),
        _table(("class", "images", "recall", "95 % confidence"), recalls),
        *([others] if others else []),
        "The intervals (Wilson) show the uncertainty that comes from the choice of test images.",
    ]


def _lowest_recalls(per_class: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The scores of the classes, of many only of those with the lowest recalls, and a sentence about the others."""
    if len(per_class) <= MAX_CLASSES:
        return per_class, ""
    ordered = sorted(per_class.items(), key=lambda item: item[1]["recall"])
    lowest, others = dict(ordered[:MAX_CLASSES]), ordered[MAX_CLASSES:]
    return lowest, (
        f"These are the classes with the lowest recalls. The recall of the other {len(others):,} is at least "
        f"{others[0][1]['recall']:.2%}."
    )


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
