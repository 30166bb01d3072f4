"""The usual PyTorch loop: a torchvision data set and a DataLoader. The third argument is its number of workers."""

import sys
import time

import torch
from torch.nn import functional as F

from bench.contenders import reporting, usual


def main() -> None:
    """Fit the network to the images of the file that the first argument names."""
    train, validation = usual.loaders(workers=int(sys.argv[3]))
    model = usual.network()
    adam = usual.optimizer(model.parameters())
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
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
        reporting.report(
            seconds=time.perf_counter() - started, validation_accuracy=hits / seen, validation_loss=loss / seen
        )
    reporting.report_memory()


if __name__ == "__main__":
    main()
