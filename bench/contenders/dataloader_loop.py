"""The usual PyTorch loop: a torchvision data set and a DataLoader.

python -m bench.contenders.dataloader_loop IMAGES EPOCHS WORKERS
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

BATCH_SIZE = 128


class Digits(Dataset[tuple[Tensor, int]]):
    """As torchvision.datasets.MNIST does it: for each item an image from the array, then the transform."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels, self.transform = images, labels, ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, :, :, 0], mode="L")), int(self.labels[index])


def loaders(workers: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of the training images, reshuffled each epoch, and of the validation images."""
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


def main() -> None:
    """Fit the network to the images of the file that the first argument names."""
    train, validation = loaders(workers=int(sys.argv[3]))
    model = network()
    adam = optimizer(model.parameters())
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
        loss, accuracy = train_and_validate(model, adam, train, validation)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "validation_accuracy": accuracy, "validation_loss": loss}), flush=True)


def train_and_validate(
    model: nn.Module, adam: torch.optim.Optimizer, train: DataLoader[Any], validation: DataLoader[Any]
) -> tuple[float, float]:
    """An epoch; loss and accuracy on the validation images."""
    model.train()
    for images, labels in train:
        adam.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        adam.step()
    model.eval()
    loss, hits, seen = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in validation:
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            seen += len(labels)
            hits += int((logits.argmax(dim=1) == labels).sum())
    return loss / seen, hits / seen


if __name__ == "__main__":
    main()
