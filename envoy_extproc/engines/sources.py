"""Where a field of `EngineStats` stands on an engine's page: a few kinds of source, and what each makes of a page.

A metric is named by a reference, ``name`` or ``name{label="value"}``; the latter means only the sets of labels that
have this value, and an empty value means those that lack the label, too, as in PromQL. A page can hold several sets
for one reference: with data parallelism vLLM writes ``engine="0"``, ``engine="1"`` and so on, and counts finished
requests by reason. What the endpoint does as a whole is their sum for counts and their mean for shares.

`str` of a source is the notation that `formulas` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

Value = float | int | frozenset[str]

_NOTHING: Mapping[str, float] = MappingProxyType({})

_MAX_DIGITS = 9  # of a limit; Python itself refuses to read thousands


class Page(msgspec.Struct, frozen=True):
    """The wanted part of one page.

    Attributes:
        totals: the sum over the sets of labels, by reference.
        sets: how many sets of labels that was, by reference.
        newest: the labels of the set with the highest value, for the references of which these are wanted.
        rows: the labels of every set, for the references of which these are wanted.
        rates: growth per second since the previous page, by counter; empty where that cannot be said.
        before: the counters some seconds ago; None where the engine had not been read then, or was another one.
    """

    totals: Mapping[str, float]
    sets: Mapping[str, int] = msgspec.field(default_factory=dict)
    newest: Mapping[str, Mapping[str, str]] = msgspec.field(default_factory=dict)
    rows: Mapping[str, Sequence[Mapping[str, str]]] = msgspec.field(default_factory=dict)
    rates: Mapping[str, float] = _NOTHING
    before: Mapping[str, float] | None = None


class Source(msgspec.Struct, frozen=True):
    """Where a field stands; the kinds below say how it is read."""

    @property
    def references(self) -> tuple[str, ...]:
        """The metrics it reads."""
        raise NotImplementedError

    @property
    def counters(self) -> tuple[str, ...]:
        """Those of them whose growth it reads."""
        return ()

    @property
    def infos(self) -> tuple[str, ...]:
        """Those of them of which it reads the newest set's labels."""
        return ()

    @property
    def tables(self) -> tuple[str, ...]:
        """Those of them of which it reads every set's labels."""
        return ()

    def value(self, page: Page, last: Value | None) -> Value | None:
        """The field, None where the page does not tell it; `last` is what the page before told."""
        raise NotImplementedError


class Total(Source, frozen=True):
    """A count that a gauge tells: the sum over its sets of labels."""

    metric: str

    @property
    def references(self) -> tuple[str, ...]:
        """The one it reads."""
        return (self.metric,)

    def value(self, page: Page, last: Value | None) -> float | None:
        """The count."""
        return page.totals.get(self.metric)

    def __str__(self) -> str:
        return self.metric


class Gauge(Total, frozen=True):
    """A rate that the engine works out itself: the sum over its sets of labels."""

    def __str__(self) -> str:
        return f"gauge({self.metric})"


class Mean(Source, frozen=True):
    """A share that a gauge tells, in parts of `per`: 1 for shares, 100 for percentages."""

    metric: str
    per: float = 1

    @property
    def references(self) -> tuple[str, ...]:
        """The one it reads."""
        return (self.metric,)

    def value(self, page: Page, last: Value | None) -> float | None:
        """The mean over its sets of labels."""
        total = page.totals.get(self.metric)
        return None if total is None else total / page.sets[self.metric] / self.per

    def __str__(self) -> str:
        return _over(self.metric, self.per)


class Ratio(Source, frozen=True):
    """A share that two metrics tell; weighted over their sets of labels, so not a mean of shares."""

    part: str
    whole: str

    @property
    def references(self) -> tuple[str, ...]:
        """Both."""
        return (self.part, self.whole)

    def value(self, page: Page, last: Value | None) -> float | None:
        """The share, None while the whole is nothing."""
        part, whole = page.totals.get(self.part), page.totals.get(self.whole)
        return None if part is None or not whole else part / whole

    def __str__(self) -> str:
        return f"{self.part} / {self.whole}"


class Rate(Source, frozen=True):
    """A counter's growth per second between two pages."""

    metric: str

    @property
    def references(self) -> tuple[str, ...]:
        """The one it reads."""
        return (self.metric,)

    @property
    def counters(self) -> tuple[str, ...]:
        """Likewise."""
        return (self.metric,)

    def value(self, page: Page, last: Value | None) -> float | None:
        """The growth per second, None on a first page and after a restart of the engine."""
        return page.rates.get(self.metric)

    def __str__(self) -> str:
        return self.metric


class Lately(Source, frozen=True):
    """A mean over what finished lately: the growth of a sum over that of a count, as a histogram has them.

    `per` is the unit in parts of ours: 1000 for milliseconds.
    """

    total: str
    count: str
    per: float = 1

    @property
    def references(self) -> tuple[str, ...]:
        """Both."""
        return (self.total, self.count)

    @property
    def counters(self) -> tuple[str, ...]:
        """Both."""
        return (self.total, self.count)

    def value(self, page: Page, last: Value | None) -> Value | None:
        """The mean of the last seconds; where nothing finished in them the last one; before any, that of the engine's life.

        A counter that was not on the page before has begun at nothing.
        """
        total, count = page.totals.get(self.total), page.totals.get(self.count)
        if total is None or not count:
            return None
        if page.before is not None:
            finished = count - page.before.get(self.count, 0.0)
            if finished > 0:
                return (total - page.before.get(self.total, 0.0)) / finished / self.per
        return total / count / self.per if last is None else last

    def __str__(self) -> str:
        name, suffix, labels = self.count.partition("_count")
        is_histogram = suffix and self.total == f"{name}_sum{labels}"
        return _over(f"{name}{labels}" if is_histogram else f"{self.total} / {self.count}", self.per)


class Names(Source, frozen=True):
    """Names in a label of an information metric, with commas between them.

    The value of such a metric is the time it was written, and the engine leaves old sets of labels on the page, so
    the newest set counts.
    """

    metric: str
    label: str

    @property
    def references(self) -> tuple[str, ...]:
        """The one it reads."""
        return (self.metric,)

    @property
    def infos(self) -> tuple[str, ...]:
        """Likewise."""
        return (self.metric,)

    def value(self, page: Page, last: Value | None) -> frozenset[str] | None:
        """The names."""
        text = page.newest.get(self.metric, {}).get(self.label)
        return None if text is None else frozenset(name.strip() for name in text.split(",") if name.strip())

    def __str__(self) -> str:
        return f"{self.metric}[{self.label}]"


class Limit(Source, frozen=True):
    """A whole number, in a label of an information metric or, without `label`, as the value of a gauge."""

    metric: str
    label: str | None = None

    @property
    def references(self) -> tuple[str, ...]:
        """The one it reads."""
        return (self.metric,)

    @property
    def infos(self) -> tuple[str, ...]:
        """Likewise if it stands in a label."""
        return () if self.label is None else (self.metric,)

    def value(self, page: Page, last: Value | None) -> int | None:
        """The number, None where it is none."""
        if self.label is None:
            total = page.totals.get(self.metric)
            return None if total is None else int(total / page.sets[self.metric])
        return _number(page.newest.get(self.metric, {}).get(self.label, ""))

    def __str__(self) -> str:
        return self.metric if self.label is None else f"{self.metric}[{self.label}]"


class Factor(msgspec.Struct, frozen=True):
    """A metric, or a label of it that holds a whole number."""

    metric: str
    label: str | None = None

    def __str__(self) -> str:
        return self.metric if self.label is None else f"{self.metric}[{self.label}]"


class Product(Source, frozen=True):
    """A number of tokens: what one metric tells, or the product of two: blocks, and the tokens of a block.

    With labels the sets are multiplied each by itself and added up: with data parallelism each engine has a cache of its
    own. Without, the first is added up and the second is the mean of its sets.
    """

    factors: tuple[Factor, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """Those of the factors."""
        return tuple(dict.fromkeys(factor.metric for factor in self.factors))

    @property
    def tables(self) -> tuple[str, ...]:
        """Likewise, where labels are read."""
        return () if self.factors[0].label is None else self.references

    def value(self, page: Page, last: Value | None) -> float | None:
        """The number, None where there is none."""
        if self.factors[0].label is not None:
            return self._of_labels(page)
        if not all(metric in page.totals for metric in self.references):
            return None
        total, *others = self.factors
        means = [page.totals[each.metric] / page.sets[each.metric] for each in others]
        return page.totals[total.metric] * math.prod(means)

    def _of_labels(self, page: Page) -> float | None:
        rows = page.rows.get(self.factors[0].metric, ())
        told = [number for row in rows if (number := self._of_row(row)) is not None]
        return float(sum(told)) if told else None

    def _of_row(self, row: Mapping[str, str]) -> int | None:
        numbers = [_number(row.get(factor.label or "", "")) for factor in self.factors]
        told = [number for number in numbers if number is not None]
        return math.prod(told) if len(told) == len(numbers) else None

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


class Given(Source, frozen=True):
    """A source that means something only where another metric is on the page."""

    source: Source
    given: str

    @property
    def references(self) -> tuple[str, ...]:
        """Those of the source, and what it depends on."""
        return (*self.source.references, self.given)

    @property
    def counters(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.counters

    @property
    def infos(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.infos

    @property
    def tables(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.tables

    def value(self, page: Page, last: Value | None) -> Value | None:
        """What the source says, if it means something."""
        return self.source.value(page, last) if self.given in page.totals else None

    def __str__(self) -> str:
        return f"{self.source} if {self.given}"


class First(Source, frozen=True):
    """The first of several sources whose metrics and labels are all on the page: engines rename them."""

    sources: tuple[Source, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """Those of all."""
        return tuple(metric for source in self.sources for metric in source.references)

    @property
    def counters(self) -> tuple[str, ...]:
        """Those of all."""
        return tuple(metric for source in self.sources for metric in source.counters)

    @property
    def infos(self) -> tuple[str, ...]:
        """Those of all."""
        return tuple(metric for source in self.sources for metric in source.infos)

    @property
    def tables(self) -> tuple[str, ...]:
        """Those of all."""
        return tuple(metric for source in self.sources for metric in source.tables)

    def value(self, page: Page, last: Value | None) -> Value | None:
        """What that one says."""
        for source in self.sources:
            if all(metric in page.totals for metric in source.references):
                value = source.value(page, last)
                if value is not None or not source.tables:  # a label can hold `None`
                    return value
        return None

    def __str__(self) -> str:
        return ", else ".join(map(str, self.sources))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _over(text: str, per: float) -> str:
    return text if per == 1 else f"{text} / {per:.15g}"
