"""Decoding JSON as liberally as engines do: msgspec first, and what it does not take mended for a second try.

Engines are Python programs; their decoder takes ``NaN``, ``1e400``, a lone surrogate escape and a byte order mark, msgspec does
not. What an engine would have read must not be refused here. So what msgspec calls malformed is looked through once more,
with one pattern that steps over all but these in C: to build every value, as Python's decoder does, would take 30 times as
long as the first try, for any body that is cut off.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

T = TypeVar("T")

Malformed = msgspec.DecodeError
"""The text is not JSON."""
Mismatch = msgspec.ValidationError
"""The text is JSON, but not of the type asked for. A subclass of `Malformed`."""

_OUT_OF_RANGE = "Number out of range"  # how msgspec calls what Python's decoder reads as infinite
_MARK = b"\xef\xbb\xbf"
_MOST_MENDED = (
    100_000  # odd tokens in one text; with more of them it is refused, or each would cost a microsecond
)

_TOO_LARGE = rb"(?:[0-9.]*+[eE]\+?[0-9]{3}|[0-9]{300})"
_NUMBERS = re.compile(
    rb'((?:[^"NI0-9]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|N(?!aN)|I(?!nfinity)|(?!'
    + _TOO_LARGE
    + rb")[0-9][0-9.eE+-]*+)*+)(NaN|Infinity|[0-9][0-9.eE+-]*+|\Z)",
    re.DOTALL,
)
"""What is passed over, and behind it a number that msgspec does not take, or the end: so it never has to begin anew."""

_SURROGATES = re.compile(
    rb"((?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+)"
    rb"(\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\\?\Z|\\u)",
    re.DOTALL,
)
"""Likewise for the escape of a lone surrogate."""


def decode(decoder: msgspec.json.Decoder[T], text: bytes) -> T:
    """The value of `text`.

    Raises:
        Mismatch: it is JSON of another type.
        Malformed: it is not JSON, not UTF-8, or nested deeper than the interpreter allows.
    """
    try:
        return decoder.decode(text)
    except Mismatch as error:
        if _OUT_OF_RANGE not in str(error):
            raise
        return _second_opinion(decoder, text, error)
    except RecursionError as error:
        raise Malformed("JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise Malformed("JSON is not UTF-8") from error
    except Malformed as error:
        return _second_opinion(decoder, text, error)


def _second_opinion(decoder: msgspec.json.Decoder[T], text: bytes, first: msgspec.DecodeError) -> T:
    mended = _mended(text)
    # Raised anew: a frame that holds the exception which passes through it keeps `text` until a garbage collection.
    if mended is None:
        raise type(first)(str(first)) from None
    try:
        return decoder.decode(mended)
    except Mismatch as error:
        raise type(error)(str(error)) from None
    except (Malformed, UnicodeDecodeError, RecursionError):
        raise type(first)(str(first)) from None


def _mended(text: bytes) -> bytes | None:
    """`text` as msgspec takes it; None where nothing in it can be mended.

    Not a number, the infinities and what is as large become a large number, of as little use; a lone surrogate becomes a question mark.
    """
    mended = text.removeprefix(_MARK)
    mended = _sub(_NUMBERS, b"1e308", mended)
    if b"\\u" in mended:
        mended = _sub(_SURROGATES, b"?", mended)
    return None if mended == text else mended


def _sub(pattern: re.Pattern[bytes], instead: bytes, text: bytes) -> bytes:
    """`text` with what `pattern` finds behind each stretch it passes over replaced."""
    parts: list[bytes] = []
    for found in pattern.finditer(text):
        odd = found[2]
        parts += (found[1], instead if len(odd) > 1 and odd != b"\\u" else odd)
        if len(parts) > 2 * _MOST_MENDED:
            return text
    return b"".join(parts)
