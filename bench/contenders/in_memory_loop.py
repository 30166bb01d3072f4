"""The plainest good loop in PyTorch: the images as one tensor of floats, channels_last, fused Adam, all threads.

    python -m bench.contenders.in_memory_loop NETWORK EPOCHS

NETWORK is a name in bench.networks.NETWORKS.
"""

import json
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.networks import NETWORKS, Network

BATCH_SIZE = 128
POOLINGS = {"max": nn.MaxPool2d, "mean": nn.AvgPool2d}


def network(given: Network) -> nn.Sequential:
    """The same layers as this project's, by PyTorch's own modules."""
    model, channels = given.model, given.image_shape[2]
    layers = list[nn.Module]()
    for filters in model.filter_counts():
        layers.append(nn.Conv2d(channels, filters, model.kernel_size, model.stride, model.padding))
        if model.batch_norm:
            layers.append(nn.BatchNorm2d(filters))
        layers.append(nn.ReLU())
        if model.pool_size > 1:
            layers.append(POOLINGS[model.pool](model.pool_size))
        channels = filters
    with torch.no_grad():
        height, width, _ = given.image_shape
        features = nn.Sequential(*layers, nn.Flatten()).eval()(torch.zeros(1, given.image_shape[2], height, width))
    head = [nn.Flatten(), nn.Dropout(model.dropout), nn.Linear(features.shape[1], given.classes)]
    return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)


def epoch(model: nn.Sequential, adam: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One pass over the images (N, C, H, W)."""
    for rows in torch.split(torch.randperm(len(labels)), BATCH_SIZE):
        adam.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images[rows]), labels[rows]))
        adam.step()


def main() -> None:
    """Train; a JSON line for each epoch."""
    given = NETWORKS[sys.argv[1]]
    images, labels = given.images()
    pixels = (images.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
    model = network(given).train()
    adam = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
        epoch(model, adam, pixels, labels)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
