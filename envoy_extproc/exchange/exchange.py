"""One HTTP exchange, from Envoy's first message to the end of the stream, as a table.

Theory of operation. Envoy opens one ext_proc stream for each HTTP request and says what happens in phases: request
headers, request body, response headers, response body, trailers. It waits for exactly one reply to each message, so
`receive` returns at most one `Continue` or `Respond` for an event that is a message, and none for others.

Three rules:

1. Every state change is in `TABLE`; `receive` looks up and does nothing else. What the table does not list is a
   message that should not come: it gets an empty reply of its own phase, is counted, and changes nothing.
2. `Schedule` is a question, answered by `Scheduled` or `Refused`; so is `ListModels`, answered by `Listed`. Only then Envoy
   gets its reply.
3. `StreamClosed` comes exactly once and last, in whatever state; it yields the one `Finish` with the one `Report`, or
   `Release` in the native lane, unless this server refused the request: then the report comes with Envoy's access-log entry (see `native`).
   In-flight is held from the answer to `Schedule` until then: the stream is held open to the end of the exchange.

    AWAIT_REQUEST_HEADERS --headers--> AWAIT_REQUEST_BODY --body--> AWAIT_DECISION --Scheduled--> AWAIT_RESPONSE_HEADERS
             |                                |                          |                          |            |
             +--no body: AWAIT_DECISION       +--bad: ANSWERED           +--Refused: ANSWERED    AWAIT_RESPONSE_BODY |
                                              +--trailers: ANSWERED                                 +--------> HELD

HELD is: nothing more has to be read, only the end is awaited. Where Envoy has `native.lua`, Scheduled leads to
HANDED_OVER instead, which is the same for an answer that the script reads. A request with trailers and no DATA frame has no body
message: the trailers come in its place. Behind a body they come by themselves and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import (
    BadRequest,
    GatewayError,
    HeadersTooLarge,
    ModelNotFound,
    PayloadTooLarge,
)
from envoy_extproc.exchange import control, reading, replies
from envoy_extproc.exchange.commands import (
    HIDE_RESPONSE,
    PASS,
    SHOW_RESPONSE,
    BodyMode,
    Command,
    Continue,
    Finish,
    Handover,
    ListModels,
    LoadReport,
    Phase,
    Release,
    Schedule,
    Serve,
)
from envoy_extproc.exchange.events import (
    Event,
    Listed,
    Refused,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Scheduled,
    StreamClosed,
)
from envoy_extproc.exchange.native import LUA_VERSIONS
from envoy_extproc.exchange.record import Record
from envoy_extproc.exchange.report import routing_of
from envoy_extproc.exchange.states import ExchangeSettings as ExchangeSettings
from envoy_extproc.exchange.states import State as State
from envoy_extproc.headers import Headers
from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes
from envoy_extproc.openai.answer import Reader
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.scheduling.interfaces import Decision

Lookup = Callable[[str], Endpoint | None]
"""The endpoint of an address, if discovery knows it."""

_PHASES: Mapping[type[Any], Phase] = {
    RequestHeaders: Phase.REQUEST_HEADERS,
    RequestBody: Phase.REQUEST_BODY,
    RequestTrailers: Phase.REQUEST_TRAILERS,
    ResponseHeaders: Phase.RESPONSE_HEADERS,
    ResponseBody: Phase.RESPONSE_BODY,
    ResponseTrailers: Phase.RESPONSE_TRAILERS,
}
_PASS_BODY = (PASS[Phase.RESPONSE_BODY],)
_NO_HEADERS = Headers()


class Exchange:
    """The state of one exchange.

    Args:
        settings: what is the same for every exchange.
        native: whether the answer may be left to `native.lua`, where Envoy has it.
        lookup: the endpoint of an address.
        new_request_id: makes an id for a request that came without.

    Attributes:
        state: what is waited for; changed by the handlers in `TABLE` alone.
        record: what is known so far.
    """

    __slots__ = (
        "_awaited_phase",
        "_decision",
        "_headers",
        "_hide_usage",
        "_load_report",
        "_lookup",
        "_native",
        "_new_request_id",
        "_reader",
        "_rewritten",
        "_route",
        "_settings",
        "_subset",
        "record",
        "state",
    )

    def __init__(
        self,
        settings: ExchangeSettings,
        lookup: Lookup,
        new_request_id: Callable[[], str],
        *,
        native: bool = False,
    ) -> None:
        self.state = State.AWAIT_REQUEST_HEADERS
        self.record = Record(accounting=settings.accounting)
        self._settings = settings
        self._lookup = lookup
        self._new_request_id = new_request_id
        self._headers = _NO_HEADERS
        self._route: routes.Route | None = None
        self._subset: tuple[str, ...] | None = None
        self._awaited_phase = Phase.REQUEST_HEADERS
        self._rewritten: bytes | None = None
        self._hide_usage = False
        self._reader: Reader | None = None
        self._native = native
        self._decision: Decision | None = None
        self._load_report: LoadReport | None = None

    def receive(self, event: Event) -> Sequence[Command]:
        """Moves by one event; returns what is to be done, in order."""
        handler = TABLE[self.state].get(type(event))
        if handler is not None:
            return handler(self, event)
        self.record.unexpected += 1
        phase = _PHASES.get(type(event))
        return () if phase is None or self.state is State.CLOSED else (PASS[phase],)

    @property
    def holds_back(self) -> bool:
        """Whether a part of the answer waits for its rest here; a stream that ended now would lose it."""
        return self._reader is not None and self._reader.holds_back

    def let_go(self) -> None:
        """The stream is to end early: the next reply takes along what is held back."""
        if self._reader is not None:
            self._reader.let_go()

    # -- request ---------------------------------------------------------------------------------------------------

    def request_headers(self, event: RequestHeaders) -> Sequence[Command]:
        """The first message: without a body that is read, all there is to decide by."""
        record, headers = self.record, event.headers
        self._headers = headers
        self._subset = event.subset
        self._native = self._native and event.lua in LUA_VERSIONS
        target = headers.get(":path") or ""
        record.started = event.at
        record.request_id = headers.get("x-request-id") or self._new_request_id()
        record.path = target.partition("?")[0]
        if control.too_many(headers):
            return self._refuse(
                HeadersTooLarge("The request's headers are larger than this gateway accepts.")
            )
        if event.end_of_stream and headers.get(":method") == "GET":
            wanted = routes.listed_model(target)
            if wanted is not None:
                self.state = State.AWAIT_DECISION
                return (ListModels(wanted),)
        route = None if event.end_of_stream else routes.find(target)
        if route is None:
            return self._schedule(Phase.REQUEST_HEADERS, model=None)
        self._route = route
        record.read_as(route)
        length = control.content_length(headers)
        if length is not None and length > self._settings.max_body_bytes:
            return self._refuse(self._too_large())
        self.state = State.AWAIT_REQUEST_BODY
        return (HIDE_RESPONSE if self._native else SHOW_RESPONSE,)

    def request_body(self, event: RequestBody) -> Sequence[Command]:
        """The whole body: reads it, and asks the engine for usage in it where none would come by itself."""
        assert self._route is not None
        try:
            inference, prompt = self._decode(event.data, self._route)
        except GatewayError as error:
            return self._refuse(error)
        self.record.inference = inference
        if inference.stream and inference.add_usage and self.record.accounting:
            self._rewritten = openai_request.ask_for_usage(event.data, inference)
            self._hide_usage = True
        return self._schedule(Phase.REQUEST_BODY, model=inference.model, prompt=prompt)

    def request_without_body(self, _: RequestTrailers) -> Sequence[Command]:
        """Trailers where the body should be: there is none. Let through, the request would reach a pod unrouted."""
        return self._refuse(BadRequest("The request has no body."))

    def request_trailers(self, _: RequestTrailers) -> Sequence[Command]:
        """The end of a request whose body came before: nothing in them is read."""
        return (PASS[Phase.REQUEST_TRAILERS],)

    def _decode(
        self, body: bytes, route: routes.Route
    ) -> tuple[openai_request.InferenceRequest, Prompt | None]:
        if len(body) > self._settings.max_body_bytes:
            raise self._too_large()
        if control.body_is_encoded(self._headers):
            encoding = self._headers.get("content-encoding")
            raise BadRequest(f"A request body with content-encoding {encoding!r} cannot be read.")
        return openai_request.read(body, route, self._headers.get("content-type") or "")

    def _schedule(
        self, phase: Phase, *, model: str | None, prompt: Prompt | None = None
    ) -> Sequence[Command]:
        self.state = State.AWAIT_DECISION
        self._awaited_phase = phase
        wanted = control.scheduling_request(
            self._headers,
            model=model,
            subset=self._subset,
            inference=self.record.inference,
            prompt=prompt,
            trust_user=self._settings.trust_user,
        )
        self.record.model = wanted.model
        return (Schedule(wanted),)

    def scheduled(self, event: Scheduled) -> Sequence[Command]:
        """The decision, and with it the reply that Envoy waits for."""
        self.state = State.HANDED_OVER if self._native else State.AWAIT_RESPONSE_HEADERS
        self._decision = event.decision
        self.record.routing = routing_of(event.decision)
        if event.prompt_tokens is not None:
            self.record.count(event.prompt_tokens)
        form = control.load_report_form(self._headers) or self._settings.load_report
        if form is not None:
            self._load_report = LoadReport(form, event.decision.chosen, event.rate)
        body, self._rewritten = self._rewritten, None  # a long prompt is not kept for the whole stream
        reply = Continue(
            phase=self._awaited_phase,
            set_headers=replies.routed_headers(self.record, self._headers, event.decision, body),
            remove_headers=replies.removed_headers(self.record, self._headers, event.decision),
            body=body,
            destination=self.record.routing.order,
            # A body that nobody reads here goes straight to the pod, however long it is.
            request_body=BodyMode.NONE if self._route is None else None,
            # Envoy takes a mode for the answer with the first reply alone.
            response_headers=not self._native if self._awaited_phase is Phase.REQUEST_HEADERS else None,
            clear_route_cache=self._settings.clear_route_cache,
            handover=self._handover(event.decision) if self._native else None,
        )
        if self._native:
            self._headers, self._decision = _NO_HEADERS, None  # not needed for the rest of a long stream
        return (reply,)

    def _handover(self, decision: Decision) -> Handover:
        inference, settings = self.record.inference, self._settings
        stream = inference is not None and inference.stream
        return replies.handover(
            self.record,
            decision,
            hide=self._hide_usage,
            max_bytes=settings.max_event_bytes if stream else settings.max_json_bytes,
            load_report=self._load_report,
        )

    def listed(self, event: Listed) -> Sequence[Command]:
        """The list of models, or the one of them that was asked for; None where nobody serves it."""
        if event.body is None:
            return self._refuse(ModelNotFound("The model that the path names does not exist.", param="model"))
        self.state = State.ANSWERED
        self.record.answer_here()
        return (replies.listing(self.record, event.body),)

    def refused(self, event: Refused) -> Sequence[Command]:
        """Nobody can take it."""
        return self._refuse(event.error)

    def _refuse(self, error: GatewayError) -> Sequence[Command]:
        self.state = State.ANSWERED
        # Its traceback would hold frames, which hold this exchange and the body, until a garbage collection.
        error.__context__ = None
        self.record.refusal, self.record.status = error.with_traceback(None), error.status
        return (replies.refusal(self.record, error),)

    def _too_large(self) -> PayloadTooLarge:
        limit = self._settings.max_body_bytes
        return PayloadTooLarge(f"The request body is larger than the {limit} bytes this gateway accepts.")

    # -- response --------------------------------------------------------------------------------------------------

    def response_headers(self, event: ResponseHeaders) -> Sequence[Command]:
        """Who answered, and whether the answer is to be read."""
        record = self.record
        record.status = control.status(event.headers)
        record.attempts = event.attempts
        record.local_reply = event.local_reply
        record.answer_ended = event.end_of_stream
        moved = () if event.upstream is None else self._served(event.upstream)
        record.length = control.content_length(event.headers)
        self._reader, mode = reading.start(record, event, self._settings, hide_usage=self._hide_usage)
        self.state = State.HELD if self._reader is None else State.AWAIT_RESPONSE_BODY
        rewritten = self._hide_usage and record.streamed and self._reader is not None
        reply = Continue(
            phase=Phase.RESPONSE_HEADERS,
            set_headers=replies.answer_headers(record, self._decision),
            remove_headers=reading.removed_headers(event.headers, rewritten=rewritten),
            response_body=mode,
            load_report=self._load_report,
        )
        self._headers, self._decision = _NO_HEADERS, None  # not needed for the rest of a long stream
        return (*moved, *reading.heard(event), reply)

    def _served(self, address: str) -> Sequence[Serve]:
        """After a retry it was another endpoint than the chosen one that answered."""
        record = self.record
        record.served_address = address
        record.served_by = self._lookup(address)
        if record.served_by is None or self._decision is None:
            return ()
        return () if record.served_by == self._decision.chosen.endpoint else (Serve(record.served_by),)

    def response_body(self, event: ResponseBody) -> Sequence[Command]:
        """What came of the answer in one read."""
        reader = self._reader
        assert reader is not None
        self.record.received += len(event.data)
        shown = reader.feed(event.data, event.at) if event.data else None
        if not event.end_of_stream:
            return _PASS_BODY if shown is None else (Continue(phase=Phase.RESPONSE_BODY, body=shown),)
        rest = self._end_of_answer(reader, event.at)
        if rest:
            shown = (event.data if shown is None else shown) + rest
        return (Continue(phase=Phase.RESPONSE_BODY, body=shown),)

    def response_trailers(self, event: ResponseTrailers) -> Sequence[Command]:
        """The end of an answer with trailers. A tail held back cannot be delivered any more: trailers carry no body."""
        assert self._reader is not None
        self._end_of_answer(self._reader, event.at)
        return (PASS[Phase.RESPONSE_TRAILERS],)

    def _end_of_answer(self, reader: Reader, at: float) -> bytes:
        self.state = State.HELD
        self.record.answer_ended = True
        self._reader = None
        return reader.finish(at)

    def handed_over(self, _: ResponseHeaders) -> Sequence[Command]:
        """The answer of an exchange that `native.lua` reads: nothing to do here, if Envoy shows it all the same."""
        return (PASS[Phase.RESPONSE_HEADERS],)

    # -- end -------------------------------------------------------------------------------------------------------

    def stream_closed(self, event: StreamClosed) -> Sequence[Command]:
        """However it ended. What was held back of a stream cut off is lost with it; what was seen of it is not."""
        if self._reader is not None and self.record.whole:
            self._end_of_answer(self._reader, event.at)  # the client left right behind the last byte
        left_to_entry = self._left_to_entry(event)
        self.state = State.CLOSED
        self._reader = None
        self._headers = _NO_HEADERS
        if left_to_entry:
            return (Release(replies.clean(self.record.request_id)),)
        return (Finish(self.record.report(event)),)

    def _left_to_entry(self, event: StreamClosed) -> bool:
        """Whether the access-log entry brings the report: in the native lane, but for what only this server knows.

        Also where it ended before it was handed over: whether Envoy still took the reply when its client left cannot be
        told here, and a request must be reported once. Where the client left so soon that not even the headers came, its
        entry alone knows whose it was.
        """
        if not self._native or self.record.answered_here:
            return False
        return event.failure is None or self.state is State.HANDED_OVER


Handler = Callable[[Exchange, Any], Sequence[Command]]

_CLOSE: Mapping[type[Any], Handler] = {StreamClosed: Exchange.stream_closed}
TABLE: Mapping[State, Mapping[type[Any], Handler]] = {
    State.AWAIT_REQUEST_HEADERS: {RequestHeaders: Exchange.request_headers, **_CLOSE},
    # Envoy answers by itself (413, a timeout) while the body is awaited: its answer passes through here too.
    # So does a pod's, if Envoy is configured to let a request past without its body: see `Record`.
    State.AWAIT_REQUEST_BODY: {
        RequestBody: Exchange.request_body,
        RequestTrailers: Exchange.request_without_body,
        ResponseHeaders: Exchange.response_headers,
        **_CLOSE,
    },
    State.AWAIT_DECISION: {
        Scheduled: Exchange.scheduled,
        Refused: Exchange.refused,
        Listed: Exchange.listed,
        **_CLOSE,
    },
    State.AWAIT_RESPONSE_HEADERS: {
        ResponseHeaders: Exchange.response_headers,
        RequestTrailers: Exchange.request_trailers,
        **_CLOSE,
    },
    State.AWAIT_RESPONSE_BODY: {
        ResponseBody: Exchange.response_body,
        ResponseTrailers: Exchange.response_trailers,
        **_CLOSE,
    },
    State.HELD: _CLOSE,
    State.HANDED_OVER: {
        RequestTrailers: Exchange.request_trailers,
        ResponseHeaders: Exchange.handed_over,
        **_CLOSE,
    },
    State.ANSWERED: _CLOSE,
    State.CLOSED: {},
}
"""What may happen in which state, and who handles it."""

NEXT: Mapping[State, Mapping[type[Any], frozenset[State]]] = {
    State.AWAIT_REQUEST_HEADERS: {
        RequestHeaders: frozenset({State.AWAIT_REQUEST_BODY, State.AWAIT_DECISION, State.ANSWERED}),
    },
    State.AWAIT_REQUEST_BODY: {
        RequestBody: frozenset({State.AWAIT_DECISION, State.ANSWERED}),
        RequestTrailers: frozenset({State.ANSWERED}),
        ResponseHeaders: frozenset({State.HELD}),
    },
    State.AWAIT_DECISION: {
        Scheduled: frozenset({State.AWAIT_RESPONSE_HEADERS, State.HANDED_OVER}),
        Refused: frozenset({State.ANSWERED}),
        Listed: frozenset({State.ANSWERED}),
    },
    State.AWAIT_RESPONSE_HEADERS: {
        ResponseHeaders: frozenset({State.AWAIT_RESPONSE_BODY, State.HELD}),
        RequestTrailers: frozenset({State.AWAIT_RESPONSE_HEADERS}),
    },
    State.HANDED_OVER: {
        ResponseHeaders: frozenset({State.HANDED_OVER}),
        RequestTrailers: frozenset({State.HANDED_OVER}),
    },
    State.AWAIT_RESPONSE_BODY: {
        ResponseBody: frozenset({State.AWAIT_RESPONSE_BODY, State.HELD}),
        ResponseTrailers: frozenset({State.HELD}),
    },
}
"""Where each of these leads; `StreamClosed` leads to CLOSED from everywhere. Tests draw from it and hold it true."""
