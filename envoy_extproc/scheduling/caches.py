"""What engines say of their KV caches: how much room there is, and when what is remembered of one is worth nothing any more.

An engine's prompts are forgotten, for one of these reasons:

    unreachable   it refuses connections, as one that begins anew does until its model is loaded
    restarted     it began anew while nobody looked (`EngineStats.life`)
    emptied       it tells no share of prompts found in its cache any more: none has been looked for since it began
    unfound       of what its answers should have found there, it found less than a quarter

The last is for engines that were told to empty their cache or to use none, of which no figure tells. It compares two
numbers that belong to the same answers: what was thought to be in the cache when they were sent there, in tokens that the
engine itself counted, and by how much the engine's count of tokens found has grown from a page before the first
of them to one after the last. Other requests can only add to the latter. Below a quarter, being sent where the prompt was has
been worth next to nothing, whatever the reason, so nothing is lost by forgetting; what an engine evicts now and then, and what
is lost by rounding to its blocks, is far less. It takes sixteen answers, so that one long prompt proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from envoy_extproc.endpoints import EngineState, EngineStats
from envoy_extproc.scheduling.prefix import PrefixIndex

Reason = Literal["unreachable", "restarted", "emptied", "unfound"]
"""Why an engine's prompts are forgotten."""

_ANSWERS = 16
"""That must have promised something before it is looked whether it was found."""

_LEAST_TOKENS = 256
"""Promised by an answer that counts: of less, an engine with large blocks may rightly find nothing."""

_FOUND = 0.25
"""Share of what was promised, from which on what is remembered is good for something."""

_SETTLED_SECONDS = 2.0
"""After the last of those answers, until the page that is compared: some engines count at intervals of their own."""


class _Promise:
    """What answers of one engine should have found in its cache since one of its pages.

    Attributes:
        since: monotonic seconds at which that page came; infinite before there is one.
        found: tokens that it told of then.
        tokens: promised since.
        answers: that promised them.
        due: from when on a page can tell whether they were found; infinite while they are too few.
    """

    __slots__ = ("answers", "due", "found", "since", "tokens")

    def __init__(self) -> None:
        self.begin(math.inf, 0.0)

    def begin(self, since: float, found: float) -> None:
        """Counts from a page on."""
        self.since, self.found = since, found
        self.tokens, self.answers, self.due = 0.0, 0, math.inf

    def add(self, tokens: float, began: float, now: float) -> None:
        """An answer to a request of the time `began` has promised `tokens`."""
        if tokens < _LEAST_TOKENS or began < self.since or self.due < math.inf:
            return
        self.tokens += tokens
        self.answers += 1
        if self.answers >= _ANSWERS:
            self.due = now + _SETTLED_SECONDS

    def is_broken(self, stats: EngineStats, *, anew: bool) -> bool:
        """Whether a page shows that what was promised was not found; `anew` if the engine itself has begun anew by then."""
        found = stats.prefix_cache_hits
        if found is None:
            self.begin(math.inf, 0.0)
            return False
        is_due = stats.at >= self.due
        broken = is_due and not anew and found - self.found < _FOUND * self.tokens
        if is_due or anew or self.since == math.inf:
            self.begin(stats.at, found)
        return broken


_REMEMBERED = 2.0
"""Tokens remembered for each that a cache has room for. An engine lets blocks go in another order than they are forgotten here.
A match that is none costs the prefill that any other endpoint would have cost; one that is not seen costs a prefill that
nobody needed, and a second endpoint's room besides."""


class Caches:
    """The caches of all engines, and the index that is to be true to them.

    Args:
        index: is told of their room, and forgets.

    Attributes:
        forgotten: how often the prompts of an engine were forgotten, by reason.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self.forgotten: dict[str, int] = dict.fromkeys(get_args(Reason), 0)
        self._index = index
        self._seen: dict[str, EngineState] = {}
        self._promises: dict[str, _Promise] = {}

    def look(self, states: Mapping[str, EngineState]) -> None:
        """Learns from what the scraper knows of each address now; who said nothing since the last look costs little."""
        seen = self._seen
        for address, state in states.items():
            before = seen.get(address)
            if state is not before:
                seen[address] = state
                if before is None or not _as_it_was(before, state) or address in self._promises:
                    self._news(address, before, state)

    def keep(self, addresses: Collection[str]) -> None:
        """Lets go of what is known of others than these: who comes back is new."""
        self._seen = {address: state for address, state in self._seen.items() if address in addresses}
        self._promises = {
            address: promise for address, promise in self._promises.items() if address in addresses
        }

    def promise(self, address: str, tokens: float, began: float, now: float) -> None:
        """The engine at `address` has answered, and should have found `tokens` of the prompt in its cache.

        Args:
            address: the engine's.
            tokens: as many.
            began: when it was decided so, monotonic seconds.
            now: when the answer was over.
        """
        if address in self._seen:
            self._promises.setdefault(address, _Promise()).add(tokens, began, now)

    def _news(self, address: str, before: EngineState | None, state: EngineState) -> None:
        stats, promise = state.stats, self._promises.get(address)
        reason = _loss(before or state, state)
        if promise is not None and stats is not None and promise.is_broken(stats, anew=reason is not None):
            reason = "unfound"
        if reason is not None and self._index.forget(address):
            self.forgotten[reason] += 1
        room = None if stats is None else stats.kv_cache_tokens
        self._index.fit(address, None if room is None else _REMEMBERED * room)


def _as_it_was(before: EngineState, now: EngineState) -> bool:
    """Whether nothing is said of the cache but what was said before: that of most engines, most of the time."""
    then, stats = before.stats, now.stats
    return (
        now.reachable
        and stats is not None
        and then is not None
        and stats.life == then.life
        and stats.kv_cache_tokens == then.kv_cache_tokens
        and stats.prefix_cache_hit_rate is not None
    )


def _loss(before: EngineState, now: EngineState) -> Reason | None:
    """Why an engine's cache is not any more what it was, as far as it says so itself."""
    if not now.reachable:
        return "unreachable"
    if before.stats is None or now.stats is None:
        return None
    if now.stats.life != before.stats.life:
        return "restarted"
    if before.stats.prefix_cache_hit_rate is not None and now.stats.prefix_cache_hit_rate is None:
        return "emptied"
    return None
