"""The cache of the loops' machine code: what it depends on, and where it lies.

Numba's own cache lies beside the code and trusts what it reads: after a flipped bit it crashes, or computes something
else. This one lies in a private folder of the user, each file has a digest, and a damaged one is compiled again. A file
is named after all that its machine code depends on, so all copies of the same code use the same file.
"""

import functools
import hashlib
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numba
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.core.compiler import CompileResult
from numba.core.cpu import CPUContext
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from pipeline.errors import Fault
from pipeline.private_folders import in_temporary_folder, private_folder

NAME = "convtrack"
SUFFIX = ".loop"
DIGEST_BYTES = 32  # of SHA-256, at the start of a file
MAX_AGE = 30 * 24 * 3600  # seconds without use, after which a file is removed
# Numba's settings that change the machine code; those of the processor are in its target.
SETTINGS = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "DISABLE_JIT"),
    *("ENABLE_PROFILING", "EXTEND_VARIABLE_LIFETIMES", "LLVM_REFPRUNE_PASS", "LLVM_REFPRUNE_FLAGS"),
)


@functools.cache
def target_context() -> CPUContext:
    """Numba's target: made here unless there is one, with all 512 bits of AVX-512. To be called before `njit`.

    By default it uses 256 on Intel's processors, because the first ones with AVX-512 slowed down otherwise. On an
    Emerald Rapids an epoch takes 5 to 13 % less time with 512. Numba's settings are as before afterwards.
    """
    before = config.CPU_FEATURES
    if before is None and "+avx512f" in (features := get_host_cpu_features()):
        config.CPU_FEATURES = f"{features},-prefer-256-bit"
    try:
        return cpu_target.target_context
    finally:
        config.CPU_FEATURES = before


def target() -> str:
    """The processor that loops are compiled for, and a digest of its features and of the compiler's settings."""
    _, processor, _ = _target()
    return f"{processor} {hashlib.sha256(repr((_target(), _settings())).encode()).hexdigest()[:8]}"


def _target() -> tuple[str, str, str]:
    system, processor, features = target_context().codegen().magic_tuple()
    return system, processor, features


def _settings() -> dict[str, str]:
    return {name: str(getattr(config, name, None)) for name in SETTINGS}


def folder() -> Path:
    """The folder of the cache, made if it does not exist. Raises Fault if there is no place for it."""
    problems = []
    for path in _places():
        try:
            return private_folder(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    raise Fault(
        f"compiled loops cannot be cached ({'; '.join(problems)}), so each process compiles them again: "
        "set NUMBA_CACHE_DIR to a folder that you can write"
    )


def _places() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR).absolute() / NAME
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):  # a user without a home
        yield (caches if caches.is_absolute() else Path.home() / ".cache") / NAME
    with suppress(OSError):
        yield in_temporary_folder()


class KernelCache:
    """The cache of one loop: what Numba's dispatcher uses of its own caches.

    ``source`` is the text of the file that the loop and all that it calls are defined in.
    """

    cache_path = None

    def __init__(self, loop: Callable[..., object], source: bytes) -> None:
        digest = hashlib.sha256(source).hexdigest()
        self._key = numba.__version__, sys.version, loop.__module__, digest, _identity(loop)

    def load_overload(self, types: tuple[object, ...], context: CPUContext) -> CompileResult | None:
        """The machine code for arguments of these types; None if it is not cached, or damaged."""
        context.refresh()  # as Numba's own cache does
        content = _read(self._name(types))
        return None if content is None else CompileResult._rebuild(context, *pickle.loads(content))

    def save_overload(self, types: tuple[object, ...], compiled: CompileResult) -> None:
        """Store the machine code for arguments of these types."""
        if not compiled.library.has_dynamic_globals:  # addresses in this process
            _write(self._name(types), dumps(compiled._reduce()))

    def flush(self) -> None:
        """Nothing is held back."""

    def _name(self, types: tuple[object, ...]) -> str:
        key = repr((self._key, types, _target(), _settings()))
        return hashlib.sha256(key.encode()).hexdigest() + SUFFIX


def _identity(value: object) -> object:
    """A constant; of a function its name and, as they are in its machine code, the constants from around it."""
    function = getattr(value, "py_func", value)  # Numba's functions have it
    if not hasattr(function, "__qualname__"):
        return value
    return function.__qualname__, [
        _identity(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()
    ]


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()


def _read(name: str) -> bytes | None:
    try:
        path = folder() / name
        stored = path.read_bytes()
        os.utime(path)  # it is in use
    except (OSError, Fault):
        return None
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return content if digest == _digest(name, content) else None


def _write(name: str, content: bytes) -> None:
    try:
        path = folder() / name
        unfinished = path.with_name(f"{name}.{uuid.uuid4().hex}")  # other processes and threads may write it, too
        try:
            unfinished.write_bytes(_digest(name, content) + content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        _remove_unused(path.parent)
    except Fault as fault:
        _warn(str(fault))
    except OSError as error:
        _warn(f"compiled loops cannot be cached ({path.parent}: {error.strerror})")


def _remove_unused(cache: Path) -> None:
    """Remove machine code of code that has changed since, and what killed processes have left."""
    for path in cache.glob(f"*{SUFFIX}*"):
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            if time.time() - path.stat().st_mtime > MAX_AGE:
                path.unlink()


@functools.cache
def _warn(problem: str) -> None:
    """Once in each process."""
    print(f"warning: {problem}", file=sys.stderr)
