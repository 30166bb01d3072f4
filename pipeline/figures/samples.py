"""Images in rows, each with a label: what was done to them."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from pipeline.figures import canvas
from pipeline.figures.tiles import Array

MAX_HEIGHT = 16  # inches, of all images


def rows_of_images(rows: Sequence[tuple[str, Array]], title: str) -> Figure:
    """One row per label, of as many images (N, H, W, C) in [0, 255] in each; all have the same shape."""
    count, height, width, _ = rows[0][1].shape
    of_row = min(canvas.WIDTH * 0.84 / count * height / width, 1.2, MAX_HEIGHT / len(rows))
    figure = canvas.of_height(0.6 + len(rows) * (of_row + 0.05))
    for (label, images), line in zip(rows, figure.subplots(len(rows), count, squeeze=False), strict=True):
        for axes, image in zip(line, images, strict=True):
            canvas.show_image(axes, image)
        canvas.label_row(line[0], label)
    figure.suptitle(title, fontsize=11)
    return figure
