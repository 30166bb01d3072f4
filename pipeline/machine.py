"""This machine and this checkout: what can change the last bits of a model, the commit, the installed packages."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipeline import files
from pipeline.errors import Fault
from pipeline.model import kernel_cache

REQUIREMENTS = Path("requirements.lock")
FACTS = (  # these change the last bits
    *("torch.version", "numba.version", "numba.target"),
    *("device", "cpu.capability", "cpu.threads"),
)


def environment_tags(device: torch.device | None = None) -> dict[str, str]:
    """The commit, the DVC experiment and the machine, as tags. Values that git or DVC does not provide are left out.

    ``device`` is the one that a network is trained on, after training.set_up.
    """
    # Without what the stages write themselves, which is not code.
    changes = _git_or_none("status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock")
    tags = {
        "git.commit": _git_or_none("rev-parse", "HEAD"),
        "git.dirty": None if changes is None else str(bool(changes)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "dvc.exp": os.environ.get("DVC_EXP_NAME"),
        "python.version": platform.python_version(),
        **facts(device),
    }
    return {key: value for key, value in tags.items() if value}


def facts(device: torch.device | None) -> dict[str, str | None]:
    """What can change the last bits of a model on another machine."""
    values = (
        torch.__version__,
        version("numba"),
        kernel_cache.target(),
        _device_name(device),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    )
    return dict(zip(FACTS, values, strict=True))


def _device_name(device: torch.device | None) -> str | None:
    if device is None:
        return None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git_or_none(*arguments: str) -> str | None:
    try:
        return git(*arguments, folder=Path()).strip()
    except Fault:
        return None


def git(*arguments: str, folder: Path | None = None) -> str:
    """What a git command prints, by default in the repository's root. Raises Fault."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder or files.root(), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Fault(f"git cannot be run: {error}") from error
    if done.returncode != 0:
        raise Fault(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def copy_repository(folder: Path) -> None:
    """Copy the files that git tracks, or would add, into a new repository."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (files.root() / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files.root() / name, folder / name)
    git("init", "--quiet", folder=folder)


def versions() -> dict[str, tuple[str, str]]:
    """For each installed package of requirements.lock, the version that is installed and the one in the file."""
    found = {}
    for line in (files.root() / REQUIREMENTS).read_text().splitlines():
        name, equals, rest = line.partition("==")
        if equals and name.replace("-", "").replace("_", "").isalnum():
            try:
                found[name] = version(name).split("+")[0], rest.split()[0].rstrip(";")
            except PackageNotFoundError:
                continue  # for another system, or of an extra
    return found
