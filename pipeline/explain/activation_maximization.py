"""Images that excite a filter or a class as much as they can, found by gradient ascent on their pixels.

Left to itself the ascent finds what looks like no class to a person. What an image is to be besides exciting, thin or
smooth, is a penalty: the L1 norm (Hung-yi Lee's lecture on explainable models) and total variation (Mahendran and
Vedaldi, 2015; weights and norms as in keras-vis).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.explain.corruptions import moved
from pipeline.model import cpu_threads
from pipeline.model.cnn import CNN

CHUNK = 8  # images that go up together
Score = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> what each is to have much of, (N,)


@dataclass(frozen=True)
class Regularization:
    """What an image is to be besides exciting. The weights are in units of the score, for an image's mean pixel."""

    l1: float = 0.0  # few bright pixels
    total_variation: float = 0.0  # few edges
    jitter: int = 0  # pixels by which it may move either way at each step, so that no single place is relied on


def class_logits(cnn: CNN, classes: Tensor) -> Score:
    """The score of the n-th image is the logit, not the probability, of the n-th class.

    A probability also rises where the other classes fall.
    """

    def logits(images: Tensor) -> Tensor:
        found: Tensor = cnn(images)
        return found.gather(1, classes[:, None])[:, 0]

    return logits


def filter_sums(cnn: CNN, filters: Tensor) -> Score:
    """The score of the n-th image is the sum of the n-th filter's map in the last convolution, before ReLU."""
    before, last = cnn.blocks[:-1], cnn.block_list()[-1]

    def sums(images: Tensor) -> Tensor:
        maps = last.before("activation", before(images))
        return maps[torch.arange(len(filters)), filters].sum(dim=(1, 2))

    return sums


def total_variation(images: Tensor) -> Tensor:
    """How much neighbouring pixels differ: the mean square of their differences, (N,) of images (N, C, H, W)."""
    down, right = images.diff(dim=2).square(), images.diff(dim=3).square()
    return down.mean(dim=(1, 2, 3)) + right.mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Ascent:
    """How many steps, how long each is (root mean square, a pixel), and where they begin: see `starts`."""

    steps: int
    step_size: float
    noise: float
    seed: int


def made(cnn: CNN, scores: Callable[[CNN, Tensor], Score], count: int, wish: Regularization, ascent: Ascent) -> Tensor:
    """An image (count, C, H, W) in [0, 1] for each class or filter, from noise around grey."""
    cnn.eval()
    start = starts(count, cnn.architecture.image_shape, ascent.noise, ascent.seed)

    def chunk(which: Tensor) -> Tensor:
        return ascend(scores(cnn, which), start[which], wish, ascent)

    # Every operation on one thread: the threads then change no bit, which two hundred steps would make many of.
    with cpu_threads.thread_pool(cnn, start.device) as pool:
        return torch.cat(list(pool.map(chunk, torch.split(torch.arange(count), CHUNK))))


def ascend(score: Score, start: Tensor, wish: Regularization, ascent: Ascent) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with a higher score than ``start``.

    Each step goes along the gradient, which is brought to the same length for every image; those of the second half
    become shorter, down to nothing.
    """
    generator = torch.Generator().manual_seed(ascent.seed)
    images = start
    for step in range(ascent.steps):
        images = images.detach().requires_grad_()
        seen = _jittered(images, wish.jitter, generator)
        price = wish.l1 * images.abs().mean(dim=(1, 2, 3)) + wish.total_variation * total_variation(images)
        (gradient,) = torch.autograd.grad((score(seen) - price).sum(), images)
        length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        size = ascent.step_size * min(1.0, 2 * (1 - step / ascent.steps))
        images = (images.detach() + size * gradient / (length + 1e-12)).clamp(0, 1)
    return images.detach()


def _jittered(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Moved by so many pixels at most, the same for all; black comes into view."""
    if not most:
        return images
    down, right = (torch.randint(2 * most + 1, (2,), generator=generator) - most).tolist()
    return moved(images.movedim(1, -1), down, right).movedim(-1, 1)


def starts(count: int, image_shape: tuple[int, int, int], noise: float, seed: int) -> Tensor:
    """Images (N, C, H, W) from which an ascent may begin: grey, 0.5, and up to ``noise`` more or less."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, channels, height, width).uniform_(0.5 - noise, 0.5 + noise, generator=generator)
