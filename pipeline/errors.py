"""How every command ends: an exit code and, after an error, one line that says what is wrong and what to do."""

import atexit
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

NO_MEMORY = re.compile(
    r"(can't|cannot|could not) allocate|out of memory|not enough memory|bad_alloc|could not create a", re.I
)
PATIENCE = 2.0  # seconds within which another Ctrl-C is taken for the same one
MAX_NAME_LENGTH = 300  # characters of a name
JOINERS = "\u200c\u200d"  # invisible parts of words in Persian and Hindi, and of emoji such as that of a family
# In a URL all before the last @ of its host, also if somebody has not escaped an @ or a slash in the password. What
# follows the first colon of a host without them is its port.
USER_AND_PASSWORD = re.compile(r"(?<=://)(?:[^\s/?#:@]*:(?!\d+(?:[/?#\s]|$))\S*|[^\s/?#]*)(?=@)")
# In the query of a URL, and as PostgreSQL's library writes them.
SECRET_VALUE = re.compile(
    r"""([\w-]*(?:password|passwd|pwd|secret|token|credential|access_?key|api_?key)[\w-]*=)
    (?:'[^']*'|"[^"]*"|[^\s&;'"]+)""",
    re.IGNORECASE | re.VERBOSE,
)


class UserError(Exception):
    """The user's mistake. The message says what is wrong, where, what is allowed and what to do. Exit code 2."""


class Fault(Exception):
    """A failure that is not the user's (a store, a disk, a loss that is not finite). Exit code 1."""


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run ``command`` and exit: 0, 2 after a UserError, 1 after a fault, 130 / 143 when interrupted.

    141 without a word if nobody reads its output any more, as after `| head`.

    Any other exception is a bug of this project and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _exit_143)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # set by a script's `&`, to last
        signal.signal(signal.SIGINT, _Interrupt())
        # Python would then handle it as the system does, and one that comes late would change the exit code.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python exits
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        _stop(2, f"error: {without_password(str(error))}")
    except (Fault, OSError) as fault:
        _stop(1, f"error: {without_password(str(fault))}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _stop(1, "error: out of memory: use a smaller train.batch_size or fewer filters, or free some memory")
    except KeyboardInterrupt:
        _stop(130, "interrupted")
    finally:
        gc.freeze()  # else the interpreter spends a second collecting garbage before it exits
    sys.exit(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Including the RuntimeErrors that PyTorch and oneDNN raise for it."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def without_password(text: str) -> str:
    """``text`` without the user and password of URLs, and without the values of keys such as ``password=``."""
    return SECRET_VALUE.sub(r"\1***", USER_AND_PASSWORD.sub("***", text))


def printable(text: str) -> str:
    """An untrusted name, for a message: on one line, escaped, and truncated if it is too long."""
    printable = text if text.isprintable() else "".join(map(_escaped, text))
    return printable if len(printable) <= MAX_NAME_LENGTH else f"{printable[:MAX_NAME_LENGTH]}..."


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() or letter in JOINERS else letter.encode("unicode_escape").decode()


def counted(number: int, thing: str, ending: str = "s") -> str:
    """A number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {thing}{'' if number == 1 else ending}"


def check_class_names(names: Sequence[object]) -> None:
    """Raises ValueError unless these are different texts that ``printable`` leaves as they are, none of them empty."""
    known = set[str]()
    for name in names:
        if not isinstance(name, str) or not name.strip() or printable(name) != name:
            allowed = f"printable text of 1 to {MAX_NAME_LENGTH} characters"
            raise ValueError(f"a class has the name {printable(repr(name))}; allowed: {allowed}")
        if name in known:
            raise ValueError(f"two classes have the name {name}")
        known.add(name)
    if not known:
        raise ValueError("there are no classes")


class _Interrupt:
    """The first Ctrl-C ends the command in order. Others that come at once change nothing; a later one ends it now."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._first > PATIENCE:
            os.write(2, b"interrupted\n")
            os._exit(128 + signal_number)


def _stop(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def _exit_143(signal_number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signal_number)
