"""Forms: the fields wanted are found whatever the bytes between them are, against the parser that engines use."""

from __future__ import annotations

import pytest
from aiohttp import FormData
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import multipart
from envoy_extproc.openai.multipart import Malformed, boundary, fields

NAMES = ("model", "stream")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('multipart/form-data; boundary="a b;c"', b"a b;c"),
        ('Multipart/Form-Data;charset=utf-8; Boundary="a\\"b"', b'a"b'),
        ("multipart/form-data;boundary=----WebKitFormBoundary7MA4", b"----WebKitFormBoundary7MA4"),
        ("multipart/form-data; boundary=abc; charset=utf-8", b"abc"),
        ("multipart/form-data", None),
        ("multipart/form-data; boundary=", None),
        ('multipart/form-data; boundary=""', None),
        ("multipart/form-data; boundary=" + "x" * 300, None),
        ("multipart/mixed; boundary=abc", None),
        ("application/json", None),
        ("", None),
    ],
)
def test_boundary(content_type: str, expected: bytes | None) -> None:
    assert boundary(content_type) == expected


def part(head: bytes, value: bytes) -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


def named(name: bytes, value: bytes) -> bytes:
    return part(b'Content-Disposition: form-data; name="' + name + b'"', value)


END = b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (named(b"model", b"m") + END, {"model": "m"}),
        (b"preamble\r\n" + named(b"model", b"m") + END + b"epilogue", {"model": "m"}),
        (named(b"model", b"a") + named(b"model", b"b") + END, {"model": "b"}),
        (named(b"file", b"--b-- \r\n--c\r\n") + named(b"model", b"m") + END, {"model": "m"}),
        (named(b"model", b"") + END, {"model": ""}),
        (named(b"model", "modèle".encode()) + END, {"model": "modèle"}),
        (named(b"model", b"\xff") + END, {"model": "\N{REPLACEMENT CHARACTER}"}),
        (part(b"content-disposition:form-data;name=model", b"m") + END, {"model": "m"}),
        (
            part(b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"', b"m") + END,
            {"model": "m"},
        ),
        (part(b'X: form-data; name="model"', b"m") + END, {}),
        (part(b'Content-Disposition: form-data; filename="model"', b"m") + END, {}),
        (part(b'Content-Disposition: form-data; filename="; name=x"; name="model"', b"m") + END, {}),
        (part(b'Content-Disposition: attachment; name="model"', b"m") + END, {}),
        (b"--b \t\r\n" + named(b"model", b"m")[5:] + END, {"model": "m"}),
        (b"--b\r\n\r\nno headers\r\n" + named(b"model", b"m") + END, {"model": "m"}),
        (END, {}),
    ],
)
def test_fields(body: bytes, expected: dict[str, str]) -> None:
    assert fields(body, b"b", NAMES) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "does not occur"),
        (b"--c\r\n", "does not occur"),
        (b"--bc\r\n", "does not end its line"),
        (b"--b", "does not end its line"),
        (b"--b\r\nContent-Disposition: form-data", "no end of its headers"),
        (b"--b\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", "no end of its headers"),
        (named(b"model", b"m"), "does not end its line|no end"),
        (named(b"model", b"m")[:-2], "no end"),
        (named(b"x", b"") * 1001 + END, "more than 1000 parts"),
        (named(b"model", b"m" * 1_048_577) + END, "'model' is longer"),
    ],
)
def test_malformed(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        fields(body, b"b", NAMES)


def test_a_long_file_is_stepped_over() -> None:
    body = named(b"file", b"\r\n--" * 3_000_000) + named(b"model", b"m") + END
    assert fields(body, b"b", NAMES) == {"model": "m"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_form_or_malformed(body: bytes) -> None:
    try:
        found = fields(body, b"b", NAMES)
    except Malformed:
        return
    assert set(found) <= set(NAMES)


@given(st.text(), st.binary(max_size=300), st.integers(0, 2))
async def test_what_aiohttp_writes(model: str, audio: bytes, place: int) -> None:
    form = FormData(default_to_multipart=True)
    for number in range(3):
        if number == place:
            form.add_field("model", model.encode("utf-8", "replace").decode())
        else:
            form.add_field("file", audio, filename="a.wav", content_type="audio/wav")
    writer = form()
    written = await writer.as_bytes()
    limit = multipart.boundary(writer.content_type)
    assert limit is not None
    assert fields(written, limit, NAMES) == {"model": model.encode("utf-8", "replace").decode()}
