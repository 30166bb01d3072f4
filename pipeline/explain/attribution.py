"""What the CNN looks for, and where in an image it finds it, as arrays; pipeline/figures draws them.

Images are (N, H, W, C) uint8 where they come from a split, (N, C, H, W) float in [0, 1] where they are differentiated.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.explain.corruptions import moved
from pipeline.model import cpu_ops
from pipeline.model.cnn import CNN, Architecture, Block, as_input, layer_names, layers
from pipeline.model.layers import Pooling

CHUNK = 250  # images at a time
MAX_SQUARES = 40  # that cover parts of an image, across and down


class FeatureMaps(NamedTuple):
    """The output of one layer for images: ``maps`` (N, filters, H, W)."""

    layer: str
    maps: Tensor


def first_filters(cnn: CNN) -> Tensor:
    """The weights of the first convolution, (filters, C, H, W)."""
    return cnn.block_list()[0].convolutions()[0].weight.detach().clone()


@torch.no_grad()
def use_of_first_filters(cnn: CNN, images: Tensor) -> Tensor:
    """How far each first filter's maps of images (N, H, W, C) are from its map of a black one: means, (filters,).

    The maps are those that reach the next convolution, of the same block or the next. A filter with a large bias
    responds to black as well, which is of no use.
    """
    block = cnn.eval().block_list()[0]
    further = block.convolutions()[1:2]
    layers = list(itertools.takewhile(lambda layer: layer not in further, block.path()))
    to_black = cpu_ops.run(layers, as_input(torch.zeros_like(images[:1])))
    found = ((cpu_ops.run(layers, as_input(chunk)) - to_black).abs().double() for chunk in torch.split(images, CHUNK))
    return torch.stack([each.mean(dim=(2, 3)).sum(dim=0) for each in found]).sum(dim=0) / len(images)


@torch.no_grad()
def feature_maps(cnn: CNN, images: Tensor) -> list[FeatureMaps]:
    """The maps of images (N, H, W, C) before each pooling, under the name of the layer before it, and after it."""
    found, maps, names = [], as_input(images), layer_names(cnn)
    for block in cnn.eval().block_list():
        maps = block.before("pooling", maps)
        found.append(FeatureMaps(_last_before_pooling(block, names), maps))
        maps = block.pooling(maps)
        found.append(FeatureMaps(names[block.pooling], maps))
    return found


def _last_before_pooling(block: Block, names: Mapping[nn.Module, str]) -> str:
    """The last layer of ``block`` before its pooling that has a name: the convolution, or one after it."""
    before = itertools.takewhile(lambda layer: layer is not block.pooling, block.modules())
    return [names[layer] for layer in before if layer in names][-1]


class ReceptiveField(NamedTuple):
    """The part of the image that one position of a layer's maps sees; the next sees ``step`` pixels further."""

    first: int
    step: int
    side: int


def receptive_field(cnn: CNN) -> ReceptiveField:
    """What one position of the last convolution's maps sees; ``first`` is below 0 if it sees padding."""
    first, step, side = 0, 1, 1
    last = cnn.block_list()[-1].convolutions()[-1]
    for layer in itertools.chain.from_iterable(block.path() for block in cnn.block_list()):
        if isinstance(layer, nn.Conv2d):
            (kernel, _), (stride, _) = layer.kernel_size, layer.stride
            padding = layer.padding[0] if isinstance(layer.padding, tuple) else (kernel - 1) // 2  # "same"
            first -= int(padding) * step
            side += (kernel - 1) * step
            if layer is last:
                break
            step *= stride
        elif isinstance(layer, Pooling):
            side += (layer.size - 1) * step
            step *= layer.size
    return ReceptiveField(first, step * last.stride[0], side)


class Patches(NamedTuple):
    """The parts of images that excite each filter most: (filters, count, h, w, C) uint8, the strongest first.

    And the ``strongest`` response of each filter, before ReLU: (filters,).
    """

    patches: Tensor
    strongest: Tensor


@torch.no_grad()
def strongest_patches(cnn: CNN, images: Tensor, count: int) -> Patches:
    """The parts of images (N, H, W, C) that excite each filter of the last convolution most.

    At most one of each image; black where a part lies over the edge. A side of the receptive field that is longer than
    the images' is cut to theirs: the part is then all of it.
    """
    cnn.eval()
    before, last = cnn.blocks[:-1], cnn.block_list()[-1]
    strengths, places = [], []
    for chunk in torch.split(images, CHUNK):
        maps = last.before("activation", before(as_input(chunk)))
        strongest, place = maps.flatten(2).max(dim=2)
        strengths.append(strongest)
        places.append(place)
    width = maps.shape[3]
    answers = torch.cat(strengths)
    which = answers.argsort(dim=0, descending=True, stable=True)[:count]
    place = torch.cat(places).gather(0, which)
    field = receptive_field(cnn)
    edge = max(0, -field.first, field.side)

    def patch(image: int, at: int) -> Tensor:
        starts = (edge + field.first + field.step * number for number in divmod(at, width))
        across = zip(starts, images.shape[1:3], strict=True)
        seen = [slice(edge, edge + side) if field.side > side else slice(at, at + field.side) for at, side in across]
        return F.pad(images[image], (0, 0, *(edge,) * 4))[seen[0], seen[1]]

    rows = zip(which.T.tolist(), place.T.tolist(), strict=True)
    found = [torch.stack([patch(*pair) for pair in zip(*row, strict=True)]) for row in rows]
    return Patches(torch.stack(found), answers.amax(dim=0))


def saliency(cnn: CNN, images: Tensor, classes: Tensor) -> Tensor:
    """How much a small change of each pixel changes the logit of a class: |dy/dx|, (N, H, W).

    Images (N, C, H, W), one class (N,) each; of several channels the largest counts (Simonyan et al., 2014).
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_chosen(cnn.eval()(images), classes).sum(), images)
    return gradient.abs().amax(dim=1)


@torch.no_grad()
def occlusion(cnn: CNN, images: Tensor, classes: Tensor, side: int) -> Tensor:
    """How much the logit of a class falls when a black square covers a pixel, averaged over all squares that do.

    Images (N, C, H, W), one class (N,) each; (N, H, W). The squares have ``side`` pixels (Zeiler and Fergus, 2014). In
    large images they are more than a pixel apart, and if need be larger, so that they leave no gaps.
    """
    cnn.eval()
    height, width = images.shape[2:]
    step = max(1, math.ceil((max(height, width) - side) / MAX_SQUARES))
    side = min(max(side, step), height, width)
    step = min(step, side)
    whole = _chosen(cnn(images), classes)
    falls, squares = torch.zeros(len(images), height, width), torch.zeros(height, width)
    for top in _places(height - side, step):
        for left in _places(width - side, step):
            covered = images.clone()
            square = (..., slice(top, top + side), slice(left, left + side))
            covered[square] = 0
            falls[square] += (whole - _chosen(cnn(covered), classes))[:, None, None]
            squares[square] += 1
    return falls / squares


def _places(last: int, step: int) -> list[int]:
    """Every ``step`` pixels from 0, and ``last``."""
    return [*range(0, last, step), last]


def grad_cam(cnn: CNN, images: Tensor, classes: Tensor) -> Tensor:
    """Where the last convolution, before its pooling, finds evidence for a class (Selvaraju et al., 2017).

    Images (N, C, H, W), one class (N,) each; (N, H, W), at least 0, stretched from the size of the maps.
    """
    cnn.eval()
    last = cnn.block_list()[-1]
    maps = last.before("activation", cnn.blocks[:-1](images)).detach().requires_grad_()
    logits = cnn.head(last.onwards("activation", maps))
    (gradient,) = torch.autograd.grad(_chosen(logits, classes).sum(), maps)
    heat = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)).detach()
    return F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]


def with_random_weights(cnn: CNN) -> CNN:
    """The same layers, untrained: a sanity check of explanations (Adebayo et al., 2018)."""
    return CNN(cnn.architecture, torch.Generator().manual_seed(1)).eval()


def parameters_of_convolutions(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """For each convolution its parameters, and those of a dense layer from all its inputs to all its outputs."""
    return {
        layer.name: (layer.parameters, (math.prod(layer.input_shape) + 1) * math.prod(layer.output_shape))
        for layer in layers(architecture)
        if layer.name.startswith("conv2d")
    }


def _chosen(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


@torch.no_grad()
def shift_similarity(cnn: CNN, images: Tensor, shifts: int) -> dict[str, list[float]]:
    """How similar each layer's maps stay when images (N, H, W, C) move to the right by 0, 1 ... ``shifts`` pixels.

    For each layer of `feature_maps` the mean cosine similarity between the maps before and after the shift:
    1 is unchanged.
    """
    sums: dict[str, list[float]] = {}
    for chunk in torch.split(images, CHUNK):
        still = feature_maps(cnn, chunk)
        for pixels in range(shifts + 1):
            for (layer, before), (_, after) in zip(still, feature_maps(cnn, moved(chunk, 0, pixels)), strict=True):
                alike = F.cosine_similarity(before.double().flatten(1), after.double().flatten(1)).sum().item()
                sums.setdefault(layer, [0.0] * (shifts + 1))[pixels] += alike
    return {layer: [total / len(images) for total in totals] for layer, totals in sums.items()}


@torch.no_grad()
def penultimate_features(cnn: CNN, images: Tensor) -> Tensor:
    """The input of the last dense layer for images (N, H, W, C): (N, features) float32."""
    cnn.eval()
    return torch.cat([cnn.features(cnn.maps(chunk)) for chunk in torch.split(images, CHUNK)])


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Features (N, features) in the ``count`` directions in which they differ most, and these directions' shares.

    (N, count) and (count,): the share of the whole variance. Signs are chosen so that each direction's largest weight
    is positive.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the search starts at random directions
        scores, values, directions = torch.pca_lowrank(features, q=min(count + 6, *features.shape), niter=6)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    variance = features.var(dim=0).sum() * (len(features) - 1)
    missing = (0, max(0, count - len(values)))  # a network may have fewer features than that
    return F.pad(scores * values * largest.sign(), missing)[:, :count], F.pad(values**2 / variance, missing)[:count]


def most_confident_mistakes(labels: Tensor, predicted: Tensor, confidence: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` wrong predictions with the highest confidence, the highest first."""
    wrong = (labels != predicted).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]


class Doubts(NamedTuple):
    """Images whose labels are doubtful, as indices, and their likely classes: (count,) each."""

    images: Tensor
    classes: Tensor


def likely_label_errors(probabilities: Tensor, labels: Tensor) -> Doubts:
    """The images whose label the network has good reason to doubt, the most doubtful first.

    Probabilities (N, classes) of images that it was not trained on. An image counts where another class is at least as
    probable as that class is, on average, for its own images (confident learning: Northcutt et al., 2021).
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    classes = probabilities.shape[1]
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    usual = torch.zeros(classes, dtype=own.dtype).index_add_(0, labels, own) / counts
    confident = probabilities >= usual
    guess = torch.where(confident, probabilities, -1.0).argmax(dim=1)
    doubtful = (confident.any(dim=1) & (guess != labels)).nonzero()[:, 0]
    margin = probabilities.gather(1, guess[:, None])[:, 0] - own
    doubtful = doubtful[margin[doubtful].argsort(descending=True, stable=True)]
    return Doubts(doubtful, guess[doubtful])
