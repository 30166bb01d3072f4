"""The lock files, for reading: dvc.lock, in which DVC notes what each stage wrote, and requirements.lock."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import files
from pipeline.errors import UserError

LOCK, REQUIREMENTS = Path("dvc.lock"), Path("requirements.lock")


def outputs(folder: Path = Path(), content: str | None = None) -> dict[str, str]:
    """The MD5 of each output by its path; that of a folder ends in ``.dir``. A UserError where it cannot be read.

    ``content`` is read in place of the folder's dvc.lock: that of another commit.
    """
    try:
        lock = YAML(typ="safe", pure=True).load(folder / LOCK if content is None else content)
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    except FileNotFoundError:
        raise UserError(f"{LOCK} does not exist: run `dvc repro`") from None
    except (YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{LOCK} is damaged ({reason}): `git checkout {LOCK}`, then `dvc repro`") from error


def versions() -> dict[str, tuple[str, str]]:
    """Of each package that requirements.lock names and that is installed, the version here and the one there."""
    found = {}
    for line in (files.root() / REQUIREMENTS).read_text().splitlines():
        name, equals, rest = line.partition("==")
        if equals and name.replace("-", "").replace("_", "").isalnum():
            try:
                found[name] = version(name).split("+")[0], rest.split()[0].rstrip(";")
            except PackageNotFoundError:
                continue  # it is of another system, or of an extra
    return found
