"""What an exchange has gathered about itself, and what is to be said of it in the end."""

from __future__ import annotations

import msgspec

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import ErrorType, GatewayError
from envoy_extproc.exchange.events import StreamClosed
from envoy_extproc.exchange.fault import fault_of as fault_of
from envoy_extproc.exchange.fault import fault_of_envoy as fault_of_envoy
from envoy_extproc.exchange.fault import fault_of_error, first_word
from envoy_extproc.exchange.report import Outcome, Report, Routing, UsageSource
from envoy_extproc.openai.answer import Seen, Usage
from envoy_extproc.openai.request import InferenceRequest
from envoy_extproc.openai.routes import Accounting, Route

Verdict = tuple[Outcome, ErrorType | None, str | None]


class Record:
    """The facts of one exchange, noted as they become known. See `Report` for what most of them mean.

    Attributes:
        started: when the request's headers came; None until then.
        accounting: whether the answer is read for its usage.
        opaque: whether an answer of a type that cannot be read is none to be wondered at.
        refusal: the error this server answered with.
        answered: whether this server gave a good answer itself.
        local_reply: Envoy's word for why it answered itself; None where a pod did.
        answer_ended: whether the end of the answer came.
        cut_by: who ended it before that; None where it ended as it should, or only the end of the stream tells.
        seen: what was read of the answer; None where nothing was to be read.
        length: of the answer's body, as its headers say; None where they do not.
        received: bytes of it that came here.
    """

    __slots__ = (
        "accounting",
        "answer_ended",
        "answered",
        "attempts",
        "cut_by",
        "inference",
        "length",
        "local_reply",
        "model",
        "opaque",
        "operation",
        "path",
        "received",
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
        self.opaque = False
        self.refusal: GatewayError | None = None
        self.answered = False
        self.status: int | None = None
        self.local_reply: str | None = None
        self.attempts = 0
        self.served_by: Endpoint | None = None
        self.served_address: str | None = None
        self.streamed = False
        self.seen: Seen | None = None
        self.length: int | None = None
        self.received = 0
        self.answer_ended = False
        self.cut_by: ErrorType | None = None
        self.unread: str | None = None
        self.unexpected = 0

    def read_as(self, route: Route) -> None:
        """The request is one to `route`."""
        self.operation = route.operation
        self.opaque = route.opaque
        self.accounting = self.accounting and route.accounting is not Accounting.NOTHING

    def count(self, prompt_tokens: int) -> None:
        """The prompt was counted: a better guess, where no engine tells, than one from its bytes."""
        if self.inference is not None:
            self.inference = msgspec.structs.replace(self.inference, prompt_tokens_estimate=prompt_tokens)

    def answer_here(self) -> None:
        """This server gives a good answer itself."""
        self.answered = self.answer_ended = True
        self.status = 200

    @property
    def answered_here(self) -> bool:
        """Whether this server answered instead of a pod, well or not."""
        return self.answered or self.refusal is not None

    @property
    def whole(self) -> bool:
        """Whether all of an answer with a length has come: its client may leave before Envoy tells of its end."""
        return self.length is not None and self.received >= self.length

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
        begun = None if seen is None else seen.begun  # a message's start told the prompt; the rest never came
        guess = Usage(
            prompt_tokens=self.inference.prompt_tokens_estimate if begun is None else begun.prompt_tokens,
            completion_tokens=0 if seen is None else seen.completion_tokens_estimate,
            cached_tokens=None if begun is None else begun.cached_tokens,
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
        word = first_word(self.local_reply) or f"envoy-{status}"
        return "error", fault_of_envoy(status, self.local_reply), word

    def _ended_early(self, closed: StreamClosed) -> Verdict | None:
        """The verdict on an exchange that ended before its answer did; None if that cannot be told."""
        seen = self.seen
        if seen is not None and seen.done and self.unread is None:
            return None  # all of it had come
        told = seen is not None and seen.error is not None  # by an engine that then broke off
        if self.cut_by is not None and not (told and self.cut_by != "client"):
            return "aborted", self.cut_by, f"closed-before-{'answer' if self.status is None else 'end'}"
        if self.status is None:
            return (
                ("drained", None, None) if closed.draining else ("aborted", "client", "closed-before-answer")
            )
        if seen is None or told:
            return None  # nobody read the answer, or it was over with the error in it
        return ("drained", None, None) if closed.draining else ("aborted", "network", "closed-before-end")

    def _verdict_on_answer(self) -> Verdict:
        """How a 2xx went that came to its end: it can still tell of an error, or make no sense."""
        seen = self.seen
        if seen is None:
            return "success", None, None
        if seen.error is not None:
            return "error", fault_of_error(seen.error), "error-in-answer"
        if seen.unreadable:
            return "error", "content", "unreadable"
        if not seen.done and not seen.oversized:
            return "error", "content", "no-done"
        return "success", None, None


def time_per_output_token(first: float | None, last: float | None, tokens: int) -> float | None:
    """(last - first) / (n - 1), in seconds; None for fewer than two tokens."""
    if first is None or last is None or tokens < 2:
        return None
    return (last - first) / (tokens - 1)
