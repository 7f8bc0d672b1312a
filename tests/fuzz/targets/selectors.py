"""Label selectors: parsed or refused; what is parsed and written again is the same."""

from __future__ import annotations

from collections.abc import Iterator

from envoy_extproc.errors import BadSelector
from envoy_extproc.scheduling.selectors import Operator, Requirement, parse
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 0
LABELS: tuple[dict[str, str], ...] = (
    {},
    {"gpu": "a10"},
    {"gpu": "", "spot": "in"},
    {"example.com/zone": "a"},
)
WORDS = [
    b"gpu",
    b"a10",
    b" in ",
    b" notin ",
    b"(",
    b")",
    b",",
    b"=",
    b"==",
    b"!=",
    b"!",
    b" ",
    b"\t",
    b"example.com/zone",
    b"/",
]


def check(data: bytes) -> None:
    """The header's text, as a header comes."""
    text = Draw(data).text().decode("utf-8", "surrogateescape")
    try:
        with bounded():
            selector = parse(text)
    except BadSelector as error:
        str(error).encode()  # it goes into an answer
        return
    for each in selector.requirements:
        assert parse(_written(each)).requirements == (each,)
    for labels in LABELS:
        assert selector.matches(labels) == all(_holds(each, labels) for each in selector.requirements)


def _written(each: Requirement) -> str:
    values = "(" + (",".join(sorted(each.values)) or ",") + ")"
    return {
        Operator.IN: f"{each.key} in {values}",
        Operator.NOT_IN: f"{each.key} notin {values}",
        Operator.EXISTS: each.key,
        Operator.ABSENT: f"!{each.key}",
    }[each.operator]


def _holds(each: Requirement, labels: dict[str, str]) -> bool:
    if each.operator in (Operator.EXISTS, Operator.ABSENT):
        return (each.key in labels) == (each.operator is Operator.EXISTS)
    return (each.key in labels and labels[each.key] in each.values) == (each.operator is Operator.IN)


def seeds() -> Iterator[bytes]:
    """One of each form."""
    for text in (
        b"gpu=a10,!spot",
        b"gpu in (a10, l4),zone notin (a,b)",
        b"example.com/zone != a",
        b"gpu==a10,in=in",
        b"",
        b"gpu=",
        b"gpu in (,)",
    ):
        yield seed(text=text)
