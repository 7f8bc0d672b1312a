"""Who is left out before scoring."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest


class ReachableFilter:
    """Leaves out endpoints that refuse connections; if all seem to, all stay: then it may be the scraping that fails."""

    name = "reachable"

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """See `Filter`."""
        return [candidate for candidate in candidates if candidate.reachable] or candidates
