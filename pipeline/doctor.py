"""Look at everything that can be wrong here, and say what mends it.

    python -m pipeline.doctor

A line for each thing that is looked at; nothing is changed. Exits 1 where something is wrong.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import files, lockfile, resuming
from pipeline.errors import Fault, UserError, run_command
from pipeline.images import sources, splits
from pipeline.network import checkpoint, model_file
from pipeline.params import read_params
from pipeline.tracking import delivery, faults, registry, runs
from pipeline.tracking.gate import CHAMPION

NEEDED = ("torch", "torchvision", "mlflow", "dvc", "optuna", "numba", "safetensors", "pydantic")
CACHE = Path(".dvc/cache/files/md5")
RWLOCK = Path(".dvc/tmp/rwlock")
DAY = 24 * 3600
INSTALL = "`rm .venv/.installed`, then `make setup`"


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
        except (UserError, Fault) as error:
            said.append(Wrong(error))
        problems = [each for each in said if isinstance(each, Wrong)]
        wrong += len(problems)
        lines = [f"WRONG  {name:<15}{problem}" for problem in problems] or [f"ok     {name:<15}{said[-1]}"]
        print("\n".join(lines), flush=True)
    if wrong:
        sys.exit(1)


def _environment() -> Found:
    known = lockfile.versions()
    yield f"Python {sys.version.split()[0]}, libraries as in {lockfile.REQUIREMENTS}"
    for package in NEEDED:
        here, wanted = known.get(package, ("not installed", ""))
        if here != wanted:
            yield Wrong(f"{package} is {here}; {lockfile.REQUIREMENTS} has {wanted or 'it'}: {INSTALL}")


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
        except (UserError, Fault) as error:
            yield Wrong(f"{error}")
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
    known = lockfile.outputs()
    yield f"{len(known)} outputs"
    if RWLOCK.exists():
        try:
            json.loads(RWLOCK.read_text() or "{}")
        except ValueError:
            yield Wrong(f"{RWLOCK} is damaged: delete it")


def _cache() -> Found:
    """DVC trusts the files of its cache without hashing them again."""
    looked_at = 0
    for path, md5 in lockfile.outputs().items():
        cached = CACHE / md5[:2] / md5[2:]
        if md5.endswith(".dir") or not cached.exists():
            continue
        looked_at += 1
        if hashlib.md5(cached.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            yield Wrong(
                f"{cached}, the copy of {path}, is damaged: `rm -f {cached} {path}`, then `dvc repro` or `dvc pull`"
            )
    yield f"{looked_at} files of these outputs" if looked_at else "none of these outputs"


def _checkpoints() -> Found:
    count = 0
    for path in sorted(files.checkpoints_folder().glob(f"*{resuming.SUFFIX}")):
        count += 1
        try:
            reached, _ = checkpoint.from_bytes(path.read_bytes())
        except checkpoint.DamagedError as error:
            yield Wrong(f"{path} is damaged ({error}): delete it; the training will begin anew")
            continue
        days = (time.time() - path.stat().st_mtime) / DAY
        yield f"{count}; the last after epoch {reached.epoch}, {days:.0f} days ago: `dvc repro` with its knobs goes on"
    if not count:
        yield "no interrupted training"


def _tracking() -> Found:
    if not runs.is_there():
        yield "none yet: `dvc repro` makes it"
        return
    runs.connect()
    for path in delivery.undelivered():
        yield Wrong(f"{path} is what a run is still to be told: `dvc repro`, or delete it")
    dead = runs.left_open()
    if dead:
        yield Wrong(f"{len(dead)} runs are open whose processes have died: `dvc repro` closes them")
    yield faults.address()


def _registry() -> Found:
    if not runs.is_there():
        yield "nothing registered yet: `dvc repro`"
        return
    runs.connect()
    if not registry.names():
        yield "nothing registered yet: `dvc repro`"
        return
    version = registry.find(CHAMPION)
    try:
        registry.load(version)
    except Fault as error:
        yield Wrong(f"{error}: `dvc repro -f evaluate`, or `python -m pipeline.champion --rollback`")
    yield f"{version.name} version {version.version} is the champion"


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
