"""Stage `evaluate`: score the model on the test images, register it, decide whether it becomes champion."""

from dataclasses import asdict
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pipeline import files
from pipeline.data.splits import TEST, TRAIN, VALIDATION, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import UserError, counted, run_command
from pipeline.explain import corruptions
from pipeline.explain.model_card import model_card
from pipeline.model import metrics, model_file, novelty
from pipeline.model.cnn import CNN, parameter_count
from pipeline.model.model_file import TrainedModel
from pipeline.params import Evaluate, Params, check_model, differences, read_params
from pipeline.stage_inputs import StageInputs
from pipeline.tracking import models, promotion, runs, store
from pipeline.tracking.registry import Entry


def main() -> None:
    """Read the model and two of the splits; write metrics.json and predictions.csv; register the model."""
    inputs = StageInputs("evaluate")
    params, dataset = read_params(), read_dataset()
    model = files.read(files.MODEL, made_by="train")
    trained = model_file.from_bytes(model, str(files.MODEL), check_model)
    _check_origin(trained, params, dataset)
    history = files.read_table(files.HISTORY, made_by="train")
    data_summary = files.read_json(files.SUMMARY, made_by="prepare")
    limit = params.data.memory_limit
    test, validation = (read_split(dataset, split, memory_limit=limit) for split in (TEST, VALIDATION))

    print(f"scoring {counted(len(test), 'test image')}", flush=True)
    outputs = novelty.outputs(trained.cnn, test.images)
    logits = metrics.finite(outputs.logits)
    scores = _test_scores(trained.cnn, logits, test, dataset, params.evaluate)
    if trained.novelty:
        scores["unlike_training"] = trained.novelty.is_unlike(outputs).double().mean().item()
    report = {
        "test": scores,
        "validation": _basic_scores(
            metrics.finite(metrics.predict_logits(trained.cnn, validation.images)), validation, dataset, VALIDATION
        ),
        "parameters": parameter_count(trained.cnn.architecture),
        "dataset": dataset.name,
    }
    inputs.check_unchanged()
    files.write_json(files.METRICS, report)
    files.write_table(files.PREDICTIONS, _predictions(logits, test, dataset))

    criterion = params.evaluate.metric.replace("_", " ")
    print(f"logging the model, and comparing its {criterion} with the champion's", flush=True)
    store.connect()
    runs.close_stale_runs()
    model_sha256 = files.sha256(model)
    run_id = runs.find_or_restore(model_sha256, trained, dataset, history)
    runs.log_evaluation(run_id, dataset, scores)
    runs.log_files(run_id, [files.METRICS, files.PREDICTIONS], runs.EVALUATION)
    runs.log_files(run_id, [path for path in (files.SUMMARY, files.IMAGES) if path.exists()], runs.DATA)
    runs.log_files(run_id, files.own_figures(files.CONTACT_SHEETS), f"{runs.DATA}/{files.CONTACT_SHEETS.name}")
    lineage = runs.lineage_of(run_id)
    card = model_card(dataset, data_summary, trained, report, lineage)
    files.write(files.CARD, card.encode())
    entry = Entry(
        run_id=run_id,
        model_id=models.log_model(run_id, trained.cnn, dataset, model_sha256),
        model_sha256=model_sha256,
        predictions_sha256=files.sha256(files.PREDICTIONS.read_bytes()),
        lineage=lineage,
        recipe=trained.recipe,
        parameters=parameter_count(trained.cnn.architecture),
        scores=scores,
        correct=(logits.argmax(dim=1) == test.labels).numpy(),
        card=card,
    )
    registered = promotion.register(entry, dataset, test, params.evaluate)
    files.write_json(files.PROMOTION, registered.as_report())
    runs.log_files(run_id, [files.PROMOTION, files.CARD], runs.EVALUATION)
    inputs.check_unchanged()
    print(
        f"{dataset.label}: test accuracy {scores['accuracy']:.2%}, "
        f"{counted(scores['error_count'], 'error')} in {counted(len(test), 'image')}\n"
        f"{metrics.beside_accuracy(scores)}\n"
        f"{registered.name} version {registered.version} is {registered.decision.alias}: {registered.decision.reason}"
    )


def _check_origin(trained: TrainedModel, params: Params, dataset: Dataset) -> None:
    """Raises UserError for a model of another recipe or other data, which `dvc.lock` may have as one of these."""
    others = differences(trained.recipe, params.recipe)
    if trained.data.get("data.sha256") != dataset.sha256:
        others.append(f"{files.PREPARED} has changed")
    if others:
        raise UserError(
            f"{files.MODEL} is not what params.yaml and the data here give ({'; '.join(others)}): "
            "`dvc repro -f train`, then `dvc repro`"
        )


def _test_scores(cnn: CNN, logits: Tensor, test: LabelledImages, dataset: Dataset, params: Evaluate) -> dict[str, Any]:
    probabilities = logits.softmax(dim=1)
    return _basic_scores(logits, test, dataset, TEST) | {
        "error_count": int((logits.argmax(dim=1) != test.labels).sum()),
        "ece": metrics.expected_calibration_error(probabilities, test.labels, params.calibration_bins),
        "per_class": _class_scores(logits, test, dataset.class_names),
        "robustness": _robustness(cnn, test),
    }


def _robustness(cnn: CNN, test: LabelledImages) -> dict[str, float]:
    """Accuracy after each corruption that the metrics report; shows the progress on a terminal."""
    accuracies = {}
    with tqdm(corruptions.REPORTED, unit=" corruptions", disable=None) as bar:
        for name in bar:
            bar.set_description(name)
            accuracies[name] = corruptions.reported_accuracy(cnn, test.images, test.labels, name)
    return accuracies


def _basic_scores(logits: Tensor, images: LabelledImages, dataset: Dataset, split: str) -> dict[str, object]:
    training, counts = (dataset.splits[each].per_class for each in (TRAIN, split))
    found: dict[str, object] = {name: metric(logits, images.labels) for name, metric in metrics.METRICS.items()}
    return found | {"baseline_accuracy": metrics.baseline_accuracy(training, counts)}


def _class_scores(logits: Tensor, test: LabelledImages, class_names: tuple[str, ...]) -> dict[str, object]:
    confusion = metrics.confusion_matrix(test.labels, logits.argmax(dim=1), len(class_names))
    return {name: asdict(score) for name, score in zip(class_names, metrics.per_class(confusion), strict=True)}


def _predictions(logits: Tensor, test: LabelledImages, dataset: Dataset) -> list[dict[str, object]]:
    """A row for each image. Six digits of confidence are as many as mean something."""
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
