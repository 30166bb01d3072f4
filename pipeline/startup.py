"""What a command sets before it imports the libraries, which takes seconds."""

import gc
import os
import signal
import sys
from types import FrameType

from pipeline import command_line


def start_command() -> None:
    """Called when `pipeline` is imported. Does nothing except under `python -m pipeline.<command>`.

    A notebook or a program that imports `pipeline` keeps its garbage collector and its signal handlers.
    """
    if sys.argv[:1] != ["-m"]:  # what Python puts there until it has found the module to run
        return
    command = sys.orig_argv[-len(sys.argv)].rpartition("pipeline.")[2]
    if command in command_line.DESCRIPTIONS:
        arguments = command_line.parse(command, sys.argv[1:])  # answers --help and refuses wrong arguments now
        if command in command_line.FIRST_LINES:
            print(command_line.FIRST_LINES[command].format(**vars(arguments)), flush=True)
    if problem := _unsupported():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    from pipeline import files  # only now: what it imports fails on Windows

    # By default Python collects after every 700 new objects. Importing the libraries makes half a million that all
    # stay: collecting took a third of the time that a stage needs to start.
    gc.set_threshold(100_000, 50, 100)
    files.use_own_temporary_folder()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else `nohup` or a shell's `&` has it ignored
        signal.signal(signal.SIGINT, _exit_at_once)  # until errors.run_command takes over


def _unsupported() -> str | None:
    """What no command can run with. Libraries would end in a traceback, or train for hours."""
    if sys.platform == "win32":
        return "this project needs Linux or another Unix; on Windows, run it in WSL"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set, and the loops of this project need Numba to compile them: unset it"
    if sys.flags.optimize > 1:
        return (
            f"PYTHONOPTIMIZE is {sys.flags.optimize}, and MLflow does not work without docstrings: unset it, or set 1"
        )
    if any(option.startswith("error") for option in sys.warnoptions):
        return "PYTHONWARNINGS makes the warnings of libraries errors: unset it"
    return None


def _exit_at_once(signal_number: int, frame: FrameType | None) -> None:
    """Without the traceback of whatever is being imported: nothing has begun yet."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal_number)
