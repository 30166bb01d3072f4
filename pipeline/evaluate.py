"""Stage `evaluate`: score the model on the test images, register it, decide whether it becomes champion."""

from dataclasses import asdict

from torch import Tensor

from pipeline import files
from pipeline.data.splits import TEST, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain import corruptions
from pipeline.explain.model_card import model_card
from pipeline.model import metrics, model_file
from pipeline.model.cnn import parameter_count
from pipeline.model.model_file import TrainedModel
from pipeline.params import Evaluate, read_params
from pipeline.tracking import models, registry, runs


def main() -> None:
    """Read the model and two of the splits; write metrics.json and predictions.csv; register the model."""
    params = read_params()
    dataset = read_dataset()
    model = files.read(files.MODEL, made_by="train")
    saved = model_file.from_bytes(model, str(files.MODEL))
    history = files.read_table(files.HISTORY, made_by="train")
    test, validation = (read_split(dataset, split) for split in (TEST, VALIDATION))

    logits = metrics.predict_logits(saved.cnn, test.images)
    scores = _test_scores(saved, logits, test, dataset, params.evaluate)
    scored = {
        "test": scores,
        "validation": _brief_scores(metrics.predict_logits(saved.cnn, validation.images), validation),
        "parameters": parameter_count(saved.cnn.architecture),
        "dataset": dataset.name,
    }
    files.write_json(files.METRICS, scored)
    files.write_table(files.PREDICTIONS, _predictions(logits, test, dataset))

    runs.connect()
    runs.close_stale_runs()
    run_id = runs.find_or_restore(files.sha256(model), saved, dataset, history)
    runs.log_evaluation(run_id, dataset, scores)
    runs.log_files(run_id, [files.METRICS, files.PREDICTIONS], runs.EVALUATION)
    lineage = runs.lineage_of(run_id)
    card = model_card(dataset, saved, scored, lineage)
    files.write(files.CARD, card.encode())
    entry = registry.Entry(
        run_id=run_id,
        model_id=models.log_model(run_id, saved.cnn, dataset, files.sha256(model)),
        model_sha256=files.sha256(model),
        predictions_sha256=files.sha256(files.PREDICTIONS.read_bytes()),
        lineage=lineage,
        recipe=saved.recipe,
        parameters=parameter_count(saved.cnn.architecture),
        scores=scores,
        right=(logits.argmax(dim=1) == test.labels).numpy(),
        card=card,
    )
    registered = registry.register(entry, dataset, test, params.evaluate.promotion)
    files.write_json(files.PROMOTION, registered.as_report())
    runs.log_files(run_id, [files.PROMOTION, files.CARD], runs.EVALUATION)
    print(
        f"{dataset.label}: test accuracy {scores['accuracy']:.2%}, {scores['error_count']} errors in "
        f"{len(test):,} images\n"
        f"{registered.name} version {registered.version} is {registered.decision.alias}: {registered.decision.reason}"
    )


def _test_scores(
    saved: TrainedModel, logits: Tensor, test: LabelledImages, dataset: Dataset, params: Evaluate
) -> dict[str, object]:
    probabilities = logits.softmax(dim=1)
    return _brief_scores(logits, test) | {
        "error_count": int((logits.argmax(dim=1) != test.labels).sum()),
        "ece": metrics.expected_calibration_error(probabilities, test.labels, params.calibration_bins),
        "per_class": _class_scores(logits, test, dataset.class_names),
        "robustness": corruptions.robustness(saved.cnn, test.images, test.labels),
    }


def _brief_scores(logits: Tensor, split: LabelledImages) -> dict[str, object]:
    return {
        "accuracy": metrics.accuracy(logits, split.labels),
        "loss": metrics.cross_entropy(logits, split.labels),
    }


def _class_scores(logits: Tensor, test: LabelledImages, class_names: tuple[str, ...]) -> dict[str, object]:
    confusion = metrics.confusion_matrix(test.labels, logits.argmax(dim=1), len(class_names))
    return {name: asdict(score) for name, score in zip(class_names, metrics.per_class(confusion), strict=True)}


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
