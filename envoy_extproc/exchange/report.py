"""What is left of an exchange: one frozen value that metrics, logs and traces hang on."""

from __future__ import annotations

from typing import Literal

import msgspec

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import ErrorType
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling.interfaces import Decision

Outcome = Literal["success", "error", "refused", "aborted", "drained"]
"""success: answered in full. error: an engine's or Envoy's error answer, or an error inside a 200. refused: answered
by this server. aborted: ended before the answer was whole. drained: given back to Envoy because this server stopped."""

UsageSource = Literal["reported", "estimated", "none"]
"""reported: the engine told. estimated: guessed from what was seen. none: nothing was generated or accounting is off."""


class Routing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is left of a `Decision` when its exchange is over, small enough to travel in dynamic metadata.

    Attributes:
        policy: the policy that was to decide.
        decided_by: the policy that did.
        fallback_reason: why it was another one; None where it was not.
        pod: name of the endpoint chosen.
        order: addresses to try, the chosen one's first.
        candidates: how many were left after filtering.
        in_flight: exchanges this server had on the chosen endpoint at that moment.
        running: what its engine said then; None where that was missing or too old.
        waiting: likewise.
        kv_cache_usage: likewise, 0 to 1.
        prefix_match: share of the prompt that the endpoint chosen was thought to hold; None where no policy asked.
        ticket: by which the report finds the account of its user, and its prompt; None where nobody waits for it.
    """

    policy: str
    decided_by: str
    pod: str
    order: tuple[str, ...]
    fallback_reason: str | None = None
    candidates: int = 0
    in_flight: int = 0
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    prefix_match: float | None = None
    ticket: str | None = None


def routing_of(decision: Decision) -> Routing:
    """The part of `decision` that is told of its exchange."""
    chosen = decision.chosen
    stats = chosen.stats
    return Routing(
        policy=decision.policy,
        decided_by=decision.decided_by,
        fallback_reason=decision.fallback_reason,
        pod=chosen.endpoint.name,
        order=tuple([endpoint.address for endpoint in decision.order]),
        candidates=len(decision.candidates),
        in_flight=chosen.in_flight,
        running=None if stats is None else stats.running,
        waiting=None if stats is None else stats.waiting,
        kv_cache_usage=None if stats is None else stats.kv_cache_usage,
        prefix_match=None if chosen.prefix_match is None else round(chosen.prefix_match, 4),
        ticket=decision.ticket,
    )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange, however it ended. Durations are seconds.

    Attributes:
        request_id: ``x-request-id``.
        path: the request's path without its query.
        operation: OpenTelemetry's ``gen_ai.operation.name``; None for a path this server does not read.
        model: as the client wrote it; None where it told none.
        status: HTTP status the client saw; None if it went before there was one.
        outcome: see `Outcome`.
        error_type: whose fault; None if nothing failed.
        error: what failed, in a word.
        routing: where it was sent and why; None if it was refused before that.
        served_by: who answered, also after a retry; None if nobody did.
        served_address: the address that answered, known to discovery or not.
        attempts: pods asked, retries included.
        streamed: whether the answer was an event stream.
        usage: tokens.
        usage_source: how they are known.
        duration: from the request's headers to the end.
        time_to_first_token: first content, reasoning or tool call of a stream.
        time_per_output_token: (last - first) / (n - 1) of a stream of two tokens or more.
        usage_removed: usage events hidden from the client.
        unread: why an answer that should have been read was not, e.g. `compressed`; None if it was.
        oversized_events: events too large to be parsed.
        unreadable_events: events that were no JSON of a known shape.
        unexpected_messages: Envoy's messages that should not have come.
    """

    request_id: str
    path: str
    operation: str | None
    model: str | None
    status: int | None
    outcome: Outcome
    error_type: ErrorType | None
    error: str | None
    routing: Routing | None
    served_by: Endpoint | None
    served_address: str | None
    attempts: int
    streamed: bool
    usage: Usage
    usage_source: UsageSource
    duration: float
    time_to_first_token: float | None
    time_per_output_token: float | None
    usage_removed: int = 0
    unread: str | None = None
    oversized_events: int = 0
    unreadable_events: int = 0
    unexpected_messages: int = 0
