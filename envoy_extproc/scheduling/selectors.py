"""Label selectors in Kubernetes' syntax, as the header `external-filter` carries them.

    gpu=a10               equal; `==` is the same
    gpu!=a10              not equal, or no such label
    gpu in (a10, l4)      one of them
    gpu notin (a10, l4)   none of them, or no such label
    gpu                   has the label
    !gpu                  has no such label
    gpu=a10,!spot         both

Keys and values are as Kubernetes allows them for labels; white space may stand between words. A selector without a
requirement selects everybody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import NoReturn

import msgspec

from envoy_extproc.errors import BadSelector

MAX_LENGTH = 1024
"""Characters; a selector people write has tens."""

_HEADER = "external-filter"
_REMEMBERED = 256  # parsed selectors; a fleet's clients use a handful
_TOKEN = re.compile(r"[ \t]*(==|!=|[=!,()]|[^ \t=!,()]+|\Z)")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_MARKS = frozenset({"==", "!=", "=", "!", ",", "(", ")", ""})


class Operator(Enum):
    """What a requirement asks of a label."""

    IN = auto()
    NOT_IN = auto()
    EXISTS = auto()
    ABSENT = auto()


class Requirement(msgspec.Struct, frozen=True):
    """One term of a selector."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether `labels` meet it. A label that is not there is not equal to anything."""
        value = labels.get(self.key)
        if self.operator is Operator.IN:
            return value in self.values
        if self.operator is Operator.NOT_IN:
            return value not in self.values
        return (value is not None) is (self.operator is Operator.EXISTS)


class Selector(msgspec.Struct, frozen=True):
    """Requirements that must all hold."""

    requirements: tuple[Requirement, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an endpoint with `labels` is selected."""
        return all(each.holds(labels) for each in self.requirements)


@lru_cache(maxsize=_REMEMBERED)
def parse(text: str) -> Selector:
    """The selector `text` writes.

    Raises:
        BadSelector: it writes none; the message says where.
    """
    if len(text) > MAX_LENGTH:
        raise BadSelector(f"The header {_HEADER} is longer than {MAX_LENGTH} characters.", param=_HEADER)
    return Selector(_Parser(text).selector())


class _Parser:
    """One pass over the words of a selector; `_word` is the one looked at, `_at` where it begins."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = 0
        self._word = ""
        self._at = 0
        self._next()

    def selector(self) -> tuple[Requirement, ...]:
        """All of it."""
        if not self._word:
            return ()
        found = [self._requirement()]
        while self._took(","):
            found.append(self._requirement())
        if self._word:
            self._fail("`,` or the end")
        return tuple(found)

    def _requirement(self) -> Requirement:
        if self._took("!"):
            return Requirement(self._key(), Operator.ABSENT)
        key = self._key()
        if self._took("=") or self._took("=="):
            return Requirement(key, Operator.IN, frozenset({self._value()}))
        if self._took("!="):
            return Requirement(key, Operator.NOT_IN, frozenset({self._value()}))
        if self._took("in"):
            return Requirement(key, Operator.IN, self._values())
        if self._took("notin"):
            return Requirement(key, Operator.NOT_IN, self._values())
        if self._word not in ("", ","):
            self._fail("`=`, `==`, `!=`, `in`, `notin`, `,` or the end")
        return Requirement(key, Operator.EXISTS)

    def _values(self) -> frozenset[str]:
        if not self._took("("):
            self._fail("`(`")
        if self._word == ")":
            self._fail("a value")
        values = {self._value()}
        while self._took(","):
            values.add(self._value())
        if not self._took(")"):
            self._fail("`,` or `)`")
        return frozenset(values)

    def _key(self) -> str:
        key = self._word
        prefix, slash, name = key.rpartition("/")
        if not _NAME.fullmatch(name) or (slash and not (len(prefix) <= 253 and _PREFIX.fullmatch(prefix))):
            self._fail("the key of a label")
        self._next()
        return key

    def _value(self) -> str:
        """A label's value, which may be nothing."""
        value = self._word
        if value in _MARKS:
            return ""
        if not _NAME.fullmatch(value):
            self._fail("the value of a label")
        self._next()
        return value

    def _took(self, word: str) -> bool:
        if self._word != word:
            return False
        self._next()
        return True

    def _next(self) -> None:
        found = _TOKEN.match(self._text, self._end)
        assert found is not None  # it matches at least the end, or one character
        self._word, self._at, self._end = found[1], found.start(1), found.end()

    def _fail(self, expected: str) -> NoReturn:
        there = repr(self._word[:64]) if self._word else "the end"
        raise BadSelector(
            f"The header {_HEADER} is no label selector: at character {self._at + 1} is {there}, expected {expected}.",
            param=_HEADER,
        )
