"""Look at everything that can be wrong here, and say what mends it.

    python -m pipeline.doctor

A line for each thing that is looked at, whatever is wrong with the others; nothing is changed. (An MLflow server, or
PostgreSQL, gets the empty experiment where it has none.) Exits 1 where something is wrong.
"""

import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

from pipeline import checkpoints, dvc_files, files, machine
from pipeline.data import sources, splits
from pipeline.errors import Fault, UserError, run_command
from pipeline.model import checkpoint, model_file
from pipeline.params import read_params
from pipeline.tracking import delivery, promotion, registry, runs, store
from pipeline.tracking.gate import CHAMPION

NEEDED = ("torch", "torchvision", "mlflow", "dvc", "optuna", "numba", "safetensors", "pydantic")
CACHE = Path(".dvc/cache/files/md5")
RWLOCK = Path(".dvc/tmp/rwlock")
DAY = 24 * 3600
INSTALL = "`rm .venv/.installed`, then `make setup`"
EVALUATE = "`dvc repro -f -s evaluate`"
WRITE = f"`dvc repro`, or {EVALUATE} where that has nothing to do"  # something into the store
PROBLEMS = (UserError, Fault, OSError)


class Wrong(str):
    """Something to mend, and how."""


Found = Iterator[str]


def main() -> None:
    """Look at one thing after the other."""
    wrong = 0
    for name, look in LOOKS.items():
        said = list[str]()
        try:
            said.extend(look())
        except PROBLEMS as error:
            said.append(_wrong(error))
        problems = [each for each in said if isinstance(each, Wrong)]
        wrong += len(problems)
        lines = [f"WRONG  {name:<15}{problem}" for problem in problems] or [f"ok     {name:<15}{said[-1]}"]
        print("\n".join(lines), flush=True)
    if wrong:
        sys.exit(1)


def _wrong(error: Exception) -> Wrong:
    if isinstance(error, OSError):
        return Wrong(f"{error.filename} cannot be read ({error.strerror}): make it a file that you may read")
    return Wrong(error)


def _environment() -> Found:
    known = machine.versions()
    yield f"Python {sys.version.split()[0]}, libraries as in {machine.REQUIREMENTS}"
    for package in NEEDED:
        here, wanted = known.get(package, ("not installed", ""))
        if here != wanted:
            yield Wrong(f"{package} is {here}; {machine.REQUIREMENTS} has {wanted or 'it'}: {INSTALL}")


def _params() -> Found:
    params = read_params()
    yield f"{len(params.knobs())} knobs"


def _raw() -> Found:
    found = list(sources.downloaded())
    for path, is_published in found:
        if not is_published:
            yield Wrong(f"{path} is not the published file: delete it, then `dvc repro`")
    yield f"{len(found)} files, all as published" if found else "nothing downloaded yet"


def _prepared() -> Found:
    if not files.PREPARED.joinpath("dataset.json").exists():
        yield "none yet: `dvc repro` makes them"
        return
    dataset = splits.read_dataset()
    for split in splits.SPLITS:
        try:
            splits.read_split(dataset, split)
        except PROBLEMS as error:
            yield _wrong(error)
    yield f"{dataset.label}, {sum(facts.count for facts in dataset.splits.values()):,} images"
    if dataset.name != dataset.requested:
        yield Wrong(
            f"{dataset.name} stands in for {dataset.requested}: set {sources.MIRROR_VARIABLE} or mend the network, "
            "then `dvc repro -f prepare` and `dvc repro`"
        )


def _model() -> Found:
    if not files.MODEL.exists():
        yield "none yet: `dvc repro` trains one"
        return
    content = files.MODEL.read_bytes()
    model_file.from_bytes(content, str(files.MODEL))
    yield f"SHA-256 {files.sha256(content)[:12]}..."


def _lock() -> Found:
    known = dvc_files.outputs()
    yield f"{len(known)} outputs"
    if RWLOCK.exists():
        try:
            json.loads(RWLOCK.read_text() or "{}")
        except ValueError:
            yield Wrong(f"{RWLOCK} is damaged: delete it")


def _cache() -> Found:
    """DVC trusts the files of its cache without hashing them again."""
    looked_at = 0
    copies = list(dvc_files.outputs().items())
    for path, md5 in copies:  # grows by what is in the folders
        cached = CACHE / md5[:2] / md5[2:]
        if not cached.exists():
            continue
        is_folder = md5.endswith(".dir")
        looked_at += not is_folder
        content = _read_cached(cached, md5)
        if content is None:
            yield Wrong(
                f"{cached}, the copy of {path}, is damaged: `rm -rf {cached} {path}`, then `dvc repro` or `dvc pull`"
            )
        elif is_folder:
            copies += [(f"{path}/{each['relpath']}", each["md5"]) for each in json.loads(content)]
    yield f"{looked_at} files of these outputs" if looked_at else "none of these outputs"


def _read_cached(path: Path, md5: str) -> bytes | None:
    """A file of the cache, or the JSON listing of a folder; None where it is not the one with this hash."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    is_whole = hashlib.md5(content, usedforsecurity=False).hexdigest() == md5.removesuffix(".dir")
    return content if is_whole else None


def _checkpoints() -> Found:
    count = 0
    for path in sorted(files.checkpoints_folder().glob(f"*{checkpoints.SUFFIX}")):
        count += 1
        try:
            reached, _ = checkpoint.from_bytes(path.read_bytes())
        except checkpoint.DamagedError as error:
            yield Wrong(f"{path} is damaged ({error}): delete it; the training will begin anew")
            continue
        except OSError as error:
            yield _wrong(error)
            continue
        days = (time.time() - path.stat().st_mtime) / DAY
        yield f"{count}; the last after epoch {reached.epoch}, {days:.0f} days ago: `dvc repro` with its knobs goes on"
    if not count:
        yield "no interrupted training"


def _tracking() -> Found:
    yield from map(_undelivered, delivery.undelivered())
    if not _connect():
        yield f"none yet: {WRITE}"
        return
    dead = runs.stale_runs()
    if dead:
        yield Wrong(f"{len(dead)} runs are open whose processes have died; what closes them: {WRITE}")
    yield store.address()


def _undelivered(path: Path) -> Wrong:
    try:
        delivery.read(path)
    except OSError as error:
        return _wrong(error)
    except delivery.DamagedError:
        return Wrong(f"{path}, which a run is still to be told, is damaged: delete it")
    return Wrong(f"{path} is what a run is still to be told: {WRITE}; or delete it")


def _connect() -> bool:
    """Not to a file that is not there yet, or that no run was written into: store.connect would begin to fill it."""
    is_begun = _is_begun()
    if is_begun:
        store.connect()
    return is_begun


def _is_begun() -> bool:
    address = os.environ.get("MLFLOW_TRACKING_URI") or store.own_store()
    path = Path(address.removeprefix("sqlite:///").partition("?")[0])
    if not address.startswith("sqlite:///"):
        return True
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'")
            ours = "SELECT 1 FROM experiments WHERE name = ?"
            return bool(tables.fetchone() and database.execute(ours, [store.EXPERIMENT]).fetchone())
    except sqlite3.Error:
        return True  # what is wrong with it, store.connect says


def _registry() -> Found:
    if not _connect() or not registry.names():
        yield f"nothing registered yet: {WRITE}"
        return
    tags: Mapping[str, str] = {}
    try:
        version = registry.find(CHAMPION)
        tags = version.tags
        registry.load(version)
    except (UserError, Fault) as error:
        yield Wrong(f"{error}: {_crowns(tags)}")
    else:
        yield f"{version.name} version {version.version} is the champion"


def _crowns(champion: Mapping[str, str]) -> str:
    """The command after which there is a whole champion, for one with these tags: its own file anew, else another."""
    if files.MODEL.exists() and files.sha256(files.MODEL.read_bytes()) == champion.get(runs.MODEL_SHA256):
        return EVALUATE
    version = promotion.fallback()
    return f"`python -m pipeline.models {version.version} --rollback`" if version else EVALUATE


LOOKS: dict[str, Callable[[], Found]] = {
    "environment": _environment,
    "params.yaml": _params,
    "downloads": _raw,
    "images": _prepared,
    "model": _model,
    "dvc.lock": _lock,
    "DVC's cache": _cache,
    "checkpoints": _checkpoints,
    "tracking store": _tracking,
    "registry": _registry,
}


if __name__ == "__main__":
    run_command(main)
