"""The usual PyTorch loop: a torchvision data set and a DataLoader. The third argument is its number of workers."""

import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bench.contenders import reporting, usual


def main() -> None:
    """Fit the network to the images of the file that the first argument names."""
    train, validation = usual.loaders(workers=int(sys.argv[3]))
    model = usual.network()
    adam = usual.optimizer(model.parameters())
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
        loss, accuracy = train_and_validate(model, adam, train, validation)
        reporting.report(seconds=time.perf_counter() - started, validation_accuracy=accuracy, validation_loss=loss)
    reporting.report_memory()


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
