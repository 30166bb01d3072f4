"""Files are written whole or not at all."""

from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import UserError


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder" / "file"
    files.write(target, b"older")

    def disk_full(path: Path, content: bytes) -> int:
        with path.open("wb") as unfinished:
            unfinished.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        files.write(target, b"newer")
    assert target.read_bytes() == b"older"
    assert list(target.parent.iterdir()) == [target]


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
