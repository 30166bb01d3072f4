"""Tables of labels as people, spreadsheets and pandas write them."""

import io
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data import label_table
from pipeline.data.label_table import Row
from pipeline.errors import UserError
from tests.data.test_file_trees import refusal
from tests.test_bad_input import damaged, is_one_line, two_hundred

ROWS = [("line 2", "cat/1.png", "cat", "train", "p1"), ("line 3", "dog/é 2.png", "7", "test", "p2")]
TABLE = "path,label,split,group\ncat/1.png,cat,train,p1\ndog/é 2.png,7,test,p2\n"


def read(text: str) -> list[Row]:
    return label_table.read(text.encode(), "labels.csv")


def parquet_of(columns: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode(),
        TABLE.replace(",", ";").encode(),
        TABLE.replace(",", "\t").encode(),
        TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\r").encode(),
        TABLE.rstrip("\n").encode(),
        TABLE.encode("utf-8-sig"),
        TABLE.replace(",", "\t").encode("utf-16"),
        TABLE.replace(",", " ,  ").encode(),
        TABLE.replace("cat/1.png", '"cat/1.png"').replace("label", '"label"').encode(),
        (TABLE + ",,,\n\n").encode(),
        TABLE.replace("\n", ",\n").encode(),
    ],
    ids=[
        "comma", "semicolon", "tab", "CRLF", "CR", "no last newline", "BOM", "UTF-16", "spaces", "quotes",
        "empty rows", "empty last column",
    ],
)  # fmt: skip
def test_a_table_is_read_as_any_program_writes_it(content: bytes) -> None:
    assert [tuple(row) for row in label_table.read(content, "labels.csv")] == ROWS


@pytest.mark.parametrize("path", ["filename", "File Name", "file_name", "FILE", "image", "Image-Path", "img_path"])
@pytest.mark.parametrize("label", ["class", "Class Name", "TARGET", "category", "labels"])
def test_columns_are_found_by_the_names_that_they_often_have(path: str, label: str) -> None:
    assert read(f"id,{label},{path}\n0,cat,1.png\n") == [Row("line 2", "1.png", "cat")]


def test_more_columns_do_no_harm() -> None:
    rows = read("index,path,width,label,Patient ID,Subset\n0,1.png,30,cat,p1,val\n")
    assert rows == [Row("line 2", "1.png", "cat", "val", "p1")]


def test_a_number_is_text_and_quoted_values_hold_anything() -> None:
    rows = read('path,label\n"a, ""b"".png",007\n1.png,1e3\n"two\nlines.png",""" x"""\n')
    assert [row[:3] for row in rows] == [
        ("line 2", 'a, "b".png', "007"),
        ("line 3", "1.png", "1e3"),
        ("line 5", "two\nlines.png", '" x"'),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "it has no column path (it has: none): its first line must name path and label"),
        ("\n", "it has no column path (it has: none): its first line must name path and label"),
        ("path,label\n", "it has no rows"),
        ("path,label\n,\n \n", "it has no rows"),
        ("file,id\n1.png,1\n", "it has no column label (it has: file, id): its first line must name path and label"),
        (
            "1.png,cat\n2.png,dog\n",
            "it has no column path (it has: 1.png, cat): its first line must name path and label",
        ),
        ("file,image,label\n", "it has several columns for the path (file, image): call the right one path"),
        ("path,class,target\n", "it has several columns for the label (class, target): call the right one label"),
        ("path,label,Label\n", "it has several columns for the label (label, Label): call the right one label"),
        ("path,label\n1.png,cat\n2.png,\n", "it: line 3 has no label"),
        ("path,label\n1.png, \n", "it: line 2 has no label"),
        ("path,label\n,cat\n", "it: line 2 has no path"),
        (
            "path,label\n1.png,cat\na,b.png,cat\n",
            "it: line 3 has not as many values (3) as the header (2): put quotes around a value with ',' in it",
        ),
        (
            "path\tlabel\n1.png\n",
            "it: line 2 has not as many values (1) as the header (2): put quotes around a value with a tab in it",
        ),
        ('path,label\n"1.png,cat\n', "it: line 2 cannot be read (unexpected end of data): check its quotes"),
    ],
)
def test_a_table_that_is_not_clear_is_refused(text: str, line: str) -> None:
    assert refusal(lambda: label_table.read(text.encode(), "it")) == line


def test_the_name_of_the_documentation_counts_before_others() -> None:
    assert read("image,path,label,class\nx,1.png,cat,3\n") == [Row("line 2", "1.png", "cat")]


def test_a_table_that_is_not_utf8_is_refused() -> None:
    line = "it is not a text in UTF-8: save it as CSV in UTF-8"
    assert refusal(lambda: label_table.read(TABLE.encode("latin-1"), "it")) == line


def test_a_parquet_table_is_read_like_one_in_csv() -> None:
    content = parquet_of(
        {
            "File": ["1.png", "2.png", "3.png"],
            "pixels": [[1.0], [2.0], [3.0]],
            "label": pyarrow.array([1, 0, 1], pyarrow.int8()),
            "split": pyarrow.array(["train", None, "test"]).dictionary_encode(),
            "patient": [2.5, float("nan"), None],
        }
    )
    assert label_table.read(content, "it") == [
        Row("row 1", "1.png", "1", "train", "2.5"),
        Row("row 2", "2.png", "0", "", ""),
        Row("row 3", "3.png", "1", "test", ""),
    ]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"path": ["1.png"], "label": [None]}, "it: row 1 has no label"),
        ({"path": ["1.png"], "label": [["cat"]]}, "it: row 1 has a value that is neither text nor a number: ['cat']"),
        ({"path": [b"1.png"], "label": [1]}, "it: row 1 has a value that is neither text nor a number: b'1.png'"),
        ({"path": ["1.png"]}, "it has no column label (it has: path): its first line must name path and label"),
        ({"path": pyarrow.array([], "string"), "label": pyarrow.array([], "string")}, "it has no rows"),
    ],
)
def test_a_parquet_table_that_is_not_clear_is_refused(columns: dict[str, Any], line: str) -> None:
    assert refusal(lambda: label_table.read(parquet_of(columns), "it")) == line


def rows_or_one_line(content: bytes) -> None:
    try:
        rows = label_table.read(content, "it")
    except UserError as error:
        assert is_one_line(str(error)), error
    else:
        assert rows
        assert all(row.path and row.label for row in rows)


CELLS = st.text(alphabet=st.sampled_from('ab,;\t"\n\r \0é\ufeff/\\'), max_size=6)


@two_hundred
@given(
    content=damaged(TABLE.encode())
    | st.binary(max_size=200)
    | st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=5).map(
        lambda lines: "\n".join(["path,label", *lines]).encode()
    )
)
def test_two_hundred_damaged_csv_tables_are_read_or_refused_in_one_line(content: bytes) -> None:
    rows_or_one_line(content)


@two_hundred
@given(content=damaged(parquet_of({"path": ["1.png", "2.png"], "label": ["cat", "dog"]})))
def test_two_hundred_damaged_parquet_tables_are_read_or_refused_in_one_line(content: bytes) -> None:
    rows_or_one_line(content)
