"""What the CNN looks for and where it finds it: filters, maps, patches, images made to please it, explanations."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.figures import canvas
from pipeline.figures.tiles import Array, mosaic, of_filters


def filters(weights: Array, use: Array) -> Figure:
    """First-layer filters (filters, C, H, W), red for weights above 0, blue for weights below, one scale for all.

    Those with the largest ``use`` (filters,) come first. A filter of more than one channel is drawn as one tile a
    channel, side by side.
    """
    order = np.argsort(-use, kind="stable")
    tiles = of_filters(weights)
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
        f"The {canvas.counted(len(tiles), 'filter')} of the first convolution ({canvas.sides(weights)} pixels), "
        "most used first"
    )
    figure.colorbar(picture, ax=grid, shrink=0.6, label="weight")
    return figure


def feature_maps(image: Array, maps: Mapping[str, Array], title: str) -> Figure:
    """One image (H, W, C) in [0, 255] and, for each layer's name, its maps (filters, H, W) on one scale a layer."""
    mosaics = {layer: mosaic(each, columns=min(16, len(each))) for layer, each in maps.items()}
    heights = [1.5]
    for layer, whole in mosaics.items():
        as_wide = canvas.WIDTH * 0.86 * whole.shape[0] / whole.shape[1]
        heights.append(0.25 + min(as_wide, 1.2 * math.ceil(len(maps[layer]) / 16)))
    figure = canvas.of_height(sum(heights) + 0.6)
    grid = figure.subplots(len(heights), 1, height_ratios=heights)
    canvas.show_image(grid[0], image)
    grid[0].set_title(f"input {image.shape[0]} x {image.shape[1]}", fontsize=9)
    for axes, (layer, whole) in zip(grid[1:], mosaics.items(), strict=True):
        canvas.bare(axes)
        axes.imshow(whole, cmap="viridis", vmin=0, interpolation="nearest")
        canvas.say_zero(axes, whole, "white")
        axes.set_title(f"{layer}: {canvas.counted(len(maps[layer]), 'map')} of {canvas.sides(maps[layer])}", fontsize=9)
    figure.suptitle(f"{title}\nthe brighter, the stronger the response; one scale a layer", fontsize=11)
    return figure


def maps_of_classes(images: Array, class_names: Sequence[str], maps: Mapping[str, Array], chosen: int) -> Figure:
    """A row an image (N, H, W, C) in [0, 255], one of each class: some maps of each layer beside it.

    ``maps`` are (N, filters, H, W) for each layer's name. Of each layer the filters are shown that answer most over
    all these images, ``chosen`` or, where there are many layers, as many as have room; on one scale a layer. More
    than eight layers have no room: eight of them are shown, from the first to the last.
    """
    layers = [list(maps)[index] for index in np.linspace(0, len(maps) - 1, min(8, len(maps))).round().astype(int)]
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
            together = mosaic(whole[row, strongest], columns=chosen)
            axes.imshow(together, cmap="viridis", vmin=0, vmax=limit, interpolation="nearest")
        words = f"{layer}\n{canvas.sides(whole)}\nfilters {_numbers(strongest)}"
        grid[0][column].set_title(words, fontsize=8 if chosen > 2 else 6.5)
    figure.suptitle("One image of each class, and the strongest maps of each layer", fontsize=11)
    return figure


def _numbers(found: Array) -> str:
    return ", ".join(str(number) for number in found)


def strongest_patches(patches: Array, strongest: Array, layer: str) -> Figure:
    """For each filter the patches (filters, count, H, W, C) in [0, 255] that excite it most, in a square.

    ``strongest`` (filters,) is each one's highest answer before ReLU; 0 or less is none.
    """
    across = math.ceil(math.sqrt(patches.shape[1]))
    filters, count = canvas.counted(len(patches), "filter"), canvas.counted(patches.shape[1], "patch", "es")
    return _of_filters(
        [np.nan_to_num(mosaic(each, columns=across), nan=0.5) for each in patches / 255],
        (strongest > 0).tolist(),
        f"What excites each of the {filters} of {layer} most:\n"
        f"{count} of {patches.shape[2]} x {patches.shape[3]} pixels of the test images",
    )


def filter_images(images: Array, sums: Array, layer: str) -> Figure:
    """For each filter the image (filters, H, W, C) in [0, 1] that was made to raise the sum of its map.

    ``sums`` (filters,) are what came of it, before ReLU; 0 or less is that of a filter which no image could please.
    """
    filters = canvas.counted(len(images), "filter")
    return _of_filters(list(images), (sums > 0).tolist(), f"Images made to excite each of the {filters} of {layer}")


def _of_filters(tiles: Sequence[Array], excited: Sequence[bool], title: str) -> Figure:
    """A tile (H, W, C) in [0, 1] a filter with its number, in brackets where it is not ``excited``."""
    columns = min(8, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    side = min(canvas.WIDTH * 0.72 / columns, 1.2)
    figure = canvas.of_height(0.8 + rows * (side + 0.15))
    grey = colormaps["gray"].resampled(64)  # shades that hardly anybody tells apart; a fifth less in the file
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
    """A row for each wish, a column a class: images (classes, H, W, C) in [0, 1], the class's probability under each.

    ``nearest`` is the class of the real image that is most like the last row's.
    """
    classes, rows = len(class_names), len(images)
    side = min(canvas.WIDTH * 0.86 / classes, 1.5)
    figure = canvas.of_height(0.9 + rows * (side + 0.3))
    grid = figure.subplots(rows, classes, squeeze=False)
    for row, (wish, whole) in enumerate(images.items()):
        for column, image in enumerate(whole):
            axes = grid[row][column]
            canvas.show_image(axes, image * 255)
            lines = [f"{probabilities[wish][column]:.3f}"]
            if row == rows - 1:
                lines += textwrap.wrap(f"like {canvas.shortened(nearest[column], 11)}", 11)
            axes.set_xlabel("\n".join(lines), fontsize=8, labelpad=2)
        canvas.label_row(grid[row][0], wish)
    for column, name in enumerate(class_names):
        grid[0][column].set_title(canvas.shortened(name, 11), fontsize=9 if classes <= 8 else 8, pad=3)
    figure.suptitle("Images made to raise one class each; below, how probable it then is", fontsize=11)
    return figure


class Heat(NamedTuple):
    """What a method says of images, (N, H, W); ``signed`` if what is below 0 speaks against the class."""

    values: Array
    signed: bool


def explanations(images: Array, titles: Sequence[str], heats: Mapping[str, Heat], title: str) -> Figure:
    """A column an image (N, H, W, C) in [0, 255], a row a method, each heat on a scale of its own.

    Signed ones are drawn in red and blue around white, the others from black to yellow.
    """
    count, side = len(images), min(canvas.WIDTH * 0.84 / len(images), 1.2)
    figure = canvas.of_height(0.9 + (1 + len(heats)) * (side + 0.06))
    grid = figure.subplots(1 + len(heats), count, squeeze=False)
    for column, (image, line) in enumerate(zip(images, titles, strict=True)):
        canvas.show_image(grid[0][column], image)
        grid[0][column].set_title(textwrap.fill(line, 13), fontsize=8, pad=3)
    canvas.label_row(grid[0][0], "image")
    for row, (method, heat) in enumerate(heats.items(), 1):
        canvas.label_row(grid[row][0], method)
        for column in range(count):
            axes = grid[row][column]
            canvas.bare(axes)
            limit = float(np.abs(heat.values[column]).max()) or 1.0
            colours, low = ("RdBu_r", -limit) if heat.signed else ("inferno", 0.0)
            axes.imshow(heat.values[column], cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
            canvas.say_zero(axes, heat.values[column], "black" if heat.signed else "white")
    figure.suptitle(f"{title}\neach picture on a scale of its own", fontsize=11)
    return figure


def equivariance(images: Array, maps: Array, titles: Sequence[str], title: str) -> Figure:
    """Images (N, H, W, C) in [0, 255] above one filter's maps (N, H', W') of them, on one scale."""
    figure = canvas.of_height(0.9 + 2 * canvas.WIDTH * 0.92 / len(images))
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, (image, each, line) in enumerate(zip(images, maps, titles, strict=True)):
        canvas.show_image(grid[0][column], image)
        grid[0][column].set_title(line, fontsize=9, pad=3)
        canvas.bare(grid[1][column])
        grid[1][column].imshow(each, cmap="viridis", vmin=0, vmax=float(maps.max()) or 1.0, interpolation="nearest")
        canvas.say_zero(grid[1][column], each, "white")
    figure.suptitle(title, fontsize=11)
    return figure


def shifts(alike: Mapping[str, Sequence[float]]) -> Figure:
    """How alike the maps of each layer stay when the image moves by 0, 1 ... pixels; a convolution, then pooling."""
    pairs = list(alike.items())
    blocks = [pairs[index : index + 2] for index in range(0, len(pairs), 2)]
    figure = canvas.of_height(3.4)
    for axes, block in zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks, strict=True):
        for (layer, values), colour, marker in zip(block, (canvas.ORANGE, canvas.BLUE), "so", strict=True):
            axes.plot(range(len(values)), values, f"{marker}-", color=colour, markersize=4, label=layer)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9 if len(blocks) < 4 else 7)
    figure.axes[0].set_ylabel("cosine with the maps before")
    figure.supxlabel("pixels by which the image moves to the right", fontsize=10)
    figure.suptitle("How alike each layer's maps stay when the image moves", fontsize=11)
    return figure


def parameter_sharing(parameters: Mapping[str, tuple[int, int]]) -> Figure:
    """For each convolution: its parameters, and those of a dense layer with the same inputs and outputs, as bars."""
    figure = canvas.of_height(1.2 + 0.75 * len(parameters))
    axes = figure.subplots()
    names = list(parameters)
    for place, name in enumerate(names):
        pairs = zip(parameters[name], (canvas.BLUE, canvas.ORANGE), ("convolution", "dense layer"), strict=True)
        for shift, (count, colour, kind) in zip((-0.2, 0.2), pairs, strict=True):
            axes.barh(place + shift, count, height=0.38, color=colour, label=kind if place == 0 else None)
            axes.text(count * 1.15, place + shift, f"{count:,}", va="center", fontsize=9)
    axes.set(xscale="log", xlabel="parameters", yticks=range(len(names)), yticklabels=names)
    axes.set_xlim(right=max(max(pair) for pair in parameters.values()) * 30)
    axes.invert_yaxis()
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set_title("Parameters of each convolution, and of a dense layer that could do the same", fontsize=11)
    return figure
