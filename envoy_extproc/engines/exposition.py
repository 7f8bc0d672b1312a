r"""Picks wanted samples out of a Prometheus text exposition without parsing the rest.

An engine's page has some 700 lines, of which a dialect wants about thirty, and a fleet's pages are read hundreds of
times a second. So the page is not split into lines: one compiled pattern, anchored at the line feed before a wanted
name, runs over the bytes in C, and Python sees only the lines that matched as a whole:

    line  := LF name [labels] blank value [blank timestamp] [blank '#' exemplar] [blank] [CR] (before LF)

The names are written as a tree of their common beginnings, so a line of another metric is left at the first byte
that no wanted name has there. Whatever is not such a line is passed over: comments, other metrics, garbage. A last
line without its line feed is passed over too, because half a number is also a number. Every repetition in the
pattern is possessive, so the time is linear in the page whatever it holds. Not read: blanks before a name, and the
quoted names of OpenMetrics' UTF-8 extension, which engines send only to those who ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, takewhile
from operator import itemgetter
from types import MappingProxyType

import msgspec

_PAIR = rb'[a-zA-Z_][a-zA-Z0-9_]*+[ \t]*+=[ \t]*+"(?:[^"\\\n]|\\[^\n])*+"'
_LABELS = rb"(?:[ \t]*+\{((?:[ \t]*+" + _PAIR + rb"[ \t]*+(?:,|(?=\})))*+)[ \t]*+\})?+"
_VALUE = rb"[ \t]*+(?<=[ \t}])([-+.0-9A-Za-z]++)"
_REST = rb"(?:[ \t]++[-+.0-9eE]++)?+(?:[ \t]++#[^\r\n]*+)?+[ \t]*+(?=\r?\n)"

_pairs = re.compile(rb'([a-zA-Z0-9_]++)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"')
_LONGEST_REMEMBERED = 4096  # bytes of labels: twice vLLM's description of its cache
_escape = re.compile(r'\\([\\n"])')


class Sample(msgspec.Struct, frozen=True):
    """One line of a page.

    Attributes:
        name: the metric's.
        text: the labels as they stand between the braces.
        value: perhaps NaN or infinite.
    """

    name: str
    text: bytes
    value: float

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels with escapes undone; read only when asked for, since most of what is wanted needs none."""
        return _remembered(self.text) if len(self.text) <= _LONGEST_REMEMBERED else _labels(self.text)


class SampleReader:
    """Reads the samples of a fixed set of metric names; made once for each engine.

    Args:
        names: full names as they stand on the page, such as ``vllm:num_requests_running``.
    """

    __slots__ = ("_pattern",)

    def __init__(self, names: Iterable[str]) -> None:
        wanted = _one_of(sorted(set(names))).encode() or rb"(?!)"
        self._pattern = re.compile(rb"\n(" + wanted + rb")" + _LABELS + _VALUE + _REST)

    def read(self, body: bytes) -> list[Sample]:
        """The wanted samples of a page, in its order; never raises. The caller bounds the length of `body`."""
        found = self._pattern.findall(b"\n" + body)
        samples = (_sample(name, labels, value) for name, labels, value in found)
        return [sample for sample in samples if sample is not None]


def _one_of(names: Sequence[str]) -> str:
    """A pattern of exactly these sorted names, where no byte is looked at twice: ``a(?:b|cd)``."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(names[0], names[-1], strict=False)) if names else ()
    shared = "".join(character for character, _ in same)
    rest = [name[len(shared) :] for name in names]
    branches = [
        _one_of(list(group)) for _, group in groupby((each for each in rest if each), key=itemgetter(0))
    ]
    if not branches:
        return re.escape(shared)
    end = "?" if "" in rest else ""
    return f"{re.escape(shared)}(?:{'|'.join(branches)}){end}"


def _sample(name: bytes, labels: bytes, value: bytes) -> Sample | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return Sample(name.decode(), labels, number)


def _labels(text: bytes) -> Mapping[str, str]:
    pairs = _pairs.findall(text)
    return MappingProxyType(
        {name.decode(): _unescape(value.decode(errors="replace")) for name, value in pairs}
    )


_remembered = lru_cache(maxsize=512)(
    _labels
)  # the same on every page of an engine, and alike on those of a fleet


def _unescape(value: str) -> str:
    if "\\" not in value:
        return value
    return _escape.sub(lambda match: "\n" if match[1] == "n" else match[1], value)
