"""What a training looks like while it goes on, as images that MLflow's page of the run plays epoch by epoch.

They are small and made of few operations: a training is not to be slower for being looked at.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.explain import activation_maximization
from pipeline.explain.activation_maximization import Ascent, Regularization
from pipeline.figures.tiles import Array, filter_tiles, mosaic
from pipeline.model.cnn import CNN
from pipeline.params import Maximisation

Picture = NDArray[np.uint8]  # (H, W, 3)
SIDE = 200  # pixels, about
STEPS = 5  # of the class image in an epoch; it goes on where it was, and begins anew where a training is resumed
RED, BLUE = (178, 24, 43), (33, 102, 172)  # the ends of the scale of the figures
GREY = 128


class LiveImages:
    """The filters of the first convolution, and an image that is made for the first class while that is learned."""

    def __init__(self, cnn: CNN, how: Maximisation) -> None:
        self._cnn, self._how, self._epochs = cnn, how, 0
        self.image = activation_maximization.starts(
            1, cnn.architecture.image_shape, how.noise, how.seed
        )  # (1, C, H, W) in [0, 1]

    def after_epoch(self) -> dict[str, Picture]:
        """Both by their names, the second some steps further on.

        The network is left in evaluation mode, its weights as they were.
        """
        self._cnn.eval()
        device = self._cnn.dense.weight.device
        score = activation_maximization.class_logits(self._cnn, torch.tensor([0], device=device))
        wish = Regularization(self._how.l1, self._how.total_variation, self._how.jitter)
        ascent = Ascent(STEPS, self._how.step_size, self._how.noise, self._how.seed + self._epochs)
        self.image = activation_maximization.ascend(score, self.image.to(device), wish, ascent)
        self._epochs += 1
        return self.now()

    def now(self) -> dict[str, Picture]:
        """Both by their names, as they are."""
        weights = self._cnn.block_list()[0].convolution.weight.detach().cpu().numpy()
        grey = (self.image[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
        return {
            "filters": _enlarged(_framed(in_two_colours(filter_tiles(weights)))),
            "class image": _enlarged(np.broadcast_to(grey, (*grey.shape[:2], 3))),
        }


def in_two_colours(tiles: Array) -> Picture:
    """Weights (...) as colours (..., 3): red above 0, blue below, white at 0; one scale for all."""
    strength = np.abs(tiles)[..., None] / (np.abs(tiles).max() or 1)
    colour = np.where(tiles[..., None] > 0, np.array(RED), np.array(BLUE))
    shown: Picture = (255 + strength * (colour - 255.0)).round().astype(np.uint8)
    return shown


def _framed(tiles: Picture) -> Picture:
    """Tiles (N, H, W, 3) as one picture that is about as wide as high, grey between them and around."""
    count, height, width, _ = tiles.shape
    columns = max(1, round(math.sqrt(count * (height + 1) / (width + 1))))
    framed = np.pad(mosaic(tiles, columns), ((1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    return np.nan_to_num(framed, nan=GREY).astype(np.uint8)


def _enlarged(picture: Picture) -> Picture:
    """Every pixel as a square of several."""
    times = max(1, round(SIDE / max(picture.shape[:2])))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
