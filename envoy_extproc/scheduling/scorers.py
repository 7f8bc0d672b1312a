"""How good a candidate is: each scorer is one expression over data somebody else gathered."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.scheduling import lora
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.roster import in_flight

_QUEUE_THAT_IS_FULL = 5.0
_CACHE_THAT_IS_FULL = 0.8
"""Requests waiting, and share of the KV cache, at which the endpoint picker calls an engine saturated."""

_BEYOND = 1e15
"""So large that sums and products of quantities below it stay finite."""


class LeastRequestScorer:
    """1 for the fewest exchanges in flight, 0 for the most, between them in proportion; all equal is all 1."""

    name = "least-request"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        counts = in_flight(candidates)
        low, high = min(counts), max(counts)
        if low == high:
            return [1.0] * len(counts)
        score = {count: (high - count) / (high - low) for count in set(counts)}  # few of them are different
        return [score[count] for count in counts]


class LeastKvCacheScorer:
    """The share of KV-cache blocks that is free. A candidate whose engine does not tell counts as full."""

    name = "least-kv-cache"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        usages = [
            None if candidate.stats is None else candidate.stats.kv_cache_usage for candidate in candidates
        ]
        if all(usage is None for usage in usages):
            raise MissingDataError("no-stats")
        return [0.0 if usage is None else min(1.0, max(0.0, 1.0 - usage)) for usage in usages]


class LeastUtilizationScorer:
    """The share of an engine that is idle, by its own word for how busy it is.

    Where it has none, by the endpoint picker's saturation: the larger of ``waiting / 5`` and ``kv_cache_usage / 0.8``,
    at most 1. A candidate whose engine tells neither counts as fully busy.
    """

    name = "least-utilization"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        busy = [_busy(candidate) for candidate in candidates]
        if all(each is None for each in busy):
            raise MissingDataError("no-stats")
        return [0.0 if each is None else 1.0 - min(1.0, each) for each in busy]


class ThroughputScorer:
    """1 for the fewest tokens per second in work, 0 for the most, between them in proportion (AIBrix's `throughput`).

    A second's work is ``2 * prompt tokens + generated tokens``, of what is told. A candidate that tells neither counts as
    the busiest one; all equal is all 1.
    """

    name = "throughput"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        work = [_work(candidate) for candidate in candidates]
        known = [each for each in work if each is not None]
        if not known:
            raise MissingDataError("no-stats")
        high = max(known)
        return spread([high - (high if each is None else each) for each in work])


class LoraAffinityScorer:
    """How ready a candidate is for the adapter a request asks for; see `lora.readiness`.

    A request for a model that is no adapter finds all equally ready.
    """

    name = "lora-affinity"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        if not request.adapter:
            return [1.0] * len(candidates)
        known = [lora.readiness(request.model, candidate) for candidate in candidates]
        if all(each is None for each in known):
            raise MissingDataError("no-stats")
        return [0.0 if each is None else each for each in known]


def spread(values: Sequence[float]) -> Sequence[float]:
    """`values` over the whole of 0 to 1, in proportion: the least is 0, the most is 1, and all equal is all 1."""
    low, high = min(values), max(values)
    width = high - low
    if width <= 0:
        return [1.0] * len(values)
    if low == 0.0 and width == 1.0:
        return values
    return [(value - low) / width for value in values]


def known(value: float | None) -> float | None:
    """A quantity as an engine told it; None where it is below 0, beyond any that can be or no number: it says nothing."""
    return value if value is not None and 0 <= value < _BEYOND else None


def _busy(candidate: Candidate) -> float | None:
    stats = candidate.stats
    if stats is None:
        return None
    own = known(stats.utilization)
    if own is not None:
        return own
    waiting, cache = known(stats.waiting), known(stats.kv_cache_usage)
    if waiting is None and cache is None:
        return None
    return max((waiting or 0.0) / _QUEUE_THAT_IS_FULL, (cache or 0.0) / _CACHE_THAT_IS_FULL)


def _work(candidate: Candidate) -> float | None:
    stats = candidate.stats
    if stats is None:
        return None
    prompt, generated = known(stats.prompt_tokens_per_second), known(stats.generation_tokens_per_second)
    if prompt is None and generated is None:
        return None
    return 2.0 * (prompt or 0.0) + (generated or 0.0)
