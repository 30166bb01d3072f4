"""The study's progress on the terminal."""

import sys
import time

from pipeline.tuning.study import ERROR, Study


class Progress:
    """One line, computed from the storage: rewritten on a terminal, else a new one whenever it has changed."""

    def __init__(self, study: Study) -> None:
        self._study, self._started, self._before = study, time.monotonic(), study.counted()
        self._shown, self._rewrites = "", sys.stdout.isatty()

    def show(self) -> None:
        """Print the line if it has changed."""
        line = self._line()
        if line != self._shown:
            self._shown = line
            print(*(("\r", line, "\033[K") if self._rewrites else (line, "\n")), sep="", end="", flush=True)

    def _line(self) -> str:
        counts = self._study.count_by_status()
        best, elsewhere = self._study.best(1), self._study.running_elsewhere()
        parts = [
            f"{counts.total()}/{self._study.total} trials",
            *(f"{counts[name]} {name}" for name in ("pruned", "failed") if counts[name]),
            *([f"{elsewhere} running elsewhere"] if elsewhere else []),
            *(f"best validation accuracy {1 - each.scores[ERROR]:.2%} (trial {each.number})" for each in best),
            *self._time_left(counts.total()),
        ]
        return ", ".join(parts)

    def _time_left(self, done: int) -> list[str]:
        if not self._before < done < self._study.total:
            return []
        left = (time.monotonic() - self._started) / (done - self._before) * (self._study.total - done)
        return [f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"]

    def end(self) -> None:
        """Leave the line, so that what follows starts on a new one."""
        if self._rewrites:
            print()
