"""A table of pictures and their labels, in CSV or Parquet."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.errors import UserError, printable

# What a column may be called, in any case and with spaces, `_` or `-` between the words. Its own name comes first, and
# counts before the others.
COLUMNS = {
    "path": (
        "path", "file", "filename", "filepath", "image", "imagepath", "imagename", "imagefile", "img", "imgpath",
        "imgname", "picture",
    ),
    "label": ("label", "labels", "class", "classname", "target", "category"),
    "split": ("split", "subset", "partition", "set"),
    "group": ("group", "groupid", "subject", "subjectid", "patient", "patientid"),
}  # fmt: skip
REQUIRED = ("path", "label")
SEPARATORS = (",", ";", "\t")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # spreadsheets write them when they save "Unicode text"


class Row(NamedTuple):
    """One picture, as text. ``split`` and ``group`` are empty where the table does not say them."""

    where: str  # for messages, such as `line 7`
    path: str
    label: str
    split: str = ""
    group: str = ""


def read(content: bytes, name: str) -> list[Row]:
    """The rows, at least one, each with a path and a label. Raises UserError with ``name`` and the line."""
    rows = list(_parquet_rows(content, name) if content.startswith(b"PAR1") else _csv_rows(content, name))
    if not rows:
        raise UserError(f"{name} has no rows")
    for row in rows:
        if not row.path or not row.label:
            raise UserError(f"{name}: {row.where} has no {'label' if row.path else 'path'}")
    return rows


def _columns(header: Sequence[str], name: str) -> dict[str, int]:
    """Where in ``header`` the columns are. Raises UserError if one is missing or several may be meant."""
    titles = ["".join(each for each in title.casefold() if each not in " _-") for title in header]
    found = {}
    for column, names in COLUMNS.items():
        numbers = [number for number, title in enumerate(titles) if title in names]
        numbers = [number for number in numbers if titles[number] == column] or numbers
        if len(numbers) > 1:
            several = ", ".join(printable(header[number]) for number in numbers)
            raise UserError(f"{name} has several columns for the {column} ({several}): call the right one {column}")
        if numbers:
            found[column] = numbers[0]
        elif column in REQUIRED:
            there = printable(", ".join(header))[:100] or "none"
            raise UserError(f"{name} has no column {column} (it has: {there}): its first line must name path and label")
    return found


def _csv_rows(content: bytes, name: str) -> Iterator[Row]:
    try:
        text = content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"{name} is not a text in UTF-8: save it as CSV in UTF-8") from error
    separator = max(SEPARATORS, key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(lines, [])
        columns = _columns(header, name)
        for line in lines:
            values = [value.strip() for value in line]
            where = f"line {lines.line_num}"
            if any(values[len(header) :]) or (any(values) and len(values) <= max(columns.values())):
                raise UserError(
                    f"{name}: {where} has not as many values ({len(values)}) as the header ({len(header)}): put quotes "
                    f"around a value with {'a tab' if separator == chr(9) else repr(separator)} in it"
                )
            if any(values):
                yield Row(where, **{column: values[number] for column, number in columns.items()})
    except csv.Error as error:
        raise UserError(f"{name}: line {lines.line_num} cannot be read ({error}): check its quotes") from error


def _parquet_rows(content: bytes, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        header = file.schema_arrow.names
        columns = _columns(header, name)
        table = file.read(columns=[header[number] for number in columns.values()])
        values = {column: table[header[number]].to_pylist() for column, number in columns.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{name} is damaged, or no Parquet file ({printable(str(error))[:100]})") from error
    for number, row in enumerate(zip(*values.values(), strict=True), 1):
        texts = [_text(value, f"{name}: row {number}") for value in row]
        yield Row(f"row {number}", **dict(zip(columns, texts, strict=True)))


def _text(value: object, where: str) -> str:
    if value is None or value != value:  # how pandas writes that there is none
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} has a value that is neither text nor a number: {printable(repr(value))[:100]}")
    return str(value).strip()
