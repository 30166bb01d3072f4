"""Bodies of multipart/form-data: those of curl, browsers and requests, and damaged ones."""

from email.message import Message

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import multipart

BODY = (
    b'--limit\r\nContent-Disposition: form-data; name="picture"; filename="cat.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    b"\xff\xd8\r\n--lim\r\n\r\n--limi\r\n"
    b'\r\n--limit\r\nContent-Disposition: form-data; name="second"\r\n\r\n'
    b"\r\n--limit--\r\n"
)


def content_type(value: str) -> Message:
    header = Message()
    header["content-type"] = value
    return header


FORM = content_type('multipart/form-data; boundary="limit"')


def found(body: bytes, header: Message = FORM, most: int = 10) -> list[tuple[str, bytes]]:
    return [(part.name, bytes(part.content)) for part in multipart.parts(body, header, most)]


def test_each_part_has_its_name_and_exactly_its_bytes() -> None:
    assert found(BODY) == [("cat.jpg", b"\xff\xd8\r\n--lim\r\n\r\n--limi\r\n"), ("second", b"")]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('form-data; name="a"; filename="ein Bär.png"', "ein Bär.png"),
        ("form-data; name=a; filename*=utf-8''ein%20B%C3%A4r.png", "ein Bär.png"),
        ('form-data; name="a"; filename=""', "a"),
        ('form-data; name="a; b"; filename="c;d.png"', "c;d.png"),
        ("form-data; name=a; filename*=unicode_escape''%5Cud800.png", "?.png"),
        ("form-data; name=a; filename*=rot13''a.png", "a.png"),
        ("form-data", ""),
        ("", ""),
    ],
)
def test_the_names_that_clients_send_are_understood(disposition: str, name: str) -> None:
    body = f"--limit\r\nContent-Disposition: {disposition}\r\n\r\nx\r\n--limit--".encode()
    assert found(body) == [(name, b"x")]


def test_one_part_more_than_allowed_is_seen_and_no_others_are_read() -> None:
    body = b"--limit" + b"\r\n\r\n\r\nx\r\n--limit" * 1000 + b"--"
    assert len(found(body, most=1000)) == 1000
    assert len(found(body, most=999)) == 1000
    assert len(found(body, most=5)) == 6


def test_no_parts_are_none() -> None:
    assert found(b"--limit--\r\n") == []


@pytest.mark.parametrize(
    ("body", "header", "reason"),
    [
        (BODY, content_type("multipart/form-data"), "needs a boundary"),
        (BODY, content_type("multipart/form-data; boundary=" + "x" * 71), "needs a boundary of 1 to 70 characters"),
        (BODY, content_type("multipart/form-data; boundary=other"), "does not begin with the boundary"),
        (b"", FORM, "does not begin with the boundary"),
        (BODY[:-4], FORM, "was cut off"),
        (BODY[:150], FORM, "was cut off"),
        (b"--limit\r\nno head\r\n--limit--", FORM, "a part does not begin with lines"),
        (b"--limit\r\nx: " + b"y" * 20_000 + b"\r\n\r\n\r\n--limit--", FORM, "lines of at most 10,000 bytes"),
    ],
)
def test_a_body_that_is_not_well_formed_is_refused(body: bytes, header: Message, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        multipart.parts(body, header, 10)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=200)), min_size=1, max_size=5))
def test_what_requests_sends_is_what_is_found(files: list[tuple[str, bytes]]) -> None:
    fields = [("file", (f"x{name}", content)) for name, content in files]
    sent = requests.Request("POST", "http://localhost", files=fields).prepare()
    assert isinstance(sent.body, bytes)
    assert [content for _, content in found(sent.body, content_type(str(sent.headers["Content-Type"])))] == [
        content for _, content in files
    ]


@given(st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.binary(max_size=8)), max_size=8), st.binary(max_size=100))
def test_a_damaged_body_is_read_or_refused(changes: list[tuple[int, bytes]], disposition: bytes) -> None:
    body = BODY.replace(b"form-data", disposition)
    for place, new in changes:
        body = body[:place] + new + body[place + len(new) :]
    try:
        parts = found(body)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(len(content) < len(body) for _, content in parts)
        assert len(parts) <= 11
