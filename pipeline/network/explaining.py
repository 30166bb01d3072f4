"""What the CNN learned, as arrays; pipeline/figures.py draws them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.network.cnn import CNN, as_input, pooled


class FeatureMaps(NamedTuple):
    """What one layer makes of one image: ``maps`` (filters, H, W)."""

    layer: str
    maps: Tensor


def first_filters(cnn: CNN) -> Tensor:
    """The weights of the first convolution, (filters, C, H, W)."""
    return cnn.block_list()[0].convolution.weight.detach().clone()


@torch.no_grad()
def feature_maps(cnn: CNN, image: Tensor) -> list[FeatureMaps]:
    """The maps of one image (H, W, C) uint8 after each convolution with its ReLU and after each pooling.

    This is the textbook order, convolution, ReLU, pooling. The CNN itself may pool first, with the same result.
    """
    found, maps = [], as_input(image[None])
    for index, block in enumerate(cnn.eval().block_list()):
        suffix = f"_{index}" if index else ""
        after = F.relu(block.normalisation(block.convolution(maps)))
        found.append(FeatureMaps(f"conv2d{suffix}", after[0]))
        maps = pooled(after, cnn.architecture.pool, cnn.architecture.pool_size)
        found.append(FeatureMaps(f"{cnn.architecture.pool}_pooling2d{suffix}", maps[0]))
    return found


def most_confident_mistakes(labels: Tensor, predicted: Tensor, confidence: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` wrong predictions with the highest confidence, the highest first."""
    wrong = (labels != predicted).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
