"""Every endpoint as it is at one moment: what is counted here, what its engine said, and whether it may be asked.

Between two decisions little changes: a request more on one endpoint, a scrape of another. So the candidates of a pool are
kept, and for a decision only those are made again of which something is another than it was: the count, the scrape, the
report in an answer. What changes by time alone is looked at when its time has come: what an engine said gets too old to
believe, and a breaker that is not closed can be another one every moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress
from operator import is_not, ne

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats
from envoy_extproc.scheduling.interfaces import Candidate
from envoy_extproc.scheduling.roster import Roster

UNKNOWN = EngineState()
"""Of an endpoint that has not been asked yet."""

_MISSED_SCRAPES = 2.5
"""Intervals after which what an engine said is old: one scrape may fail, and the next be late."""

_EARLY_SECONDS = 1e-3
"""Before what was said gets too old, from when on it is looked at every time: sums of times are not exact."""


class Sources:
    """What candidates are joined from.

    Args:
        in_flight: exchanges on an address now.
        counts: the same by address, those at 0 left out; None where it is not at hand.
        states: what the scraper knows, by address.
        max_age: seconds after which what an engine said is not believed; longer where it is asked more seldom.
        avoided: whether the pod at an address failed so lately that another one should be asked.
        doubted: the addresses for which `avoided` can be true now; None: any.
        fresher: what the engine at an address last said, in an answer or in the scrape that is given.
        reports: what `fresher` goes by, by address: where that is the same object, so is its answer. None: it may always be
            another one.
    """

    def __init__(
        self,
        *,
        in_flight: Callable[[str], int],
        states: Mapping[str, EngineState],
        max_age: float,
        counts: Mapping[str, int] | None = None,
        avoided: Callable[[str, float], bool] | None = None,
        doubted: Collection[str] | None = None,
        fresher: Callable[[str, EngineStats | None], EngineStats | None] | None = None,
        reports: Mapping[str, object] | None = None,
    ) -> None:
        self.in_flight = in_flight
        self.counts = counts
        self.states = states
        self.max_age = max_age
        self.avoided = avoided
        self.doubted: Collection[str] | None = () if avoided is None else doubted
        self.fresher = fresher
        self.reports: Mapping[str, object] | None = {} if fresher is None else reports

    def in_flight_of(self, addresses: Sequence[str]) -> Sequence[int]:
        """Exchanges on each address now."""
        if self.counts is None:
            count = self.in_flight
            return [count(address) for address in addresses]
        get = self.counts.get
        return [get(address, 0) for address in addresses]

    def candidate(self, endpoint: Endpoint, now: float) -> Candidate:
        """The endpoint as it is at `now`."""
        address = endpoint.address
        state = self.states.get(address, UNKNOWN)
        stats, _ = self.stats(address, state, now)
        reachable = state.reachable and not self.is_avoided(address, now)
        return Candidate(endpoint, self.in_flight(address), stats, reachable)

    def stats(self, address: str, state: EngineState, now: float) -> tuple[EngineStats | None, float]:
        """What is believed at `now` of what an engine said, and until when it is that."""
        longest = max(self.max_age, _MISSED_SCRAPES * state.interval)
        scraped, until = _believed(state.stats, now, longest)
        if self.fresher is None:
            return scraped, until
        stats, until_then = _believed(self.fresher(address, scraped), now, longest)
        return stats, min(until, until_then)

    def is_avoided(self, address: str, now: float) -> bool:
        """Whether requests to it failed lately."""
        return self.avoided is not None and self.avoided(address, now)


def _believed(stats: EngineStats | None, now: float, longest: float) -> tuple[EngineStats | None, float]:
    if stats is None or now - stats.at > longest:
        return None, math.inf
    return stats, stats.at + longest - _EARLY_SECONDS


class _Pool:
    """The candidates of some endpoints, and what they were made from."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._addresses = [endpoint.address for endpoint in endpoints]
        self._places = {address: place for place, address in enumerate(self._addresses)}
        self._candidates: list[Candidate] = []
        self._counts: Sequence[int] = ()
        self._states: Sequence[EngineState | None] = []
        self._reports: Sequence[object] = []
        self._until: list[float] = []
        self._next = math.inf
        self._avoided: set[int] = set()
        self._unreachable: set[int] = set()
        self._roster: Roster | None = None

    def roster(self, sources: Sources, now: float) -> Roster:
        """The candidates at `now`."""
        counts = sources.in_flight_of(self._addresses)
        states = list(map(sources.states.get, self._addresses))
        reports = list(map(sources.reports.get, self._addresses)) if sources.reports else []
        changed = self._changed(counts, states, reports, sources, now)
        self._counts, self._states, self._reports = counts, states, reports
        for place in changed:
            self._make(place, sources, now)
        if now >= self._next:
            self._next = min(self._until)
        if changed or self._roster is None:
            self._roster = Roster.of(
                self._candidates,
                in_flight=counts,
                places=self._places,
                all_reachable=not self._unreachable,
            )
        return self._roster

    def _changed(
        self,
        counts: Sequence[int],
        states: Sequence[EngineState | None],
        reports: Sequence[object],
        sources: Sources,
        now: float,
    ) -> Collection[int]:
        """The places whose candidates may be others than they were."""
        everywhere = range(len(self._addresses))
        if not self._candidates:
            self._candidates = [Candidate(endpoint) for endpoint in self._endpoints]
            self._until = [math.inf] * len(everywhere)
            return everywhere
        if sources.reports is None or sources.doubted is None or len(reports) != len(self._reports):
            return everywhere
        changed = set(compress(everywhere, map(ne, counts, self._counts)))
        if states != self._states:  # told at once where all are the same objects
            changed.update(compress(everywhere, map(is_not, states, self._states)))
        if reports != self._reports:
            changed.update(compress(everywhere, map(is_not, reports, self._reports)))
        changed |= self._avoided
        if sources.doubted:
            changed.update([self._places[each] for each in sources.doubted if each in self._places])
        if now >= self._next:
            changed.update(place for place in everywhere if now >= self._until[place])
        return changed

    def _make(self, place: int, sources: Sources, now: float) -> None:
        address, state = self._addresses[place], self._states[place] or UNKNOWN
        avoided = sources.is_avoided(address, now)
        (self._avoided.add if avoided else self._avoided.discard)(place)
        reachable = state.reachable and not avoided
        (self._unreachable.discard if reachable else self._unreachable.add)(place)
        stats, until = sources.stats(address, state, now)
        self._until[place] = until
        self._next = min(self._next, until)
        self._candidates[place] = Candidate(self._endpoints[place], self._counts[place], stats, reachable)


class Candidates:
    """The candidates of pools of endpoints.

    Args:
        sources: what they are joined from.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._pools: dict[int, tuple[Sequence[Endpoint], _Pool]] = {}

    def forget(self) -> None:
        """Other endpoints are there from now on."""
        self._pools.clear()

    def of(self, endpoints: Sequence[Endpoint], now: float) -> list[Candidate]:
        """Any endpoints as they are at `now`."""
        return [self._sources.candidate(endpoint, now) for endpoint in endpoints]

    def roster(self, endpoints: Sequence[Endpoint], now: float) -> Roster:
        """All endpoints of a pool as they are at `now`. The sequence is known again by itself, not by what is in it."""
        known = self._pools.get(id(endpoints))
        if known is None:
            known = self._pools[id(endpoints)] = (endpoints, _Pool(endpoints))
        return known[1].roster(self._sources, now)
