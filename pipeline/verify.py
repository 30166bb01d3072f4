"""Build everything twice from nothing, and compare: `make verify`.

    python -m pipeline.verify

Two copies of this repository, with the changes that are not committed, each run `dvc repro` with a store of their own.
Exits 1 where they do not give the same bytes. What differs from the committed dvc.lock is told, with what may be why.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import dvc_files, files, machine, recipe
from pipeline.data import sources
from pipeline.data.splits import read_dataset
from pipeline.errors import Fault, UserError, run_command
from pipeline.params import read_params

DECIDING = ("torch", "numpy", "numba")  # packages of which another version may add up in another order
GRACE_SECONDS = 10  # for a stage to end after SIGTERM


def main() -> None:
    """Build, build again, print a line an output."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that closes does not reach DVC's own session
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    committed = committed_outputs()
    with TemporaryDirectory(prefix="convtrack-") as folder:
        first, second = (_built(Path(folder) / name) for name in ("first", "second"))
        tell_stand_in(Path(folder) / "second")
    tell(first, second, committed)


def committed_outputs() -> dict[str, str]:
    """The hashes that the last commit's dvc.lock has; the file itself is that of the last `dvc repro`."""
    try:
        return dvc_files.outputs(content=_git("show", f"HEAD:./{dvc_files.LOCK}"))
    except Fault as fault:
        raise UserError(
            f"there is no committed {dvc_files.LOCK} to compare with ({fault}): run `dvc repro` and commit it"
        ) from fault


def tell(first: Mapping[str, str], second: Mapping[str, str], committed: Mapping[str, str]) -> None:
    """A line an output, and what may be why it is not the committed one. A Fault where the two builds differ."""
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
    _lend_downloads(folder)
    code, told = _run_as_one([sys.executable, "-m", "dvc", "repro", "--quiet"], folder, _environment())
    if code != 0:
        raise Fault(f"dvc repro failed: {(told.strip().splitlines() or ['without a word'])[-1]}")
    return dvc_files.outputs(folder)


def tell_stand_in(folder: Path) -> None:
    """A line where it was not built on the images that params.yaml names."""
    dataset = read_dataset(folder / files.PREPARED)
    if dataset.name != dataset.requested:
        print(
            f"{dataset.requested} could not be had, so this is verified on {dataset.name}: "
            f"set {sources.MIRROR_VARIABLE}, or mend the network, for the images that params.yaml names"
        )


def _lend_downloads(folder: Path) -> None:
    """What was downloaded once need not be again. What is missing or damaged comes from the mirrors, as everywhere."""
    for path, is_published in sources.downloaded():
        if is_published:
            lent = folder / path.relative_to(files.root())
            lent.parent.mkdir(parents=True, exist_ok=True)
            lent.symlink_to(path)


def _environment() -> dict[str, str]:
    """That of this process without other stores; a mirror that is named from this root is found from others too."""
    outside = ("MLFLOW", "DVC", "OPTUNA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    mirror = environment.get(sources.MIRROR_VARIABLE)
    if mirror and "://" not in mirror:
        environment[sources.MIRROR_VARIABLE] = str(files.root() / mirror)
    return environment


def _run_as_one(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and standard error of ``command``. What interrupts it ends what it has started too: DVC's stages."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, told = process.communicate()
        except BaseException:
            _end(process)
            raise
    return process.returncode, told


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM for its whole group; SIGKILL for what is there still after a while, or at a second interrupt.

    All of them have the same standard error, which is at its end when the last of them is.
    """
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=GRACE_SECONDS)
    finally:
        # PermissionError is what macOS says of a group that is just ending.
        with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=GRACE_SECONDS)


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
        done = subprocess.run(["git", *words], cwd=files.root(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise Fault(f"git cannot be run: {error}") from error
    if done.returncode != 0:
        raise Fault(f"git {words[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def _table(first: Mapping[str, str], second: Mapping[str, str], committed: Mapping[str, str]) -> Iterator[str]:
    yield f"{'output':<40}{'MD5':<18}{'second run':<14}dvc.lock"
    for path, md5 in first.items():
        again = "the same" if second.get(path) == md5 else "ANOTHER"
        before = "the same" if committed.get(path) == md5 else "another"
        yield f"{path:<40}{md5[:12]:<18}{again:<14}{before}"


def _reasons() -> Iterator[str]:
    yield "params.yaml or the code was changed after that file was written: `git diff HEAD` tells what is not committed"
    for package, (here, wanted) in machine.versions().items():
        if package in DECIDING:
            yield f"{package} is {here}" + ("" if here == wanted else f", {machine.REQUIREMENTS} has {wanted}")
    tags = machine.environment_tags(recipe.device_for(read_params()))
    for name in ("device", "cpu.capability", "cpu.threads"):
        yield f"{name} is {tags[name]}; of the machine that wrote dvc.lock it may be another"


if __name__ == "__main__":
    run_command(main)
