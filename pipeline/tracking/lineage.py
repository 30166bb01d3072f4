"""Where a model comes from: the tags that say so, and whether this checkout would make the same model again."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline import files

CODE, RECIPE = "code", "recipe"
PARAMS_SHA256, DATA_SHA256 = "params.sha256", "data.sha256"
MACHINE = ("torch.version", "numba.version", "device", "cpu.capability", "cpu.threads")  # these change the last bits
TELLING = ("tracking", "figures")  # folders of the pipeline that the stage `train` loads to tell of it


def surroundings(device: torch.device | None = None) -> dict[str, str]:
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
        **machine(device),
    }
    return {key: value for key, value in tags.items() if value}


def machine(device: torch.device | None) -> dict[str, str | None]:
    """What of a machine changes the last bits of a model."""
    facts = (
        torch.__version__,
        version("numba"),
        _name(device),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    )
    return dict(zip(MACHINE, facts, strict=True))


def _name(device: torch.device | None) -> str | None:
    if device is None:
        return None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def code() -> str:
    """JSON: every file of the pipeline that this process has loaded, and the start of its SHA-256.

    A commit does not tell of changes that nobody committed; these do. What only tells of a model is left out.
    """
    package = Path(__file__).parents[1]
    loaded = {Path(getattr(module, "__file__", None) or "/") for module in list(sys.modules.values())}
    ours = sorted(path for path in loaded if path.is_relative_to(package) and path.parent.name not in TELLING)
    return json.dumps({path.relative_to(package.parent).as_posix(): _short(path) for path in ours})


def _short(path: Path) -> str:
    return files.sha256(path.read_bytes())[:16] if path.exists() else ""


def differences(
    tags: Mapping[str, str], recipe: Mapping[str, object], data_sha256: str | None
) -> Iterator[tuple[str, str]]:
    """What keeps this checkout from training the model with these tags again: the kind of thing, and what differs.

    ``recipe`` is that of params.yaml, ``data_sha256`` that of the prepared data, None where there are none.
    """
    before = json.loads(tags[RECIPE])
    for knob in sorted(set(before) | set(recipe)):
        if (was := before.get(knob)) != (now := recipe.get(knob)):
            yield "params", f"{knob} was {was}, here it is {now}"
    if data_sha256 is None:
        yield "data", "there are none here yet: dvc repro prepare"
    elif data_sha256 != tags[DATA_SHA256]:
        yield "data", f"SHA-256 was {tags[DATA_SHA256][:12]}..., here it is {data_sha256[:12]}..."
    package = Path(__file__).parents[1]
    for name, digest in json.loads(tags.get(CODE, "{}")).items():
        if _short(package.parent / name) != digest:
            yield "code", f"{name} is another"


def other_machine(tags: Mapping[str, str], device: torch.device) -> list[str]:
    """What may change the last bits of a model that is trained again here, on ``device``."""
    here = surroundings(device)
    return [
        f"{key} was {tags[key]}, here it is {here.get(key)}"
        for key in MACHINE
        if key in tags and tags[key] != here.get(key)
    ]
