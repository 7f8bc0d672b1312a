"""Sessions: a client that tells where its last answer came from is sent there again, where the cache of its prompt is.

The header `x-session-id` carries a session as AIBrix writes it, the endpoint's ``ip:port`` in base64, so that sessions
survive a move from one gateway to the other. It can only name an endpoint that the request may go to anyway: any other
address in it counts for nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from envoy_extproc.scheduling import hashing
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest

HEADER = "x-session-id"
"""Of requests and answers alike."""

_LONGEST = 128
"""Characters of a session; the longest address there is makes 64."""


def token(address: str) -> str:
    """The session that stays at `address`."""
    return base64.b64encode(address.encode()).decode()


def address(token: str) -> str | None:
    """The address in a client's session; None where there is none to be read."""
    if len(token) > _LONGEST:
        return None
    try:
        return base64.b64decode(token, validate=True).decode("ascii") or None
    except (binascii.Error, ValueError):
        return None


class SessionAffinityScorer:
    """1 for the one endpoint the session is at, 0 for the others.

    That is the one `x-session-id` names, if it is among the candidates; else the one to which `x-aibrix-session-key`
    belongs by rendezvous hashing.
    """

    name = "session-affinity"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`.

        Raises:
            MissingDataError: `no-session`: the client tells neither. `session-gone`: the endpoint it names is not there.
        """
        home = request.session
        if home is not None:
            scores = [1.0 if candidate.endpoint.address == home else 0.0 for candidate in candidates]
            if 1.0 in scores:
                return scores
        if request.session_key is None:
            raise MissingDataError("no-session" if home is None else "session-gone")
        weights = hashing.weights(request.session_key, candidates)
        winner = weights.index(max(weights))
        return [1.0 if place == winner else 0.0 for place in range(len(weights))]
