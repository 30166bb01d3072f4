"""The cache of machine code: what is damaged is compiled again, and no other user can write into it."""

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numba.core import config

from pipeline.errors import Fault
from pipeline.model import cpu_kernels, kernel_cache, winograd_kernels
from tests.conftest import REPOSITORY

POOLS = """
import numpy as np
from pipeline.model import cpu_kernels
pooled, argmax = np.empty((1, 2, 2, 1), np.float32), np.empty((1, 2, 2, 1), np.uint8)
cpu_kernels.pool_relu(2, 1).forward(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1), pooled, argmax)
print(pooled.ravel())
"""
POOLED = "[ 5.  7. 13. 15.]\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, empty."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The two folders for the cache if no setting names one: the user's, and one in the temporary folder."""
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    kernel_cache._warn.cache_clear()
    return tmp_path / "caches/convtrack", tmp_path / f"temporary/convtrack-{os.getuid()}"


def compute() -> str:
    """The result of a loop as in a new process: compiled, or read from the cache."""
    forward = inspect.unwrap(cpu_kernels.pool_relu)(2, 1).forward
    pooled, argmax = np.empty((1, 2, 2, 1), np.float32), np.empty((1, 2, 2, 1), np.uint8)
    forward(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1), pooled, argmax)
    return f"{pooled.ravel()}\n"


def files_in(folder: Path) -> dict[Path, int]:
    """The files by their inode, which changes when a file is written again."""
    return {path.relative_to(folder): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_at(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip


@pytest.mark.faults
@pytest.mark.parametrize("damage", [_empty, _cut, *map(_flip_at, (0, 0.2, 0.6, 1))])
def test_fault_40_a_loop_whose_file_is_damaged_is_compiled_again(damage: Callable[[Path], None], cache: Path) -> None:
    assert compute() == POOLED
    whole = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert whole
    for path in whole:
        damage(path)
    assert compute() == POOLED
    repaired = files_in(cache)
    assert compute() == POOLED
    assert files_in(cache) == repaired


@pytest.mark.faults
def test_fault_40_the_file_of_another_loop_is_not_read(cache: Path) -> None:
    inspect.unwrap(cpu_kernels.pool_relu)(2, -1).forward(
        np.ones((1, 2, 2, 1), np.float32), np.empty((1, 1, 1, 1), np.float32), np.empty((1, 1, 1, 1), np.uint8)
    )
    (other,) = cache.rglob("*.loop")
    assert compute() == POOLED
    (own,) = set(cache.rglob("*.loop")) - {other}
    shutil.copy(other, own)
    assert compute() == POOLED


@pytest.mark.faults
def test_fault_41_a_folder_of_somebody_else_is_neither_read_nor_written(places: tuple[Path, Path]) -> None:
    own, temporary = places
    other = own.parent / "other"
    other.mkdir(parents=True)
    own.symlink_to(other)
    assert compute() == POOLED
    assert files_in(other) == {}
    assert len(files_in(temporary)) == 1


@pytest.mark.faults
def test_fault_41_a_folder_that_others_can_write_into_is_neither_read_nor_written(places: tuple[Path, Path]) -> None:
    own, temporary = places
    assert compute() == POOLED
    (path,) = own.iterdir()
    path.unlink()
    own.chmod(0o777)
    assert compute() == POOLED
    assert files_in(own) == {}
    assert len(files_in(temporary)) == 1


@pytest.mark.faults
def test_fault_41_without_a_place_for_the_cache_that_is_said_once(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, temporary = places
    own.parent.write_text("no folder")
    temporary.write_text("no folder")
    assert [compute(), compute()] == [POOLED, POOLED]
    said = capsys.readouterr().err
    assert said == (
        f"warning: compiled loops cannot be cached ({own}: Not a directory; {temporary}: File exists), so each process "
        "compiles them again: set NUMBA_CACHE_DIR to a folder that you can write\n"
    )
    with pytest.raises(Fault, match="compiled loops cannot be cached"):
        kernel_cache.folder()


@pytest.mark.faults
def test_fault_41_a_file_that_cannot_be_written_costs_only_time(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own, _ = places
    assert compute() == POOLED
    (path,) = own.iterdir()
    path.unlink()
    path.mkdir()
    assert [compute(), compute()] == [POOLED, POOLED]
    assert capsys.readouterr().err == f"warning: compiled loops cannot be cached ({own}: Is a directory)\n"


@pytest.mark.faults
@pytest.mark.slow
def test_fault_41_clones_share_one_folder_also_at_the_same_time_and_without_a_home(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "pipeline", clone / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    before = files_in(clone)

    def run(code: Path) -> subprocess.Popen[str]:
        environment = {"PYTHONPATH": str(code), "XDG_CACHE_HOME": str(tmp_path / "caches")}
        environment |= {"HOME": "/dev/null", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", POOLS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    at_once = [run(REPOSITORY), run(clone), run(clone)]
    assert [(process.communicate(), process.returncode) for process in at_once] == [((POOLED, ""), 0)] * 3
    cached = files_in(tmp_path / "caches")
    assert len(cached) == 1
    shutil.move(clone, tmp_path / "moved")
    assert run(tmp_path / "moved").communicate() == (POOLED, "")
    assert files_in(tmp_path / "caches") == cached
    assert files_in(tmp_path / "moved") == before  # nothing is written beside the code


def test_what_is_no_longer_used_is_removed(cache: Path) -> None:
    assert compute() == POOLED
    (used,) = cache.rglob("*.loop")
    old, left, new = used.with_name("a.loop"), used.with_name("a.loop.b"), used.with_name("c.loop")
    ancient = time.time() - 2 * kernel_cache.MAX_AGE
    for path in (old, left, new):
        path.touch()
    for path in (used, old, left):
        os.utime(path, (ancient, ancient))
    assert compute() == POOLED  # reads `used`
    kernel_cache._write("d.loop", b"")
    assert {path.name for path in used.parent.iterdir()} == {used.name, "c.loop", "d.loop"}


@pytest.mark.parametrize(("name", "value"), [("OPT", 0), ("LOOP_VECTORIZE", 0), ("BOUNDSCHECK", 1), ("DISABLE_JIT", 1)])
def test_other_settings_of_the_compiler_are_another_target_and_another_file(
    name: str, value: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file_name() -> str:
        return kernel_cache.KernelCache(compute, b"")._name(())

    before = kernel_cache.target(), file_name()
    monkeypatch.setattr(config, name, value)
    assert all(now != then for now, then in zip((kernel_cache.target(), file_name()), before, strict=True))


def test_a_loop_that_calls_others_has_the_same_file_wherever_these_are_in_memory() -> None:
    loops = []
    for _ in range(2):
        winograd_kernels._steps.cache_clear()
        loops.append(inspect.unwrap(winograd_kernels.pooled_tiles)(64, 100, 1))
    one, other = (loop._cache._name(()) for loop in loops)
    assert one == other


def test_a_loop_that_calls_others_has_another_file_for_each_of_their_constants() -> None:
    def name(constant: int) -> str:
        def called() -> int:
            return constant

        calls = cpu_kernels.called_in_loops(called)

        def loop() -> int:
            return calls()

        return kernel_cache.KernelCache(loop, b"")._name(())

    assert name(1) == name(1)
    assert name(1) != name(2)


def test_another_processor_is_another_target() -> None:
    def target(**settings: str) -> str:
        code = "from pipeline.model import kernel_cache; print(kernel_cache.target())"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | settings
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True, text=True
        ).stdout

    assert target() == f"{kernel_cache.target()}\n"
    assert target(NUMBA_CPU_NAME="generic").startswith("generic ")
    assert target(NUMBA_CPU_FEATURES="+sse2").split()[1] != kernel_cache.target().split()[1]


def test_numba_compiles_for_512_bits_and_its_setting_is_as_before() -> None:
    """A processor with AVX-512 and without: Numba's target is that of the process, so each has its own."""
    code = """
from numba.core import config
from pipeline.model import kernel_cache
kernel_cache.get_host_cpu_features = lambda: "{features}"
found = kernel_cache.target_context().codegen().magic_tuple()[2]
print("-prefer-256-bit" in found, config.CPU_FEATURES)
"""
    for features, has_512 in (("+avx2,+avx512f", True), ("+avx2", False)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(features=features)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        assert done.stdout == f"{has_512} None\n"
