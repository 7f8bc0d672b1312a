"""What an exchange has gathered about itself, and what is to be said of it in the end."""

from __future__ import annotations

import re

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import ErrorType, GatewayError
from envoy_extproc.exchange.events import StreamClosed
from envoy_extproc.exchange.report import Outcome, Report, Routing, UsageSource
from envoy_extproc.openai.answer import Seen, Usage
from envoy_extproc.openai.request import InferenceRequest

Verdict = tuple[Outcome, ErrorType | None, str | None]


class Record:
    """The facts of one exchange, noted as they become known. See `Report` for what most of them mean.

    Attributes:
        started: when the request's headers came; None until then.
        refusal: the error this server answered with.
        local_reply: Envoy's word for why it answered itself; None where a pod did.
        answer_ended: whether the end of the answer came.
        cut_by: who ended it before that; None where it ended as it should, or only the end of the stream tells.
        seen: what was read of the answer; None where nothing was to be read.
    """

    __slots__ = (
        "accounting",
        "answer_ended",
        "attempts",
        "cut_by",
        "inference",
        "local_reply",
        "model",
        "operation",
        "path",
        "refusal",
        "request_id",
        "routing",
        "seen",
        "served_address",
        "served_by",
        "started",
        "status",
        "streamed",
        "unexpected",
        "unread",
    )

    def __init__(self, *, accounting: bool) -> None:
        self.accounting = accounting
        self.started: float | None = None
        self.request_id = ""
        self.path = ""
        self.operation: str | None = None
        self.model: str | None = None
        self.inference: InferenceRequest | None = None
        self.routing: Routing | None = None
        self.refusal: GatewayError | None = None
        self.status: int | None = None
        self.local_reply: str | None = None
        self.attempts = 0
        self.served_by: Endpoint | None = None
        self.served_address: str | None = None
        self.streamed = False
        self.seen: Seen | None = None
        self.answer_ended = False
        self.cut_by: ErrorType | None = None
        self.unread: str | None = None
        self.unexpected = 0

    def report(self, closed: StreamClosed) -> Report:
        """The whole of it, at the end."""
        outcome, error_type, error = self._verdict(closed)
        usage, source = self._usage()
        seen = self.seen or Seen()
        started = closed.at if self.started is None else self.started
        first, last = seen.first_token_at, seen.last_token_at
        return Report(
            request_id=self.request_id,
            path=self.path,
            operation=self.operation,
            model=self.model,
            status=self.status,
            outcome=outcome,
            error_type=error_type,
            error=error,
            routing=self.routing,
            served_by=self.served_by,
            served_address=self.served_address,
            attempts=self.attempts,
            streamed=self.streamed,
            usage=usage,
            usage_source=source,
            duration=closed.at - started,
            time_to_first_token=None if first is None else first - started,
            time_per_output_token=time_per_output_token(first, last, usage.completion_tokens),
            usage_removed=seen.removed_events,
            unread=self.unread,
            oversized_events=seen.oversized,
            unreadable_events=seen.unreadable,
            unexpected_messages=self.unexpected,
        )

    def _usage(self) -> tuple[Usage, UsageSource]:
        seen = self.seen
        if seen is not None and seen.usage is not None:
            return seen.usage, "reported"
        failed = self.refusal is not None or (self.status is not None and self.status >= 300)
        if self.inference is None or self.routing is None or failed or not self.accounting:
            return Usage(), "none"
        guess = Usage(
            prompt_tokens=self.inference.prompt_tokens_estimate,
            completion_tokens=0 if seen is None else seen.completion_tokens_estimate,
        )
        return guess, "estimated"

    def _verdict(self, closed: StreamClosed) -> Verdict:
        if closed.failure is not None:
            return "error", "internal", closed.failure
        if self.refusal is not None:
            return "refused", self.refusal.error_type, self.refusal.detail
        if self.served_address is not None and self.routing is None:
            return "error", "internal", "served-undecided"  # a pod answered what nobody had sent there
        if self.status is None or not self.answer_ended:
            early = self._ended_early(closed)
            if early is not None:
                return early
        if self.status is not None and self.status >= 400:
            return self._verdict_on_failure(self.status)
        return self._verdict_on_answer()

    def _verdict_on_failure(self, status: int) -> Verdict:
        """How an answer failed that says so itself: an engine's, or Envoy's own."""
        if self.local_reply is None:
            return "error", fault_of(status), f"status-{status}"
        return "error", fault_of_envoy(status), first_word(self.local_reply) or f"envoy-{status}"

    def _ended_early(self, closed: StreamClosed) -> Verdict | None:
        """The verdict on an exchange that ended before its answer did; None if that cannot be told."""
        if self.cut_by is not None:
            return "aborted", self.cut_by, f"closed-before-{'answer' if self.status is None else 'end'}"
        if self.status is None:
            return (
                ("drained", None, None) if closed.draining else ("aborted", "client", "closed-before-answer")
            )
        if self.seen is None or self.seen.error is not None:
            return None  # nobody read the answer, or it was over with the error in it
        return ("drained", None, None) if closed.draining else ("aborted", "network", "closed-before-end")

    def _verdict_on_answer(self) -> Verdict:
        """How a 2xx went that came to its end: it can still tell of an error, or make no sense."""
        seen = self.seen
        if seen is None:
            return "success", None, None
        if seen.error is not None:
            return "error", fault_of(seen.error.code), "error-in-answer"
        if seen.unreadable:
            return "error", "content", "unreadable"
        if not seen.done and not seen.oversized:
            return "error", "content", "no-done"
        return "success", None, None


def fault_of(status: int) -> ErrorType:
    """Whose fault an engine's error status is: 429 and 503 mean it has too much to do."""
    if status in (429, 503):
        return "overload"
    return "client" if 400 <= status < 500 else "model_server"


def fault_of_envoy(status: int) -> ErrorType:
    """Whose fault it is when Envoy answers by itself: below 500 the client's, else no pod could be reached."""
    return "client" if status < 500 else "network"


def first_word(details: str) -> str:
    """Envoy's response code details without what it says in braces, which has no bound."""
    return re.split(r"[^a-z0-9_]", details[:64])[0]


def time_per_output_token(first: float | None, last: float | None, tokens: int) -> float | None:
    """(last - first) / (n - 1), in seconds; None for fewer than two tokens."""
    if first is None or last is None or tokens < 2:
        return None
    return (last - first) / (tokens - 1)
