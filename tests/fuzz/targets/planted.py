"""A target with a defect, to see that a run finds one and says so."""

from __future__ import annotations

from collections.abc import Iterator

from envoy_extproc.openai.sse import data_of

CHOICES = 0
WORDS = [b"[DONE]"]


def check(data: bytes) -> None:
    """Fails where an event says that it is the last.

    Raises:
        AssertionError: it does.
    """
    if data_of(b"data: " + data + b"\n\n").endswith(b"[DONE]"):
        raise AssertionError("a planted defect")


def seeds() -> Iterator[bytes]:
    """Nothing near it."""
    yield b"hello"
