"""Editing a JSON object in place: what an edit does not name stays byte for byte, duplicate keys included.

The text handed in is known to be a valid JSON object; a decoder has seen it before. So the scanner needs no grammar
of its own: outside of strings only brackets nest, and a regular expression steps from one to the next in C.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import msgspec

_SPACE = b" \t\r\n"
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'  # possessive: a megabyte of text leaves no backtracking stack
_NEXT = re.compile(_STRING + rb"|[][{},:]", re.DOTALL)
_KEY_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")


class Member(msgspec.Struct, frozen=True):
    """One member of an object: its key and where it stands in the text.

    Attributes:
        key: the name, escapes undone.
        start: offset of the key's opening quote.
        value: offset of the value's first byte.
        end: offset behind the value's last byte.
    """

    key: str
    start: int
    value: int
    end: int


def members(text: bytes, start: int = 0) -> Iterator[Member]:
    """The members of the object that opens at or behind `start`, in order, nested ones not entered."""
    position = text.index(b"{", start) + 1
    while (key := _NEXT.search(text, position)) is not None and key[0][:1] == b'"':
        colon = _KEY_COLON.match(text, key.end())
        if colon is None:
            return
        end = _value_end(text, colon.end())
        yield Member(_unquoted(key[0]), key.start(), colon.end(), end)
        comma = _NEXT.search(text, end)
        if comma is None or comma[0] != b",":
            return
        position = comma.end()


def find(text: bytes, key: str, start: int = 0) -> Member | None:
    """The member that counts under `key`: of several the last, as in Python's, Go's and pydantic's decoders."""
    found = None
    for member in members(text, start):
        if member.key == key:
            found = member
    return found


def append(text: bytes, member: bytes) -> bytes:
    """`text` with one more member, written ``"key":value``, at its end."""
    brace = text.rindex(b"}")
    separator = b"" if text[:brace].rstrip(_SPACE).endswith(b"{") else b","
    return b"".join((text[:brace], separator, member, text[brace:]))


def replace(text: bytes, start: int, end: int, value: bytes) -> bytes:
    """`text` with the bytes from `start` to `end` replaced."""
    return b"".join((text[:start], value, text[end:]))


def remove(text: bytes, member: Member) -> bytes:
    """`text` without `member` and the comma that separated it."""
    before = text[: member.start].rstrip(_SPACE)
    if before.endswith(b","):
        return before[:-1] + text[member.end :]
    after = text[member.end :].lstrip(_SPACE)
    return text[: member.start] + after.removeprefix(b",")


def _unquoted(key: bytes) -> str:
    if b"\\" not in key:
        return key[1:-1].decode("utf-8", "replace")
    try:
        return str(json.loads(key))
    except ValueError:  # not UTF-8, or a control character: msgspec steps over both
        return key[1:-1].decode("utf-8", "replace")


def _value_end(text: bytes, start: int) -> int:
    depth = 0
    for token in _NEXT.finditer(text, start):
        first = token[0][:1]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if depth < 0:  # the object around the value closes: the value was a scalar
                return len(text[start : token.start()].rstrip(_SPACE)) + start
            if depth == 0:
                return token.end()
        elif depth == 0:
            if first == b'"':
                return token.end()
            return len(text[start : token.start()].rstrip(_SPACE)) + start
    return len(text)
