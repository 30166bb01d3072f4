"""Reads DVC's own files: from dvc.yaml the code that a stage depends on, from dvc.lock what each stage wrote."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import Fault, UserError
from pipeline.params import parse_yaml

LOCK, PIPELINE = Path("dvc.lock"), Path("dvc.yaml")


def code_of(stage: str) -> dict[str, str]:
    """The SHA-256 of every file of code that a stage depends on, by its path from the repository's root.

    In a temporary copy of the repository it is the code of the copy. Raises Fault where dvc.yaml has no such stage.
    """
    root = Path(__file__).parents[1]
    content: Any = parse_yaml((root / PIPELINE).read_bytes(), PIPELINE)
    try:
        dependencies = [root / dep for dep in content["stages"][stage]["deps"] if dep.startswith("pipeline/")]
    except (TypeError, KeyError, AttributeError) as error:
        raise Fault(f"{PIPELINE} has no stage {stage} with its deps: `git restore {PIPELINE}`") from error
    found = [file for each in dependencies for file in ([each] if each.is_file() else each.rglob("*.py"))]
    return {file.relative_to(root).as_posix(): files.sha256(file.read_bytes()) for file in sorted(set(found))}


def outputs(folder: Path = Path(), content: str | None = None) -> dict[str, str]:
    """The MD5 of each output by its path; that of a folder ends in ``.dir``. Raises UserError.

    ``content`` is that of another commit's dvc.lock, to be read in place of the folder's.
    """
    try:
        lock: Any = parse_yaml((folder / LOCK).read_bytes() if content is None else content.encode(), LOCK)
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    except FileNotFoundError:
        raise UserError(f"{LOCK} does not exist: run `dvc repro`") from None
    except (UserError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{LOCK} is damaged ({reason}): `git checkout {LOCK}`, then `dvc repro`") from error


def has_noted(path: Path, content: bytes) -> bool:
    """Whether dvc.lock has this content for the output ``path``: then the stage was asked to run again."""
    try:
        return outputs().get(path.as_posix()) == hashlib.md5(content, usedforsecurity=False).hexdigest()
    except UserError:
        return False
