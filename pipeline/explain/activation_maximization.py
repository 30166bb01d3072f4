"""Images that excite a filter or a class as much as they can: gradient ascent on the pixels (Erhan et al., 2009).

Without regularization the ascent finds images that look like no class to a person. Penalties make them sparse or
smooth: the L1 norm (Hung-yi Lee's lecture on explainable models) and total variation (Mahendran and Vedaldi, 2015;
weights and norms as in keras-vis).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.explain.corruptions import moved
from pipeline.model import cpu_threads
from pipeline.model.cnn import CNN

CHUNK = 8  # images that are optimised together
Score = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> what the ascent raises in each, (N,)


@dataclass(frozen=True)
class Regularization:
    """Penalties in units of the score, for an image's mean pixel, and a random shift."""

    l1: float = 0.0  # of brightness
    total_variation: float = 0.0  # of edges
    jitter: int = 0  # pixels of random shift in each direction at each step, so that no single position matters


@dataclass(frozen=True)
class Ascent:
    """Number of steps, root mean square change of a pixel in each, and the starting images: see `starts`."""

    steps: int
    step_size: float
    noise: float
    seed: int


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
    earlier, last = cnn.blocks[:-1], cnn.block_list()[-1]

    def sums(images: Tensor) -> Tensor:
        maps = last.before("activation", earlier(images))
        return maps[torch.arange(len(filters)), filters].sum(dim=(1, 2))

    return sums


def total_variation(images: Tensor) -> Tensor:
    """How much neighbouring pixels differ: the mean square of their differences, (N,) of images (N, C, H, W)."""
    down, right = images.diff(dim=2).square(), images.diff(dim=3).square()
    return down.mean(dim=(1, 2, 3)) + right.mean(dim=(1, 2, 3))


def maximize(
    cnn: CNN,
    score_of: Callable[[CNN, Tensor], Score],
    count: int,
    regularization: Regularization,
    ascent: Ascent,
) -> Tensor:
    """Images (count, C, H, W) in [0, 1], one for each class or filter, from noise around grey."""
    cnn.eval()
    start = starts(count, cnn.architecture.image_shape, ascent.noise, ascent.seed)

    def maximize_chunk(chosen: Tensor) -> Tensor:
        return ascend(score_of(cnn, chosen), start[chosen], regularization, ascent)

    # Every operation on one thread: otherwise rounding would depend on the number of threads, amplified by 200 steps.
    with cpu_threads.thread_pool(cnn, start.device) as pool:
        return torch.cat(list(pool.map(maximize_chunk, torch.split(torch.arange(count), CHUNK))))


def ascend(score: Score, start: Tensor, regularization: Regularization, ascent: Ascent) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with a higher score than ``start``.

    Each step follows the gradient, scaled to the same length for every image; in the second half the step
    size falls linearly to zero.
    """
    generator = torch.Generator().manual_seed(ascent.seed)
    images = start
    for step in range(ascent.steps):
        images = images.detach().requires_grad_()
        seen = _jittered(images, regularization.jitter, generator)
        brightness = images.abs().mean(dim=(1, 2, 3))
        penalty = regularization.l1 * brightness + regularization.total_variation * total_variation(images)
        (gradient,) = torch.autograd.grad((score(seen) - penalty).sum(), images)
        length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        size = ascent.step_size * min(1.0, 2 * (1 - step / ascent.steps))
        images = (images.detach() + size * gradient / (length + 1e-12)).clamp(0, 1)
    return images.detach()


def _jittered(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shifted by up to this many pixels, all by the same amount; new pixels are black."""
    if not most:
        return images
    down, right = (torch.randint(2 * most + 1, (2,), generator=generator) - most).tolist()
    return moved(images.movedim(1, -1), down, right).movedim(-1, 1)


def starts(count: int, image_shape: tuple[int, int, int], noise: float, seed: int) -> Tensor:
    """Images (N, C, H, W) at which an ascent may begin: grey (0.5), plus or minus up to ``noise``."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, channels, height, width).uniform_(0.5 - noise, 0.5 + noise, generator=generator)
