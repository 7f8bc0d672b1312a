"""How each engine says what we want to know: a table from the fields of `EngineStats` to metrics of its page.

A page can hold several sets of labels for one metric: with data parallelism vLLM writes ``engine="0"``,
``engine="1"`` and so on, and counts finished requests by reason. What the endpoint does as a whole is their sum for
counts and their mean for shares. Numbers that are not finite are read as absent.

To add an engine is to add a `Dialect` to `DIALECTS` and a recorded scrape to its test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.exposition import Sample, SampleReader

_NO_COUNTERS: Mapping[str, float] = MappingProxyType({})


class PageError(ValueError):
    """A page that holds no metric of the dialect: another engine's, one that is still starting, or no page at all."""


class Page(msgspec.Struct, frozen=True):
    """The wanted part of one page.

    Attributes:
        totals: the sum over all sets of labels, by metric.
        sets: how many sets of labels that was, by metric.
        rates: growth per second since the previous page, by counter; empty where that cannot be said.
    """

    totals: Mapping[str, float]
    sets: Mapping[str, int]
    rates: Mapping[str, float]


class Total(msgspec.Struct, frozen=True):
    """A count that a gauge tells: the sum over its sets of labels."""

    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names it reads."""
        return (self.metric,)

    def value(self, page: Page) -> float | None:
        """The count, None where the page does not tell it."""
        return page.totals.get(self.metric)


class Mean(msgspec.Struct, frozen=True):
    """A share that a gauge tells: the mean over its sets of labels."""

    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names it reads."""
        return (self.metric,)

    def value(self, page: Page) -> float | None:
        """The share, None where the page does not tell it."""
        total = page.totals.get(self.metric)
        return None if total is None else total / page.sets[self.metric]


class Ratio(msgspec.Struct, frozen=True):
    """A share that two counters tell over the engine's life; weighted, so not a mean of shares."""

    part: str
    whole: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names it reads."""
        return (self.part, self.whole)

    def value(self, page: Page) -> float | None:
        """The share, None before the first event or where the page does not tell it."""
        part, whole = page.totals.get(self.part), page.totals.get(self.whole)
        return None if part is None or not whole else part / whole


class Rate(msgspec.Struct, frozen=True):
    """A counter's growth per second between two pages."""

    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names it reads."""
        return (self.metric,)

    def value(self, page: Page) -> float | None:
        """The growth per second, None on a first page and after a restart of the engine."""
        return page.rates.get(self.metric)


Source = Total | Mean | Ratio | Rate


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Where one engine tells each field of `EngineStats`; None where it does not tell it."""

    running: Source | None = None
    waiting: Source | None = None
    kv_cache_usage: Source | None = None
    prefix_cache_hit_rate: Source | None = None
    generation_tokens_per_second: Source | None = None
    requests_per_second: Source | None = None
    mem_utilization: Source | None = None

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """The fields that the engine tells, by name."""
        return {field: source for field, source in vars(self).items() if source is not None}

    @cached_property
    def counters(self) -> frozenset[str]:
        """The metrics whose growth is wanted."""
        return frozenset(source.metric for source in self.sources.values() if isinstance(source, Rate))

    @cached_property
    def samples(self) -> SampleReader:
        """Reads the metrics of this dialect."""
        return SampleReader({metric for source in self.sources.values() for metric in source.metrics})


class Reading(msgspec.Struct, frozen=True):
    """One page, read: what it says, and the counters that the next page's rates start from.

    Attributes:
        stats: what the engine said.
        counters: the raw counters whose rates are wanted, by metric.
    """

    stats: EngineStats
    counters: Mapping[str, float] = _NO_COUNTERS


def read(dialect: Dialect, body: bytes, at: float, previous: Reading | None = None) -> Reading:
    """Reads a page that arrived at monotonic second `at`; rates are taken against the `previous` page, if any.

    A counter that went down means that the engine restarted: no rate is told then.

    Raises:
        PageError: the page holds no number of the dialect.
    """
    samples = [sample for sample in dialect.samples.read(body) if math.isfinite(sample.value)]
    if not samples:
        raise PageError("the page holds no metric that this engine should tell")
    totals, sets = _totals(samples)
    counters = {name: totals[name] for name in dialect.counters if name in totals}
    page = Page(totals=totals, sets=sets, rates=_rates(counters, at, previous))
    values = {field: source.value(page) for field, source in dialect.sources.items()}
    return Reading(stats=EngineStats(at=at, **values), counters=counters)


def _totals(samples: list[Sample]) -> tuple[dict[str, float], dict[str, int]]:
    totals: dict[str, float] = {}
    sets: dict[str, int] = {}
    for sample in samples:
        totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        sets[sample.name] = sets.get(sample.name, 0) + 1
    return totals, sets


def _rates(counters: Mapping[str, float], at: float, previous: Reading | None) -> Mapping[str, float]:
    if previous is None or at <= previous.stats.at:
        return _NO_COUNTERS
    growth = {
        name: now - previous.counters[name] for name, now in counters.items() if name in previous.counters
    }
    if any(grown < 0 for grown in growth.values()):
        return (
            _NO_COUNTERS  # all of them: a counter that has overtaken its old value since tells nothing either
        )
    seconds = at - previous.stats.at
    return {name: grown / seconds for name, grown in growth.items()}


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        # The V1 engine's names, as recorded from vLLM 0.32.
        "vllm": Dialect(
            running=Total("vllm:num_requests_running"),
            waiting=Total("vllm:num_requests_waiting"),
            kv_cache_usage=Mean("vllm:kv_cache_usage_perc"),
            prefix_cache_hit_rate=Ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            generation_tokens_per_second=Rate("vllm:generation_tokens_total"),
            requests_per_second=Rate("vllm:request_success_total"),
        ),
    }
)
"""The engines that can be read, by the name that `Endpoint.engine` gives."""
