"""The machine and the code that a figure comes from."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """What a reader needs to compare the figures with their own."""
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def code() -> str:
    """The commit, with "-dirty" after it where the files are not those of the commit."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.now(UTC).date().isoformat()


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
