"""``ExternalProcessor.Process``: one gRPC stream for each HTTP exchange, from Envoy's first message to its end.

The stream is held to the end of the exchange: its end, however it comes, is what releases in-flight. grpc.aio shows
that end as EOF or as a cancellation, about half and half; neither says how the exchange went. That is the core's to
know, so both are taken as the same event.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterable, Callable

import grpc
import msgspec
import structlog

from envoy_extproc import orca
from envoy_extproc.errors import GatewayError
from envoy_extproc.exchange.commands import (
    Command,
    Continue,
    Finish,
    Heard,
    ListModels,
    Release,
    Respond,
    Schedule,
    Serve,
)
from envoy_extproc.exchange.events import Event, Listed, Refused, Scheduled, StreamClosed
from envoy_extproc.exchange.exchange import Exchange, ExchangeSettings, State
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server import wire
from envoy_extproc.server.catalogue import Catalogue
from envoy_extproc.server.director import Director
from envoy_extproc.server.native_lane import NativeLane
from envoy_extproc.state.memory import InFlight, Lease
from envoy_extproc.state.rates import Rates
from envoy_extproc.telemetry import UNKNOWN_MODEL, Hook
from envoy_extproc.tokens.counting import PromptCounter

log = structlog.get_logger()

_ROUTED = (State.AWAIT_RESPONSE_HEADERS, State.AWAIT_RESPONSE_BODY, State.HELD, State.HANDED_OVER)
_OVER = (State.ANSWERED, State.CLOSED)
_OVER_OR_HANDED_OVER = (*_OVER, State.HANDED_OVER)

Context = grpc.aio.ServicerContext[wire.ProcessingRequest, wire.ProcessingResponse]


def new_request_id() -> str:
    """An id for a request that came without one: a random UUID, as Envoy's own."""
    return str(uuid.uuid4())


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What every exchange of a server is performed with.

    Attributes:
        settings: for every exchange.
        director: decides.
        in_flight: counts.
        hook: is told.
        lane: the native lane.
        catalogue: knows the models.
        rates: how often requests go to each endpoint.
        counter: counts prompts before they are decided about; None where the estimate will do for all.
        heard: told what the engine at an address said of its load, and when.
        hold: whether a stream is held to the end of an exchange that was handed over.
        left: told the ticket of each that is over, though its report is left to Envoy's access log.
    """

    settings: ExchangeSettings
    director: Director
    in_flight: InFlight
    hook: Hook
    lane: NativeLane
    catalogue: Catalogue
    rates: Rates = msgspec.field(default_factory=Rates)
    counter: PromptCounter | None = None
    heard: Callable[[str, orca.Parsed, float], None] = lambda _address, _parsed, _at: None
    hold: bool = True
    left: Callable[[str], None] = lambda _ticket: None


class Call:
    """One stream: performs what its exchange commands.

    Attributes:
        exchange: the core's side of it.
        returning: whether this server is giving the stream back to Envoy.
        writing: whether a reply is on its way out. Cancelled in the middle of its first one, gRPC would leave the
            stream open for ever.
        uncounted: a request whose prompt is to be counted before it is decided about; None where none is.
    """

    __slots__ = ("_lease", "_parts", "_ticket", "exchange", "returning", "uncounted", "writing")

    def __init__(self, exchange: Exchange, parts: Parts) -> None:
        self.exchange = exchange
        self.returning = False
        self.writing = False
        self.uncounted: SchedulingRequest | None = None
        self._parts = parts
        self._lease: Lease | None = None
        self._ticket: str | None = None

    def receive(self, event: Event) -> Continue | Respond | None:
        """Feeds the exchange and does what it asks for; returns the reply Envoy waits for, if there is one."""
        reply: Continue | Respond | None = None
        for command in self.exchange.receive(event):
            answer = self._perform(command, event.at)
            if answer is not None:
                reply = answer
        return reply

    async def decide(self, clock: Callable[[], float]) -> Continue | Respond | None:
        """Counts the prompt of the request that is uncounted, and performs what waited for it, if anybody still waits for that.

        The conversation may outlive its stream: decided about then, the request would be in flight for ever.
        """
        request, self.uncounted = self.uncounted, None
        counter = self._parts.counter
        assert request is not None
        assert counter is not None
        counted = await counter.counted(request)
        if self.exchange.state is State.CLOSED:
            return None
        return self.receive(self._schedule(counted, clock()))

    def _perform(self, command: Command, at: float) -> Continue | Respond | None:
        match command:
            case Continue() | Respond():
                return command
            case Schedule():
                counter = self._parts.counter
                if counter is not None and counter.counts(command.request):
                    self.uncounted = command.request
                    return None
                return self.receive(self._schedule(command.request, at))
            case ListModels():
                parts = self._parts
                body = parts.catalogue.answer(parts.director.snapshot, command.name, at)
                return self.receive(Listed(at, body))
            case Heard():
                self._parts.heard(command.address, command.parsed, at)
            case Serve():
                if self._lease is not None:
                    self._lease.move(command.endpoint)
            case Finish():
                self._finish(command)
            case Release():
                self._release(command, at)
        return None

    def _schedule(self, request: SchedulingRequest, at: float) -> Scheduled | Refused:
        parts = self._parts
        began = time.perf_counter()
        try:
            decision = parts.director.schedule(request, at)
        except GatewayError as error:
            return Refused(at, error)
        seconds = time.perf_counter() - began
        self._lease = parts.in_flight.acquire(decision.chosen.endpoint, request.model or UNKNOWN_MODEL)
        self._ticket = decision.ticket
        parts.hook.decided(decision, seconds)
        tokens = None if request.tokenizer is None else request.prompt_tokens
        return Scheduled(at, decision, parts.rates.add(decision.chosen.endpoint.address, at), tokens)

    def _finish(self, command: Finish) -> None:
        if self._lease is not None:
            self._lease.release()
        self._parts.hook.finished(command.report)

    def _release(self, command: Release, at: float) -> None:
        parts, lease = self._parts, self._lease
        parts.lane.end(at)
        if lease is None:
            return
        if not parts.hold:
            parts.lane.keep(command.request_id, lease, at)
            return
        lease.release()
        if self._ticket is not None:
            parts.left(self._ticket)


class ExternalProcessor:
    """The service.

    Args:
        parts: what exchanges are performed with.
        message_unknown: called for a message of a kind not known here.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        message_unknown: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._message_unknown = message_unknown
        self._clock = clock
        self._live: dict[asyncio.Task[None], Call] = {}

    def handler(self) -> grpc.GenericRpcHandler[wire.ProcessingRequest, wire.ProcessingResponse]:
        """What a gRPC server needs to serve it, under Envoy's name."""
        method = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=wire.ProcessingRequest.FromString,
            response_serializer=wire.ProcessingResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(wire.PROCESS, {"Process": method})

    @property
    def live(self) -> int:
        """Streams open now."""
        return len(self._live)

    async def process(self, _requests: AsyncIterable[wire.ProcessingRequest], context: Context) -> None:
        """Serves one stream."""
        task = asyncio.current_task()
        assert task is not None
        parts = self._parts
        exchange = Exchange(parts.settings, parts.director.lookup, new_request_id, native=parts.lane.open)
        call = Call(exchange, parts)
        self._live[task] = call
        failure: str | None = None
        try:
            # Envoy resets about half of all streams, which cancels this task; a read that is cancelled in the middle never
            # frees 112 bytes in grpcio 1.85 (its operation is freed behind the wait for it). So it is left to end by itself.
            await asyncio.shield(self._converse(call, context))
        except asyncio.CancelledError:
            if not call.returning:
                raise
            task.uncancel()
        except wire.DecodeError:
            self._message_unknown()
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a ProcessingRequest")
        except grpc.aio.InternalError:
            pass  # Envoy was gone before its reply could be sent; the same end as any other
        except Exception as error:
            # The outermost edge of a stream: a defect ends this exchange as an error, Envoy decides by its fail mode.
            failure = type(error).__name__
            log.exception("exchange_failed", request_id=exchange.record.request_id)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            del self._live[task]
            call.receive(StreamClosed(self._clock(), draining=call.returning, failure=failure))

    async def _converse(self, call: Call, context: Context) -> None:
        """Reads and replies until nothing more is to be read. It may outlive its stream: then it ends with its next step."""
        try:
            await self._reply_to_each(call, context)
        except Exception:
            if call.exchange.state is not State.CLOSED:
                raise
            # A read or a write that was under way when the stream ended: nobody is left to hear of it.

    async def _reply_to_each(self, call: Call, context: Context) -> None:
        clock, exchange, lane = self._clock, call.exchange, self._parts.lane
        over = _OVER if self._parts.hold else _OVER_OR_HANDED_OVER
        while exchange.state not in over:
            message: object = await context.read()
            if not isinstance(message, wire.ProcessingRequest):  # grpc.aio.EOF
                return
            event = wire.decode(message, clock())
            if event is None:
                # Envoy waits for no reply to what it says about itself, and a reply would have no phase.
                self._message_unknown()
                continue
            reply = call.receive(event)
            if call.uncounted is not None:
                reply = await call.decide(clock)
            if reply is not None:
                call.writing = True
                await context.write(wire.encode(reply, lane.plea(event.at)))
                call.writing = False

    # -- drain -----------------------------------------------------------------------------------------------------

    def give_back(self, *, held_only: bool) -> None:
        """Ends streams without an error, so that Envoy carries their exchanges to their end alone.

        A request that has no pod yet is never among them: Envoy would send it anywhere. Nor is, until its next reply
        has gone out, one of whose answer a part is held back here: its client would miss it. One whose reply is being
        written is left for the next time.

        Args:
            held_only: only those of which nothing more is to be read; their exchanges lose nothing by it.
        """
        states = (State.HELD,) if held_only else _ROUTED
        for task, call in self._live.items():
            if call.exchange.state not in states or call.returning or call.writing:
                continue
            if call.exchange.holds_back:
                call.exchange.let_go()
            else:
                call.returning = True
                task.cancel()
