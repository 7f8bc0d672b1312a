"""Prompts under way: the index learns when one is sent, and again when it is known who really computed it.

A prompt is remembered of the endpoint that was chosen at once, so that the next request that begins like it finds it there.
When its report comes and says that another endpoint served it, after a retry, that one learns the prompt, and the chosen
one, which refused it, does not keep it. Nor does one that answered with an error. Where a client left before any answer nobody
knows; most often the engine had begun.

Only hashes are kept, and only until the report. In the native lane that comes with Envoy's access log, up to 0.1 s after the
end and perhaps to another server, which then knows nothing of the prompt: all that is lost is one correction.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState
from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.caches import Caches
from envoy_extproc.scheduling.interfaces import Decision
from envoy_extproc.scheduling.prefix import PrefixIndex

_MOST_BLOCKS = 1_000_000
"""Of all prompts under way, in 8 MB: 8,000 prompts of 8,000 tokens. The oldest go first."""


class _Sent(msgspec.Struct, frozen=True):
    """A prompt on its way to `endpoint`, which was thought to hold `share` of its `blocks`, decided `at` monotonic seconds."""

    blocks: array[int]
    endpoint: Endpoint
    share: float
    at: float


class Prompts:
    """The prompts of one server.

    Args:
        index: learns.
        name: sets the tickets of this server apart from others'.
        clock: monotonic seconds, the same that are handed in.
        most_blocks: remembered of all prompts under way.

    Attributes:
        caches: what the engines say of theirs.
    """

    def __init__(
        self,
        index: PrefixIndex,
        *,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        most_blocks: int = _MOST_BLOCKS,
    ) -> None:
        self.caches = Caches(index)
        self._index = index
        self._name = name
        self._clock = clock
        self._most_blocks = most_blocks
        self._sent: dict[str, _Sent] = {}
        self._blocks = 0
        self._issued = 0

    def __len__(self) -> int:
        """Prompts under way."""
        return len(self._sent)

    def look(self, states: Mapping[str, EngineState]) -> None:
        """Learns from what the scraper knows of each address now."""
        self.caches.look(states)

    def keep(self, endpoints: Mapping[str, Endpoint]) -> None:
        """These, by address, are the endpoints from now on; others are forgotten."""
        self._index.keep(endpoints)
        self.caches.keep(endpoints)

    def sent(
        self, blocks: Sequence[int], endpoint: Endpoint, share: float, at: float, ticket: str | None = None
    ) -> str:
        """A prompt of these blocks goes to `endpoint`; returns the ticket of its report, `ticket` where it has one already.

        Args:
            blocks: of the prompt.
            endpoint: the chosen one.
            share: of the blocks, 0 to 1, that it was thought to hold before.
            at: monotonic seconds of the decision.
            ticket: that the report has anyway.
        """
        if ticket is None:
            self._issued += 1
            ticket = f"{self._name}-p{self._issued}"
        self._sent[ticket] = _Sent(array("Q", blocks), endpoint, share, at)
        self._blocks += len(blocks)
        while self._blocks > self._most_blocks:
            self._take(next(iter(self._sent)))
        return ticket

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`. A prompt is told of by `sent`, before its decision is."""

    def finished(self, report: Report) -> None:
        """See `Hook`. A report with another server's ticket is passed over."""
        ticket = None if report.routing is None else report.routing.ticket
        sent = None if ticket is None else self._take(ticket)
        if sent is None or report.status is None:
            return
        chosen, served = sent.endpoint, report.served_by
        computed = _was_computed(report)
        if computed and report.served_address == chosen.address:
            self._promised(sent, report)
            return
        held = round(sent.share * len(sent.blocks))
        self._index.unlearn(sent.blocks[held:], chosen.address)
        if computed and served is not None:
            self._index.learn(sent.blocks, served)

    def _promised(self, sent: _Sent, report: Report) -> None:
        held = round(sent.share * len(sent.blocks))
        tokens = min(sent.share * report.usage.prompt_tokens, held * self._index.rule.tokens)
        self.caches.promise(sent.endpoint.address, tokens, sent.at, self._clock())

    def _take(self, ticket: str) -> _Sent | None:
        sent = self._sent.pop(ticket, None)
        if sent is not None:
            self._blocks -= len(sent.blocks)
        return sent


def _was_computed(report: Report) -> bool:
    """Whether an engine has computed the prompt, by an answer whose status is known.

    An engine that is full may say so inside a 200, before the first token.
    """
    if report.status is None or report.status >= 400 or report.served_address is None:
        return False
    return report.outcome != "error" or report.usage.completion_tokens > 0
