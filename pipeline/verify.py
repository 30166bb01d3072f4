"""Run the pipeline twice from scratch, and compare the outputs: `make verify`.

    python -m pipeline.verify

Two copies of this repository, uncommitted changes included, each run `dvc repro` with their own store. Exits 1 if
the two differ. If they differ from the committed dvc.lock, possible reasons are printed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import dvc_files, files, machine, recipe
from pipeline.data import downloads, published
from pipeline.data.splits import read_dataset
from pipeline.errors import Fault, UserError, run_command
from pipeline.params import read_params

DECIDING = ("torch", "numpy", "numba")  # packages that may sum in a different order in another version
GRACE_SECONDS = 10  # for a stage to end after SIGTERM


def main() -> None:
    """Build, build again, compare."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # DVC has a session of its own, that no terminal closes
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    committed = committed_outputs()
    with TemporaryDirectory(prefix="convtrack-") as folder:
        first, second = (build(Path(folder) / name) for name in ("first", "second"))
    compare(first, second, committed)


def committed_outputs() -> dict[str, str]:
    """The hashes in the last commit's dvc.lock; the file here is that of the last `dvc repro`."""
    try:
        return dvc_files.outputs(content=machine.git("show", f"HEAD:./{dvc_files.LOCK}"))
    except Fault as fault:
        raise UserError(
            f"there is no committed {dvc_files.LOCK} to compare with ({fault}): run `dvc repro` and commit it"
        ) from fault


def build(folder: Path) -> dict[str, str]:
    """Run `dvc repro` in a copy of this repository; the hashes of its outputs."""
    print(f"dvc repro in {folder}", flush=True)
    machine.copy_repository(folder)
    _link_downloads(folder)
    code, errors = _run_as_group([sys.executable, "-m", "dvc", "repro"], folder, _environment())
    if code != 0:
        raise Fault(f"dvc repro failed: {(errors.strip().splitlines() or ['without a message'])[-1]}")
    warn_of_fallback(folder)
    return dvc_files.outputs(folder)


def compare(first: Mapping[str, str], second: Mapping[str, str], committed: Mapping[str, str]) -> None:
    """Print a line per output, and why some may differ from the committed ones. A Fault where the builds differ."""
    print("\n".join(_table(first, second, committed)))
    print()
    if first != second:
        raise Fault("two runs of this code on this machine do not give the same bytes")
    print("Both builds gave the same bytes.")
    if any(committed.get(path) != md5 for path, md5 in first.items()):
        print("They differ from the committed dvc.lock. Possible reasons:")
        print("\n".join(f"  {reason}" for reason in _reasons()))


def warn_of_fallback(folder: Path) -> None:
    """Print a line where the build did not have the images that params.yaml names."""
    dataset = read_dataset(folder / files.PREPARED)
    if dataset.name != dataset.requested:
        print(f"built with {dataset.label}: {downloads.NETWORK_REMEDY} to verify it with {dataset.requested}")


def _link_downloads(folder: Path) -> None:
    """Reuse the files that are already downloaded. Missing and damaged ones come from the mirrors, as usual."""
    for path, is_published in published.downloaded():
        if is_published:
            link = folder / path.relative_to(files.root())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def _environment() -> dict[str, str]:
    """That of this process, without other stores; a mirror that is a relative path is made absolute."""
    outside = ("MLFLOW", "DVC", "OPTUNA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    mirror = environment.get(downloads.MIRROR_VARIABLE)
    if mirror and "://" not in mirror:
        environment[downloads.MIRROR_VARIABLE] = str(files.root() / mirror)
    return environment


def _run_as_group(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and standard error of ``command``, whose output is shown. An interrupt ends what it started, too."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate()
        except BaseException:
            _end(process)
            raise
    return process.returncode, errors


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the whole process group, then SIGKILL after a while, or at a second interrupt.

    The processes share one standard error, which ends with the last of them.
    """
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=GRACE_SECONDS)
    finally:
        # PermissionError is what macOS raises for a group that is just ending.
        with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=GRACE_SECONDS)


def _table(first: Mapping[str, str], second: Mapping[str, str], committed: Mapping[str, str]) -> Iterator[str]:
    yield f"{'output':<40}{'MD5':<18}{'second run':<14}dvc.lock"
    for path, md5 in first.items():
        again = "same" if second.get(path) == md5 else "DIFFERENT"
        before = "same" if committed.get(path) == md5 else "different"
        yield f"{path:<40}{md5[:12]:<18}{again:<14}{before}"


def _reasons() -> Iterator[str]:
    yield "params.yaml or the code has changed since dvc.lock was written: `git diff HEAD` shows what is not committed"
    for package, (here, wanted) in machine.versions().items():
        if package in DECIDING:
            yield f"{package} is {here}" + ("" if here == wanted else f", {machine.REQUIREMENTS} has {wanted}")
    tags = machine.environment_tags(recipe.device_for(read_params()))
    for name in ("numba.target", "device", "cpu.capability", "cpu.threads"):
        yield f"{name} is {tags[name]}; it may differ on the machine that wrote dvc.lock"


if __name__ == "__main__":
    run_command(main)
