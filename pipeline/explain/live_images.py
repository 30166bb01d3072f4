"""Images of a network after each epoch of its training.

They are small and take few operations, so as not to slow the training down.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.explain import activation_maximization
from pipeline.explain.activation_maximization import Ascent, Regularization
from pipeline.explain.attribution import first_filters
from pipeline.figures.tiles import Array, filter_tiles, mosaic
from pipeline.model.cnn import CNN
from pipeline.params import Maximisation

Picture = NDArray[np.uint8]  # (H, W, 3)
SIDE = 200  # pixels, roughly
STEPS = 5  # gradient ascent steps per epoch; a resumed training restarts the class image
RED, BLUE = (178, 24, 43), (33, 102, 172)  # as in the figure of the filters
GREY = 128


class LiveImages:
    """The filters of the first convolution, and an image that raises the logit of the first class."""

    def __init__(self, cnn: CNN, settings: Maximisation) -> None:
        self._cnn, self._settings, self._epochs = cnn, settings, 0
        self.image = activation_maximization.starts(
            1, cnn.architecture.image_shape, settings.noise, settings.seed
        )  # (1, C, H, W) in [0, 1]

    def after_epoch(self) -> dict[str, Picture]:
        """Both images by name, after some more steps of the second.

        Leaves the network in evaluation mode and its weights unchanged.
        """
        self._cnn.eval()
        device = self._cnn.dense.weight.device
        score = activation_maximization.class_logits(self._cnn, torch.tensor([0], device=device))
        settings = self._settings
        regularization = Regularization(settings.l1, settings.total_variation, settings.jitter)
        ascent = Ascent(STEPS, settings.step_size, settings.noise, settings.seed + self._epochs)
        self.image = activation_maximization.ascend(score, self.image.to(device), regularization, ascent)
        self._epochs += 1
        return self.now()

    def now(self) -> dict[str, Picture]:
        """Both images by name, as they are."""
        weights = first_filters(self._cnn).cpu().numpy()
        pixels = (self.image[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
        return {
            "filters": _enlarged(_framed(red_and_blue(filter_tiles(weights)))),
            "class image": _enlarged(np.broadcast_to(pixels, (*pixels.shape[:2], 3))),
        }


def red_and_blue(tiles: Array) -> Picture:
    """Weights (...) as colours (..., 3): red above 0, blue below, white at 0, on one scale."""
    strength = np.abs(tiles)[..., None] / (np.abs(tiles).max() or 1)
    colour = np.where(tiles[..., None] > 0, np.array(RED), np.array(BLUE))
    coloured: Picture = (255 + strength * (colour - 255.0)).round().astype(np.uint8)
    return coloured


def _framed(tiles: Picture) -> Picture:
    """Tiles (N, H, W, 3) as one roughly square picture, with grey lines between and around them."""
    count, height, width, _ = tiles.shape
    columns = max(1, round(math.sqrt(count * (height + 1) / (width + 1))))
    framed = np.pad(mosaic(tiles, columns), ((1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    return np.nan_to_num(framed, nan=GREY).astype(np.uint8)


def _enlarged(picture: Picture) -> Picture:
    """Every pixel repeated as a square."""
    times = max(1, round(SIDE / max(picture.shape[:2])))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
