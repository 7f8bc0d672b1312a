"""How many endpoints of each model can be counted on, and what is wrong with the others: for alerts, not for choosing.

    ready          engines answer, and the breaker is closed
    failing        the breaker is open or half-open: requests there failed lately
    unreachable    connections to it are refused or time out, whatever its breaker says

A half-open breaker's pod is asked, as a probe; it counts as failing until it has served one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from envoy_extproc.endpoints import EngineState, Snapshot

STATES = ("ready", "failing", "unreachable")

_UNKNOWN = EngineState()


def by_model(
    snapshot: Snapshot, states: Mapping[str, EngineState], breaker: Callable[[str], str | None]
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """(model, endpoints by state) of every model that discovery knows, zeros too; an endpoint counts for each of its models.

    Args:
        snapshot: who is known.
        states: what the scraper knows, by address.
        breaker: what the breaker of an address does, as `Breakers.describe` says it.
    """
    found = {endpoint.address: _state(endpoint.address, states, breaker) for endpoint in snapshot.endpoints}
    for model, endpoints in snapshot.by_model.items():
        counts = Counter(found[endpoint.address] for endpoint in endpoints)
        yield model, {state: counts[state] for state in STATES}


def _state(address: str, states: Mapping[str, EngineState], breaker: Callable[[str], str | None]) -> str:
    if not states.get(address, _UNKNOWN).reachable:
        return "unreachable"
    return "failing" if breaker(address) in ("open", "half-open") else "ready"
