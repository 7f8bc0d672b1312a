"""Forms: any bytes under any content type, and forms made to order, whose fields must come back."""

from __future__ import annotations

from collections.abc import Iterator

from envoy_extproc.openai import multipart
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 1
NAMES = ("model", "stream", "prompt")
WORDS = [
    b"--x", b"--x--", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"--", b'content-disposition: form-data; name="model"', b'name="',
    b"; name=stream", b'\\"', b'"', b'; filename="a"', b"boundary=", b';boundary="', b"multipart/form-data", b" ", b"\t", b":",
]  # fmt: skip


def check(data: bytes) -> None:
    """Three ways to read an input: as a body, as a content type, as the values of a form."""
    draw = Draw(data)
    (_body, _content_type, _round_trip)[draw.byte() % 3](draw.text())


def _body(body: bytes) -> None:
    try:
        with bounded():
            found = multipart.fields(body, b"x", NAMES)
    except multipart.Malformed:
        return
    for name, value in found.items():
        assert name in NAMES
        assert len(value) <= len(body)
        assert value.isascii() is False or value.encode() in body


def _content_type(value: bytes) -> None:
    text = value.decode("utf-8", "surrogateescape")  # as a header comes
    with bounded():
        boundary = multipart.boundary(text)
    assert boundary is None or (boundary and boundary.replace(b"\\", b"") in value.replace(b"\\", b""))


def _round_trip(text: bytes) -> None:
    values = [value.replace(b"--x", b"") for value in text.split(b"\0", 2)]
    if any(b"\r\n--x" in b"\r\n" + value + b"\r\n" for value in values):
        return
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in zip(NAMES, values, strict=False)
    ]
    with bounded():
        found = multipart.fields(b"".join(parts) + b"--x--\r\n", b"x", NAMES)
    expected = [value.decode("utf-8", "replace") for value in values]
    assert [found[name] for name in NAMES[: len(values)]] == expected


def seeds() -> Iterator[bytes]:
    """Forms as clients write them."""
    part = b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    file = (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n'
        b"RIFF\r\n--\r\n--x \r\n"
    )
    yield seed(0, text=part % (b"model", b"whisper") + file + part % (b"stream", b"true") + b"--x--\r\n")
    yield seed(
        0, text=b"preamble\r\n--x \t\r\n\r\nheaderless\r\n" + part % (b"prompt", b"p") + b"--x--epilogue"
    )
    yield seed(1, text=b"multipart/form-data; boundary=x")
    yield seed(1, text=b'Multipart/Form-Data; charset=utf-8; boundary="a\\"b c"')
    yield seed(2, text=b"whisper\0true\0a prompt\r\nof two lines")
