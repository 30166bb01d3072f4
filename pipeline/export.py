"""Write a registered model, by default the champion, into a file that needs no MLflow.

python -m pipeline.export --format onnx|pt2 [--model MODEL] [--out FILE]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.export import ExportedProgram

from pipeline import files
from pipeline.errors import UserError, run_command
from pipeline.network import formats
from pipeline.tracking import registry, runs
from pipeline.tracking.gate import CHAMPION

WRITERS: dict[str, Callable[[ExportedProgram, Sequence[str]], bytes]] = {
    "onnx": formats.as_onnx,
    "pt2": formats.as_pt2,
}


def main() -> None:
    """Read the model from the registry, and write it in the other format."""
    arguments = _arguments()
    runs.connect()
    version = registry.find(arguments.model)
    loaded = registry.load(version)
    path = arguments.out or Path(f"{version.name}-{version.version}.{arguments.format}")
    try:
        content = WRITERS[arguments.format](loaded.model.program, loaded.class_names)
    except ImportError as error:
        raise UserError(f"{error}: the format {arguments.format} needs `pip install onnx onnxscript`") from error
    files.write(path, content)
    print(f"{version.name} version {version.version} -> {path}, {len(content):,} bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export", description="A registered model as a file that needs no MLflow."
    )
    parser.add_argument("--format", required=True, choices=WRITERS)
    parser.add_argument("--model", default=CHAMPION, help="an alias, a version, NAME@alias or NAME/version")
    parser.add_argument("--out", type=Path, help="the file to write (default: NAME-VERSION.FORMAT)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
