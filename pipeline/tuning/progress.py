"""The study's progress on the terminal."""

import sys
import time

from pipeline.tuning.study import Study


class Progress:
    """One line, computed from the storage: rewritten on a terminal, else a new one whenever it has changed."""

    def __init__(self, study: Study, unit: str = "trials") -> None:
        self._study, self._unit, self._started, self._before = study, unit, time.monotonic(), study.counted()
        self._shown, self._rewrites = "", sys.stdout.isatty()

    def show(self) -> None:
        """Print the line if it has changed."""
        line = self._line()
        if line != self._shown:
            self._shown = line
            print(*(("\r", line, "\033[K") if self._rewrites else (line, "\n")), sep="", end="", flush=True)

    def _line(self) -> str:
        done, elsewhere = self._study.counted(), self._study.running_elsewhere()
        parts = [
            f"{done}/{self._study.total} {self._unit}",
            *([f"{elsewhere} running elsewhere"] if elsewhere else []),
            *self._study.remarks(),
            *self._time_left(done),
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
