"""Check this repository for problems, and say how to fix them.

    python -m pipeline.doctor

Prints a line for each check. Nothing is changed, except that the experiment is created on an MLflow server or in
PostgreSQL if it does not exist, that the locations in an SQLite store are updated (after a move, or where new files
would get lost), and that it is migrated to the installed MLflow, both with a copy first.
Exits 1 if something is wrong.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline import checkpoints, dvc_files, files, machine
from pipeline.data import downloads, published, splits
from pipeline.errors import Fault, UserError, counted, run_command, without_password
from pipeline.model import checkpoint, kernel_cache, model_file
from pipeline.params import check_model, differences, read_params
from pipeline.tracking import addresses, delivery, promotion, registry, runs, sqlite_files, store
from pipeline.tracking.gate import CHAMPION
from pipeline.tracking.registry import REGISTER

NEEDED = ("torch", "torchvision", "mlflow", "dvc", "optuna", "numba", "safetensors", "pydantic")
CACHE = Path(".dvc/cache/files/md5")
RWLOCK = Path(".dvc/tmp/rwlock")
DAY = 24 * 3600
INSTALL = "`rm .venv/.installed`, then `make setup`"
WRITE = f"`dvc repro`, or {REGISTER} if that has nothing to do"  # commands that write into the store


class Problem(str):
    """A line about something that is wrong, and how to fix it."""


Lines = Iterator[str]  # of a check: the Problems found; if there are none, the last line describes what was checked


def main() -> None:
    """Run all checks and print what they find."""
    found = 0
    for name, check in CHECKS.items():
        lines = list[str]()
        lines += _errors_of(lambda check=check, lines=lines: lines.extend(check()))
        problems = [line for line in lines if isinstance(line, Problem)]
        found += len(problems)
        shown = [f"WRONG  {name:<15}{problem}" for problem in problems] or [f"ok     {name:<15}{lines[-1]}"]
        print(without_password("\n".join(shown)), flush=True)
    if found:
        sys.exit(1)


def _errors_of(read: Callable[..., object], *arguments: object, damaged: str = "delete it") -> Lines:
    """The error of a reader as a Problem. Most errors include the remedy; ``damaged`` is the remedy for other files."""
    try:
        read(*arguments)
    except (UserError, Fault) as error:
        yield Problem(error)
    except OSError as error:
        yield Problem(f"{error.filename} cannot be read ({error.strerror}): check the file and its permissions")
    except (checkpoint.DamagedError, delivery.DamagedError) as error:
        yield Problem(f"{arguments[0]} is damaged ({error}): {damaged}")


def _environment() -> Lines:
    installed = machine.versions()
    yield f"Python {sys.version.split()[0]}, libraries as in {machine.REQUIREMENTS}"
    yield from _errors_of(kernel_cache.folder)
    for package in NEEDED:
        here, wanted = installed.get(package, ("not installed", ""))
        if here != wanted:
            yield Problem(f"{package} is {here}; {machine.REQUIREMENTS} has {wanted or 'it'}: {INSTALL}")


def _params() -> Lines:
    read_params()
    yield "all values are valid"


def _downloads() -> Lines:
    downloaded = list(published.downloaded())
    for path, is_published in downloaded:
        if not is_published:
            yield Problem(f"{path} is not the published file: delete it, then `dvc repro`")
    yield f"{counted(len(downloaded), 'file')}, all as published" if downloaded else "nothing downloaded yet"


def _images() -> Lines:
    if not files.PREPARED.joinpath("dataset.json").exists():
        yield "none yet: `dvc repro` creates them"
        return
    dataset = splits.read_dataset()
    for split in splits.SPLITS:
        yield from _errors_of(splits.read_split, dataset, split, files.PREPARED, 0)
    yield f"{dataset.label}, {sum(facts.count for facts in dataset.splits.values()):,} images"
    if dataset.name != dataset.requested:
        yield Problem(f"{dataset.label}: {downloads.NETWORK_REMEDY}, then `dvc repro -f prepare` and `dvc repro`")


def _model() -> Lines:
    if not files.MODEL.exists():
        yield "none yet: `dvc repro` trains one"
        return
    content = files.MODEL.read_bytes()
    model_file.from_bytes(content, str(files.MODEL), check_model)
    yield f"SHA-256 {files.sha256(content)[:12]}..."


def _lock() -> Lines:
    yield f"{len(dvc_files.outputs())} outputs"
    if RWLOCK.exists():
        try:
            json.loads(RWLOCK.read_text() or "{}")
        except ValueError:
            yield Problem(f"{RWLOCK} is damaged: delete it")
    if files.MODEL.is_file() and dvc_files.has_noted(files.MODEL, files.MODEL.read_bytes()):
        yield from _wrong_origin()


def _wrong_origin() -> Lines:
    """Whether dvc.lock says that the model comes from other parameters or data than the model itself says."""
    trained = model_file.from_bytes(files.MODEL.read_bytes(), str(files.MODEL), check_model)
    noted, dependencies = dvc_files.noted_inputs("train")
    both = trained.recipe.keys() & noted.keys()
    wrong = differences({path: trained.recipe[path] for path in both}, {path: noted[path] for path in both})
    described = files.PREPARED / "dataset.json"
    is_noted = described.is_file() and dependencies.get(described.as_posix()) == dvc_files.md5(described.read_bytes())
    if is_noted and trained.data.get("data.sha256") != splits.read_dataset().sha256:
        wrong.append(f"{files.PREPARED} has changed")
    if wrong:
        remedy = "`dvc repro -f train`, then `dvc repro`"
        yield Problem(
            f"{dvc_files.LOCK} has another origin of {files.MODEL} than that file ({'; '.join(wrong)}): {remedy}"
        )


def _cache() -> Lines:
    """DVC does not hash the files of its cache again."""
    checked = 0
    copies = list(dvc_files.outputs().items())
    for path, md5 in copies:  # gets longer by the files of each folder
        cached = CACHE / md5[:2] / md5[2:]
        if not cached.exists():
            continue
        content = _read_cached(cached, md5)
        if content is None:
            remedy = f"`rm -rf {cached} {path}`, then `dvc repro` or `dvc pull`"
            yield Problem(f"{cached}, the copy of {path}, is damaged: {remedy}")
        elif md5.endswith(".dir"):
            copies += [(f"{path}/{each['relpath']}", each["md5"]) for each in json.loads(content)]
        checked += not md5.endswith(".dir")
    yield f"{counted(checked, 'cached file')} checked" if checked else "these outputs are not cached"


def _read_cached(path: Path, md5: str) -> bytes | None:
    """A cached file, or the JSON list of a folder's files; None where it does not have this hash."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if dvc_files.md5(content) == md5.removesuffix(".dir") else None


def _checkpoints() -> Lines:
    paths = checkpoints.paths()
    for path in paths:
        yield from _errors_of(checkpoints.read, path, damaged="delete it; training will start from the beginning")
    if not paths:
        yield "no interrupted training"
        return
    days = (time.time() - max(path.stat().st_mtime for path in paths)) / DAY
    ago = f"{counted(round(days), 'day')} ago"
    yield f"{len(paths)} interrupted, the last {ago}: `dvc repro` with the same parameters continues it"


def _tracking() -> Lines:
    for path in delivery.undelivered():
        damaged = list(_errors_of(delivery.read, path))
        yield from damaged or [Problem(f"{path} has updates that MLflow has not received: {WRITE}; or delete it")]
    if not _connect():
        yield f"none yet: {WRITE}"
        return
    database = addresses.sqlite_path(addresses.configured())
    if database and (damage := sqlite_files.damage(database)):
        yield Problem(f"{database} is damaged ({damage}): restore a copy, or try `sqlite3 {database.name} .recover`")
        return
    dead = runs.stale_runs()
    if dead:
        yield Problem(f"{counted(len(dead), 'run')} left open by processes that have died; to close: {WRITE}")
    yield addresses.address()


def _connect() -> bool:
    """Whether there is a store with runs in it, connected to. store.connect would begin to fill one that is empty."""
    has_runs = _has_runs()
    if has_runs:
        store.connect()
    return has_runs


def _has_runs() -> bool:
    path = addresses.sqlite_path(addresses.configured())
    if path is None:
        return True
    if not path.exists():
        return False
    try:
        ours = "SELECT 1 FROM experiments WHERE name = ?"
        return sqlite_files.finds_row(path, sqlite_files.TABLES) and sqlite_files.finds_row(
            path, ours, store.EXPERIMENT
        )
    except sqlite3.Error:
        return True  # store.connect then says what is wrong with it


def _registry() -> Lines:
    is_there, model = _connect(), dvc_files.evaluated_model()
    if model and (lacking := registry.lacking(model) if is_there else registry.NO_VERSION):
        yield Problem(lacking)
    if not is_there or not registry.names():
        yield f"nothing registered yet: {WRITE}"
        return
    tags: Mapping[str, str] = {}
    try:
        version = registry.find(CHAMPION)
        tags = version.tags
        registry.load(version)
    except (UserError, Fault) as error:
        yield Problem(f"{error}: {_champion_remedy(tags)}")
    else:
        yield f"{version.name} version {version.version} is the champion"


def _champion_remedy(tags: Mapping[str, str]) -> str:
    """A command that restores a complete champion: register the same model again if it is here, else roll back."""
    if files.MODEL.exists() and files.sha256(files.MODEL.read_bytes()) == tags.get(runs.MODEL_SHA256):
        return REGISTER
    version = promotion.fallback()
    return f"`python -m pipeline.models {version.version} --rollback`" if version else REGISTER


CHECKS: dict[str, Callable[[], Lines]] = {
    "environment": _environment,
    "params.yaml": _params,
    "downloads": _downloads,
    "images": _images,
    "model": _model,
    "dvc.lock": _lock,
    "DVC's cache": _cache,
    "checkpoints": _checkpoints,
    "tracking store": _tracking,
    "registry": _registry,
}


if __name__ == "__main__":
    run_command(main)
