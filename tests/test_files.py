"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import UserError
from tests.conftest import OWN_MOUNTS, REPOSITORY, needs_own_mounts


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("a full disk", marks=needs_own_mounts),
        "a file-size limit",
        "a folder that only others may write",
    ],
)
def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, way: str) -> None:
    """In a process of its own, that has the limit or is another user."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"older")
    before, remedy = {
        "a full disk": ("disk()", "make room on that disk"),
        "a file-size limit": (
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",
            "make room on that disk",
        ),
        "a folder that only others may write": (
            "os.chmod('folder', 0o555); os.geteuid() or os.setuid(65534)",
            "make the folder writable",
        ),
    }[way]
    code = f"""
import os, resource, signal, subprocess
from pathlib import Path
from pipeline import files
from pipeline.errors import run_command

def disk():
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", "folder"], check=True)
    Path("folder/file").write_bytes(b"older")

def main():
    {before}
    files.write(Path("folder/file"), bytes(100_000))

try:
    run_command(main)
finally:
    print(Path("folder/file").read_bytes(), os.listdir("folder"))
"""
    # In namespaces of its own, so that the small disk is gone with the process.
    command = [*OWN_MOUNTS, sys.executable, "-c", code] if way == "a full disk" else [sys.executable, "-c", code]
    tmp_path.chmod(0o755)
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    line = done.stderr.decode()
    assert (done.returncode, line.count("\n")) == (1, 1), line
    assert line.startswith("error: folder/file cannot be written (")
    assert line.endswith(f"): {remedy}, then run again\n")
    assert done.stdout.decode() == "b'older' ['file']\n"


def test_what_a_killed_process_left_half_written_goes_with_the_next_write(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = tmp_path / f".file.{int(done.stdout)}.tmp", tmp_path / f".file.{os.getppid()}.tmp"
    for path in (dead, alive, tmp_path / ".file.tmp", tmp_path / ".file.mine.tmp"):
        path.touch()
    files.write(tmp_path / "file", b"whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", alive.name, ".file.tmp", ".file.mine.tmp"}


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    files.write_table(tmp_path / "table.csv", [{"epoch": 1, "class": "T-shirt, long"}, {"epoch": 2, "class": 'a "b"'}])
    rows = files.read_table(tmp_path / "table.csv", made_by="train")
    assert rows == [{"epoch": "1", "class": "T-shirt, long"}, {"epoch": "2", "class": 'a "b"'}]
    assert b"\r" not in (tmp_path / "table.csv").read_bytes()


def test_a_missing_file_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors does not exist: run `dvc repro train` first"):
        files.read(tmp_path / "model.safetensors", made_by="train")


def test_the_root_is_what_dvc_says_else_this_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (files.root() / "pipeline" / "files.py").is_file()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert files.root() == tmp_path.resolve()
    assert files.raw_folder() == tmp_path.resolve() / "data" / "raw"
