"""A person's own pictures, in a folder or a .zip: which there are, and the class, split and group of each.

Opens no picture and writes nothing.
"""

import posixpath
import re
import stat
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from pipeline.data import label_table
from pipeline.data.file_trees import BROKEN_LINK, NOT_UTF8, Contents, FileTree, Folder, Zip
from pipeline.data.splits import SPLITS, TEST, TRAIN, VALIDATION
from pipeline.errors import UserError, check_class_names, counted, printable

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".ico",
})  # fmt: skip
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN,
    "validation": VALIDATION, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION,
    "test": TEST, "testing": TEST,
}  # fmt: skip
MAX_CLASSES = 10_000
MAX_MATCHED = 500  # characters of a path that a pattern is tried on: some patterns take very long on long texts
MAX_SHOWN = 60  # characters of a name in a message that shows several
NO_PICTURE = "not a picture by its name"
NO_CLASS_FOLDER = "not in a class folder"
NO_MATCH = "does not match data.label_pattern"


class Entry(NamedTuple):
    """One picture."""

    path: str  # relative to the folder, or to the top of the zip, with forward slashes
    label: str
    split: str | None = None  # train, validation or test if the publisher says so, which he then does for all pictures
    group: str | None = None  # pictures of one subject, which must stay in one split


@dataclass(frozen=True)
class Listing:
    """All pictures with their labels, sorted by path, and what else was found.

    ``form`` says how they were read. ``skipped`` holds the paths, in a printable form, of what is left out, by reason.
    """

    form: str
    entries: tuple[Entry, ...]
    skipped: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted. The other splits have no classes but those of the training split."""
        return tuple(sorted({entry.label for entry in self.entries}))


@dataclass
class _Labelled:
    """Pictures with labels as they were written."""

    form: str
    entries: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Pictures:
    """The pictures in a folder or a .zip of one, for a ``with``."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where ``path``, which is data.path of params.yaml, is neither."""
        self._tree = _tree(path)
        # The folder that holds all files of a zip, with a slash; None while that is not known.
        self._top = None if isinstance(self._tree, Zip) else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tree.close()

    def listing(self, labels: str | None = None, label_pattern: str | None = None, group: str | None = None) -> Listing:
        """All pictures with their labels: from the table ``labels``, from their names, or from the folders they are in.

        The arguments are parameters of the section data in params.yaml. Raises UserError where labels, splits or groups
        are not clear.
        """
        if labels is not None and label_pattern is not None:
            raise UserError("params.yaml: data.labels and data.label_pattern are both given: remove one")
        contents = self._contents()
        if labels is not None:
            labelled = self._by_table(contents, labels)
        elif label_pattern is not None:
            labelled = _by_pattern(contents, label_pattern)
        else:
            labelled = _by_folders(contents)
        _add_splits(labelled)
        if group is not None:
            labelled.entries = _grouped(labelled, group)
        entries = _with_classes(labelled, contents.name)
        labelled.warnings += _group_warnings(entries)
        labelled.warnings += [
            f"left out, {reason} ({len(paths):,}): {_some(sorted(paths))}"
            for reason in (BROKEN_LINK, NOT_UTF8)
            if (paths := contents.skipped.get(reason))
        ]
        skipped = {reason: tuple(map(printable, sorted(paths))) for reason, paths in sorted(contents.skipped.items())}
        return Listing(labelled.form, tuple(sorted(entries)), skipped, tuple(labelled.warnings))

    def open(self, path: str) -> IO[bytes]:
        """The file of an Entry, seekable. Raises UserError where it cannot be read, is damaged or too large."""
        if self._top is None:
            self._contents()
        return self._tree.open(f"{self._top}{path}")

    def source(self, path: str) -> str | Callable[[], memoryview]:
        """The file of an Entry for a decoder: where it is on the disk, or what reads it, which raises as `open`."""

        def content() -> memoryview:
            with self.open(path) as file:
                return memoryview(file.read())

        return self._tree.file(path) or content

    def version(self, path: str) -> str:
        """Of the file of an Entry: see FileTree. The listing comes first."""
        return self._tree.version(f"{self._top}{path}")

    def _contents(self) -> Contents:
        """What there is. If one folder holds all files of a zip, paths are relative to it."""
        contents = self._tree.contents()
        top = _single_folder(contents.files) if isinstance(self._tree, Zip) else ""
        contents.files = sorted(path.removeprefix(top) for path in contents.files)
        contents.folders = [path.removeprefix(top) for path in contents.folders if f"{path}/" != top]
        self._top = top
        return contents

    def _by_table(self, contents: Contents, labels: str) -> _Labelled:
        """The pictures that a table lists, whatever their suffixes."""
        finder, name = _Finder(contents.files), _short(labels)
        table = finder.find(labels)
        if table is None:
            raise UserError(
                f"params.yaml: data.labels is {name}, which is not a file in {contents.name}{_tables(contents)}"
            )
        with self.open(table) as file:
            rows = label_table.read(file.read(), name)
        paths = _listed(rows, table, finder, contents.name)
        labelled = _Labelled(f"table {name}", _entries(rows, paths, name))
        if repeated := len(rows) - len(labelled.entries):
            labelled.warnings.append(f"{name} lists pictures more than once (rows that say nothing new: {repeated:,})")
        for path in set(contents.files) - {table, *paths}:
            contents.skip(f"not in {name}" if _is_picture(path) else NO_PICTURE, path)
        return labelled


def _tree(path: Path) -> FileTree:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"params.yaml: data.path is {printable(str(path))}, which cannot be read ({reason}): name a folder of "
            "pictures, or a .zip of one"
        ) from error
    if stat.S_ISDIR(mode):
        return Folder(path)
    if stat.S_ISREG(mode):
        return Zip(path)
    raise UserError(f"params.yaml: data.path is {printable(str(path))}, which is neither a folder nor a .zip")


def _single_folder(files: Collection[str]) -> str:
    """The folder that holds all ``files``, with a slash; empty if there is none, or if it is a split."""
    tops = {path[: path.find("/") + 1] for path in files}
    return "" if len(tops) != 1 or tops & {""} or _split_folders(files) else tops.pop()


def _split_folders(paths: Iterable[str]) -> dict[str, str]:
    """The split of each top folder that is called like one."""
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    found = {top: SPLIT_WORDS[_word(top)] for top in sorted(tops) if _word(top) in SPLIT_WORDS}
    return dict(sorted(found.items(), key=lambda item: SPLITS.index(item[1])))


def _word(text: str) -> str:
    return text.strip().casefold()


def _is_picture(path: str) -> bool:
    return path[path.rfind(".") :].lower() in SUFFIXES


def _pictures(contents: Contents) -> list[str]:
    """The files that are pictures by their names, at least one."""
    found = []
    for path in contents.files:
        if _is_picture(path):
            found.append(path)
        else:
            contents.skip(NO_PICTURE, path)
    if not found:
        counts = "; ".join(f"{reason}: {len(paths):,}" for reason, paths in sorted(contents.skipped.items()))
        raise UserError(f"{contents.name} has no pictures ({counts or 'it is empty'}): check data.path in params.yaml")
    return found


def _by_folders(contents: Contents) -> _Labelled:
    """A top folder is a class; so is a folder in a top folder such as train, if there are no others."""
    pictures = _pictures(contents)
    splits = _split_folders(pictures)
    others = sorted({path.partition("/")[0] for path in pictures if "/" in path} - splits.keys())
    if splits and others:
        raise UserError(
            f"{contents.name} has {_some(others)} beside {_some(splits)}: move what is not a split elsewhere. If all "
            "these folders are classes, set data.label_pattern: ^(?P<label>[^/]+)/"
        )
    labelled = _Labelled(f"class folders{_inside(splits)}")
    for path in pictures:
        *folders, _ = path.split("/")
        split = splits[folders.pop(0)] if splits and folders else None
        if folders:
            labelled.entries.append(Entry(path, folders[0], split))
        else:
            contents.skip(NO_CLASS_FOLDER, path)
    if not labelled.entries:
        raise UserError(
            f"{contents.name} has no class folders, but pictures such as {_some(pictures)}: put those of each class "
            f"into a folder, or set in params.yaml data.labels, a table{_tables(contents)}, or data.label_pattern, "
            "such as ^(?P<label>[^_]+)_"
        )
    labelled.warnings += _folder_warnings(contents, labelled.entries, splits)
    return labelled


def _folder_warnings(contents: Contents, entries: Iterable[Entry], splits: Mapping[str, str]) -> list[str]:
    found = []
    if loose := contents.skipped.get(NO_CLASS_FOLDER):
        found.append(f"pictures in no class folder are not used ({len(loose):,}): {_some(sorted(loose))}")
    depth = 2 if splits else 1
    used = {"/".join(path.split("/")[:depth]) for path, *_ in entries}
    classes = {
        folder
        for folder in contents.folders
        if folder.count("/") == depth - 1 and (not splits or _word(folder.partition("/")[0]) in SPLIT_WORDS)
    }
    if empty := sorted(classes - used):
        found.append(f"folders without pictures are no classes ({len(empty):,}): {_some(empty)}")
    inside = {path.split("/")[depth] for path, *_ in entries if path.count("/") > depth}
    if words := sorted(name for name in inside if _word(name) in SPLIT_WORDS):
        found.append(f"folders called {_some(words)} are inside class folders, where they are not splits")
    return found


def _by_pattern(contents: Contents, text: str) -> _Labelled:
    """The label is a part of the path."""
    pattern, pictures = _compiled(text, "data.label_pattern", "label"), _pictures(contents)
    labelled = _Labelled(f"names that match {_short(text)}")
    for path in pictures:
        match = _search(pattern, path)
        if match is None or not match["label"]:
            contents.skip(NO_MATCH, path)
            continue
        group = _normal(match.groupdict().get("group") or "") or None
        labelled.entries.append(Entry(path, match["label"], group=group))
    if not labelled.entries:
        raise _no_match("data.label_pattern", text, pictures)
    return labelled


def _add_splits(labelled: _Labelled) -> None:
    """Where the labels say no splits, top folders such as train do, if all pictures are in them."""
    splits = _split_folders(path for path, *_ in labelled.entries)
    tops = [path.partition("/")[0] for path, *_ in labelled.entries]
    if TRAIN in splits.values() and splits.keys() == set(tops) and not any(entry.split for entry in labelled.entries):
        pairs = zip(labelled.entries, tops, strict=True)
        labelled.entries = [entry._replace(split=splits[top]) for entry, top in pairs]
        labelled.form += _inside(splits)


def _grouped(labelled: _Labelled, text: str) -> list[Entry]:
    """The pictures with the groups that the pattern data.group finds in their paths."""
    pattern = _compiled(text, "data.group", "group")
    if any(entry.group for entry in labelled.entries):
        raise UserError("params.yaml: data.group is given, but the labels come with groups too: remove one of the two")
    found, unmatched = [], []
    for entry in labelled.entries:
        match = _search(pattern, entry.path)
        group = _normal(match["group"] or "") if match else ""
        found.append(entry._replace(group=group or None))
        if not group:
            unmatched.append(entry.path)
    if len(unmatched) == len(found):
        raise _no_match("data.group", text, unmatched)
    if unmatched:
        labelled.warnings.append(
            f"pictures that data.group does not match are in no group ({len(unmatched):,}): {_some(unmatched)}"
        )
    return found


def _compiled(text: str, parameter: str, group: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a pattern may mean in a future Python
            pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"params.yaml: {parameter} is no regular expression ({printable(str(error))}): {_short(text)}"
        ) from None
    if group not in pattern.groupindex:
        raise UserError(
            f"params.yaml: {parameter} has no group (?P<{group}>...), for the part of a path that is the {group}: "
            f"{_short(text)}"
        )
    return pattern


def _search(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
    return pattern.search(path) if len(path) <= MAX_MATCHED else None


def _no_match(parameter: str, text: str, paths: Collection[str]) -> UserError:
    count = counted(len(paths), "picture")
    return UserError(f"params.yaml: {parameter} {_short(text)} matches none of {count}, such as {_some(paths)}")


class _Finder:
    """Finds files by paths as people write them: with backslashes, a leading ./, accents composed in another way."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = set(files)
        counts = Counter(map(self._plain, self._files))
        self._by_plain = {plain: path for path in self._files if counts[plain := self._plain(path)] == 1}

    def find(self, text: str) -> str | None:
        """The file's own path; None where there is none, or where several may be meant."""
        return text if text in self._files else self._by_plain.get(self._plain(text))

    @staticmethod
    def _plain(text: str) -> str:
        return unicodedata.normalize("NFC", posixpath.normpath(text.strip().replace("\\", "/")))


def _listed(rows: list[label_table.Row], table: str, finder: _Finder, name: str) -> list[str]:
    """The files of the rows, whose paths are relative to the top or, where those fit better, to the table's folder."""
    places = dict.fromkeys(("", posixpath.dirname(table)))
    found = [[finder.find(posixpath.join(place, row.path)) for row in rows] for place in places]
    best = min(found, key=lambda paths: paths.count(None))
    if missing := [row.path for row, path in zip(rows, best, strict=True) if path is None]:
        raise UserError(
            f"{_short(table)} lists pictures that are not in {name} ({len(missing):,}): {_some(missing)}: paths are "
            "relative to it and have suffixes; hidden files do not count"
        )
    return [path for path in best if path is not None]


def _entries(rows: list[label_table.Row], paths: list[str], name: str) -> list[Entry]:
    """One for each picture of a table. Raises UserError where a picture has two labels, or a row no known split."""
    found: dict[str, Entry] = {}
    has_splits = any(row.split for row in rows)
    for row, path in zip(rows, paths, strict=True):
        split = SPLIT_WORDS.get(_word(row.split))
        if has_splits and split is None:
            raise UserError(
                f"{name}: {row.where} has the split {_short(row.split) or 'nothing'}; allowed: {', '.join(SPLIT_WORDS)}"
            )
        entry = Entry(path, _normal(row.label), split, _normal(row.group) or None)
        if found.setdefault(path, entry) != entry:
            raise UserError(f"{name}: {row.where} lists {_short(path)} again, with another label, split or group")
    return list(found.values())


def _with_classes(labelled: _Labelled, name: str) -> list[Entry]:
    """The pictures with the names of their classes. Raises UserError where there is nothing to be learned from them."""
    normal = {label: _normal(label) for label in {entry.label for entry in labelled.entries}}
    entries = [Entry(path, normal[label], split, group) for path, label, split, group in labelled.entries]
    for path, label, *_ in {entry.label: entry for entry in entries}.values():
        try:
            check_class_names([label])
        except ValueError as error:
            raise UserError(f"{_short(path)}: {error}: rename it") from None
    classes = sorted({entry.label for entry in entries})
    if len(classes) < 2:
        raise UserError(
            f"{name} has one class, {_short(classes[0])}, where two are needed (found: {labelled.form}); "
            "if the classes are folders inside a folder, name that folder in data.path, or zip it alone"
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{name} has {len(classes):,} classes (found: {labelled.form}), such as {_some(classes)}; "
            f"allowed: {MAX_CLASSES:,}: is each one a single picture?"
        )
    learned = {entry.label for entry in entries if entry.split in (TRAIN, None)}
    if unknown := sorted(set(classes) - learned):
        raise UserError(
            f"{name} has no pictures in train for {len(unknown):,} of its classes: {_some(unknown)}: put some there, "
            "or leave these classes out"
        )
    if spaces := _alike({unicodedata.normalize("NFC", label) for label in normal}, _normal):
        labelled.warnings.append(f"names that differ only in spaces around them are one class: {_some(spaces)}")
    if case := _alike(classes, str.casefold):
        labelled.warnings.append(f"classes differ only in upper and lower case: {_some(case)}")
    return entries


def _alike(names: Iterable[str], form: Callable[[str], str]) -> list[str]:
    """Those that ``form`` makes the same, together in one text."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted(names):
        groups[form(name)].append(name)
    return [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]


def _group_warnings(entries: Iterable[Entry]) -> list[str]:
    splits = defaultdict[str, set[str]](set)
    for entry in entries:
        if entry.group and entry.split:
            splits[entry.group].add(entry.split)
    if leaking := sorted(group for group, found in splits.items() if len(found) > 1):
        return [f"groups have pictures in several of the published splits ({len(leaking):,}): {_some(leaking)}"]
    return []


def _normal(name: str) -> str:
    """A name as the others are spelled: systems compose accents in different ways."""
    return unicodedata.normalize("NFC", name).strip(" ")


def _short(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


def _some(names: Collection[str]) -> str:
    """Two of them, for a message, and how many more there are."""
    shown = ", ".join(_short(name) for name in list(names)[:2])
    return f"{shown} and {len(names) - 2:,} more" if len(names) > 2 else shown


def _inside(splits: Iterable[str]) -> str:
    folders = [f"{printable(folder)}/" for folder in splits]
    return f" in {' and '.join([', '.join(folders[:-1]), folders[-1]] if folders[1:] else folders)}" if folders else ""


def _tables(contents: Contents) -> str:
    tables = [path for path in contents.files if path.lower().endswith(TABLE_SUFFIXES)]
    return f" (there is {_some(tables)})" if tables else ""
