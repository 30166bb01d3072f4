"""SIGKILL at random moments of `dvc repro`, each followed by one plain `dvc repro`: `make kill-test`.

    python -m bench.kill_test [KILLS]

In a clone, with the packaged images and the published recipe. DVC and its stages are killed together. Each time the
model must be the same, with exactly one finished run, no run left open, and a champion in the registry. Writes
docs/reliability.md; exits 1 where one of these does not hold.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient

from bench import recipes
from bench.measurement import code, machine, today
from pipeline import files
from pipeline.errors import run_command
from pipeline.machine import copy_repository

KILLS = 40
EPOCHS = 30  # so that many of the kills hit the training
TABLE = Path("docs/reliability.md")
STAGES = ("prepare", "train", "evaluate", "visualize")
OUTSIDE = ("MLFLOW", "DVC", "OPTUNA")


@dataclass(frozen=True)
class Killed:
    """When and in which stage a `dvc repro` was killed, and what the next one left."""

    second: float
    stage: str
    model: str
    statuses: Counter[str]
    champion: bool
    code: int

    def holds(self, model: str) -> bool:
        """Whether nothing was lost."""
        whole = (self.code, self.model, self.statuses["FINISHED"], self.statuses["RUNNING"]) == (0, model, 1, 0)
        return whole and self.champion

    def as_row(self, number: int) -> str:
        """A row of the table."""
        closed = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        champion = "yes" if self.champion else "NO"
        return f"| {number} | {self.second:.1f} | {self.stage} | `{self.model[:8]}` | {closed} | {champion} |"


def main() -> None:
    """Run `dvc repro` once undisturbed, then kill it again and again."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    generator, version = random.Random(0), code()
    with TemporaryDirectory(prefix="convtrack-") as temporary:
        clone = Path(temporary) / "clone"
        copy_repository(clone)
        recipe = recipes.as_yaml({"data.dataset": "mnist-5k", "train.epochs": EPOCHS})
        (clone / "params.yaml").write_text(recipe)
        commit = ["-c", "user.name=kill-test", "-c", "user.email=", "commit", "--quiet", "--message=clone"]
        for words in (["add", "--all"], commit):
            subprocess.run(["git", *words], cwd=clone, check=True)
        _repro(clone)  # compiles the CPU kernels
        _clear(clone)
        started = time.perf_counter()
        _repro(clone)
        seconds = time.perf_counter() - started
        model = files.sha256((clone / files.MODEL).read_bytes())
        print(f"undisturbed: {seconds:.1f} s, model {model[:8]}", flush=True)
        rows = list[Killed]()
        while len(rows) < kills:
            _clear(clone)
            if (killed := _kill(clone, generator.uniform(0, seconds))) is not None:
                rows.append(killed)
                print(killed.as_row(len(rows)), flush=True)
    failed = [row for row in rows if not row.holds(model)]
    TABLE.write_text(_page(rows, seconds, model, version))
    print(f"{len(rows) - len(failed)} of {len(rows)} kills lost nothing; {TABLE}")
    sys.exit(bool(failed))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}


def _repro(clone: Path) -> int:
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    done = subprocess.run(command, cwd=clone, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr, flush=True)
    return done.returncode


def _clear(clone: Path) -> None:
    """Make it as after cloning: no outputs, no cache, no store."""
    for name in ("data", "models", "reports", "mlruns", "checkpoints", "mlflow.db", ".dvc/cache", ".dvc/tmp"):
        subprocess.run(["rm", "-rf", name], cwd=clone, check=True)
    for path in clone.glob("mlflow.db*"):
        path.unlink()
    subprocess.run(["git", "checkout", "--quiet", "--", "."], cwd=clone, check=True)
    with (clone / "dvc.lock").open("w") as lock:  # empty, so that every stage runs
        lock.write("schema: '2.0'\nstages: {}\n")


def _kill(clone: Path, second: float) -> Killed | None:
    """Kill `dvc repro` after ``second`` seconds, and run it once more. None if it had ended by then."""
    command = [sys.executable, "-m", "dvc", "repro", "--verbose"]
    log = clone.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=clone, env=_environment(), stdout=output, stderr=output, start_new_session=True
        )
        time.sleep(second)
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if ended:
        return None
    done = _repro(clone)
    # A new name each time: for a known name mlflow would keep reading the earlier file.
    store = shutil.copy(clone / "mlflow.db", clone.parent / f"{time.time_ns()}.db")
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    aliases = [model.aliases for model in MlflowClient().search_registered_models()]
    return Killed(
        second=second,
        stage=_reached(log.read_text()),
        model=files.sha256((clone / files.MODEL).read_bytes()) if (clone / files.MODEL).exists() else "none",
        statuses=Counter(str(run.info.status) for run in found),
        champion=[set(each) for each in aliases] == [{"champion"}],
        code=done,
    )


def _reached(output: str) -> str:
    """The stage that DVC had started last."""
    started = [stage for stage in STAGES if f"Running stage '{stage}'" in output]
    return started[-1] if started else "DVC, before the first stage"


def _page(rows: list[Killed], seconds: float, model: str, version: str) -> str:
    whole = sum(row.holds(model) for row in rows)
    at = Counter(row.stage for row in rows)
    where = ", ".join(f"{count} in {stage}" for stage, count in at.items())
    lines = "\n".join(row.as_row(number) for number, row in enumerate(rows, 1))
    facts = machine()
    return f"""# Reliability: results of the kill test

`make kill-test` runs `dvc repro` in a clone (mnist-5k, the published recipe for {EPOCHS} epochs, {seconds:.0f} s),
kills it with all its processes by SIGKILL at a random moment, and runs `dvc repro` once more. {whole} of {len(rows)}
kills lost nothing: the same model, exactly one finished run for it, no run left open, a champion in the registry.
Kills by stage: {where}.

| # | second | killed in | model | runs afterwards | champion |
|---|---|---|---|---|---|
{lines}

{facts["processor"]} with {facts["cpu_capability"]}, {facts["threads"]} threads, PyTorch {facts["torch"]}; {today()},
code of commit `{version}`.
"""


if __name__ == "__main__":
    run_command(main)
