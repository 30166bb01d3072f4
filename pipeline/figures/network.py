"""What the CNN looks for and where it finds it: filters, maps, patches, images that excite it, explanations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.errors import counted
from pipeline.figures import canvas
from pipeline.figures.tiles import Array, filter_tiles, mosaic


def filters(weights: Array, use: Array) -> Figure:
    """First-layer filters (filters, C, H, W), red for weights above 0, blue for weights below, one scale for all.

    Those with the largest ``use`` (filters,) come first. The channels of a filter are drawn side by side.
    """
    order = np.argsort(-use, kind="stable")
    tiles = filter_tiles(weights)
    columns = max(1, 8 // weights.shape[1])
    rows = math.ceil(len(tiles) / columns)
    limit = float(np.abs(weights).max()) or 1.0
    figure = canvas.of_height(0.9 + rows * canvas.WIDTH * 0.9 / columns / weights.shape[1])
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        canvas.bare(axes)
        if place < len(tiles):
            index = order[place]
            picture = axes.imshow(tiles[index], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_title(str(index), fontsize=8, pad=2)
        else:
            axes.set_axis_off()
    figure.suptitle(
        f"The {counted(len(tiles), 'filter')} of the first convolution ({canvas.sides(weights)} pixels), "
        "most used first"
    )
    figure.colorbar(picture, ax=grid, shrink=0.6, label="weight")
    return figure


def feature_maps(image: Array, maps: Mapping[str, Array], title: str) -> Figure:
    """One image (H, W, C) in [0, 255] with each layer's maps (filters, H, W), on one scale per layer."""
    mosaics = {layer: mosaic(each, columns=min(16, len(each))) for layer, each in maps.items()}
    heights = [1.5]
    for layer, whole in mosaics.items():
        full_width = canvas.WIDTH * 0.86 * whole.shape[0] / whole.shape[1]
        heights.append(0.25 + min(full_width, 1.2 * math.ceil(len(maps[layer]) / 16)))
    figure = canvas.of_height(sum(heights) + 0.6)
    grid = figure.subplots(len(heights), 1, height_ratios=heights)
    canvas.show_image(grid[0], image)
    grid[0].set_title(f"input {image.shape[0]} x {image.shape[1]}", fontsize=9)
    for axes, (layer, whole) in zip(grid[1:], mosaics.items(), strict=True):
        canvas.bare(axes)
        axes.imshow(whole, cmap="viridis", vmin=0, interpolation="nearest")
        canvas.mark_zero(axes, whole, "white")
        axes.set_title(f"{layer}: {counted(len(maps[layer]), 'map')} of {canvas.sides(maps[layer])}", fontsize=9)
    figure.suptitle(f"{canvas.literal(title)}\nbrighter: a stronger response; one scale per layer", fontsize=11)
    return figure


def maps_of_classes(
    images: Array, class_names: Sequence[str], maps: Mapping[str, Array], chosen: int, which: str = "each class"
) -> Figure:
    """One row per image (N, H, W, C) in [0, 255], one image per class, with some maps of each layer beside it.

    ``maps`` are (N, filters, H, W) for each layer's name, drawn on one scale per layer. A layer shows the ``chosen``
    filters with the strongest response to all these images, or fewer where there are many layers. Of more than eight
    layers eight are shown, evenly spaced from the first to the last.
    """
    layers = _spread(maps, 8)
    chosen = min(chosen, 16 // len(layers))
    count, tile = len(images), canvas.WIDTH * 0.86 / (1 + chosen * len(layers))
    figure = canvas.of_height(1.1 + count * (min(tile, 1.0) + 0.12))
    grid = figure.subplots(count, 1 + len(layers), squeeze=False, width_ratios=[1, *[chosen * 1.02] * len(layers)])
    for row, (image, name) in enumerate(zip(images, class_names, strict=True)):
        canvas.show_image(grid[row][0], image)
        canvas.label_row(grid[row][0], canvas.shortened(name, 24))
    for column, layer in enumerate(layers, 1):
        whole = maps[layer]
        strongest = np.argsort(-whole.mean(axis=(0, 2, 3)), kind="stable")[:chosen]
        limit = float(whole[:, strongest].max()) or 1.0
        for row in range(count):
            axes = grid[row][column]
            canvas.bare(axes)
            axes.set_frame_on(False)
            axes.imshow(
                mosaic(whole[row, strongest], columns=chosen),
                cmap="viridis",
                vmin=0,
                vmax=limit,
                interpolation="nearest",
            )
        label = f"{layer}\n{canvas.sides(whole)}\nfilters {', '.join(map(str, strongest))}"
        grid[0][column].set_title(label, fontsize=8 if chosen > 2 else 6.5)
    figure.suptitle(f"One image of {which}, and the strongest maps of each layer", fontsize=11)
    return figure


def _spread(names: Iterable[str], most: int) -> list[str]:
    """All of these, or ``most`` of them, evenly spaced from the first to the last."""
    known = list(names)
    return [known[index] for index in np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int)]


def strongest_patches(patches: Array, strongest: Array, layer: str) -> Figure:
    """For each filter the patches (filters, count, H, W, C) in [0, 255] that excite it most, in a square.

    ``strongest`` (filters,) is the highest response of each before ReLU; one of 0 or less is marked.
    """
    across = math.ceil(math.sqrt(patches.shape[1]))
    filters, count = counted(len(patches), "filter"), counted(patches.shape[1], "patch", "es")
    return _filter_grid(
        [np.nan_to_num(mosaic(each, columns=across), nan=0.5) for each in patches / 255],
        (strongest > 0).tolist(),
        f"What excites each of the {filters} of {layer} most:\n"
        f"{count} of {patches.shape[2]} x {patches.shape[3]} pixels from the test images",
    )


def filter_images(images: Array, sums: Array, layer: str) -> Figure:
    """For each filter the image (filters, H, W, C) in [0, 1] that was made to raise the sum of its map.

    ``sums`` (filters,) are the sums that were reached, before ReLU; a filter with 0 or less is marked.
    """
    filters = counted(len(images), "filter")
    return _filter_grid(list(images), (sums > 0).tolist(), f"Images made to excite each of the {filters} of {layer}")


def _filter_grid(tiles: Sequence[Array], excited: Sequence[bool], title: str) -> Figure:
    """One tile (H, W, C) in [0, 1] per filter with its number, in brackets where it is not ``excited``."""
    columns = min(8, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    side = min(canvas.WIDTH * 0.72 / columns, 1.2)
    figure = canvas.of_height(0.8 + rows * (side + 0.15))
    grey = colormaps["gray"].resampled(64)  # the difference can hardly be seen, and the file is a fifth smaller
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if index >= len(tiles):
            axes.set_axis_off()
            continue
        canvas.bare(axes)
        tile = tiles[index]
        axes.imshow(tile[:, :, 0] if tile.shape[2] == 1 else tile, cmap=grey, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{index}" if excited[index] else f"({index})", fontsize=8, pad=2)
    silent = "" if all(excited) else "\nin brackets: filters that even these do not excite"
    figure.suptitle(title + silent, fontsize=11)
    return figure


def class_images(
    images: Mapping[str, Array], probabilities: Mapping[str, Array], class_names: Sequence[str], nearest: Sequence[str]
) -> Figure:
    """One row per kind of regularization, one column per class: images (classes, H, W, C) in [0, 1].

    Below each image is the probability of its class, and in the last row the class of the ``nearest`` real image.
    """
    classes, rows = len(class_names), len(images)
    side = min(canvas.WIDTH * 0.86 / classes, 1.5)
    figure = canvas.of_height(0.9 + rows * (side + 0.3))
    grid = figure.subplots(rows, classes, squeeze=False)
    for row, (regularization, whole) in enumerate(images.items()):
        for column, image in enumerate(whole):
            axes = grid[row][column]
            canvas.show_image(axes, image * 255)
            lines = [f"{probabilities[regularization][column]:.3f}"]
            if row == rows - 1:
                lines.append(canvas.wrapped(f"like {canvas.shortened(nearest[column], 11)}", 11))
            axes.set_xlabel("\n".join(lines), fontsize=8, labelpad=2)
        canvas.label_row(grid[row][0], regularization)
    for column, name in enumerate(class_names):
        grid[0][column].set_title(canvas.literal(canvas.shortened(name, 11)), fontsize=9 if classes <= 8 else 8, pad=3)
    figure.suptitle(
        "Images made to raise the logit of one class each; below, the probability of that class", fontsize=11
    )
    return figure


class Heatmap(NamedTuple):
    """The evidence for a class in each pixel, (N, H, W); ``signed`` if values below 0 are evidence against it."""

    values: Array
    signed: bool


def explanations(images: Array, titles: Sequence[str], heatmaps: Mapping[str, Heatmap], title: str) -> Figure:
    """One column per image (N, H, W, C) in [0, 255], one row per method, each heatmap on its own scale.

    Signed ones are drawn in red and blue around white, the others from black to yellow.
    """
    count, side = len(images), min(canvas.WIDTH * 0.84 / len(images), 1.2)
    figure = canvas.of_height(0.9 + (1 + len(heatmaps)) * (side + 0.06))
    grid = figure.subplots(1 + len(heatmaps), count, squeeze=False)
    for column, (image, line) in enumerate(zip(images, titles, strict=True)):
        canvas.show_image(grid[0][column], image)
        grid[0][column].set_title(canvas.wrapped(line, 13), fontsize=8, pad=3)
    canvas.label_row(grid[0][0], "image")
    for row, (method, heatmap) in enumerate(heatmaps.items(), 1):
        canvas.label_row(grid[row][0], method)
        for column in range(count):
            axes = grid[row][column]
            canvas.bare(axes)
            limit = float(np.abs(heatmap.values[column]).max()) or 1.0
            colours, low = ("RdBu_r", -limit) if heatmap.signed else ("inferno", 0.0)
            axes.imshow(heatmap.values[column], cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
            canvas.mark_zero(axes, heatmap.values[column], "black" if heatmap.signed else "white")
    figure.suptitle(f"{title}\neach picture on its own scale", fontsize=11)
    return figure


def equivariance(images: Array, maps: Array, titles: Sequence[str], title: str) -> Figure:
    """Images (N, H, W, C) in [0, 255], and below each the map (N, H', W') of one filter, all on one scale."""
    figure = canvas.of_height(0.9 + 2 * canvas.WIDTH * 0.92 / len(images))
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, (image, each, line) in enumerate(zip(images, maps, titles, strict=True)):
        canvas.show_image(grid[0][column], image)
        grid[0][column].set_title(canvas.literal(line), fontsize=9, pad=3)
        canvas.bare(grid[1][column])
        grid[1][column].imshow(each, cmap="viridis", vmin=0, vmax=float(maps.max()) or 1.0, interpolation="nearest")
        canvas.mark_zero(grid[1][column], each, "white")
    figure.suptitle(title, fontsize=11)
    return figure


def shift_similarity(similarity: Mapping[str, Sequence[float]]) -> Figure:
    """How similar each layer's maps stay when the image shifts by 0, 1 ... pixels; a panel for each pair of layers.

    A pair is a convolution and the pooling after it.
    """
    pairs = list(similarity.items())
    blocks = [pairs[index : index + 2] for index in range(0, len(pairs), 2)]
    figure = canvas.of_height(3.4)
    for axes, block in zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks, strict=True):
        for (layer, values), colour, marker in zip(block, (canvas.ORANGE, canvas.BLUE), "so", strict=True):
            axes.plot(range(len(values)), values, f"{marker}-", color=colour, markersize=4, label=layer)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9 if len(blocks) < 4 else 7)
    figure.axes[0].set_ylabel("cosine to the unshifted maps")
    figure.supxlabel("shift to the right (pixels)", fontsize=10)
    figure.suptitle("How similar each layer's maps stay when the image shifts", fontsize=11)
    return figure


def parameter_sharing(parameters: Mapping[str, tuple[int, int]]) -> Figure:
    """For each convolution: its parameters, and those of a dense layer with the same inputs and outputs, as bars.

    Of more than twelve convolutions twelve are shown, evenly spaced from the first to the last.
    """
    names = _spread(parameters, 12)
    figure = canvas.of_height(1.2 + 0.75 * len(names))
    axes = figure.subplots()
    for position, name in enumerate(names):
        pairs = zip(parameters[name], (canvas.BLUE, canvas.ORANGE), ("convolution", "dense layer"), strict=True)
        for offset, (count, colour, kind) in zip((-0.2, 0.2), pairs, strict=True):
            axes.barh(position + offset, count, height=0.38, color=colour, label=kind if position == 0 else None)
            axes.text(count * 1.15, position + offset, f"{count:,}", va="center", fontsize=9)
    axes.set(xscale="log", xlabel="parameters", yticks=range(len(names)), yticklabels=names)
    axes.set_xlim(right=max(max(pair) for pair in parameters.values()) * 30)
    axes.invert_yaxis()
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    which = "each convolution" if len(names) == len(parameters) else f"{len(names)} of {len(parameters)} convolutions"
    axes.set_title(f"Parameters of {which}, and of a dense layer that could do the same", fontsize=11)
    return figure
