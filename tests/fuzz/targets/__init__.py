"""The parsers that read what strangers write, one module each.

A module has `check`, which takes any bytes and raises where a property does not hold; `seeds`, the inputs that a run begins
with; `WORDS` of the language; and `CHOICES`, how many bytes it draws before the text.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

TARGETS = (
    "request",
    "form",
    "sse",
    "stream",
    "answer",
    "lua",
    "page",
    "models",
    "load_report",
    "selectors",
    "tokens",
)
"""By module name."""


class Target(Protocol):
    """Such a module."""

    CHOICES: int
    WORDS: Sequence[bytes]

    def check(self, data: bytes) -> None: ...

    def seeds(self) -> Iterator[bytes]: ...


def load(name: str) -> Target:
    """The module, imported: under `atheris.instrument_imports` what it imports is instrumented."""
    return cast("Target", importlib.import_module(f"tests.fuzz.targets.{name}"))
