"""Reads DVC's own files: from dvc.yaml what a stage depends on, from dvc.lock what each stage read and wrote."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import Fault, UserError
from pipeline.params import flat, parse_yaml

LOCK, PIPELINE = Path("dvc.lock"), Path("dvc.yaml")
ROOT = Path(__file__).parents[1]  # of this code; in a temporary copy of the repository that of the copy
CODE = "pipeline/"
OWN_PICTURES = "${data.path}"  # in dvc.yaml, where DVC puts the parameter in its place
KEPT_LOCK = Path(".dvc/tmp/dvc.lock")


def keep_lock() -> None:
    """Copy dvc.lock, which DVC empties before it writes it again: pipeline.recover needs a whole one after a kill."""
    if LOCK.is_file() and is_whole(content := LOCK.read_bytes()):
        files.write(KEPT_LOCK, content)


def is_whole(lock: bytes) -> bool:
    """Whether this is the content of a dvc.lock that was not cut off."""
    try:
        _outputs(lock)
    except _DAMAGED:
        return False
    return True


def digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its name."""
    return {name: _sha256(path) for name, path in paths.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return files.sha256_of(file)


def code_of(stage: str) -> dict[str, str]:
    """The SHA-256 of every file of code that a stage depends on, by its path from the repository's root.

    In a temporary copy of the repository it is the code of the copy. Raises Fault where dvc.yaml has no such stage.
    """
    return digests(code_files(definition(stage)))


def code_files(definition: Mapping[str, Any]) -> dict[str, Path]:
    """The files of code that the stage with this ``definition`` depends on, by their paths from the root."""
    dependencies = [ROOT / dep for dep in definition["deps"] if dep.startswith(CODE)]
    found = [file for each in dependencies for file in ([each] if each.is_file() else each.rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file for file in sorted(set(found))}


def definition(stage: str) -> dict[str, Any]:
    """What dvc.yaml says about a stage. Raises Fault where it has no such stage with its deps."""
    content: Any = parse_yaml((ROOT / PIPELINE).read_bytes(), PIPELINE)
    try:
        found = dict(content["stages"][stage])
        return found | {"deps": [str(dep) for dep in found["deps"]]}
    except (TypeError, KeyError, ValueError) as error:
        raise Fault(f"{PIPELINE} has no stage {stage} with its deps: `git restore {PIPELINE}`") from error


def outputs(folder: Path = Path(), content: str | None = None) -> dict[str, str]:
    """The MD5 of each output by its path; that of a folder ends in ``.dir``. Raises UserError.

    ``content`` is that of another commit's dvc.lock, to be read in place of the folder's.
    """
    try:
        return _outputs((folder / LOCK).read_bytes() if content is None else content.encode())
    except FileNotFoundError:
        raise UserError(f"{LOCK} does not exist: run `dvc repro`") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{LOCK} is damaged ({reason}): `python -m pipeline.recover`, then `dvc repro`") from error


def _outputs(lock: bytes) -> dict[str, str]:
    """The MD5 of each output. Raises _DAMAGED."""
    content: Any = parse_yaml(lock, LOCK)
    return {out["path"]: out["md5"] for stage in content["stages"].values() for out in stage["outs"]}


_DAMAGED = (UserError, TypeError, KeyError, AttributeError)  # what reading a damaged dvc.lock raises


def noted_inputs(stage: str) -> tuple[dict[str, object], dict[str, str]]:
    """The parameters by their dotted paths, and the MD5 of each dependency, with which dvc.lock has a stage's outputs.

    Raises UserError where dvc.lock is damaged.
    """
    outputs()
    content: Any = parse_yaml(LOCK.read_bytes(), LOCK)
    noted = content["stages"].get(stage, {})
    params = flat(noted.get("params", {}).get("params.yaml", {}))
    return params, {dep["path"]: dep["md5"] for dep in noted.get("deps", [])}


def has_noted(path: Path, content: bytes) -> bool:
    """Whether dvc.lock has this content for the output ``path``: then the stage was asked to run again."""
    try:
        return outputs().get(path.as_posix()) == md5(content)
    except UserError:
        return False


def evaluated_model() -> str | None:
    """The SHA-256 of the model here, where dvc.lock has it and its evaluation: DVC then does not evaluate it again."""
    if not all(path.is_file() and has_noted(path, path.read_bytes()) for path in (files.MODEL, files.PREDICTIONS)):
        return None
    return files.sha256(files.MODEL.read_bytes())


def md5(content: bytes) -> str:
    """The MD5 of ``content``, as DVC notes it for a file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
