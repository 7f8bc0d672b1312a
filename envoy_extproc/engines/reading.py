"""Reads a page in an engine's dialect: what it says, and what the next page's growth is measured against.

Numbers that are not finite are read as absent. A counter that went down means that the engine restarted: nothing of
before counts then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.dialects import Dialect
from envoy_extproc.engines.exposition import Sample
from envoy_extproc.engines.formulas import SHARES
from envoy_extproc.engines.sources import Page, Value

WINDOW = 5.0
"""Seconds: a mean over "lately" covers the last one to two of these. Long enough for a few requests of an engine that
is in use, short enough to follow a change of load."""

_NO_COUNTERS: Mapping[str, float] = MappingProxyType({})


class PageError(ValueError):
    """A page that holds no metric of the dialect: another engine's, one that is still starting, or no page at all."""


class Mark(msgspec.Struct, frozen=True):
    """The counters as they were at monotonic second `at`."""

    at: float
    counters: Mapping[str, float]


class Reading(msgspec.Struct, frozen=True):
    """One page, read: what it says, and what the next one is compared with.

    Attributes:
        stats: what the engine said.
        counters: the counters whose growth is wanted, by reference.
        marks: the counters of earlier pages of this engine, an older and a newer; growth of the last seconds is
            measured from the older.
    """

    stats: EngineStats
    counters: Mapping[str, float] = _NO_COUNTERS
    marks: tuple[Mark, Mark] | None = None


def read(dialect: Dialect, body: bytes, at: float, previous: Reading | None = None) -> Reading:
    """Reads a page that arrived at monotonic second `at`; growth is taken against the `previous` page, if any.

    Raises:
        PageError: the page holds no number of the dialect.
    """
    samples = [sample for sample in dialect.samples.read(body) if math.isfinite(sample.value)]
    if not samples:
        raise PageError("the page holds no metric that this engine should tell")
    totals, sets = _totals(dialect, samples)
    counters = {name: totals[name] for name in dialect.counters if name in totals}
    if previous is not None and (at <= previous.stats.at or _restarted(counters, previous)):
        previous = None
    page = Page(
        totals=totals,
        sets=sets,
        newest=_newest(dialect, samples),
        rates=_rates(counters, at, previous),
        before=None if previous is None or previous.marks is None else previous.marks[0].counters,
    )
    return Reading(
        stats=_stats(dialect, page, at, previous), counters=counters, marks=_marks(counters, at, previous)
    )


def _totals(dialect: Dialect, samples: Iterable[Sample]) -> tuple[dict[str, float], dict[str, int]]:
    totals: dict[str, float] = {}
    sets: dict[str, int] = {}
    for sample in samples:
        for reference, wanted in dialect.selections[sample.name]:
            if not wanted or _fits(wanted, sample.labels):
                totals[reference] = totals.get(reference, 0.0) + sample.value
                sets[reference] = sets.get(reference, 0) + 1
    return {reference: total for reference, total in totals.items() if math.isfinite(total)}, sets


def _fits(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(label, "") == value for label, value in wanted.items())


def _newest(dialect: Dialect, samples: Iterable[Sample]) -> dict[str, Mapping[str, str]]:
    newest: dict[str, Sample] = {}
    for sample in samples if dialect.infos else ():
        for reference, wanted in dialect.selections[sample.name]:
            if reference in dialect.infos and (not wanted or _fits(wanted, sample.labels)):
                known = newest.get(reference)
                if known is None or sample.value >= known.value:
                    newest[reference] = sample
    return {reference: sample.labels for reference, sample in newest.items()}


def _restarted(counters: Mapping[str, float], previous: Reading) -> bool:
    """Whether any counter went down: one that has overtaken its old value since tells nothing either."""
    return any(now < previous.counters.get(name, 0.0) for name, now in counters.items())


def _rates(counters: Mapping[str, float], at: float, previous: Reading | None) -> Mapping[str, float]:
    if previous is None:
        return _NO_COUNTERS
    seconds, before = at - previous.stats.at, previous.counters
    return {name: (now - before[name]) / seconds for name, now in counters.items() if name in before}


def _marks(counters: Mapping[str, float], at: float, previous: Reading | None) -> tuple[Mark, Mark]:
    mark = Mark(at, counters)
    if previous is None or previous.marks is None:
        return mark, mark
    older, newer = previous.marks
    return (newer, mark) if at - newer.at >= WINDOW else (older, newer)


def _stats(dialect: Dialect, page: Page, at: float, previous: Reading | None) -> EngineStats:
    values: dict[str, Any] = {}
    for field, source in dialect.sources.items():
        value = source.value(page, None if previous is None else getattr(previous.stats, field))
        values[field] = _share(value) if field in SHARES else _finite(value)
    return EngineStats(at=at, **values)


def _finite(value: Value | None) -> Value | None:
    """Absurd numbers have infinite sums, rates and means."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(value: Value | None) -> float | None:
    """A share held to 0 to 1; engines say a negative one where they do not know."""
    return min(value, 1.0) if isinstance(value, float) and value >= 0 else None
