"""Ask a registered model, by default the champion, what is on pictures.

    python -m pipeline.predict FILE_OR_FOLDER... [--model MODEL] [--json]

A line for each picture: the file, its label, how probable it is, and the second guess where it is close. `-` is a
picture on standard input. One that cannot be read is a line on standard error, and does not stop the others.
"""

import argparse
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import image_files, sources
from pipeline.errors import UserError, printable, run_command
from pipeline.tracking import registry, runs
from pipeline.tracking.gate import CHAMPION
from pipeline.tracking.registry import Loaded

STDIN = "-"
CLOSE = 0.1  # probability from which on the second guess is told
AT_A_TIME = 250  # pictures


def main() -> None:
    """Load the model, then read, classify and print, some pictures at a time."""
    arguments = _arguments()
    runs.connect()
    loaded = registry.load(registry.find(arguments.model))
    show = _as_json if arguments.json else _as_line
    pictures_named = unread = 0
    paths = _paths(arguments.files)
    while some := list(itertools.islice(paths, AT_A_TIME)):
        images = []
        for path in some:
            pictures_named += 1
            try:
                images.append((path, _image(path, loaded)))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                unread += 1
        if images:
            answers = loaded.classify(np.stack([image for _, image in images]))
            for (path, _), probabilities in zip(images, answers, strict=True):
                print(show(path, dict(zip(loaded.class_names, probabilities.tolist(), strict=True))))
    if unread:
        raise UserError(f"{unread} of {pictures_named} pictures could not be read")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description="What is on these pictures, says a registered model."
    )
    parser.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="pictures, folders of them, or - for stdin")
    parser.add_argument("--model", default=CHAMPION, help="an alias, a version, NAME@alias or NAME/version")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, with all probabilities")
    return parser.parse_args()


def _paths(given: Iterable[str]) -> Iterator[str]:
    """The files that are named, and the pictures in the folders that are."""
    for name in given:
        if _is_folder(name):
            found = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in image_files.SUFFIXES)
            yield from map(str, found) if found else [name]
        else:
            yield name


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # a name that no file can have, or a place that is closed: said when it is read
        return False


def _image(path: str, loaded: Loaded) -> NDArray[np.uint8]:
    """A picture as the model takes it, (H, W, C)."""
    name = printable(path)
    picture = image_files.read(io.BytesIO(sys.stdin.buffer.read()) if path == STDIN else Path(path), name)
    dataset = sources.DATASETS.get(loaded.data_name)
    if dataset and dataset.centred_strokes:
        return image_files.centred_strokes(picture, loaded.image_shape, name).numpy()
    return image_files.fitted(picture, loaded.image_shape).numpy()


def _as_line(path: str, probabilities: Mapping[str, float]) -> str:
    (label, first), *others = sorted(probabilities.items(), key=lambda each: -each[1])
    doubt = "".join(f"  (or {printable(other)}, {second:.1%})" for other, second in others[:1] if second >= CLOSE)
    return f"{printable(path)}  {printable(label)}  {first:.1%}{doubt}"


def _as_json(path: str, probabilities: Mapping[str, float]) -> str:
    label = max(probabilities, key=lambda name: probabilities[name])
    content = {"file": path, "label": label, "probability": probabilities[label], "probabilities": probabilities}
    return json.dumps(content)


if __name__ == "__main__":
    run_command(main)
