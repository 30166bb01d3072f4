"""What the two usual PyTorch programs share: images as torchvision hands them out, and the network."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

BATCH_SIZE = 128


class Digits(Dataset[tuple[Tensor, int]]):
    """As torchvision.datasets.MNIST does it: an image from the array, then the transform, for each item."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels, self.transform = images, labels, ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, :, :, 0], mode="L")), int(self.labels[index])


def loaders(workers: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Of the training images, in a new order each epoch, and of the validation images."""
    data = np.load(sys.argv[1])
    train, validation = (Digits(data[f"{split}_images"], data[f"{split}_labels"]) for split in ("train", "validation"))
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0),
        DataLoader(validation, BATCH_SIZE, num_workers=workers, persistent_workers=workers > 0),
    )


def network(filters: Sequence[int] = (32, 64), dropout: float = 0.5) -> nn.Sequential:
    """The published network, or one with other filter counts and dropout."""
    first, second = filters
    return nn.Sequential(
        nn.Conv2d(1, first, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(25 * second, 10),
    )


def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam as Keras has it."""
    return torch.optim.Adam(parameters, lr=1e-3, eps=1e-7)
