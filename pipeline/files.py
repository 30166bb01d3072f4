"""The files that the stages hand to each other: their names, how they are written, how they are hashed."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import Fault, UserError

PREPARED = Path("data/prepared")
MODEL = Path("models/model.safetensors")
HISTORY = Path("reports/history.csv")
METRICS = Path("reports/metrics.json")
PREDICTIONS = Path("reports/predictions.csv")
PROMOTION = Path("reports/promotion.json")
FIGURES = Path("reports/figures")


def root() -> Path:
    """The repository's root. DVC names it in ``DVC_ROOT``, also where it runs a stage in a temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).parents[1]).resolve()


def raw_folder() -> Path:
    """Where downloads are kept: beside the repository's other data, so that temporary copies find them too."""
    return root() / "data" / "raw"


def read(path: Path, made_by: str) -> bytes:
    """The bytes of ``path``; a UserError that names the stage to run where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `dvc repro {made_by}` first") from None


def write(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write ``content`` as JSON: the same content gives the same bytes."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``rows`` as CSV under the names of their keys: the same rows give the same bytes."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue().encode())


def read_table(path: Path, made_by: str) -> list[dict[str, str]]:
    """The rows of a CSV file, at least one; errors name the stage to run."""
    rows = list(csv.DictReader(io.StringIO(read(path, made_by).decode(), newline="")))
    if not rows:
        raise Fault(f"{path} is empty: run `dvc repro -f {made_by}`")
    return rows


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content`` as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
