"""Fairness between users by what they have been served: the virtual token counter, as routing can follow it.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), keep a counter of weighted tokens for each user and
serve next whoever has the least. A gateway holds no queue, so it cannot say when a request is served, only where. So
users who have had most are kept apart from those who have had least: endpoints stand in the order of their addresses, light
users go to the first, heavy ones to the last, and where all are alike, or a user is alone, load decides by itself. How many
others have had less says where a user goes, not how much less: so each has an equal part of the endpoints, and one who is far
ahead of all others has not the last ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest


class FairnessRules(msgspec.Struct, frozen=True, kw_only=True):
    """How service is counted and weighed.

    Attributes:
        window_seconds: service that lies further back is forgotten.
        input_weight: of a prompt token.
        output_weight: of a token of the answer.
        apart_tokens: weighted tokens between the least and the most served at which they are kept apart altogether.
        fairness_weight: how much keeping users apart counts.
        load_weight: how much the endpoints' load does.
        max_users: counted by themselves; those beyond share a counter.
    """

    window_seconds: float = 300.0
    input_weight: float = 1.0
    output_weight: float = 2.0
    apart_tokens: float = 8000.0
    fairness_weight: float = 1.0
    load_weight: float = 1.0
    max_users: int = 4096


class VtcScorer:
    """How well an endpoint suits a user who has had so much, and how idle it is.

    With endpoints in the order of their addresses at 0 to 1, and a user between the least served (0) and the most (1) by the
    share of the others below, the score is ``1 - (fairness * |endpoint - user| * apart + load * in_flight / most) / (fairness + load)``; `apart` is
    ``(most served - least served) / apart_tokens``, at most 1.
    """

    name = "vtc-basic"

    def __init__(self, rules: FairnessRules | None = None) -> None:
        self._rules = rules or FairnessRules()

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`.

        Raises:
            MissingDataError: `no-user`: the request does not say whose it is.
        """
        standing, rules = request.standing, self._rules
        if standing is None:
            raise MissingDataError("no-user")
        between = standing.most - standing.least
        apart = min(1.0, between / rules.apart_tokens)
        most = max([candidate.in_flight for candidate in candidates]) or 1
        whole = rules.fairness_weight + rules.load_weight
        fairness, load = rules.fairness_weight * apart / whole, rules.load_weight / whole
        return [
            max(0.0, 1.0 - (fairness * abs(place - standing.below) + load * candidate.in_flight / most))
            for place, candidate in zip(_places(candidates), candidates, strict=True)
        ]


def _places(candidates: Sequence[Candidate]) -> Sequence[float]:
    """Each one's place in the order of addresses, 0 to 1: the same whatever order they come in."""
    last = len(candidates) - 1 or 1
    addresses = [candidate.endpoint.address for candidate in candidates]
    places = [0.0] * len(candidates)
    for rank, place in enumerate(sorted(range(len(candidates)), key=addresses.__getitem__)):
        places[place] = rank / last
    return places
