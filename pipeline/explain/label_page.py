"""Labels that may be wrong: a table of all images, and a page of the doubtful ones in one file without scripts."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from pipeline.explain.attribution import Doubts
from pipeline.figures import canvas
from pipeline.figures.tiles import Array

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1.5em; padding: 0 }
li { list-style: none; overflow-wrap: anywhere }
img { width: 150px; height: 150px; object-fit: contain; image-rendering: pixelated; background: #eee; display: block }
.path { color: #666; font-size: 12px }
"""


@dataclass(frozen=True)
class Row:
    """An image, and the probability of its label; ``suggested`` is the likely class where that is another one."""

    index: int
    path: str
    label: str
    probability: str
    suggested: str = ""
    suggested_probability: str = ""


def rows(
    probabilities: Tensor, labels: Tensor, doubts: Doubts, class_names: Sequence[str], paths: Sequence[str]
) -> list[Row]:
    """A row for each of N images, the doubtful first and the most doubtful at the top; the others in their order.

    Probabilities are (N, classes) and labels (N,).
    """
    guess_of = dict(zip(doubts.images.tolist(), doubts.classes.tolist(), strict=True))
    others = [index for index in range(len(labels)) if index not in guess_of]
    found = []
    for index in [*guess_of, *others]:
        label, guess = int(labels[index]), guess_of.get(index)
        suggestion = [] if guess is None else [class_names[guess], f"{probabilities[index, guess]:.6f}"]
        found.append(Row(index, paths[index], class_names[label], f"{probabilities[index, label]:.6f}", *suggestion))
    return found


def page(title: str, facts: Sequence[str], doubtful: Iterable[tuple[Row, Array]]) -> str:
    """HTML with a card for each of ``doubtful``, whose images are (H, W, C) in [0, 255]."""
    cards = "\n".join(_card(row, image) for row, image in doubtful)
    paragraphs = "\n".join(f"<p>{escape(fact)}</p>" for fact in facts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{paragraphs}\n<ol>\n{cards}\n</ol></body></html>\n"
    )


def _card(row: Row, image: Array) -> str:
    """The picture, its file, its label and the likely one. Names may be in any script, so each is isolated."""
    picture = base64.b64encode(canvas.image_as_png(image)).decode()
    return (
        f'<li><img alt="" src="data:image/png;base64,{picture}">'
        f"labelled <b><bdi>{escape(row.label)}</bdi></b> ({float(row.probability):.1%}), "
        f"perhaps <b><bdi>{escape(row.suggested)}</bdi></b> ({float(row.suggested_probability):.1%})"
        f'<div class="path"><bdi>{escape(row.path)}</bdi></div></li>'
    )
