"""What params.yaml says of the network and its training, carried out. For the stages and for the tuning study."""

from collections.abc import Callable, Iterator

import torch

from pipeline.data.splits import Dataset, LabelledImages
from pipeline.errors import UserError
from pipeline.model import training
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN, Architecture, layers
from pipeline.params import Params


def device_for(params: Params) -> torch.device:
    """Set torch up as ``train`` says; a UserError where this machine cannot do it."""
    try:
        return training.set_up(params.train.device, params.train.threads, params.train.precision)
    except ValueError as error:
        raise UserError(f"params.yaml: train.{error}") from None


def architecture(params: Params, dataset: Dataset) -> Architecture:
    """The layers that ``model`` says, for the images of ``dataset``."""
    return Architecture(dataset.image_shape, dataset.class_names, **params.model.model_dump())


def build(params: Params, dataset: Dataset) -> CNN:
    """The untrained CNN for the images of ``dataset``; a UserError where they do not fit."""
    try:
        return CNN(architecture(params, dataset), torch.Generator().manual_seed(params.seed))
    except ValueError as error:
        raise UserError(f"params.yaml: model: {error}") from None


def fit(
    cnn: CNN,
    train: LabelledImages,
    validation: LabelledImages,
    params: Params,
    on_step: Callable[[training.Step], object] = lambda step: None,
    start: Checkpoint | None = None,
    keep: Callable[[Checkpoint], object] = lambda checkpoint: None,
) -> Iterator[training.Epoch]:
    """Train ``cnn`` in place as ``train`` says, on the device of the images; an Epoch after each pass.

    The functions and ``start`` are those of training.fit. A UserError where a batch would be too small for batch
    normalisation.
    """
    size = params.train.batch_size
    of_one_pixel = any(layer.output_shape[:-1] == (1, 1) for layer in layers(cnn.architecture))
    if cnn.architecture.batch_norm and of_one_pixel and 1 in (size, len(train) % size):
        raise UserError(
            f"params.yaml: train.batch_size is {size}, which makes a batch of one of the "
            f"{len(train):,} images; over maps of one pixel model.batch_norm needs two: take another batch size"
        )
    how = params.train.model_dump(exclude={"device", "threads", "live_images", "loss"})
    return training.fit(
        cnn,
        (train.images, train.labels),
        (validation.images, validation.labels),
        generator=torch.Generator(train.images.device).manual_seed(params.seed),
        on_step=on_step,
        start=start,
        keep=keep,
        **how,
    )
