"""LoRA adapters: which models are, and which engine has one at hand.

An engine runs a batch with at most `max_loras` adapters; a request for another one waits, or costs loading it.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy_extproc.endpoints import EngineState
from envoy_extproc.scheduling.interfaces import Candidate


def adapters(states: Iterable[EngineState]) -> frozenset[str]:
    """The models that are adapters: engines list them with a parent, or run or queue them as such."""
    found: set[str] = set()
    for state in states:
        if state.served is not None and len(state.served) > 1:  # a lone model is nobody's adapter
            found.update([model.id for model in state.served if model.parent is not None])
        if state.stats is not None:
            found.update(state.stats.loras or (), state.stats.waiting_loras or ())
    return frozenset(found)


def readiness(model: str | None, candidate: Candidate) -> float | None:
    """How ready an engine is to run an adapter (the levels are the endpoint picker's); None where it does not tell.

    1.0: the adapter is in the running batch. 0.8: the batch has room for one more beside those that run or wait. 0.6: the
    adapter waits already. 0.0: its requests have to wait until another adapter is through. One that both runs and waits takes
    one place; the endpoint picker counts it twice.
    """
    stats = candidate.stats
    if stats is None or stats.loras is None:
        return None
    if model in stats.loras:
        return 1.0
    waiting = stats.waiting_loras or frozenset()
    if stats.max_loras is not None and len(stats.loras | waiting) < stats.max_loras:
        return 0.8
    return 0.6 if model in waiting else 0.0
