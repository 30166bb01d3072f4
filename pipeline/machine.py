"""This machine and checkout: what of them can change the last bits of a model, and which commit this is."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipeline import files

REQUIREMENTS = Path("requirements.lock")
FACTS = ("torch.version", "numba.version", "device", "cpu.capability", "cpu.threads")  # these change the last bits


def environment_tags(device: torch.device | None = None) -> dict[str, str]:
    """The commit, the experiment and the machine. Names that git or DVC did not give are left out.

    ``device`` is the one that a network is trained on, after training.set_up.
    """
    # The stages write these themselves, so that they say nothing of the code.
    changes = _git("status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock")
    tags = {
        "git.commit": _git("rev-parse", "HEAD"),
        "git.dirty": None if changes is None else str(bool(changes)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "dvc.exp": os.environ.get("DVC_EXP_NAME"),
        "python.version": platform.python_version(),
        **facts(device),
    }
    return {key: value for key, value in tags.items() if value}


def facts(device: torch.device | None) -> dict[str, str | None]:
    """What of a machine changes the last bits of a model."""
    values = (
        torch.__version__,
        version("numba"),
        _device_name(device),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    )
    return dict(zip(FACTS, values, strict=True))


def _device_name(device: torch.device | None) -> str | None:
    if device is None:
        return None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
