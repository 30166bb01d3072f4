"""Stage `evaluate`: score the model on the test images, register it, decide whether it becomes champion."""

from dataclasses import asdict

from torch import Tensor

from pipeline import files
from pipeline.errors import run_command
from pipeline.images.splits import TEST, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.network import checkpoint, scoring
from pipeline.network.cnn import parameter_count
from pipeline.params import read_params
from pipeline.tracking import registry, runs


def main() -> None:
    """Read the model and two of the splits; write metrics.json and predictions.csv; register the model."""
    params = read_params()
    dataset = read_dataset()
    model = files.read(files.MODEL, made_by="train")
    cnn = checkpoint.from_bytes(model)
    test, validation = (read_split(dataset, split) for split in (TEST, VALIDATION))

    logits = scoring.predict_logits(cnn, test.images)
    scores = _scores(logits, test, dataset.class_names, params.evaluate.calibration_bins)
    metrics = {
        "test": scores,
        "validation": _brief_scores(scoring.predict_logits(cnn, validation.images), validation),
        "parameters": parameter_count(cnn.architecture),
        "dataset": dataset.name,
    }
    files.write_json(files.METRICS, metrics)
    files.write_table(files.PREDICTIONS, _predictions(logits, test, dataset))

    runs.connect()
    run_id = runs.find_or_restore(files.sha256(model), cnn, params, dataset, files.read_table(files.HISTORY, "train"))
    runs.log_evaluation(run_id, dataset, scores)
    runs.log_files(run_id, [files.METRICS, files.PREDICTIONS], "evaluation")
    registered = registry.register(
        run_id,
        f"{dataset.name}-cnn",
        model_sha256=files.sha256(model),
        test_sha256=dataset.splits[TEST].sha256,
        error_count=_error_count(logits, test),
    )
    print(
        f"{dataset.name}: test accuracy {scoring.accuracy(logits, test.labels):.2%},"
        f" {_error_count(logits, test)} errors in {len(test):,} images\n"
        f"{registered.name} version {registered.version} is {registered.alias}: {registered.reason}"
    )


def _scores(logits: Tensor, test: LabelledImages, class_names: tuple[str, ...], bins: int) -> dict[str, object]:
    confusion = scoring.confusion_matrix(test.labels, logits.argmax(dim=1), len(class_names))
    return _brief_scores(logits, test) | {
        "error_count": _error_count(logits, test),
        "ece": scoring.expected_calibration_error(logits.softmax(dim=1), test.labels, bins),
        "per_class": {
            name: asdict(score) for name, score in zip(class_names, scoring.per_class(confusion), strict=True)
        },
    }


def _brief_scores(logits: Tensor, split: LabelledImages) -> dict[str, object]:
    return {
        "accuracy": scoring.accuracy(logits, split.labels),
        "loss": scoring.cross_entropy(logits, split.labels),
    }


def _error_count(logits: Tensor, split: LabelledImages) -> int:
    return int((logits.argmax(dim=1) != split.labels).sum())


def _predictions(logits: Tensor, test: LabelledImages, dataset: Dataset) -> list[dict[str, object]]:
    """A row an image; six digits of confidence tell all that can be told apart."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    names = dataset.class_names
    return [
        {"index": index, "actual": names[actual], "predicted": names[guess], "confidence": f"{sure:.6f}"}
        for index, (actual, guess, sure) in enumerate(
            zip(test.labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
        )
    ]


if __name__ == "__main__":
    run_command(main)
