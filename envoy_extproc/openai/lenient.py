"""Decoding JSON as liberally as engines do: msgspec first, Python's own decoder as a second opinion.

Engines are Python programs; their decoder takes ``NaN``, ``1e400`` and a lone surrogate escape, msgspec does not. What an engine
would have read must not be refused here, so whatever msgspec calls malformed is asked again, at a price only such
texts pay.
"""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec

T = TypeVar("T")

Malformed = msgspec.DecodeError
"""The text is not JSON."""
Mismatch = msgspec.ValidationError
"""The text is JSON, but not of the type asked for. A subclass of `Malformed`."""

_OUT_OF_RANGE = "Number out of range"  # how msgspec calls what Python's decoder reads as infinite
_LARGEST = 1e308


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
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError):
        # Raised anew: a frame that holds the exception which passes through it keeps `text` until a garbage collection.
        raise type(first)(str(first)) from None
    return decoder.decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _number(text: str) -> float:
    """A float that JSON can hold: not a number and the infinities stay what they are, a number of no use."""
    return max(-_LARGEST, min(_LARGEST, float(text)))
