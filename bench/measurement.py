"""How things are measured: time and memory of a process, the machine and the code, and the required bounds."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

DATASET = "mnist"  # of the figures in bench/*.json and docs/benchmarks.md
OUTSIDE = ("MLFLOW", "DVC", "OPTUNA")  # settings that must not reach what is measured
# A process of its own starts the command: a child's peak memory also counts what its parent had when it was started.
LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
print(json.dumps({"seconds": seconds, "peak_mb": peak}))
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Finished:
    """A process that ended: its seconds from start to end, its peak memory, and the JSON lines that it printed."""

    seconds: float
    peak_mb: float
    rows: list[dict[str, float]]


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> Finished:
    """Run a command that sees no GPU and none of the caller's settings. Raises CalledProcessError. Needs Linux."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(OUTSIDE)}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, command)],
        cwd=folder,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *rows, process = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Finished(process["seconds"], process["peak_mb"], rows)


def origin() -> dict[str, object]:
    """Where a figure comes from: the machine, the date and the code."""
    return {"machine": machine(), "date": today(), "code": code()}


def machine() -> dict[str, object]:
    """What readers need to compare a figure with their own."""
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def code() -> str:
    """The commit, followed by "-dirty" where files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.now(UTC).date().isoformat()


def _processor() -> str:
    """The processor's name where Linux knows it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Bound:
    """A figure and its bound; ``low`` if less is better."""

    what: str
    figures: tuple[float, ...]  # their median counts
    bound: float
    aim: float
    unit: str
    low: bool = False

    @property
    def figure(self) -> float:
        """The median."""
        return statistics.median(self.figures)

    @property
    def holds(self) -> bool:
        """Whether the median keeps the bound."""
        return self.figure <= self.bound if self.low else self.figure >= self.bound

    def as_row(self) -> dict[str, object]:
        """For a results file."""
        return asdict(self) | {"figure": self.figure, "holds": self.holds}

    def __str__(self) -> str:
        least = "at most" if self.low else "at least"
        verdict = "holds" if self.holds else "FALLS SHORT"
        spread = f"({min(self.figures):.2f} ... {max(self.figures):.2f})" if len(self.figures) > 1 else ""
        reached = f"{self.what:<62}{self.figure:>7.2f} {self.unit:<7}{spread:<18}"
        return f"{reached}{least} {self.bound:g} (aim {self.aim:g})  {verdict}"


def conclude(bounds: Iterable[Bound]) -> None:
    """Print a line for each bound; exit 1 where one falls short."""
    verdicts = []
    for bound in bounds:
        print(bound)
        verdicts.append(bound.holds)
    if not all(verdicts):
        sys.exit(1)
