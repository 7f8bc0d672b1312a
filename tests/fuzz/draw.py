"""What a fuzz input means: its first bytes choose, the rest is the hostile text.

Choices come first so that a mutation of the text leaves them alone, and so that a seed is made by writing them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from typing import TypeVar

T = TypeVar("T")

MOST_BYTES = 65_536
"""A text is repeated up to here: what is quadratic shows."""

MOST_SECONDS = 1.0
"""CPU seconds for a text of up to `MOST_BYTES`: a hundred times what the slowest parser needs on an idle machine."""

_LONG = 0xFF
"""As the first byte of a text: a part of what follows is repeated."""

CHOICES = 3
"""Bytes that `Draw.text` draws for itself."""

SLICES = ((0, 255), (64, 127), (160, 191))
"""Parts that are repeated, in 256ths."""


class TooSlowError(AssertionError):
    """A parser took far longer than its input is worth."""


class Draw:
    """One input, read from its front; behind its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """The next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def choose(self, among: Sequence[T]) -> T:
        """One of them, by the next byte."""
        return among[self.byte() % len(among)]

    def flag(self) -> bool:
        """A coin."""
        return bool(self.byte() & 1)

    def text(self) -> bytes:
        """All that is left, as it is or with a part of it repeated up to `MOST_BYTES`."""
        form, first, second = self.byte(), self.byte(), self.byte()
        rest = self._data[self._at :]
        self._at = len(self._data)
        if form != _LONG or not rest:
            return rest
        start, end = sorted((first * len(rest) // 256, second * len(rest) // 256))
        part = rest[start : end + 1]
        return rest[:start] + part * (MOST_BYTES // len(part)) + rest[end + 1 :]


def seed(*choices: int, text: bytes) -> bytes:
    """The input that makes these choices and has this text."""
    return bytes((*choices, 0, 0, 0)) + text


def short(data: bytes, choices: int) -> bytes:
    """The input without its repetition: what a fuzzer makes and keeps is fast."""
    return (
        data[:choices] + b"\0" + data[choices + 1 :]
        if data[choices : choices + 1] == bytes((_LONG,))
        else data
    )


def stretched(data: bytes, choices: int) -> Iterator[bytes]:
    """The input with each of the `SLICES` of its text repeated."""
    for first, second in SLICES:
        yield data[:choices] + bytes((_LONG, first, second)) + data[choices + CHOICES :]


def cut(text: bytes, number: int) -> list[bytes]:
    """The text in pieces, none empty: 0 whole, 1 in lines, 2 small texts byte by byte, else at places drawn by it."""
    if number == 1:
        return text.splitlines(keepends=True)
    if number == 2 and len(text) <= 256:
        return [text[place : place + 1] for place in range(len(text))]
    rng = Random(number)
    places = sorted(rng.randrange(len(text) + 1) for _ in range(number % 16))
    edges = [0, *places, len(text)]
    return [text[a:b] for a, b in pairwise(edges) if a < b]


@contextmanager
def bounded() -> Iterator[None]:
    """What runs in here may take `MOST_SECONDS` of CPU."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    if took > MOST_SECONDS:
        raise TooSlowError(f"{took:.1f} s for at most {MOST_BYTES} bytes")
