"""How good a candidate is: each scorer is one expression over data somebody else gathered."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest


class LeastRequestScorer:
    """1 for the fewest exchanges in flight, 0 for the most, between them in proportion; all equal is all 1."""

    name = "least-request"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        counts = [candidate.in_flight for candidate in candidates]
        low, high = min(counts), max(counts)
        if low == high:
            return [1.0] * len(counts)
        return [(high - count) / (high - low) for count in counts]


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
