"""The endpoint picker's scorers, under its names and by its formulas, for whoever comes from it with a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.scorers import LeastKvCacheScorer, LoraAffinityScorer, known, spread

_THRESHOLD = 128.0
"""Requests waiting at which `load-aware-scorer` takes an engine for full."""


class QueueScorer:
    """1 for the fewest requests waiting in the engine, 0 for the most, between them in proportion; all equal is all 1."""

    name = "queue-scorer"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`. A candidate that does not tell counts as the one with the most."""
        return _fewest([None if each.stats is None else each.stats.waiting for each in candidates])


class RunningRequestsSizeScorer:
    """The same of the requests running in the engine."""

    name = "running-requests-size-scorer"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`. A candidate that does not tell counts as the one with the most."""
        return _fewest([None if each.stats is None else each.stats.running for each in candidates])


class KvCacheUtilizationScorer(LeastKvCacheScorer):
    """`least-kv-cache` by its other name."""

    name = "kv-cache-utilization-scorer"


class LoraAffinityPickerScorer(LoraAffinityScorer):
    """`lora-affinity` by its other name."""

    name = "lora-affinity-scorer"


class LoadAwareScorer:
    """0.5 for an engine where nobody waits, less in proportion down to 0 where 128 do."""

    name = "load-aware-scorer"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`. A candidate that does not tell scores 0."""
        waiting = [None if each.stats is None else known(each.stats.waiting) for each in candidates]
        if all(each is None for each in waiting):
            raise MissingDataError("no-stats")
        return [0.0 if each is None else 0.5 - min(each, _THRESHOLD) / _THRESHOLD / 2 for each in waiting]


def _fewest(told: Sequence[float | None]) -> Sequence[float]:
    counts = [known(each) for each in told]
    most = max((each for each in counts if each is not None), default=None)
    if most is None:
        raise MissingDataError("no-stats")
    return spread([most - (most if each is None else each) for each in counts])
