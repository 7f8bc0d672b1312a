"""Reading the few short fields of a multipart/form-data body (RFC 7578, RFC 2046) that routing needs.

Audio and images in it are megabytes: they are stepped over by searching for the delimiter, never copied. The grammar is as
strict as the parsers of the engines are, python-multipart above all: lines end in CR LF, a part's headers end in an empty line, and
the last delimiter has two more hyphens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

_MOST_PARTS = 1000  # python-multipart's own bound is 1,000 fields
_MOST_HEADER_BYTES = 16_384
_MOST_FIELD_BYTES = 1_048_576  # a prompt; a model's name is far shorter
_LONGEST_BOUNDARY = 256  # RFC 2046 allows 70; clients were seen to write more

_BOUNDARY = re.compile(r';[ \t]*boundary[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^";,\s]+))', re.IGNORECASE)
_NAME = re.compile(rb';[ \t]*name[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^";,\s]+))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition[ \t]*:[ \t]*form-data([^\r\n]*)", re.IGNORECASE)


class Malformed(ValueError):
    """The body is no form; the message says where."""


def boundary(content_type: str) -> bytes | None:
    """The boundary of a ``multipart/form-data`` content type; None for another type, or one without a boundary."""
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        return None
    found = _BOUNDARY.search(content_type)
    if found is None:
        return None
    value = re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else found[2]
    return value.encode("utf-8", "surrogateescape") if 0 < len(value) <= _LONGEST_BOUNDARY else None


def fields(body: bytes, boundary: bytes, names: Collection[str]) -> Mapping[str, str]:
    """The values of the fields called `names`; of several of one name the last.

    Raises:
        Malformed: the body is no form with that boundary, has too many parts, or one of the fields is too long.
    """
    found = {}
    for name, start, end in _parts(body, b"--" + boundary):
        if name in names:
            if end - start > _MOST_FIELD_BYTES:
                raise Malformed(f"the field {name!r} is longer than {_MOST_FIELD_BYTES} bytes")
            found[name] = body[start:end].decode("utf-8", "replace")
    return found


def _parts(body: bytes, delimiter: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, and where the content begins and ends, of each part."""
    position = _first(body, delimiter)
    for _ in range(_MOST_PARTS):
        if body.startswith(b"--", position):
            return
        start = _behind_padding(body, position)
        # The empty line may follow at once: a part without headers.
        end_of_headers = body.find(b"\r\n\r\n", start - 2, start + _MOST_HEADER_BYTES)
        if end_of_headers < 0:
            raise Malformed(f"the part at byte {start} has no end of its headers")
        content = end_of_headers + 4
        end = body.find(b"\r\n" + delimiter, content)
        if end < 0:
            raise Malformed(f"the part at byte {start} has no end")
        yield _name(body[start:end_of_headers]), content, end
        position = end + 2 + len(delimiter)
    raise Malformed(f"it has more than {_MOST_PARTS} parts")


def _first(body: bytes, delimiter: bytes) -> int:
    """Behind the first delimiter, which a preamble may stand before."""
    if body.startswith(delimiter):
        return len(delimiter)
    found = body.find(b"\r\n" + delimiter)
    if found < 0:
        raise Malformed("its boundary does not occur in it")
    return found + 2 + len(delimiter)


def _behind_padding(body: bytes, position: int) -> int:
    """Behind the rest of a delimiter's line: blanks and CR LF."""
    end = body.find(b"\r\n", position, position + 256)
    if end < 0 or body[position:end].strip(b" \t"):
        raise Malformed(f"the delimiter before byte {position} does not end its line")
    return end + 2


def _name(headers: bytes) -> str:
    """The field's name; empty for a part that has none."""
    disposition = _DISPOSITION.search(headers)
    found = None if disposition is None else _NAME.search(disposition[1])
    if found is None:
        return ""
    value = re.sub(rb"\\(.)", rb"\1", found[1]) if found[1] is not None else found[2]
    return value.decode("utf-8", "replace")
