"""The tables of docs/errors.md, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "errors.md"
_COLUMNS = (
    "id",
    "what happened",
    "status",
    "body",
    "headers",
    "outcome",
    "error_type",
    "error",
    "counts too",
)
_HEADER = re.compile(r"`([a-z0-9-]+): ([^`]+)`")
_METRIC = re.compile(r"`([a-z_]+)`(?: by (\d+))?")


@dataclass(frozen=True, slots=True)
class Said:
    """What a row says of one lane; None is ``-``.

    Attributes:
        error: ``*`` where the page only says what it is.
    """

    outcome: str | None
    error_type: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A row.

    Attributes:
        said: by lane.
        counts: how much other metrics grow.
    """

    status: int | None
    body: str
    headers: Mapping[str, str]
    said: Mapping[str, Said]
    counts: Mapping[str, int]


def rows() -> Mapping[str, Row]:
    """Every row by its id."""
    lines = [
        line.strip().strip("|").split("|") for line in PAGE.read_text("utf-8").splitlines() if line[:1] == "|"
    ]
    found: dict[str, Row] = {}
    inside = False
    for cells in ([cell.strip() for cell in line] for line in lines):
        if cells[0].startswith("---"):
            continue
        if len(cells) != len(_COLUMNS) or cells[0] == _COLUMNS[0]:
            inside = tuple(cells) == _COLUMNS
        elif inside:
            assert cells[0] not in found, f"{cells[0]} stands there twice"
            found[cells[0]] = _row(dict(zip(_COLUMNS, cells, strict=True)))
    return found


def _row(cells: Mapping[str, str]) -> Row:
    words = [_both(cells[column]) for column in ("outcome", "error_type", "error")]
    status = cells["status"]
    return Row(
        status=None if status == "-" else int(status),
        body=cells["body"],
        headers=dict(_HEADER.findall(cells["headers"])),
        said={
            lane: Said(*each)
            for lane, each in zip(("stream", "native"), zip(*words, strict=True), strict=True)
        },
        counts={name: int(number or 1) for name, number in _METRIC.findall(cells["counts too"])},
    )


def _both(cell: str) -> tuple[str | None, str | None]:
    """What a cell says of either lane."""
    stream, slash, native = cell.partition(" / ")
    return _word(stream), _word(native if slash else stream)


def _word(text: str) -> str | None:
    if text == "-":
        return None
    return "*" if text.startswith("*") else text.strip("`")
