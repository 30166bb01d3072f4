"""The arguments of each command. It imports nothing large, so that --help and a wrong argument are answered at once."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

FORMATS = ("onnx", "pt2")
STUDY = "convtrack"
MAX_STUDY_NAME = 100  # characters
MAX_FOLDS = 100
MODEL = "an alias, a version, NAME@alias or NAME/version (default: champion)"

DESCRIPTIONS = {
    "prepare": "Download and verify the images, split them, and write the splits to data/prepared.",
    "train": "Train the CNN of params.yaml; write models/model.safetensors and reports/history.csv.",
    "evaluate": "Score the model on the test images, write reports/metrics.json, and register the model.",
    "visualize": "Draw what the model learned and where it fails; write reports/figures and reports/plots.",
    "results": "Print the results of the last `dvc repro`.",
    "recover": "Repair DVC's own files after a process was killed while it wrote them; `make repro` runs it first.",
    "doctor": "Check this repository for problems, and say how to fix them. Exits 1 if something is wrong.",
    "verify": "Run the pipeline twice from scratch, and compare the outputs with each other and with dvc.lock.",
    "label_check": "Find training images whose label may be wrong, with networks that were trained without them.",
    "tune": "Search the parameters in tune.space for the best values.",
    "ui": "Show the tracking store in MLflow's pages, for this machine only.",
    "predict": "Classify pictures with a registered model.",
    "serve": "Serve a registered model over HTTP.",
    "export": "Write a registered model to a file that works without MLflow.",
    "models": "Show where a registered model comes from, list the champions, or roll back to an earlier one.",
}
# What is said at once, by commands that import for seconds before they can say anything.
FIRST_LINES = {
    "serve": "loading {model} ...",
    "ui": 'MLflow needs ten to twenty seconds until it says "running on http://127.0.0.1:{port}"',
}
WITHOUT_ARGUMENTS = "It takes no arguments. The values that it uses are in params.yaml."


def parse(command: str, arguments: Sequence[str] | None = None) -> Namespace:
    """The arguments of `python -m pipeline.<command>`, by default those of this process.

    Exits 0 after --help, and 2 with one line for arguments that the command does not take.
    """
    add_arguments = ARGUMENTS.get(command)
    parser = ArgumentParser(
        prog=f"python -m pipeline.{command}",
        description=DESCRIPTIONS[command],
        epilog=None if add_arguments else WITHOUT_ARGUMENTS,
    )
    if add_arguments:
        add_arguments(parser)
    parsed = parser.parse_args(arguments)
    if command == "tune" and parsed.force and not parsed.apply:
        parser.error("--force needs --apply")
    return parsed


def _tune(parser: ArgumentParser) -> None:
    parser.add_argument("--trials", type=_natural, help="total number of trials in the study (default: tune.trials)")
    parser.add_argument("--workers", type=_natural, help="number of trials in parallel (default: one per core)")
    parser.add_argument("--study", type=_name, default=STUDY, help="name of the study (default: %(default)s)")
    parser.add_argument("--apply", action="store_true", help="write the best values into params.yaml")
    parser.add_argument("--force", action="store_true", help="with --apply: even if the gain may be due to chance")


def _label_check(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--folds", type=_folds, default=5, help="number of networks, each trained without a part (default: %(default)s)"
    )


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="champion", help=MODEL)


def _add_port(parser: ArgumentParser, port: int) -> None:
    parser.add_argument("--port", type=_port, default=port, help="the port to listen at (default: %(default)s)")


def _ui(parser: ArgumentParser) -> None:
    _add_port(parser, 5000)


def _predict(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="pictures, folders of them, or - for stdin")
    _add_model(parser)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--csv", action="store_true", help="print a table with a row for each picture")
    table.add_argument("--json", action="store_true", help="print a JSON object a line, with all probabilities")


def _serve(parser: ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    _add_port(parser, 5002)


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("--format", required=True, choices=FORMATS, help="ONNX, or pt2 for torch.export.load")
    _add_model(parser)
    parser.add_argument("--out", type=Path, help="the file to write (default: NAME-VERSION.FORMAT)")


def _models(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=MODEL)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--history", action="store_true", help="list the champions, with dates (UTC) and reasons")
    action.add_argument("--rollback", action="store_true", help="make MODEL the champion (default: the previous one)")


ARGUMENTS: dict[str, Callable[[ArgumentParser], None]] = {
    "label_check": _label_check,
    "tune": _tune,
    "ui": _ui,
    "predict": _predict,
    "serve": _serve,
    "export": _export,
    "models": _models,
}


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _folds(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= MAX_FOLDS:
        raise ArgumentTypeError(f"{text} is not a number of folds; allowed: 2 to {MAX_FOLDS}")
    return int(text)


def _name(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= MAX_STUDY_NAME:
        raise ArgumentTypeError(f"a study's name has 1 to {MAX_STUDY_NAME} characters, all on one line")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ArgumentTypeError(f"{text} is not a port; allowed: 1 to 65535")
    return int(text)
