"""Classify pictures with a registered model, by default the champion.

    python -m pipeline.predict FILE_OR_FOLDER... [--model MODEL] [--csv | --json]

Prints a line for each picture: the file, its label, the probability, the second guess if it is close, and whether it
does not look like the images that the model was trained on; with --csv as a table. `-` reads a picture from standard
input. A picture that cannot be read gives a line on standard error and does not stop the others.
"""

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import command_line
from pipeline.data import decoder, image_files
from pipeline.data.decoder import Decoders, Request
from pipeline.errors import UserError, counted, printable, run_command
from pipeline.tracking import registry, store
from pipeline.tracking.registry import Loaded

STDIN = "-"
MAX_STDIN = 200_000_000  # bytes, which are held in memory beside the pixels
CLOSE = 0.1  # the probability from which the second guess is shown
BATCH_SIZE = 250  # pictures
COLUMNS = ("file", "label", "probability", "second_label", "second_probability", "unlike_training")  # of --csv


def main() -> None:
    """Load the model, then read, classify and print, some pictures at a time."""
    arguments = command_line.parse("predict")
    store.connect()
    loaded = registry.load(registry.find(arguments.model))
    show = _table() if arguments.csv else _print_json if arguments.json else _print_line
    count = unread = 0
    paths = _paths(arguments.files)
    with Decoders() as decoders:
        while batch := list(itertools.islice(paths, BATCH_SIZE)):
            images = list(_readable(batch, loaded, decoders))
            count, unread = count + len(batch), unread + len(batch) - len(images)
            if images:
                answers = loaded.classify(np.stack([image for _, image in images]))
                for (path, _), probabilities, unlike in zip(images, *answers, strict=True):
                    show(path, dict(zip(loaded.class_names, probabilities.tolist(), strict=True)), unlike)
    if unread:
        raise UserError(f"{unread:,} of {counted(count, 'picture')} could not be read")


def _paths(given: Iterable[str]) -> Iterator[str]:
    """The files that are given, and the pictures in the folders that are given."""
    for name in given:
        if _is_folder(name):
            found = image_files.pictures(Path(name))
            yield from map(str, found) if found else [name]
        else:
            yield name


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # an impossible or forbidden path: reading it says why
        return False


def _readable(paths: Sequence[str], loaded: Loaded, decoders: Decoders) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The paths of the pictures that can be read, and their images (H, W, C); for the others an error is printed."""
    requests, known = list[Request](), list[str]()
    for path in paths:
        try:
            # Standard input is read here: a thread that waits for it could not be interrupted.
            source = _from_stdin() if path == STDIN else path
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            requests.append(Request(printable(path), source, (loaded.preprocessing,)))
            known.append(path)
    for path, answer in zip(known, decoders.ask(decoder.image, requests), strict=True):
        if isinstance(answer, UserError):
            print(f"error: {answer}", file=sys.stderr)
        else:
            yield path, np.frombuffer(answer, np.uint8).reshape(loaded.image_shape)


def _from_stdin() -> memoryview:
    content = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise UserError(f"standard input has more than {MAX_STDIN:,} bytes; name the file instead")
    return memoryview(content)


def _print_line(path: str, probabilities: Mapping[str, float], unlike_training: bool | None) -> None:
    print(_as_line(path, probabilities, unlike_training))


def _as_line(path: str, probabilities: Mapping[str, float], unlike_training: bool | None) -> str:
    (label, first), *others = _best_two(probabilities)
    doubt = "".join(f"  (or {printable(other)}, {second:.1%})" for other, second in others if second >= CLOSE)
    warning = "  does not look like the training images" if unlike_training else ""
    return f"{printable(path)}  {printable(label)}  {first:.1%}{doubt}{warning}"


def _best_two(probabilities: Mapping[str, float]) -> list[tuple[str, float]]:
    """The label and the second guess, if there is more than one class, with their probabilities."""
    return sorted(probabilities.items(), key=lambda each: -each[1])[:2]


def _print_json(path: str, probabilities: Mapping[str, float], unlike_training: bool | None) -> None:
    print(json.dumps(registry.described(path, probabilities, unlike_training)))


def _table() -> Callable[[str, Mapping[str, float], bool | None], None]:
    """Prints the heads of the columns; what it returns prints a row. What is not known is left empty."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS)

    def row(path: str, probabilities: Mapping[str, float], unlike_training: bool | None) -> None:
        name = path.encode(errors="backslashreplace").decode()  # one that is not UTF-8 would make the table unreadable
        (label, first), *others = _best_two(probabilities)
        second = others[0] if others else ("", None)
        table.writerow([name, label, first, *second, unlike_training])

    return row


if __name__ == "__main__":
    run_command(main)
