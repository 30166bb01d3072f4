"""Checks that a figure is readable, as far as a program can tell."""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from pipeline.figures import canvas


def assert_readable(figure: Figure) -> None:
    """No text is cut off or overlaps another, and no panel is empty."""
    figure.set_dpi(canvas.DOTS_PER_INCH)
    figure.draw_without_rendering()  # lays it out
    # The box of slanted text is much larger than the text.
    boxes = {text: text.get_window_extent() for text in _texts(figure) if text.get_rotation() % 90 == 0}
    page = figure.bbox
    assert boxes
    assert [
        text.get_text()
        for text, box in boxes.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ] == [], "cut off"
    # The boxes have a margin of a pixel or two.
    assert [
        (one.get_text(), other.get_text())
        for (one, its), (other, others) in itertools.combinations(boxes.items(), 2)
        if min(its.x1, others.x1) - max(its.x0, others.x0) > 2 and min(its.y1, others.y1) - max(its.y0, others.y0) > 2
    ] == [], "overlapping"
    for axes in figure.axes:
        pictures: list[NDArray[np.floating]] = [
            np.ma.filled(np.ma.asarray(each.get_array()), 0) for each in axes.images
        ]
        assert not axes.axison or axes.has_data() or axes.get_label() == "<colorbar>", "an empty panel"
        assert not pictures or axes.texts or any(np.ptp(each) > 0 or each.size == 1 for each in pictures), (
            "an empty picture"
        )


def _texts(figure: Figure) -> list[Text]:
    """The text that is drawn: ticks outside of the axes have labels too, which are not."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (axes.axison and low <= tick.get_loc() <= high):
                    hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in texts if text.get_visible() and text.get_text().strip() and text not in hidden]
