"""Folders and zips with all that people, systems and programs leave in them."""

import io
import os
import socket
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given

from pipeline.data import file_trees
from pipeline.data.file_trees import Contents, FileTree, Folder, Zip
from pipeline.errors import UserError
from tests.test_bad_input import damaged, is_one_line, two_hundred

CATS = {"cat/1.png": b"cat 1", "cat/2.png": b"cat 2"}


def fill(top: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files, by their paths."""
    top.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(content)
    return top


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    """A .zip with these files, by their paths; one that ends in a slash is a folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def refusal(call: Callable[[], object]) -> str:
    """The one line of the UserError that ``call`` raises."""
    with pytest.raises(UserError) as error:
        call()
    assert is_one_line(str(error.value)), error.value
    return str(error.value)


def in_folder(tmp_path: Path, files: Mapping[str, bytes]) -> FileTree:
    return Folder(fill(tmp_path / "pictures", files))


def in_zip(tmp_path: Path, files: Mapping[str, bytes]) -> FileTree:
    return Zip(zipped(tmp_path / "pictures.zip", files))


in_both = pytest.mark.parametrize("tree_of", [in_folder, in_zip])


def files_of(contents: Contents) -> list[str]:
    return sorted(contents.files)


def skipped_by(contents: Contents) -> dict[str, list[str]]:
    return {reason: sorted(paths) for reason, paths in contents.skipped.items()}


@in_both
def test_files_in_any_depth_are_found_and_opened(
    tmp_path: Path, tree_of: Callable[[Path, Mapping[str, bytes]], FileTree]
) -> None:
    files = CATS | {"top.txt": b"", "a/b/c/d.PNG": b"deep", "日本語/é 👍.png": b"named", "a=b,c:d@e/'\"\n.png": b"odd"}
    tree = tree_of(tmp_path, files)
    contents = tree.contents()
    assert files_of(contents) == sorted(files)
    assert sorted(contents.folders) == sorted(["cat", "a", "a/b", "a/b/c", "日本語", "a=b,c:d@e"])
    assert skipped_by(contents) == {}
    for path, content in files.items():
        with tree.open(path) as file:
            assert file.read() == content
            assert file.seek(0) == 0
    tree.close()


@in_both
@pytest.mark.parametrize(
    "system", [".DS_Store", "._1.png", ".hidden.png", "Thumbs.db", "desktop.ini", "cat/.DS_Store", "cat/._1.png",
               "__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git", "cat/@eaDir", "cat/.ipynb_checkpoints"],
)  # fmt: skip
def test_hidden_files_and_those_of_systems_are_left_out(
    tmp_path: Path, system: str, tree_of: Callable[[Path, Mapping[str, bytes]], FileTree]
) -> None:
    is_file = Path(system).suffix in (".png", ".db", ".ini") or system.endswith(".DS_Store")
    more = [system] if is_file else [f"{system}/1.png", f"{system}/cat/2.png"]
    contents = tree_of(tmp_path, CATS | dict.fromkeys(more, b"")).contents()
    assert files_of(contents) == sorted(CATS)
    assert contents.folders == ["cat"]
    assert skipped_by(contents) == {file_trees.HIDDEN: [system]}


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    top = fill(tmp_path / "pictures", CATS)
    elsewhere = fill(tmp_path / "elsewhere", {"dog/3.png": b"dog 3", "one.png": b"1"})
    (elsewhere / "back").symlink_to(elsewhere)
    links = {
        "cat/linked.png": elsewhere / "one.png",
        "dog": elsewhere / "dog",
        "other": elsewhere,  # its folder dog has been read, and its link leads to itself
        "again": top / "cat",
        "above": tmp_path,
        "cat/loop": top / "cat",
        "itself": top / "itself",
        "gone.png": tmp_path / "gone.png",
        "null.png": Path("/dev/null"),
    }
    for path, target in links.items():
        (top / path).symlink_to(target)
    tree = Folder(top)
    contents = tree.contents()
    assert files_of(contents) == ["cat/1.png", "cat/2.png", "cat/linked.png", "dog/3.png", "other/one.png"]
    assert skipped_by(contents) == {
        file_trees.LINK_TO_SEEN: ["above", "again", "cat/loop", "other/back", "other/dog"],
        file_trees.BROKEN_LINK: ["gone.png", "itself"],
        file_trees.NOT_REGULAR: ["null.png"],
    }
    assert tree.open("dog/3.png").read() == b"dog 3"


def test_pipes_and_sockets_are_left_out_and_nobody_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fill(tmp_path / "pictures", CATS))  # the path of a socket must be short
    os.mkfifo("cat/pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("cat/socket.png")
        tree = Folder(Path())
        contents = tree.contents()
        assert files_of(contents) == sorted(CATS)
        assert skipped_by(contents) == {file_trees.NOT_REGULAR: ["cat/pipe.png", "cat/socket.png"]}
    assert refusal(lambda: tree.open("cat/pipe.png")) == "cat/pipe.png is not a regular file"


def test_a_name_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    top = fill(tmp_path / "pictures", CATS)
    (top / os.fsdecode(b"cat/caf\xe9.png")).touch()
    (top / os.fsdecode(b"d\xf6g")).mkdir()
    contents = Folder(top).contents()
    assert files_of(contents) == sorted(CATS)
    assert contents.folders == ["cat"]
    assert skipped_by(contents) == {file_trees.NOT_UTF8: ["cat/caf\udce9.png", "d\udcf6g"]}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is above it may be closed to the other user
    tmp_path.chmod(0o755)
    top = fill(Path("pictures"), CATS | {"dog/1.png": b"", "cat/2.png": b""})
    (top / "dog").chmod(0)
    (top / "cat/2.png").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read all
        line = refusal(Folder(top).contents)
        assert refusal(lambda: Folder(top).open("cat/2.png")) == "cat/2.png cannot be read: Permission denied"
    finally:
        os.seteuid(user)
        (top / "dog").chmod(0o755)
    assert line == (
        "the folder pictures/dog cannot be read (Permission denied): make it readable, or move it elsewhere"
    )


def test_a_file_that_has_gone_or_is_too_large_is_named(tmp_path: Path) -> None:
    top = fill(tmp_path, {"large.png": b""})
    os.truncate(top / "large.png", file_trees.MAX_BYTES + 1)
    tree = Folder(top)
    assert refusal(lambda: tree.open("large.png")) == "large.png has 1,073,741,825 bytes; allowed: 1,073,741,824"
    assert refusal(lambda: tree.open("gone.png")) == "gone.png cannot be read: No such file or directory"


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", CATS)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    assert refusal(Zip(path).contents) == f"cat/1.png in {path} is encrypted: make a zip without a password"


def test_a_zip_with_a_rare_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/1.png", b"cat")
    assert "is compressed by method 14; allowed: 0 and 8" in refusal(Zip(tmp_path / "it.zip").contents)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\3\4" + bytes(100), b"PK\5\6" + b"\xff" * 18])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it.zip").write_bytes(content)
    line = refusal(lambda: Zip(tmp_path / "it.zip"))
    assert line.startswith(f"{tmp_path / 'it.zip'} is not a zip archive, or is damaged (")


def test_a_damaged_picture_in_a_zip_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", {"cat/1.png": os.urandom(1000), "cat/2.png": b"whole"})
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    tree = Zip(path)
    tree.contents()
    assert refusal(lambda: tree.open("cat/1.png")).startswith(f"cat/1.png in {path} is damaged (Bad CRC-32")
    assert tree.open("cat/2.png").read() == b"whole"


SMALL_ZIP = io.BytesIO()
with zipfile.ZipFile(SMALL_ZIP, "w", zipfile.ZIP_DEFLATED) as _archive:
    for _name in ("cat/é.png", "cat/2.png", "dog/3.png"):
        _archive.writestr(_name, _name * 20)


@two_hundred
@given(content=damaged(SMALL_ZIP.getvalue()))
def test_two_hundred_damaged_zips_are_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.zip").write_bytes(content)
    try:
        tree = Zip(tmp_path / "it.zip")
        for path in tree.contents().files:
            assert len(tree.open(path).read()) <= file_trees.MAX_BYTES
        tree.close()
    except UserError as error:
        assert is_one_line(str(error))


def test_paths_that_lead_out_of_a_zip_are_left_out(tmp_path: Path) -> None:
    unsafe = ["/etc/1.png", "../1.png", "cat/../../1.png", "C:/1.png", "C:\\1.png", "..\\1.png"]
    contents = in_zip(tmp_path, CATS | dict.fromkeys(unsafe, b"")).contents()
    assert files_of(contents) == sorted(CATS)
    assert skipped_by(contents) == {file_trees.UNSAFE: sorted({name.replace("\\", "/") for name in unsafe})}


def test_of_two_files_of_one_path_in_a_zip_the_later_one_counts(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", CATS)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("cat/1.png", b"later")
    tree = Zip(path)
    contents = tree.contents()
    assert files_of(contents) == sorted(CATS)
    assert skipped_by(contents) == {file_trees.REPEATED: ["cat/1.png"]}
    assert tree.open("cat/1.png").read() == b"later"


def test_links_in_a_zip_are_left_out_and_empty_folders_are_found(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", CATS | {"dog/": b"", "no\\pictures\\": b""})
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    contents = Zip(path).contents()
    assert skipped_by(contents) == {file_trees.NOT_REGULAR: ["cat/link.png"]}
    assert sorted(contents.folders) == ["cat", "dog", "no", "no/pictures"]


def test_a_zip_bomb_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size that it declares; if that is a lie, no more than that size is read."""
    path = zipped(tmp_path / "it.zip", {"bomb.png": bytes(10_000_000)})
    monkeypatch.setattr(file_trees, "MAX_BYTES", 9_999_999)
    tree = Zip(path)
    tree.contents()
    line = f"bomb.png in {path} has 10,000,000 bytes; allowed: 9,999,999"
    assert refusal(lambda: tree.open("bomb.png")) == line

    content = path.read_bytes()
    declared = struct.pack("<L", 10_000_000)
    assert content.count(declared) == 2
    path.write_bytes(content.replace(declared, struct.pack("<L", 1000)))
    tree = Zip(path)
    tree.contents()
    assert refusal(lambda: tree.open("bomb.png")).startswith(f"bomb.png in {path} is damaged (Bad CRC-32")


def test_a_zip_inside_a_zip_is_a_file_like_others(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"dog/1.png": b""})
    assert files_of(in_zip(tmp_path, CATS | {"inner.zip": inner.read_bytes()}).contents()) == [*CATS, "inner.zip"]


@pytest.mark.parametrize(
    ("raw", "flags", "name"),
    [
        ("Käse/é.png".encode(), file_trees.UTF8_NAME, "Käse/é.png"),
        ("Käse/日本.png".encode(), 0, "Käse/日本.png"),  # macOS
        ("Käse/é.png".encode("cp437"), 0, "Käse/é.png"),  # Windows
        (b"cat\\1.png", 0, "cat/1.png"),
    ],
)
def test_names_in_a_zip_are_read_in_their_encoding(tmp_path: Path, raw: bytes, flags: int, name: str) -> None:
    stand_in = "x" * len(raw)
    content = zipped(tmp_path / "it.zip", {stand_in: b"it"}).read_bytes()
    content = content.replace(stand_in.encode(), raw)
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.index(signature) + offset
        content = content[:at] + struct.pack("<H", flags) + content[at + 2 :]
    (tmp_path / "it.zip").write_bytes(content)
    tree = Zip(tmp_path / "it.zip")
    assert tree.contents().files == [name]
    assert tree.open(name).read() == b"it"


def test_the_version_of_a_file_changes_with_its_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_trees, "CLOCK_TICK", 0)
    tree, path = in_folder(tmp_path, CATS), tmp_path / "pictures/cat/1.png"
    first, times = [tree.version(path) for path in CATS], path.stat()
    assert [tree.version(path) for path in CATS] == first
    path.write_bytes(b"dog 1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # set back, as some programs do
    assert [tree.version(path) == old for path, old in zip(CATS, first, strict=True)] == [False, True]


def test_the_version_of_a_file_in_a_zip_changes_with_the_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_trees, "CLOCK_TICK", 0)

    def versions() -> list[str]:
        tree = Zip(tmp_path / "cats.zip")
        tree.contents()
        return [tree.version(path) for path in CATS]

    zipped(tmp_path / "cats.zip", CATS)
    first = versions()
    assert versions() == first
    assert len(set(first)) == len(CATS)
    zipped(tmp_path / "cats.zip", CATS | {"cat/1.png": b"dog 1"})
    assert set(versions()).isdisjoint(first)


def test_a_file_that_changed_just_now_has_another_version_each_time(tmp_path: Path) -> None:
    tree = in_folder(tmp_path, CATS)
    assert tree.version("cat/1.png") != tree.version("cat/1.png")
    assert refusal(lambda: tree.version("cat/9.png")) == "cat/9.png cannot be read: No such file or directory"
