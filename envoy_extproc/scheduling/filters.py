"""Who is left out before scoring."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.scheduling import lora
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest
from envoy_extproc.scheduling.roster import Roster

_AHEAD = 8
"""Exchanges by which the endpoints that have an adapter may be busier than the idlest one before any other will do: the
bound AIBrix sets to its prefix affinity. Without one a popular adapter would never leave the first engine that had it."""


class ReachableFilter:
    """Leaves out endpoints that refuse connections; if all seem to, all stay: then it may be the scraping that fails."""

    name = "reachable"

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """See `Filter`."""
        if isinstance(candidates, Roster) and candidates.all_reachable:
            return candidates
        return [candidate for candidate in candidates if candidate.reachable] or candidates


class LoraAffinityFilter:
    """For an adapter, the endpoints that are readiest to run it, as long as load does not say otherwise.

    Where even the idlest of them has more than 8 exchanges more than the idlest of all, all stay. Nothing happens to
    requests for a model that is no adapter, or where no engine tells.
    """

    name = "lora-affinity"

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """See `Filter`."""
        if not request.adapter:
            return candidates
        ready = [lora.readiness(request.model, candidate) for candidate in candidates]
        best = max((each for each in ready if each is not None), default=None)
        if best is None:
            return candidates
        readiest = [candidate for candidate, each in zip(candidates, ready, strict=True) if each == best]
        idlest = min(candidate.in_flight for candidate in candidates)
        if min(candidate.in_flight for candidate in readiest) > idlest + _AHEAD:
            return candidates
        return readiest
