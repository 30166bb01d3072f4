"""The CNN, written once: blocks of convolutions, ReLU and pooling, then a head, dropout and a dense layer.

Training, scoring, explanations, exports and the server all call ``CNN.forward``. A change to ``Block`` changes all of
them, the summary table and the receptive fields included: these are read off the layers.
"""

import copy
import functools
import itertools
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import check_class_names
from pipeline.model import cpu_ops
from pipeline.model.layers import (
    HEADS,
    Add,
    BatchNorm,
    Dropout,
    GlobalAverage,
    Head,
    Normalization,
    Pool,
    Pooling,
    as_float,
)

MAX_IMAGE_SIZE = 2**24  # H * W * C; those of 4096 x 4096 pixels in grey


@dataclass(frozen=True)
class Architecture:
    """Everything that determines the CNN's layers. ``image_shape`` is (H, W, C); one filter count per block.

    ``mean`` and ``std`` are those of the training pixels in [0, 1], one value per channel; empty unless ``normalize``.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    filters: tuple[int, ...]
    convolutions: int = 1
    kernel_size: int = 3
    stride: int = 1
    padding: int | Literal["same"] = 0
    batch_norm: bool = False
    residual: bool = False
    pool: Pool = "max"
    pool_size: int = 2
    head: Head = "flatten"
    dense: int | None = None
    dropout: float = 0.5
    normalize: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Residual(nn.Module):
    """Convolutions, plus their input through a shortcut (He et al., 2016).

    The shortcut is a 1 x 1 convolution where filter counts or sizes differ, else it has no layers.
    """

    def __init__(self, convolutions: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.convolutions, self.shortcut, self.add = convolutions, shortcut, Add()

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) floats in, (N, filters, H', W') out. Raises ValueError where the two sizes differ."""
        added: Tensor = self.add(cpu_ops.run(self.convolutions, inputs), cpu_ops.run(self.shortcut, inputs))
        return added


class Block(nn.Sequential):
    """Convolutions, each with batch normalisation if wanted and ReLU; pooling after the last.

    Before them the first block has the normalisation of the pixels, if wanted. With ``residual``, the block's input is
    added before the last ReLU.

    A CPU operation may compute several of these layers at once (see cpu_ops.run). It is used only where the layers are
    exactly the ones that it computes, so a layer that is added or replaced here takes effect everywhere.

    The explanations find two layers by name, which every block must have: ``activation``, before which they take the
    responses of the last convolution, and ``pooling``, before which they take the feature maps. What they draw of the
    convolutions they find by its type: see ``path``.
    """

    convolution: nn.Conv2d  # the last one, unless it is in a Residual
    activation: nn.Module
    pooling: Pooling

    def __init__(self, channels: int, filters: int, architecture: Architecture) -> None:
        a, layers = architecture, OrderedDict[str, nn.Module]()
        for number in range(1, a.convolutions + 1):
            is_first, is_last = number == 1, number == a.convolutions
            inputs, stride = (channels, a.stride) if is_first else (filters, 1)
            name = "" if is_last else f"_{number}"
            found = _convolution(a, inputs, filters, a.kernel_size, stride, _padding(a))
            layers.update({kind + name: layer for kind, layer in found.items()})
            if is_last and a.residual:
                layers = OrderedDict(residual=Residual(nn.Sequential(layers), _shortcut(a, channels, filters)))
            layers[f"activation{name}"] = nn.ReLU()
        layers["pooling"] = Pooling(a.pool, a.pool_size)
        if a.normalize:
            layers["pixel_normalisation"] = Normalization(a.mean, a.std)
            layers.move_to_end("pixel_normalisation", last=False)
        super().__init__(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) in, floats or bytes (255 stands for 1); (N, filters, H', W') out."""
        return cpu_ops.run(self, inputs)

    def before(self, name: str, inputs: Tensor) -> Tensor:
        """What reaches the layer ``name`` when the block is given ``inputs``: (N, filters, H, W).

        For "activation" these are the last convolution's responses, for "pooling" its feature maps.
        """
        names = list(self._modules)
        return cpu_ops.run(list(self)[: names.index(name)], inputs)

    def onwards(self, name: str, maps: Tensor) -> Tensor:
        """The block's output for ``maps`` that reach the layer ``name``: the rest of the pass after ``before``."""
        names = list(self._modules)
        return cpu_ops.run(list(self)[names.index(name) :], maps)

    def path(self) -> list[nn.Module]:
        """The layers in the order in which they run, without those of a shortcut and the sum after it."""
        residuals = [layer for layer in self if isinstance(layer, Residual)]
        aside = {layer for each in residuals for part in (each.shortcut, each.add) for layer in part.modules()}
        return [layer for layer in self.modules() if _is_layer(layer) and layer not in aside]

    def convolutions(self) -> list[nn.Conv2d]:
        """Those of ``path``."""
        return [layer for layer in self.path() if isinstance(layer, nn.Conv2d)]


def _convolution(
    a: Architecture, channels: int, filters: int, kernel_size: int, stride: int, padding: int
) -> dict[str, nn.Module]:
    """A convolution, and batch normalisation if wanted, by the names that they have in a block."""
    layers = dict[str, nn.Module]()
    layers["convolution"] = nn.Conv2d(channels, filters, kernel_size, stride, padding)
    if a.batch_norm:
        layers["normalisation"] = BatchNorm(filters)
    return layers


def _shortcut(a: Architecture, channels: int, filters: int) -> nn.Sequential:
    if (channels, a.stride) == (filters, 1):
        return nn.Sequential()
    return nn.Sequential(OrderedDict(_convolution(a, channels, filters, kernel_size=1, stride=a.stride, padding=0)))


def _padding(a: Architecture) -> int:
    """In pixels on each side. Raises ValueError where no whole number keeps the size."""
    if isinstance(a.padding, int):
        return a.padding
    if a.kernel_size % 2 == 0:
        raise ValueError(f"padding: same needs an odd kernel_size, and it is {a.kernel_size}")
    return a.kernel_size // 2


def _is_layer(module: nn.Module) -> bool:
    """Whether it computes something itself, and does not only contain other layers."""
    return not list(module.children()) and not isinstance(module, nn.Sequential)


class CNN(nn.Module):
    """The network. Weights are Glorot-uniform (Glorot and Bengio, 2010), biases zero, as in Keras."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None) -> None:
        """Build the layers of ``architecture`` with initial weights drawn from ``generator`` (on the CPU).

        Raises ValueError where the layers do not fit the images, these are too large, or classes have no good names.
        """
        super().__init__()
        channels, height, width = output_shape(architecture)
        self.architecture = architecture
        self.blocks = _blocks(architecture)
        self.to_features = HEADS[architecture.head]()
        features = self.to_features(torch.empty(1, channels, height, width, device="meta")).shape[1]
        self.hidden = nn.Sequential()
        if architecture.dense:
            self.hidden.extend([nn.Linear(features, architecture.dense), nn.ReLU()])
        self.dropout = Dropout(architecture.dropout)
        self.dense = nn.Linear(architecture.dense or features, len(architecture.class_names))
        self.seen = _seen_side(self.blocks, 0, architecture), _seen_side(self.blocks, 1, architecture)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def block_list(self) -> list[Block]:
        """The blocks in order. The type of an nn.Sequential says only that it holds modules."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (N, classes) of images (N, H, W, C) uint8, or of (N, C, H, W) floats in [0, 1].

        ``generator`` draws the dropout masks and is needed during training only. Under autocast the convolutions
        compute in bfloat16. Raises ValueError for images of another shape than the network's.
        """
        return self.head(self.maps(images), generator)

    def maps(self, images: Tensor) -> Tensor:
        """The last block's maps (N, filters, H, W) of images as ``forward`` takes them."""
        pixels = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
        height, width, channels = self.architecture.image_shape
        if pixels.shape[1:] != (channels, height, width):
            expected = " x ".join(map(str, self.architecture.image_shape))
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}; the network takes N x {expected} torch.uint8"
            )
        # If the sizes do not divide evenly, the last rows and columns cannot affect a logit: of a 28 x 28 image the
        # published network sees 26 x 26. They are not computed.
        maps: Tensor = self.blocks(pixels[:, :, : self.seen[0], : self.seen[1]])
        return maps

    def features(self, maps: Tensor) -> Tensor:
        """What the last block's maps (N, filters, H, W) become for dropout and the last dense layer: (N, D)."""
        found: Tensor = self.hidden(self.to_features(maps))
        return found

    def head(self, maps: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (N, classes) of the last block's maps (N, filters, H, W)."""
        features = self.features(maps)
        if cpu_ops.computes_dropout_dense(self.dropout, self.dense, features):
            return cpu_ops.dropout_dense(self.dropout, self.dense, features, generator)
        logits: Tensor = self.dense(self.dropout(features, generator))
        return logits


def _blocks(architecture: Architecture) -> nn.Sequential:
    a = architecture
    if a.normalize and not len(a.mean) == len(a.std) == a.image_shape[2]:
        raise ValueError(f"normalize needs a mean and a deviation for each of the {a.image_shape[2]} channels")
    of_maps = replace(a, normalize=False)  # the blocks after the first get no pixels
    channels = itertools.pairwise((a.image_shape[2], *a.filters))
    return nn.Sequential(*(Block(*pair, of_maps if number else a) for number, pair in enumerate(channels)))


@functools.cache
def output_shape(architecture: Architecture) -> tuple[int, int, int]:
    """(C, H, W) of the last block's maps, computed without any data. Raises ValueError as CNN does."""
    check_class_names(architecture.class_names)
    height, width, channels = architecture.image_shape
    if min(architecture.image_shape) < 1 or math.prod(architecture.image_shape) > MAX_IMAGE_SIZE:
        shape = " x ".join(map(str, architecture.image_shape))
        raise ValueError(f"the images are {shape}; allowed: at least 1 x 1 x 1, and at most {MAX_IMAGE_SIZE:,} values")
    with torch.device("meta"):
        maps = torch.empty(1, channels, height, width)
        for number, block in enumerate(_blocks(architecture).eval(), 1):
            shape = f"{maps.shape[2]} x {maps.shape[3]}"
            try:
                maps = block(maps)
            except RuntimeError as error:
                raise ValueError(f"block {number} does not fit the {shape} pixels that reach it ({error})") from error
            if 0 in maps.shape:
                raise ValueError(f"block {number} leaves nothing of the {shape} pixels that reach it")
    _, channels, height, width = maps.shape
    return channels, height, width


def _seen_side(blocks: nn.Sequential, axis: int, architecture: Architecture) -> int:
    """How many rows (axis 0) or columns (axis 1) of an image can change a logit.

    All of them if there is a layer that uses the right and bottom edge, such as a convolution with padding, or the
    whole image, such as batch normalisation.
    """
    side = output_shape(architecture)[1 + axis]
    for layer in reversed([layer for block in blocks for layer in block.children()]):
        match layer:
            case nn.ReLU() | Normalization():
                pass
            case Pooling():
                side *= layer.size
            case nn.Conv2d() if layer.padding == (0, 0) and layer.dilation == (1, 1):
                side = (side - 1) * layer.stride[axis] + layer.kernel_size[axis]
            case _:
                return architecture.image_shape[axis]
    return side


class Layer(NamedTuple):
    """One row of the summary table, for one image: its shapes are (H, W, C) or (features,)."""

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    input_shape: tuple[int, ...]


@functools.cache
def layers(architecture: Architecture) -> tuple[Layer, ...]:
    """The CNN's layers in the order in which they run, without activations, derived from the network itself.

    Raises ValueError where the layers do not fit the images.
    """
    with torch.device("meta"):  # shapes alone, no data
        cnn = CNN(architecture, None).eval()
        names, rows = layer_names(cnn), list[Layer]()

        def add_row(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before, after = _shape(inputs[0]), _shape(output)
            parameters = sum(parameter.numel() for parameter in layer.parameters())
            rows.append(Layer(names[layer], after, parameters, _multiply_adds(layer, output), before))

        for layer in names:
            layer.register_forward_hook(add_row)
        height, width, channels = architecture.image_shape
        cnn.head(cnn.blocks(torch.empty(1, channels, height, width)))
    return tuple(rows)


def _shape(values: Tensor) -> tuple[int, ...]:
    """(H, W, C) of maps (N, C, H, W), (features,) of (N, features)."""
    return tuple(values.permute(0, 2, 3, 1).shape[1:] if values.dim() == 4 else values.shape[1:])


def layer_names(cnn: CNN) -> dict[nn.Module, str]:
    """The name of each layer but the activations, as Keras gives them in its summaries: conv2d, conv2d_1 ..."""
    counts, names = Counter[str](), dict[nn.Module, str]()
    for layer in cnn.modules():
        if _is_layer(layer) and not isinstance(layer, nn.ReLU):
            kind = _kind(layer)
            names[layer] = f"{kind}_{counts[kind]}" if counts[kind] else kind
            counts[kind] += 1
    return names


def _kind(layer: nn.Module) -> str:
    match layer:
        case Pooling():
            return f"{layer.kind}_pooling2d"
        case nn.Conv2d():
            return "conv2d"
        case nn.BatchNorm2d():
            return "batch_norm"
        case GlobalAverage():
            return "global_average_pooling2d"
        case nn.Linear():
            return "dense"
    return type(layer).__name__.lower()


def _multiply_adds(layer: nn.Module, output: Tensor) -> int:
    """Multiply-adds for one image: every output value is a sum over the weights of one filter or neuron."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return output.numel() * layer.weight[0].numel()
    return 0


def summary(architecture: Architecture) -> str:
    """The table of layers, output shapes and parameter counts."""
    rows = [("Layer", "Output shape", "Param #")]
    for layer in layers(architecture):
        rows.append((layer.name, f"({', '.join(map(str, layer.output_shape))})", f"{layer.parameters:,}"))
    rows.append(("total", "", f"{parameter_count(architecture):,}"))
    width = max(18, *(len(name) + 2 for name, *_ in rows))
    return "\n".join(f"{name:<{width}}{shape:<20}{parameters:>10}" for name, shape, parameters in rows)


def parameter_count(architecture: Architecture) -> int:
    """The number of trainable parameters."""
    return sum(layer.parameters for layer in layers(architecture))


def multiply_adds(architecture: Architecture) -> int:
    """The multiply-adds of the convolutions and the dense layers for one image."""
    return sum(layer.multiply_adds for layer in layers(architecture))


def as_input(images: Tensor) -> Tensor:
    """Images (N, H, W, C) uint8 as (N, C, H, W) float32 in [0, 1], which have gradients."""
    return as_float(images.permute(0, 3, 1, 2))


MAX_IMAGES = 1000


class Classifier(nn.Module):
    """The CNN as others use it: images (N, H, W, C) uint8 in, class probabilities (N, classes) out."""

    def __init__(self, cnn: CNN) -> None:
        super().__init__()
        # torch.export stores weights in the plain memory format only; channels_last pays off in training alone.
        self.cnn = copy.deepcopy(cnn).cpu().eval().to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities, each row adding up to 1; a RuntimeError for more than MAX_IMAGES."""
        # The exported graph keeps this check: a server's memory must not depend on who asks.
        torch._check(images.shape[0] <= MAX_IMAGES, lambda: f"at most {MAX_IMAGES:,} images at a time")
        logits: Tensor = self.cnn(images)
        return logits.softmax(dim=1)
