"""Build everything twice from nothing, and compare: `make verify`.

    python -m pipeline.verify

Two copies of this repository, with the changes that are not committed, each run `dvc repro` with a store of their own.
Exits 1 where they do not give the same bytes. What differs from the committed dvc.lock is told, with what may be why.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import files, lockfile, recipe
from pipeline.errors import Fault, run_command
from pipeline.images.sources import MIRROR_VARIABLE
from pipeline.params import read_params
from pipeline.tracking import lineage

DECIDING = ("torch", "numpy", "numba")  # packages of which another version may add up in another order


def main() -> None:
    """Build, build again, print a line an output."""
    committed = lockfile.outputs()
    with TemporaryDirectory(prefix="convtrack-") as folder:
        first, second = (_built(Path(folder) / name) for name in ("first", "second"))
    print("\n".join(_table(first, second, committed)))
    print()
    if first != second:
        raise Fault("two runs of this code on this machine do not give the same bytes")
    print("Twice the same bytes.")
    if any(committed.get(path) != md5 for path, md5 in first.items()):
        print("They are not those of the committed dvc.lock. What may be why:")
        print("\n".join(f"  {reason}" for reason in _reasons()))


def _built(folder: Path) -> dict[str, str]:
    """The hashes of what `dvc repro` makes in a copy of this repository."""
    print(f"dvc repro in {folder}", flush=True)
    copy_into(folder)
    outside = ("MLFLOW", "DVC", "OPTUNA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    if files.raw_folder().is_dir():  # what was downloaded once need not be again
        environment[MIRROR_VARIABLE] = str(files.raw_folder())
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise Fault(f"dvc repro failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    return lockfile.outputs(folder)


def copy_into(folder: Path) -> None:
    """What git knows or would add, in a repository of its own."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (files.root() / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files.root() / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=files.root(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Fault(f"git cannot say what belongs to this repository: {error}") from error
    return done.stdout


def _table(first: Mapping[str, str], second: Mapping[str, str], committed: Mapping[str, str]) -> Iterator[str]:
    yield f"{'output':<40}{'MD5':<18}{'second run':<14}dvc.lock"
    for path, md5 in first.items():
        again = "the same" if second.get(path) == md5 else "ANOTHER"
        before = "the same" if committed.get(path) == md5 else "another"
        yield f"{path:<40}{md5[:12]:<18}{again:<14}{before}"


def _reasons() -> Iterator[str]:
    yield "params.yaml or the code was changed after dvc.lock was written: `dvc status` tells"
    for package, (here, wanted) in lockfile.versions().items():
        if package in DECIDING:
            yield f"{package} is {here}" + ("" if here == wanted else f", {lockfile.REQUIREMENTS} has {wanted}")
    machine = lineage.surroundings(recipe.device_for(read_params()))
    for name in ("device", "cpu.capability", "cpu.threads"):
        yield f"{name} is {machine[name]}; of the machine that wrote dvc.lock it may be another"


if __name__ == "__main__":
    run_command(main)
