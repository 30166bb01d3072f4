"""Files are written whole or not at all."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import Fault, UserError
from tests.conftest import OWN_MOUNTS, REPOSITORY, needs_namespaces


def _can_trace() -> bool:
    traced = ["strace", "-o", os.devnull, "true"]
    return bool(shutil.which("strace")) and subprocess.run(traced, capture_output=True, check=False).returncode == 0


@pytest.mark.faults
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("a full disk", marks=needs_namespaces),
        "a file-size limit",
        "a folder that only others may write",
    ],
)
def test_fault_3_a_write_that_fails_leaves_the_older_file(tmp_path: Path, way: str) -> None:
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


# strace is not a Python package and is for Linux only, so `make setup` cannot install it: a clone on macOS, or in a
# container that may not trace, must be able to run the other tests. CI is not let through without it (.ci/run).
@pytest.mark.faults
@pytest.mark.skipif(
    not _can_trace(),
    reason="reads off the system calls that a file is on the disk before it has its name, which nothing short of a "
    "power failure shows otherwise; pip cannot install strace, and here there is none or it may not trace: on Linux, "
    "apt-get install strace",
)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_write_ends(tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "folder"
    code = (
        f"from pathlib import Path; from pipeline import files; files.write(Path({str(folder / 'file')!r}), b'whole')"
    )
    strace = ["strace", "-f", "-y", "-e", "trace=/^(write|f.*sync|rename.*)$", "-o", str(trace)]
    subprocess.run([*strace, sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    calls = re.findall(rf'([a-z]+)\w*\(.*?{re.escape(str(folder))}([^">]*)', trace.read_text())
    ((_, unfinished), *_) = calls
    assert unfinished not in ("", "/file")
    assert calls == [("write", unfinished), ("fsync", unfinished), ("rename", unfinished), ("fsync", "")]
    assert (folder / "file").read_bytes() == b"whole"


def test_what_a_killed_process_left_half_written_goes_with_the_next_write(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = tmp_path / f".file.{int(done.stdout)}.tmp", tmp_path / f".file.{os.getppid()}.tmp"
    for path in (dead, alive, tmp_path / ".file.tmp", tmp_path / ".file.mine.tmp"):
        path.touch()
    files.write(tmp_path / "file", b"whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", alive.name, ".file.tmp", ".file.mine.tmp"}


@pytest.mark.faults
def test_a_folder_that_is_a_link_to_nothing_is_said_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(Fault, match=r"checkpoints is a link to .*gone, which does not exist: make that folder"):
        files.check_writable(tmp_path / "checkpoints")


@pytest.mark.faults
@pytest.mark.parametrize("there", [True, False])  # else it tries the folder above
@pytest.mark.parametrize("step", [1, 2])
def test_fault_46_what_a_process_left_that_was_killed_while_it_tried_a_folder_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, there: bool
) -> None:
    code = f"""
import os, signal
from pathlib import Path
from pipeline import files
calls = iter(range(1, 10))
os.fsync = lambda _: next(calls) == {step} and os.kill(os.getpid(), signal.SIGKILL)
files.check_writable(Path("models"))
"""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    if there:
        models.mkdir()
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.rglob(".*") if path.is_file()]
    models.mkdir(exist_ok=True)
    living = models / f".model.safetensors.{os.getppid()}.tmp"
    living.touch()
    files.check_writable(Path("models"))
    assert [path for path in tmp_path.rglob(".*") if path.is_file()] == [living]


@pytest.mark.faults
def test_fault_46_the_temporary_folder_of_a_killed_command_is_removed_by_the_next(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path), "DVC_ROOT": str(tmp_path)}
    code = """
import os, signal, tempfile
from pipeline import files
files.use_own_temporary_folder()
open(tempfile.mkdtemp() + "/large", "w").close()
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert list(left.rglob("large"))
    living, other = tmp_path / f"convtrack-{os.getppid()}-abc", tmp_path / "convtrack-999999999"
    for folder in (living, other):
        folder.mkdir()
    subprocess.run([sys.executable, "-m", "pipeline.recover"], cwd=tmp_path, env=environment, check=True)
    assert set(tmp_path.iterdir()) == {living, other}


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


def test_processes_that_try_a_folder_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = "from pathlib import Path\nfrom pipeline import files\nfor _ in range(150): files.check_writable(Path())"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0)] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"epoch,loss\n1,\x80\n", b'{"te', b"\xff\xfe", b"7"])
def test_fault_7_a_damaged_report_names_its_stage(tmp_path: Path, content: bytes) -> None:
    report = tmp_path / "report"
    report.write_bytes(content)
    with pytest.raises(Fault, match=f"^{report} is damaged .*: run `dvc repro -f evaluate`$"):
        files.read_json(report, made_by="evaluate")
    if not content.isascii():
        with pytest.raises(Fault, match=f"^{report} is damaged .*: run `dvc repro -f train`$"):
            files.read_table(report, made_by="train")
