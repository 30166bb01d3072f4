"""How a contender says what it did: JSON lines on standard output."""

import json
import resource


def report(**figures: float) -> None:
    """A line."""
    print(json.dumps(figures), flush=True)


def report_memory() -> None:
    """The most memory that this process has had."""
    report(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
