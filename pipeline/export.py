"""Write a registered model, by default the champion, to a file that works without MLflow.

python -m pipeline.export --format onnx|pt2 [--model MODEL] [--out FILE]
"""

from collections.abc import Callable
from pathlib import Path

from pipeline import command_line, files
from pipeline.errors import UserError, run_command
from pipeline.model import formats
from pipeline.model.cnn import CNN
from pipeline.tracking import registry, store

WRITERS: dict[str, Callable[[CNN], bytes]] = {"onnx": formats.as_onnx, "pt2": formats.as_pt2}


def main() -> None:
    """Read the model from the registry, and write it in the other format."""
    arguments = command_line.parse("export")
    store.connect()
    version = registry.find(arguments.model)
    loaded = registry.load(version)
    path = arguments.out or Path(f"{version.name}-{version.version}.{arguments.format}")
    if path.is_dir():
        raise UserError(f"--out is {path}, which is a folder; name a file")
    print(f"writing {version.name} version {version.version} as {arguments.format}", flush=True)
    try:
        content = WRITERS[arguments.format](loaded.cnn)
    except ImportError as error:
        raise UserError(
            f"{error}: the format {arguments.format} needs `pip install onnx onnxruntime onnxscript`"
        ) from error
    files.write(path, content)
    print(f"{version.name} version {version.version} -> {path}, {len(content):,} bytes")


if __name__ == "__main__":
    run_command(main)
