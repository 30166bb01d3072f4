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
    model_sha256, cnn = files.sha256(model), checkpoint.from_bytes(model)
    test, validation = (read_split(dataset, split) for split in (TEST, VALIDATION))

    logits = scoring.predict_logits(cnn, test.images)
    error_count = int((logits.argmax(dim=1) != test.labels).sum())
    scores = _brief_scores(logits, test) | {
        "error_count": error_count,
        "ece": scoring.expected_calibration_error(logits.softmax(dim=1), test.labels, params.evaluate.calibration_bins),
        "per_class": _class_scores(logits, test, dataset.class_names),
    }
    metrics = {
        "test": scores,
        "validation": _brief_scores(scoring.predict_logits(cnn, validation.images), validation),
        "parameters": parameter_count(cnn.architecture),
        "dataset": dataset.name,
    }
    files.write_json(files.METRICS, metrics)
    files.write_table(files.PREDICTIONS, _predictions(logits, test, dataset))

    runs.connect()
    history = files.read_table(files.HISTORY, made_by="train")
    run_id = runs.find_or_restore(model_sha256, cnn, dataset, history)
    runs.log_evaluation(run_id, dataset, scores)
    runs.log_files(run_id, [files.METRICS, files.PREDICTIONS], "evaluation")
    registered = registry.register(
        run_id,
        runs.log_model(run_id, cnn, dataset, model_sha256),
        f"{dataset.name}-cnn",
        model_sha256=model_sha256,
        test_sha256=dataset.splits[TEST].sha256,
        error_count=error_count,
    )
    print(
        f"{dataset.label}: test accuracy {scores['accuracy']:.2%}, {error_count} errors in {len(test):,} images\n"
        f"{registered.name} version {registered.version} is {registered.alias}: {registered.reason}"
    )


def _brief_scores(logits: Tensor, split: LabelledImages) -> dict[str, object]:
    return {
        "accuracy": scoring.accuracy(logits, split.labels),
        "loss": scoring.cross_entropy(logits, split.labels),
    }


def _class_scores(logits: Tensor, test: LabelledImages, class_names: tuple[str, ...]) -> dict[str, object]:
    confusion = scoring.confusion_matrix(test.labels, logits.argmax(dim=1), len(class_names))
    return {name: asdict(score) for name, score in zip(class_names, scoring.per_class(confusion), strict=True)}


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
