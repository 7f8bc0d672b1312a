"""Reads a page in an engine's dialect: what it says, and what the next page's growth is measured against.

Numbers that are not finite are read as absent. A counter that went down means that the engine restarted, and so does
another time at which its process began: nothing of before counts then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.dialects import Dialect
from envoy_extproc.engines.exposition import Sample, SampleReader
from envoy_extproc.engines.formulas import SHARES
from envoy_extproc.engines.sources import Page, Value

WINDOW = 5.0
"""Seconds: a mean over "lately" covers the last one to two of these. Long enough for a few requests of an engine that
is in use, short enough to follow a change of load."""

_NO_COUNTERS: Mapping[str, float] = MappingProxyType({})
_NO_FIELDS: AbstractSet[str] = frozenset()


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
        whole_at: monotonic seconds of the last page from which every field was read.
    """

    stats: EngineStats
    counters: Mapping[str, float] = _NO_COUNTERS
    marks: tuple[Mark, Mark] | None = None
    whole_at: float = float("-inf")


def read(dialect: Dialect, body: bytes, at: float, previous: Reading | None = None) -> Reading:
    """Reads a page that arrived at monotonic second `at`; growth is taken against the `previous` page, if any.

    Raises:
        PageError: the page holds no number of the dialect.
    """
    samples, passed_over = _samples(dialect, body, at, previous)
    totals, sets = _totals(dialect, samples)
    counters = {name: totals[name] for name in dialect.counters if name in totals}
    life, before = 0, previous
    if previous is not None:
        restarted = _restarted(counters, previous) or _began_anew(dialect, Page(totals, sets), previous)
        life = previous.stats.life + restarted
        before = None if restarted or at <= previous.stats.at else previous
    described = [sample for sample in samples if sample.name in dialect.described]
    page = Page(
        totals=totals,
        sets=sets,
        newest=_newest(dialect, described),
        rows=_rows(dialect, described),
        rates=_rates(counters, at, before),
        before=None if before is None or before.marks is None else before.marks[0].counters,
    )
    return Reading(
        stats=_stats(dialect, page, before, at=at, life=life, passed_over=passed_over),
        counters=counters,
        marks=_marks(counters, at, before),
        whole_at=at if previous is None or not passed_over else previous.whole_at,
    )


def _samples(
    dialect: Dialect, body: bytes, at: float, previous: Reading | None
) -> tuple[list[Sample], AbstractSet[str]]:
    """The samples of a page, and the fields that were not looked for.

    Raises:
        PageError: the page holds no number of the dialect.
    """
    if not _is_due(dialect, at, previous):
        samples = _own(dialect, dialect.changing, body)
        if samples:
            return samples, dialect.seldom
    samples = _own(dialect, dialect.samples, body)
    if not samples:
        raise PageError("the page holds no metric that this engine should tell")
    return samples, _NO_FIELDS


def _is_due(dialect: Dialect, at: float, previous: Reading | None) -> bool:
    """Whether every field is to be read; what was not there may come yet."""
    if not dialect.seldom or previous is None or at - previous.whole_at >= WINDOW:
        return True
    return any(getattr(previous.stats, field) is None for field in dialect.seldom)


def _own(dialect: Dialect, reader: SampleReader, body: bytes) -> list[Sample]:
    """What `reader` finds; nothing where that is only what other programs tell, too."""
    samples = [sample for sample in reader.read(body) if math.isfinite(sample.value)]
    return [] if all(sample.name in dialect.anybodys for sample in samples) else samples


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
    for sample in samples:
        for reference, wanted in dialect.selections[sample.name]:
            if reference in dialect.infos and (not wanted or _fits(wanted, sample.labels)):
                known = newest.get(reference)
                if known is None or sample.value >= known.value:
                    newest[reference] = sample
    return {reference: sample.labels for reference, sample in newest.items()}


def _rows(dialect: Dialect, samples: Iterable[Sample]) -> dict[str, list[Mapping[str, str]]]:
    rows: dict[str, list[Mapping[str, str]]] = {}
    for sample in samples:
        for reference, wanted in dialect.selections[sample.name]:
            if reference in dialect.tables and (not wanted or _fits(wanted, sample.labels)):
                rows.setdefault(reference, []).append(sample.labels)
    return rows


def _restarted(counters: Mapping[str, float], previous: Reading) -> bool:
    """Whether any counter went down: one that has overtaken its old value since tells nothing either."""
    return any(now < previous.counters.get(name, 0.0) for name, now in counters.items())


def _began_anew(dialect: Dialect, page: Page, previous: Reading) -> bool:
    """Whether its process is another one, by the time at which it began; False where it does not tell."""
    source, before = dialect.sources.get("started"), previous.stats.started
    now = None if source is None else source.value(page, None)
    return now is not None and before is not None and now != before


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


def _stats(
    dialect: Dialect,
    page: Page,
    previous: Reading | None,
    *,
    at: float,
    life: int,
    passed_over: AbstractSet[str],
) -> EngineStats:
    values: dict[str, Any] = {}
    for field, source in dialect.sources.items():
        last = None if previous is None else getattr(previous.stats, field)
        value = last if field in passed_over else source.value(page, last)
        values[field] = _share(value) if field in SHARES else _finite(value)
    return EngineStats(at=at, life=life, **values)


def _finite(value: Value | None) -> Value | None:
    """Absurd numbers have infinite sums, rates and means."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(value: Value | None) -> float | None:
    """A share held to 0 to 1; engines say a negative one where they do not know."""
    return min(value, 1.0) if isinstance(value, float) and value >= 0 else None
