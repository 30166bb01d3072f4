"""A person's pictures and their labels: class folders, published splits, tables, names, and zips of all these."""

import os
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import file_trees
from pipeline.data.folder import SPLIT_WORDS, Entry, Listing, Pictures
from pipeline.errors import UserError
from tests.data.test_file_trees import fill, refusal, zipped
from tests.test_bad_input import is_one_line, two_hundred

ANIMALS = {"cat/1.png": b"cat 1", "cat/2.JPG": b"cat 2", "dog/1.png": b"dog 1"}
LABELS = [("cat/1.png", "cat"), ("cat/2.JPG", "cat"), ("dog/1.png", "dog")]


def listing(path: Path, **arguments: str) -> Listing:
    with Pictures(path) as pictures:
        return pictures.listing(**arguments)


def listed(tmp_path: Path, files: Mapping[str, bytes] | list[str], **arguments: str) -> Listing:
    """The listing of a folder with these files."""
    files = files if isinstance(files, Mapping) else dict.fromkeys(files, b"")
    return listing(fill(tmp_path / "pictures", files), **arguments)


def refused(tmp_path: Path, files: Mapping[str, bytes] | list[str], **arguments: str) -> str:
    """The line with which it is refused; `HERE` stands for the folder."""
    return refusal(lambda: listed(tmp_path, files, **arguments)).replace(str(tmp_path / "pictures"), "HERE")


def labels(found: Listing) -> list[tuple[str, str]]:
    return [(entry.path, entry.label) for entry in found.entries]


def test_a_folder_is_a_class_with_all_that_is_inside_it(tmp_path: Path) -> None:
    more = ["cat/young/3.webp", "cat/notes.txt", "dog/bark.wav", "dog/without", "README.md"]
    found = listed(tmp_path, [*ANIMALS, *more])
    assert found.form == "class folders"
    assert found.entries == tuple(Entry(path, label) for path, label in sorted([*LABELS, (more[0], "cat")]))
    assert found.class_names == ("cat", "dog")
    assert found.skipped == {"not a picture by its name": tuple(sorted(more[1:]))}
    assert found.warnings == ()


def test_a_picture_is_known_by_its_suffix_in_any_case(tmp_path: Path) -> None:
    suffixes = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif", "ico"]
    pictures = [f"{name}/1.{suffix}" for name in ("cat", "dog") for each in suffixes for suffix in (each, each.upper())]
    others = ["cat/1.txt", "cat/jpg", "cat/1.png.part", "cat/1.jpg~", "dog/movie.mp4"]
    found = listed(tmp_path, pictures + others)
    assert [entry.path for entry in found.entries] == sorted(pictures)
    assert found.skipped == {"not a picture by its name": tuple(sorted(others))}


def test_the_same_pictures_in_every_form_have_the_same_labels_and_bytes(tmp_path: Path) -> None:
    flat = {path.replace("/", "_"): content for path, content in ANIMALS.items()}
    rows = "".join(f"{path.replace('/', '_')};{path[:3]}\n" for path in ANIMALS)
    table = flat | {"labels.csv": f"File Name;Class\n{rows}".encode()}
    forms: dict[str, tuple[Mapping[str, bytes], dict[str, str]]] = {
        "folders": (ANIMALS, {}),
        "table": (table, {"labels": "labels.csv"}),
        "names": (flat, {"label_pattern": r"^(?P<label>[^_]+)_"}),
        "train": ({f"train/{path}": content for path, content in ANIMALS.items()}, {}),
    }
    for form, (files, arguments) in forms.items():
        inside = {f"pictures/{path}": content for path, content in files.items()}
        places = [
            fill(tmp_path / form, files),
            zipped(tmp_path / f"{form}.zip", files),
            zipped(tmp_path / f"{form} in a folder.zip", inside | {"__MACOSX/pictures/._1.png": b"", "pictures/": b""}),
        ]
        found = []
        for place in places:
            with Pictures(place) as pictures:
                found.append(pictures.listing(**arguments))
                pairs = [(entry.label, pictures.open(entry.path).read()) for entry in found[-1].entries]
            assert pairs == [("cat", b"cat 1"), ("cat", b"cat 2"), ("dog", b"dog 1")]
        assert {(each.form, each.entries, each.warnings) for each in found} == {
            (found[0].form, found[0].entries, found[0].warnings)
        }


@pytest.mark.parametrize("put", [fill, zipped])
def test_a_process_that_did_not_list_the_pictures_opens_them_too(
    tmp_path: Path, put: Callable[[Path, Mapping[str, bytes]], Path]
) -> None:
    with Pictures(put(tmp_path / "pictures", ANIMALS)) as pictures:
        assert pictures.open("cat/2.JPG").read() == b"cat 2"
        assert refusal(lambda: pictures.open("cat/3.png")).startswith("cat/3.png ")
    inside = {f"top/{path}": content for path, content in ANIMALS.items()}
    with Pictures(zipped(tmp_path / "inside.zip", inside)) as pictures:
        assert pictures.open("cat/2.JPG").read() == b"cat 2"


def test_nothing_in_the_folder_is_written(tmp_path: Path) -> None:
    top = fill(tmp_path / "pictures", ANIMALS | {"labels.csv": b"path,label\ncat/1.png,cat\ndog/1.png,dog\n"})

    def state() -> list[tuple[str, int, int]]:
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(tmp_path.rglob("*"))]

    before = state()
    with Pictures(top) as pictures:
        pictures.listing(labels="labels.csv")
        pictures.listing()
        with pictures.open("cat/1.png") as file:
            assert not file.writable()
    assert state() == before


# Published splits.


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "validation", "test"),
        ("Training", "VAL", "Testing"),
        ("TRAIN", "valid", "test"),
        ("train", "dev", "test"),
    ],
)
def test_train_validation_and_test_are_never_classes(tmp_path: Path, train: str, validation: str, test: str) -> None:
    files = [f"{split}/{path}" for split in (train, validation, test) for path in ANIMALS]
    found = listed(tmp_path, files)
    assert found.form == f"class folders in {train}/, {validation}/ and {test}/"
    assert found.class_names == ("cat", "dog")
    splits = {train: "train", validation: "validation", test: "test"}
    assert {entry.path.partition("/")[0]: entry.split for entry in found.entries} == splits
    assert len(found.entries) == len(files)


@pytest.mark.parametrize(
    ("splits", "form"),
    [(["train", "test"], "class folders in train/ and test/"), (["train"], "class folders in train/")],
)
def test_splits_that_are_not_published_are_left_to_be_cut(tmp_path: Path, splits: list[str], form: str) -> None:
    found = listed(tmp_path, [f"{split}/{path}" for split in splits for path in ANIMALS])
    assert found.form == form
    assert {entry.split for entry in found.entries} == set(splits)


@pytest.mark.parametrize("others", [["extra/cat/1.png"], ["extra/1.png"]])
def test_a_third_folder_beside_the_splits_is_named(tmp_path: Path, others: list[str]) -> None:
    files = [f"{split}/{path}" for split in ("train", "test") for path in ANIMALS]
    assert refused(tmp_path, files + others) == (
        "HERE has extra beside train, test: move what is not a split elsewhere. If all these folders are classes, set "
        "data.label_pattern: ^(?P<label>[^/]+)/"
    )


def test_folders_without_pictures_beside_the_splits_do_no_harm(tmp_path: Path) -> None:
    found = listed(tmp_path, [f"train/{path}" for path in ANIMALS] + ["docs/about.txt", "LICENSE", ".git/1.png"])
    assert found.form == "class folders in train/"
    assert found.warnings == ()


def test_a_class_may_be_called_train_if_a_pattern_says_so(tmp_path: Path) -> None:
    files = ["bus/1.png", "car/1.png", "train/1.png"]
    assert refused(tmp_path, files).startswith("HERE has bus, car beside train: ")
    found = listed(tmp_path, files, label_pattern="^(?P<label>[^/]+)/")
    assert labels(found) == [(path, path[:-6]) for path in files]
    assert {entry.split for entry in found.entries} == {None}


def test_a_test_folder_without_class_folders_is_skipped_and_counted(tmp_path: Path) -> None:
    found = listed(tmp_path, [*(f"train/{path}" for path in ANIMALS), "test/1.png", "test/2.png"])
    assert {entry.split for entry in found.entries} == {"train"}
    assert found.skipped == {"not in a class folder": ("test/1.png", "test/2.png")}
    assert found.warnings == ("pictures in no class folder are not used (2): test/1.png, test/2.png",)


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_class_that_is_not_in_train_is_named(tmp_path: Path, split: str) -> None:
    files = [*(f"train/{path}" for path in ANIMALS), f"{split}/cat/1.png", f"{split}/emu/1.png"]
    ending = ": put some there, or leave these classes out"
    assert refused(tmp_path, files) == f"HERE has no pictures in train for 1 of its classes: emu{ending}"
    assert f"for 2 of its classes: cat, dog{ending}" in refused(tmp_path / "2", ["test/cat/1.png", "test/dog/1.png"])


def test_classes_keep_their_numbers_where_the_test_lacks_one(tmp_path: Path) -> None:
    found = listed(
        tmp_path, ["train/cat/1.png", "train/ant/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"]
    )
    assert found.class_names == ("ant", "cat", "dog")


def test_splits_inside_class_folders_are_pointed_out(tmp_path: Path) -> None:
    found = listed(tmp_path, ["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"])
    assert {entry.split for entry in found.entries} == {None}
    assert found.warnings == ("folders called test, train are inside class folders, where they are not splits",)


# Names of classes.


def test_system_files_and_hidden_ones_are_neither_pictures_nor_classes(tmp_path: Path) -> None:
    junk = [".DS_Store", "cat/._1.png", "Thumbs.db", "dog/desktop.ini", "cat/.hidden.png"]
    folders = ["__MACOSX", ".ipynb_checkpoints", "@eaDir", ".thumbnails", "cat/.ipynb_checkpoints"]
    found = listed(tmp_path, [*ANIMALS, *junk, *(f"{each}/1.png" for each in folders)])
    assert labels(found) == LABELS
    assert found.skipped == {file_trees.HIDDEN: tuple(sorted(junk + folders))}
    assert found.warnings == ()


def test_an_empty_class_folder_is_a_warning(tmp_path: Path) -> None:
    (fill(tmp_path / "pictures", ANIMALS) / "emu").mkdir()
    found = listed(tmp_path, ["ant/notes.txt"])
    assert found.class_names == ("cat", "dog")
    assert found.warnings == ("folders without pictures are no classes (2): ant, emu",)


def test_what_may_be_a_lost_class_is_a_warning(tmp_path: Path) -> None:
    top = fill(tmp_path / "pictures", ANIMALS)
    (top / "emu").symlink_to(tmp_path / "a disk that is not there")
    (top / os.fsdecode(b"d\xf6g")).mkdir()
    assert listing(top).warnings == (
        "left out, a link that cannot be followed (1): emu",
        "left out, the name is not UTF-8 (1): d\\udcf6g",
    )
    assert listing(top).skipped["the name is not UTF-8"] == ("d\\udcf6g",)


def test_an_empty_class_folder_of_a_split_is_a_warning(tmp_path: Path) -> None:
    top = fill(tmp_path / "pictures", {f"{split}/{path}": b"" for split in ("train", "test") for path in ANIMALS})
    (top / "test/emu").mkdir()
    assert listing(top).warnings == ("folders without pictures are no classes (1): test/emu",)


def test_pictures_beside_the_class_folders_are_counted(tmp_path: Path) -> None:
    found = listed(tmp_path, [*ANIMALS, "cover.png"])
    assert labels(found) == LABELS
    assert found.warnings == ("pictures in no class folder are not used (1): cover.png",)


@pytest.mark.parametrize(
    "name",
    [
        "café",
        "日本語",
        "👍🏽",
        "👩\u200d🔬",
        "x" * 255,
        "a=b",
        "a,b",
        "a:b",
        "a@b",
        "a'b",
        'a"b',
        "a\\b",
        "a b",
        "-",
        "$HOME",
        "%20",
        "1e3",
        "#",
    ],
)
def test_a_class_may_have_any_printable_name(tmp_path: Path, name: str) -> None:
    found = listed(tmp_path, ["cat/1.png", f"{name}/1.png"])
    assert labels(found) == sorted([("cat/1.png", "cat"), (f"{name}/1.png", name)])
    assert listing(zipped(tmp_path / "it.zip", {"cat/1.png": b"", "a/1.png": b""})).class_names == ("a", "cat")


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31mred", "a\x7f", "a\u202eb", "a\u200bb", "   "])
def test_a_class_whose_name_cannot_be_printed_is_refused_with_its_folder(tmp_path: Path, name: str) -> None:
    line = refused(tmp_path, ["cat/1.png", f"{name}/1.png"])
    assert line.startswith(f"{name.encode('unicode_escape').decode()}/1.png: a class has the name ")
    assert line.endswith("; allowed: printable text of 1 to 300 characters: rename it")


def test_one_name_with_its_accents_composed_in_two_ways_is_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    found = listed(tmp_path, [f"train/{composed}/1.png", f"test/{apart}/1.png", "train/tea/1.png"])
    assert found.class_names == (composed, "tea")
    assert found.warnings == ()
    with Pictures(tmp_path / "pictures") as pictures:
        assert [pictures.open(entry.path).read() for entry in found.entries] == [b""] * 3


def test_names_that_differ_only_in_case_are_a_warning(tmp_path: Path) -> None:
    found = listed(tmp_path, ["Cat/1.png", "cat/1.png", "dog/1.png"])
    assert found.class_names == ("Cat", "cat", "dog")
    assert found.warnings == ("classes differ only in upper and lower case: 'Cat' and 'cat'",)


def test_names_that_differ_only_in_spaces_around_them_are_one_class(tmp_path: Path) -> None:
    found = listed(tmp_path, ["cat/1.png", " cat/1.png", "dog /1.png"])
    assert found.class_names == ("cat", "dog")
    assert found.warnings == ("names that differ only in spaces around them are one class: ' cat' and 'cat'",)


def test_one_class_is_too_few(tmp_path: Path) -> None:
    assert refused(tmp_path, ["photos/cat/1.png", "photos/dog/1.png"]) == (
        "HERE has one class, photos, where two are needed (found: class folders); if the classes are folders inside a "
        "folder, name that folder in data.path, or zip it alone"
    )


def test_ten_thousand_classes_are_enough(tmp_path: Path) -> None:
    files = {f"{number}.png": b"" for number in range(10_001)}
    line = refused(tmp_path, files, label_pattern=r"(?P<label>\d+)\.png")
    assert "HERE has 10,001 classes" in line
    assert line.endswith("allowed: 10,000: is each one a single picture?")
    (tmp_path / "pictures/9999.png").unlink()
    assert len(listing(tmp_path / "pictures", label_pattern=r"(?P<label>\d+)\.png").class_names) == 10_000


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ([], "HERE has no pictures (it is empty): check data.path in params.yaml"),
        (
            ["cat/1.txt", ".DS_Store"],
            "HERE has no pictures (hidden, or a system's own: 1; not a picture by its name: 1): check data.path in "
            "params.yaml",
        ),
        (
            ["cat_1.png", "dog_1.png", "emu_1.png", "labels.csv"],
            "HERE has no class folders, but pictures such as cat_1.png, dog_1.png and 1 more: put those of each class "
            "into a folder, or set in params.yaml data.labels, a table (there is labels.csv), or data.label_pattern, "
            "such as ^(?P<label>[^_]+)_",
        ),
        (
            ["train/1.png", "test/1.png"],
            "HERE has no class folders, but pictures such as test/1.png, train/1.png: put those of each class into a "
            "folder, or set in params.yaml data.labels, a table, or data.label_pattern, such as ^(?P<label>[^_]+)_",
        ),
    ],
)
def test_a_folder_without_labels_is_refused_with_the_choices(tmp_path: Path, files: list[str], line: str) -> None:
    assert refused(tmp_path, files) == line


def test_a_path_that_is_neither_a_folder_nor_a_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.tar").write_bytes(b"tar")
    os.mkfifo(tmp_path / "pipe")
    start = f"params.yaml: data.path is {tmp_path}"
    assert refusal(lambda: Pictures(tmp_path / "none")) == (
        f"{start}/none, which cannot be read (No such file or directory): name a folder of pictures, or a .zip of one"
    )
    assert refusal(lambda: Pictures(tmp_path / "pipe")) == f"{start}/pipe, which is neither a folder nor a .zip"
    assert "it.tar is not a zip archive, or is damaged" in refusal(lambda: Pictures(tmp_path / "it.tar"))
    assert "embedded null byte" in refusal(lambda: Pictures(Path("a\0b")))
    assert "File name too long" in refusal(lambda: Pictures(Path("x" * 300)))


# Tables.


def tabled(tmp_path: Path, text: str, table: str = "labels.csv", **arguments: str) -> Listing:
    return listed(tmp_path, ANIMALS | {table: text.encode()}, labels=table, **arguments)


def refused_table(tmp_path: Path, text: str, **arguments: str) -> str:
    return refused(tmp_path, ANIMALS | {"labels.csv": text.encode()}, **{"labels": "labels.csv"} | arguments)


def test_a_table_says_label_split_and_group(tmp_path: Path) -> None:
    text = "path,label,split,group\ncat/1.png,a,Train,p1\ncat/2.JPG,b,TRAINING,\ndog/1.png,a,testing,p2\n"
    found = tabled(tmp_path, text)
    assert found == Listing(
        "table labels.csv",
        (
            Entry("cat/1.png", "a", "train", "p1"),
            Entry("cat/2.JPG", "b", "train", None),
            Entry("dog/1.png", "a", "test", "p2"),
        ),
        {},
        (),
    )


def test_pictures_that_a_table_does_not_list_are_counted(tmp_path: Path) -> None:
    fill(tmp_path / "pictures", {"notes.txt": b"", "cat/raw": b""})
    found = tabled(tmp_path, "path,label\ncat/1.png,1\ncat/raw,2\n")
    assert labels(found) == [("cat/1.png", "1"), ("cat/raw", "2")]
    assert found.skipped == {
        "not a picture by its name": ("notes.txt",),
        "not in labels.csv": ("cat/2.JPG", "dog/1.png"),
    }


@pytest.mark.parametrize("path", ["cat\\\\1.png", "./cat/1.png", "cat//1.png", " cat/1.png", "dog/../cat/1.png"])
def test_paths_are_found_as_people_write_them(tmp_path: Path, path: str) -> None:
    path = path.replace("\\\\", "\\")
    assert labels(tabled(tmp_path, f"path,label\n{path},a\ndog/1.png,b\n")) == [("cat/1.png", "a"), ("dog/1.png", "b")]


def test_paths_with_accents_composed_in_another_way_are_found(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    found = listed(
        tmp_path, {apart: b"", "b.png": b"", "t.csv": f"path,label\n{composed},a\nb.png,b\n".encode()}, labels="t.csv"
    )
    assert labels(found) == [("b.png", "b"), (apart, "a")]


def test_paths_may_be_relative_to_the_folder_of_the_table(tmp_path: Path) -> None:
    text = "file_name,label\n1.png,a\n../dog/1.png,b\n"
    assert labels(tabled(tmp_path, text, table="cat/metadata.csv")) == [("cat/1.png", "a"), ("dog/1.png", "b")]


def test_a_repeated_row_is_a_warning(tmp_path: Path) -> None:
    found = tabled(tmp_path, "path,label\ncat/1.png,a\ndog/1.png,b\ncat/1.png,a\n./cat/1.png,a\n")
    assert labels(found) == [("cat/1.png", "a"), ("dog/1.png", "b")]
    assert found.warnings == ("labels.csv lists pictures more than once (rows that say nothing new: 2)",)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "path,label\ncat/1.png,a\nemu/1.png,b\nemu/2.png,b\nemu/3.png,b\n",
            "labels.csv lists pictures that are not in HERE (3): emu/1.png, emu/2.png and 1 more: paths are relative "
            "to it and have suffixes; hidden files do not count",
        ),
        (
            "path,label\ncat/1.png,a\ndog/1.png,b\ncat\\1.png,b\n",
            "labels.csv: line 4 lists cat/1.png again, with another label, split or group",
        ),
        (
            "path,label,split\ncat/1.png,a,train\ndog/1.png,b,holdout\n",
            "labels.csv: line 3 has the split holdout; allowed: " + ", ".join(SPLIT_WORDS),
        ),
        (
            "path,label,split\ncat/1.png,a,train\ndog/1.png,b,\n",
            "labels.csv: line 3 has the split nothing; allowed: " + ", ".join(SPLIT_WORDS),
        ),
        (
            "path,label,split\ncat/1.png,a,train\ncat/2.JPG,b,train\ndog/1.png,c,test\n",
            "HERE has no pictures in train for 1 of its classes: c: put some there, or leave these classes out",
        ),
        ("path,label\n", "labels.csv has no rows"),
        ("path,label\ncat/1.png,\n", "labels.csv: line 2 has no label"),
        (
            "path,label\ncat/1.png,a\ndog/1.png,\x1b\n",
            r"dog/1.png: a class has the name '\x1b'; allowed: printable text of 1 to 300 characters: rename it",
        ),
        (
            "path,label\ncat/1.png,a\n",
            "HERE has one class, a, where two are needed (found: table labels.csv); if the classes are folders inside "
            "a folder, name that folder in data.path, or zip it alone",
        ),
    ],
)
def test_a_table_that_does_not_fit_the_pictures_is_refused(tmp_path: Path, text: str, line: str) -> None:
    assert refused_table(tmp_path, text) == line


def test_a_table_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    assert refused_table(tmp_path, "", labels="../labels.txt") == (
        "params.yaml: data.labels is ../labels.txt, which is not a file in HERE (there is labels.csv)"
    )
    line = refused_table(tmp_path, "", label_pattern="(?P<label>.)")
    assert line == "params.yaml: data.labels and data.label_pattern are both given: remove one"


def test_a_group_with_pictures_in_two_published_splits_is_a_warning(tmp_path: Path) -> None:
    text = "path,label,split,group\ncat/1.png,a,train,p1\ncat/2.JPG,b,train,p2\ndog/1.png,a,test,p2\n"
    assert tabled(tmp_path, text).warnings == ("groups have pictures in several of the published splits (1): p2",)


# Patterns.


def test_a_pattern_finds_labels_and_groups_in_paths(tmp_path: Path) -> None:
    files = ["a/p1_cat_1.png", "a/p1_dog_2.png", "b/p2_cat_3.png", "b/cover.png"]
    found = listed(tmp_path, files, label_pattern=r"(?P<group>p\d)_(?P<label>[a-z]+)_")
    assert found.form == r"names that match (?P<group>p\d)_(?P<label>[a-z]+)_"
    assert found.entries == (
        Entry(files[0], "cat", None, "p1"),
        Entry(files[1], "dog", None, "p1"),
        Entry(files[2], "cat", None, "p2"),
    )
    assert found.skipped == {"does not match data.label_pattern": ("b/cover.png",)}


def test_pictures_in_train_and_test_keep_their_splits_in_every_form(tmp_path: Path) -> None:
    files = ["test/cat2.png", "train/cat1.png", "train/dog1.png"]
    table = "path,label\n" + "".join(f"{path},{path.split('/')[1][:3]}\n" for path in files)
    arguments = {"label_pattern": r"/(?P<label>[a-z]+)\d"}, {"labels": "labels.csv"}
    found = [listed(tmp_path, dict.fromkeys(files, b"") | {"labels.csv": table.encode()}, **each) for each in arguments]
    assert [each.form for each in found] == [
        r"names that match /(?P<label>[a-z]+)\d in train/ and test/",
        "table labels.csv in train/ and test/",
    ]
    entries = [Entry(path, path.split("/")[1][:3], path.split("/")[0]) for path in files]
    assert [list(each.entries) for each in found] == [entries] * 2


def test_groups_are_found_by_a_pattern_in_class_folders(tmp_path: Path) -> None:
    files = ["cat/p1-1.png", "cat/p2-1.png", "dog/p1-2.png", "dog/other.png"]
    found = listed(tmp_path, files, group=r"/(?P<group>p\d)-")
    assert {entry.path: entry.group for entry in found.entries} == {
        "cat/p1-1.png": "p1", "cat/p2-1.png": "p2", "dog/p1-2.png": "p1", "dog/other.png": None,
    }  # fmt: skip
    assert found.warnings == ("pictures that data.group does not match are in no group (1): dog/other.png",)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"label_pattern": "(?P<label>["},
            "params.yaml: data.label_pattern is no regular expression (unterminated character set at position 10): "
            "(?P<label>[",
        ),
        (
            {"label_pattern": "(.+)_"},
            "params.yaml: data.label_pattern has no group (?P<label>...), for the part of a path that is the label: "
            "(.+)_",
        ),
        (
            {"group": "(?P<label>.)"},
            "params.yaml: data.group has no group (?P<group>...), for the part of a path that is the group: "
            "(?P<label>.)",
        ),
        (
            {"label_pattern": "(?P<label>emu)"},
            "params.yaml: data.label_pattern (?P<label>emu) matches none of 3 pictures, such as cat/1.png, "
            "cat/2.JPG and 1 more",
        ),
        (
            {"group": "(?P<group>emu)?"},
            "params.yaml: data.group (?P<group>emu)? matches none of 3 pictures, such as cat/1.png, cat/2.JPG and "
            "1 more",
        ),
        (
            {"label_pattern": "(?P<label>..)(?P<group>.)", "group": "(?P<group>.)"},
            "params.yaml: data.group is given, but the labels come with groups too: remove one of the two",
        ),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(tmp_path: Path, arguments: dict[str, str], line: str) -> None:
    assert refused(tmp_path, ANIMALS, **arguments) == line


def test_a_pattern_is_not_tried_on_very_long_paths(tmp_path: Path) -> None:
    """On which some take for ever."""
    long = "/".join(["a" * 250] * 3) + "/1.png"
    found = listed(tmp_path, [*ANIMALS, long], label_pattern="^(?P<label>[a-z]+)")
    assert labels(found) == LABELS
    assert len(found.skipped["does not match data.label_pattern"]) == 1


REGEX_PARTS = [
    "(?P<label>", "(?P<group>", ")", "(", "[", "]", "*", "+", "?", "{2}", "{,9999999999}", ".", "\\d", "\\1", "|", "^",
    "a", "/", "(?i)", "[[a]", "(?<=", "\\N{x}", "\0", "\n",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@two_hundred
@example(pattern="(?P<label>" + "(" * 5000 + ")" * 5001)
@example(pattern="(?P<label>[[a]|.)")  # Python warns
@given(pattern=st.lists(st.sampled_from(REGEX_PARTS), max_size=8).map("".join) | st.text(max_size=30))
def test_two_hundred_patterns_are_used_or_refused_in_one_line(pattern: str, tmp_path: Path) -> None:
    for arguments in ({"label_pattern": pattern}, {"label_pattern": f"(?P<label>{pattern})"}, {"group": pattern}):
        try:
            found = listed(tmp_path, ANIMALS, **arguments)
        except UserError as error:
            assert is_one_line(str(error)), error
        else:
            assert len(found.class_names) >= 2


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_three_seconds(tmp_path: Path) -> None:
    """Of processor time, which other processes do not lengthen."""
    for number in range(200):
        (tmp_path / f"class {number}").mkdir()
        for picture in range(500):
            (tmp_path / f"class {number}/{picture}.png").touch()
    started = time.process_time()
    assert len(listing(tmp_path).entries) == 100_000
    assert time.process_time() - started < 3
