"""What has to be said before the libraries are imported, which takes seconds."""

import gc
import os
import signal
import sys
from types import FrameType


def begin() -> None:
    """Called by the package itself, so before anything else of it.

    Python looks for garbage after every 700 new objects. The libraries of a stage make half a million while they are
    imported and none of them is garbage: looking for it took a third of the time that a stage needs to start.
    """
    gc.set_threshold(100_000, 50, 100)
    # `python -m pipeline.train` comes here first; errors.run_command takes over when all is imported. Whoever imports
    # the pipeline as a library keeps the handlers that there are; as does a shell that has SIGINT ignored.
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(signal_number: int, frame: FrameType | None) -> None:
    """Nothing has begun yet: no traceback of what is just being imported."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal_number)
