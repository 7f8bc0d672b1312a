"""Sending a prompt where its beginning is in the KV cache, as long as that endpoint is not much busier than others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.scheduling.roster import in_flight, without

NO_PROMPT = "no-prompt"
"""The request has no prompt that can be read, or one shorter than a block."""

_AHEAD = 8.0
"""Exchanges beyond that which the whole of a prompt is worth: the imbalance up to which AIBrix follows a match."""


class PrefixCacheScorer:
    """The share of the prompt whose KV cache a candidate holds, 0 to 1.

    Args:
        index: who holds what; this scorer teaches it.
    """

    name = "prefix-cache"

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        if not self._index.blocks(request):
            raise MissingDataError(NO_PROMPT)
        return self._index.shares(request, candidates)

    def remember(self, request: SchedulingRequest, chosen: Candidate) -> None:
        """See `Remembering`."""
        self._index.learn(self._index.blocks(request), chosen.endpoint)

    def keep_models(self, models: Collection[str]) -> None:
        """See `Remembering`. Blocks of a model that is gone are not asked for again, and are the next to be forgotten."""


class PrefixLoadFilter:
    """Leaves out candidates that are too busy for what they hold of the prompt.

        in flight > bound * (all in flight + 1) / candidates + 8 * share of the prompt

    The first term is that of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016). A match is
    worth being busier by 8 exchanges if it is whole, by 1 if it is an eighth. So a popular prompt goes to another endpoint
    before the first one melts, which then holds it too; and a system prompt that is a hundredth of every request draws
    nothing. The idlest candidate is never left out. Where nobody holds any of the prompt nobody is.

    Args:
        index: who holds what.
        bound: how much busier than the mean a candidate may be that holds nothing, 1 or more.
    """

    name = "prefix-load"

    def __init__(self, index: PrefixIndex, bound: float = 1.25) -> None:
        self._index = index
        self._bound = bound

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """See `Filter`."""
        blocks = self._index.blocks(request)
        matched = self._index.match(blocks)
        if not matched:
            return candidates
        counts = in_flight(candidates)
        bound = self._bound * (sum(counts) + 1) / len(counts)
        busy = [place for place, count in enumerate(counts) if count > bound]
        each = _AHEAD / len(blocks)
        gone = [
            place
            for place in busy
            if counts[place] > bound + each * matched.get(candidates[place].endpoint.address, 0)
        ]
        return without(candidates, gone) if gone else candidates
