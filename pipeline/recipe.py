"""Build and train the network as params.yaml describes, for the stages and for the tuning study."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields

import torch

from pipeline.data import mapped_files
from pipeline.data.splits import Dataset, LabelledImages
from pipeline.errors import UserError
from pipeline.model import novelty, training
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN, Architecture, layers
from pipeline.model.model_file import TrainedModel
from pipeline.params import Params


def device_for(params: Params) -> torch.device:
    """Set torch up as ``train`` in params.yaml says. Raises UserError where this machine cannot do that."""
    try:
        return training.set_up(params.train.device, params.train.threads, params.train.precision)
    except ValueError as error:
        raise UserError(f"params.yaml: train.{error}") from None


def architecture(params: Params, dataset: Dataset) -> Architecture:
    """The architecture that ``model`` in params.yaml describes, for the images of ``dataset``.

    Raises ValueError where the filters grow too far.
    """
    values = params.model.model_dump() | {"filters": params.model.filter_counts()}
    if params.model.normalize:
        values |= {"mean": dataset.mean, "std": dataset.std}
    return Architecture(dataset.image_shape, dataset.class_names, **values)


def build(params: Params, dataset: Dataset) -> CNN:
    """The untrained CNN for the images of ``dataset``. Raises UserError where its layers do not fit them."""
    try:
        return CNN(architecture(params, dataset), torch.Generator().manual_seed(params.seed))
    except ValueError as error:
        raise UserError(f"params.yaml: model: {error}") from None


def settings(params: Params) -> training.Settings:
    """The settings of training.fit in params.yaml."""
    given = params.train.model_dump()
    own = {each.name for each in fields(training.Settings)}
    return training.Settings(**{name: given[name] for name in own & set(given)}, augmentations=given["augmentation"])


def trained(
    cnn: CNN, train: LabelledImages, validation: LabelledImages, params: Params, dataset: Dataset
) -> TrainedModel:
    """What the model file holds, after ``fit``."""
    generator = torch.Generator().manual_seed(params.seed)

    def some() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in novelty.chosen(len(train), generator):
            found = train[rows.to(train.labels.device)]
            yield found.images, found.labels
            mapped_files.let_go()

    found = novelty.fit(cnn, some(), validation.images)
    return TrainedModel(cnn, dataset.tags, params.recipe, asdict(dataset.preprocessing), found)


def fit(
    cnn: CNN,
    train: LabelledImages,
    validation: LabelledImages,
    params: Params,
    on_step: Callable[[training.Step], object] = lambda step: None,
    resume_from: Checkpoint | None = None,
    save_checkpoint: Callable[[Checkpoint], object] = lambda checkpoint: None,
) -> Iterator[training.Epoch]:
    """Train ``cnn`` in place as ``train`` in params.yaml says, on the device of the images; yields every Epoch.

    The functions and ``resume_from`` are those of training.fit. Raises UserError where a batch would be too small for
    batch normalisation.
    """
    size = params.train.batch_size
    of_one_pixel = any(layer.output_shape[:-1] == (1, 1) for layer in layers(cnn.architecture))
    if cnn.architecture.batch_norm and of_one_pixel and 1 in (size, len(train) % size):
        raise UserError(
            f"params.yaml: train.batch_size is {size}, which leaves a batch of one of the "
            f"{len(train):,} images; with maps of one pixel model.batch_norm needs at least two: use another batch size"
        )

    def after_step(step: training.Step) -> None:
        mapped_files.let_go()  # else this process would soon seem to have all images in memory
        on_step(step)

    return training.fit(
        cnn,
        (train.images, train.labels),
        (validation.images, validation.labels),
        settings(params),
        generator=torch.Generator(train.images.device).manual_seed(params.seed),
        on_step=after_step,
        resume_from=resume_from,
        save_checkpoint=save_checkpoint,
    )
