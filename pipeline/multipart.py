"""The files in a body of multipart/form-data (RFC 7578), as `curl -F` and web pages send them."""

import itertools
import mmap
import re
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value
from typing import NamedTuple

MAX_HEAD = 10_000  # bytes of the lines before a part's content
LINE = b"\r\n"


class Part(NamedTuple):
    """A file, under the name that the sender gave it, else that of its field."""

    name: str
    content: memoryview


def parts(body: bytes | mmap.mmap, content_type: Message, most: int) -> list[Part]:
    """The first ``most`` + 1 files in a body, whose content is not copied. Raises ValueError if it is not well-formed.

    ``content_type`` has the header of that name, which says what the boundary between the parts is.
    """
    boundary = content_type.get_boundary("").encode("ascii", "replace")
    first = b"--" + boundary
    if not 1 <= len(boundary) <= 70:
        raise ValueError("multipart/form-data needs a boundary of 1 to 70 characters in its content type")
    if body[: len(first)] != first:
        raise ValueError("the body does not begin with the boundary that its content type has")
    view = memoryview(body)
    # A pattern of plain text is found in linear time, also in a mapped file.
    delimiters = itertools.islice(re.finditer(re.escape(LINE + first), body), most + 1)
    spans = [(0, len(first)), *(each.span() for each in delimiters)]
    if len(spans) <= most + 1 and bytes(view[spans[-1][1] :][:2]) != b"--":
        raise ValueError("the body was cut off: it does not end with its boundary and two hyphens")
    return [_part(view[start:end]) for (_, start), (end, _) in itertools.pairwise(spans)]


def _part(content: memoryview) -> Part:
    lines, empty_line, _ = bytes(content[:MAX_HEAD]).partition(2 * LINE)
    if not empty_line or content[:2] != LINE:
        raise ValueError(f"a part does not begin with lines of at most {MAX_HEAD:,} bytes that say what it is")
    header = HeaderParser().parsestr(lines[2:].decode(errors="replace"))
    field = collapse_rfc2231_value(header.get_param("name", "", header="content-disposition"))
    name = (header.get_filename() or field).encode(errors="replace").decode()  # it may claim an encoding of any kind
    return Part(name, content[len(lines + empty_line) :])
