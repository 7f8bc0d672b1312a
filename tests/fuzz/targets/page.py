"""Pages of metrics, in every dialect, two in a row: read into finite numbers, or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from envoy_extproc.engines import reading
from envoy_extproc.engines.dialects import DIALECTS, Dialect
from tests.fuzz.draw import Draw, bounded, seed
from tests.support.captures import FOLDER

CHOICES = 2
_NAMES = tuple(sorted(DIALECTS))
_BOUNDARY = b"# NEXT\n"  # between two pages
WORDS = [
    b"\n", b"{", b"}", b'="', b'",', b'"', b"\\", b" ", b"1e308", b"-1e308", b"NaN", b"+Inf", b"-1", b"1e400", b"0x1p3", b"1_0",
    b" # {} 1", b"# HELP ", b"9" * 40, b'engine="1"', b"1700000000000", b"\r\n", b"\xff", b"\t", _BOUNDARY,
]  # fmt: skip


def check(data: bytes) -> None:
    """One page, and the next one after it."""
    draw = Draw(data)
    dialect, seconds, text = DIALECTS[draw.choose(_NAMES)], draw.byte() / 10, draw.text()
    first, _, second = text.partition(_BOUNDARY)
    read = _read(dialect, first, 1.0, None)
    for step in (1, 2):
        read = _read(dialect, second, 1.0 + step * seconds, read) or read


def _read(
    dialect: Dialect, page: bytes, at: float, previous: reading.Reading | None
) -> reading.Reading | None:
    try:
        with bounded():
            read = reading.read(dialect, page, at, previous)
    except reading.PageError:
        return None
    for name, value in msgspec.structs.asdict(read.stats).items():
        _check_value(name, value)
    for sample in dialect.samples.read(page):
        assert re.search(rb"(?:^|\n)" + re.escape(sample.name.encode()) + rb"[ \t{]", page), "made up"
        assert all(isinstance(value, str) for value in sample.labels.values())
    return read


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float):
        assert math.isfinite(value), f"{name} is {value}"
    if name.endswith(("_usage", "_rate")) and value is not None:
        assert 0 <= value <= 1, f"{name} is {value}"


def seeds() -> Iterator[bytes]:
    """Recorded pages, cut down to the lines that are read, once and as they change."""
    for number, name in enumerate(_NAMES):
        for path in sorted(FOLDER.parent.glob("*-metrics*.txt")):
            wanted = {sample.name.encode() for sample in DIALECTS[name].samples.read(path.read_bytes())}
            lines = [
                line
                for line in path.read_bytes().splitlines(keepends=True)
                if line.partition(b" ")[0].partition(b"{")[0] in wanted
            ]
            if lines:
                page = b"".join(lines[:40])
                yield seed(number, 10, text=page)
                yield seed(number, 60, text=page + _BOUNDARY + page.replace(b".0\n", b"7.0\n"))
