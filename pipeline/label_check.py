"""Find training images whose label is likely wrong: each is judged by a network that was trained without it.

python -m pipeline.label_check [--folds K]
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline import command_line, files, recipe
from pipeline.data import duplicates, mapped_files, splitting
from pipeline.data.splits import TRAIN, Dataset, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, UserError, run_command
from pipeline.explain import attribution, label_page
from pipeline.model import metrics
from pipeline.model.cnn import CNN
from pipeline.model.training import DivergedError, Step
from pipeline.params import Params, read_params

MAX_SHOWN = 500  # images on the page, which a browser loads at once; the table has all of them


def main() -> None:
    """Train a network for each fold of the training images; write a table of them, and a page of the doubtful ones."""
    arguments = command_line.parse("label_check")
    params, dataset = read_params(), read_dataset()
    device = recipe.device_for(params)
    train = read_split(dataset, TRAIN, memory_limit=params.data.memory_limit)
    paths, groups = _paths_and_groups(len(train), params)
    folds = _folds(train, dataset, groups, params, arguments.folds)
    print(f"training {arguments.folds} networks, each without a part of the {len(train):,} training images", flush=True)
    probabilities = _out_of_fold(train, folds, params, dataset, device)

    doubts = attribution.likely_label_errors(probabilities, train.labels)
    rows = label_page.rows(probabilities, train.labels, doubts, dataset.class_names, paths)
    files.write_table(files.LABEL_CHECK, [asdict(row) for row in rows])
    facts = [
        f"{dataset.label}: {len(doubts.images):,} of {len(train):,} training labels may be wrong",
        f"accuracy of the networks on images that they were trained without: "
        f"{metrics.accuracy(probabilities, train.labels):.2%}; the lower it is, the more of these labels are right",
    ]
    shown = rows[: min(len(doubts.images), MAX_SHOWN)]
    images = ((row, train.images[row.index].numpy()) for row in shown)
    files.write(files.LABEL_PAGE, label_page.page("Labels that may be wrong", facts, images).encode())
    print("\n".join(facts))
    print(f"the most doubtful first: {files.LABEL_PAGE}, and all of them in {files.LABEL_CHECK}")


def _paths_and_groups(count: int, params: Params) -> tuple[list[str], list[str | None]]:
    """The file and the subject of each training image, from reports/images.csv. Data sets without files have neither.

    Raises UserError where that table is not of these images.
    """
    if params.data.dataset != "folder":
        return [f"training image {index}" for index in range(count)], [None] * count
    rows = [row for row in files.read_table(files.IMAGES, made_by="prepare") if row["split"] == TRAIN]
    if sorted(int(row["index"]) for row in rows) != list(range(count)):
        raise UserError(f"{files.IMAGES} is not of the {count:,} training images here: run `dvc repro -f prepare`")
    rows.sort(key=lambda row: int(row["index"]))
    return [row["path"] for row in rows], [row["group"] or None for row in rows]


def _folds(
    train: LabelledImages, dataset: Dataset, groups: Sequence[str | None], params: Params, count: int
) -> NDArray[np.int64]:
    """A fold (N,) for each training image. Copies, and images of one subject, are in one: their labels are too."""
    labels = train.labels.numpy()
    pictures = splitting.Pictures(
        keys=[],
        labels=labels,
        class_names=dataset.class_names,
        groups=groups,
        copies=duplicates.clusters(train.images.numpy(), params.data.near_duplicates),
        published=[],
    )
    units = pictures.units()
    if (distinct := int(units.max()) + 1) < count:
        raise UserError(f"--folds is {count}; allowed here: at most {distinct:,}, the training images without copies")
    return splitting.folds(units, labels, count, params.seed)


def _out_of_fold(
    train: LabelledImages, folds: NDArray[np.int64], params: Params, dataset: Dataset, device: torch.device
) -> Tensor:
    """The probabilities (N, classes) of each image, given by the network that was trained on the other folds."""
    count = int(folds.max()) + 1
    probabilities = torch.empty(len(train), len(dataset.class_names))
    total = (count - 1) * len(train) * params.train.epochs
    with tqdm(total=total, unit=" images", unit_scale=True, disable=None) as bar:
        for fold in range(count):
            bar.set_description(f"network {fold + 1} of {count}")
            held_out, others = (_part(train, chosen).to(device) for chosen in (folds == fold, folds != fold))
            cnn = recipe.build(params, dataset)
            _train(cnn, others, held_out, params, lambda step: bar.update(step.images))
            logits = metrics.finite(metrics.predict_logits(cnn, held_out.images))
            probabilities[torch.from_numpy(folds == fold)] = logits.softmax(dim=1).cpu()
    return probabilities


def _part(images: LabelledImages, chosen: NDArray[np.bool_]) -> LabelledImages:
    """Those that are chosen (N,). Their pixels are in a file: there may be more of them than memory."""
    rows = np.flatnonzero(chosen)
    return LabelledImages(mapped_files.selected(images.images.numpy(), rows, files.PREPARED), images.labels[rows])


def _train(
    cnn: CNN, train: LabelledImages, held_out: LabelledImages, params: Params, on_step: Callable[[Step], object]
) -> None:
    try:
        for _ in recipe.fit(cnn, train, held_out, params, on_step=on_step):
            pass
    except DivergedError as error:
        raise Fault(f"{error}: try a lower train.learning_rate in params.yaml") from error


if __name__ == "__main__":
    run_command(main)
