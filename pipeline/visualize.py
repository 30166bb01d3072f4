"""Stage `visualize`: draw how the training went, what the model learned, and where it fails."""

import torch
from matplotlib.figure import Figure

from pipeline import figures, files
from pipeline.errors import UserError, run_command
from pipeline.images.splits import TEST, Dataset, LabelledImages, read_dataset, read_split
from pipeline.network import explaining, model_file, scoring
from pipeline.network.cnn import CNN
from pipeline.params import Visualize, read_params
from pipeline.tracking import runs


def main() -> None:
    """Read the model, its history and its predictions, and the test split; write reports/figures."""
    params = read_params()
    dataset = read_dataset()
    model = files.read(files.MODEL, made_by="train")
    saved = model_file.from_bytes(model, str(files.MODEL))
    test = read_split(dataset, TEST)
    history = files.read_table(files.HISTORY, made_by="train")

    paths = []
    for name, figure in _figures(saved.cnn, dataset, test, history, params.visualize).items():
        paths.append(files.FIGURES / f"{name}.png")
        files.write(paths[-1], figures.as_png(figure))
    for stale in set(files.FIGURES.iterdir()) - set(paths):
        stale.unlink()

    runs.connect()
    runs.settle()
    run_id = runs.find_or_restore(files.sha256(model), saved, dataset, history)
    runs.log_files(run_id, paths, "figures")
    print(f"{len(paths)} figures of a model trained on {dataset.label} -> {files.FIGURES}")


def _figures(
    cnn: CNN, dataset: Dataset, test: LabelledImages, history: list[dict[str, str]], params: Visualize
) -> dict[str, Figure]:
    return {
        "learning_curves": figures.learning_curves(_columns(history)),
        "first_layer_filters": figures.filters(explaining.first_filters(cnn).numpy()),
        "feature_maps": _feature_maps(cnn, dataset, test, params.image),
    } | _predicted(dataset, test, params.mistakes)


def _columns(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _feature_maps(cnn: CNN, dataset: Dataset, test: LabelledImages, index: int) -> Figure:
    if index >= len(test):
        raise UserError(f"params.yaml: visualize.image is {index}; allowed: 0 ... {len(test) - 1}, the test images")
    image, label = test.images[index], dataset.class_names[int(test.labels[index])]
    maps = {layer: each.numpy() for layer, each in explaining.feature_maps(cnn, image)}
    return figures.feature_maps(image.numpy(), maps, f"What each layer makes of test image {index} (class {label})")


def _predicted(dataset: Dataset, test: LabelledImages, count: int) -> dict[str, Figure]:
    """The figures that need no network, only what evaluate wrote."""
    rows = files.read_table(files.PREDICTIONS, made_by="evaluate")
    number = {name: index for index, name in enumerate(dataset.class_names)}
    predicted = torch.tensor([number[row["predicted"]] for row in rows])
    confidence = torch.tensor([float(row["confidence"]) for row in rows])
    worst = explaining.most_confident_mistakes(test.labels, predicted, confidence, count)
    confusion = scoring.confusion_matrix(test.labels, predicted, len(dataset.class_names))
    errors = int((predicted != test.labels).sum())
    return {
        "confusion_matrix": figures.confusion_matrix(
            confusion.numpy(), dataset.class_names, f"{errors} mistakes in {len(test):,} test images of {dataset.label}"
        ),
        "confident_mistakes": figures.mistakes(
            test.images[worst].numpy(),
            [rows[index]["actual"] for index in worst.tolist()],
            [rows[index]["predicted"] for index in worst.tolist()],
            confidence[worst].tolist(),
        ),
    }


if __name__ == "__main__":
    run_command(main)
