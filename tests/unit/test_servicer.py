"""The service on a real grpc.aio server and channel: conversations as Envoy has them, and every way they can end."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from envoy_extproc._proto import ext_proc_pb2
from envoy_extproc.endpoints import Snapshot
from envoy_extproc.exchange.exchange import ExchangeSettings
from envoy_extproc.exchange.report import Report
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import Decision, SchedulingRequest
from envoy_extproc.server import wire
from envoy_extproc.server.catalogue import Catalogue
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.server.native_lane import Accounting, NativeLane
from envoy_extproc.server.servicer import ExternalProcessor, Parts
from envoy_extproc.state.memory import InFlight
from envoy_extproc.telemetry import Hook, Hooks
from envoy_extproc.tokens.counting import PromptCounter, Uncounted
from tests.support.builders import MODEL, endpoint, sse, token, usage
from tests.support.gateway import eventually

Request = ext_proc_pb2.ProcessingRequest
Response = ext_proc_pb2.ProcessingResponse
Stream = grpc.aio.StreamStreamCall[Request, Response]
STREAM = b'{"model":"llama-3-8b","stream":true}'
FILTER = "envoy.filters.http.ext_proc"


@dataclass
class Told:
    """A hook that keeps what it is told."""

    decisions: list[Decision] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def decided(self, decision: Decision, seconds: float) -> None:
        assert seconds >= 0
        self.decisions.append(decision)

    def finished(self, report: Report) -> None:
        self.reports.append(report)


class Defect(RuntimeError):
    """What a broken part raises."""


class BrokenHook:
    """An exporter with a defect."""

    def decided(self, decision: Decision, seconds: float) -> None:
        raise Defect

    def finished(self, report: Report) -> None:
        raise Defect


class BrokenDirector(Director):
    """Choosing with a defect."""

    def schedule(self, request: object, now: float) -> Decision:
        raise Defect


@dataclass
class Service:
    """A server under test, and a way to it."""

    processor: ExternalProcessor
    in_flight: InFlight
    told: Told
    unknown: list[None]
    address: str
    open: Callable[[], Stream]

    async def give_back(self, *, held_only: bool) -> None:
        """As a drain does it again and again: once no reply is on its way, so that it passes over no stream."""
        await until(lambda: not any(call.writing for call in self.processor._live.values()))
        self.processor.give_back(held_only=held_only)

    async def report(self) -> Report:
        """The one report, as soon as the stream is over for the server too."""
        await until(lambda: self.processor.live == 0 and bool(self.told.reports))
        (report,) = self.told.reports
        return report


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def service(
    *,
    hooks: Sequence[Hook] = (),
    director: type[Director] = Director,
    settings: ExchangeSettings | None = None,
    lane: NativeLane | None = None,
    hold: bool = True,
    counter: PromptCounter | None = None,
) -> AsyncIterator[Service]:
    in_flight, told, unknown = InFlight(), Told(), list[None]()
    directing = director(
        profiles=registry.build(),
        rules=RoutingRules(),
        in_flight=in_flight.count,
        states={},
        rng=random.Random(1),
    )
    directing.update(Snapshot([endpoint(1), endpoint(2, models=("other",))]))
    parts = Parts(
        settings=settings or ExchangeSettings(),
        director=directing,
        in_flight=in_flight,
        hook=Hooks(*hooks, told),
        lane=lane or NativeLane("auto"),
        catalogue=Catalogue({}),
        counter=counter,
        hold=hold,
    )
    processor = ExternalProcessor(parts, message_unknown=lambda: unknown.append(None))
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((processor.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.stream_stream(
                f"/{wire.PROCESS}/Process",
                request_serializer=Request.SerializeToString,
                response_deserializer=Response.FromString,
            )

            def begin() -> Stream:
                return method(None)

            yield Service(processor, in_flight, told, unknown, f"127.0.0.1:{port}", begin)
    finally:
        await server.stop(None)


# -- what Envoy says -----------------------------------------------------------------------------------------------


def request_headers(
    path: str = "/v1/chat/completions", *, end: bool = False, lua: int | None = None
) -> Request:
    message = Request()
    message.request_headers.end_of_stream = end
    if lua is not None:
        message.metadata_context.filter_metadata[wire.LUA_METADATA].fields["v"].number_value = lua
    for name, value in ((":path", path), (":method", "POST"), ("x-request-id", "id-1")):
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    return message


def request_body(data: bytes = STREAM) -> Request:
    message = Request()
    message.request_body.body, message.request_body.end_of_stream = data, True
    return message


def response_headers(
    status: str = "200", content_type: str = "text/event-stream", *, upstream: str = "10.0.0.1:8000"
) -> Request:
    message = Request()
    for name, value in ((":status", status), ("content-type", content_type)):
        header = message.response_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    fields = message.attributes[FILTER].fields
    fields["upstream.address"].string_value = upstream
    fields["upstream.request_attempt_count"].number_value = 1
    return message


def response_body(data: bytes, *, end: bool = False) -> Request:
    message = Request()
    message.response_body.body, message.response_body.end_of_stream = data, end
    return message


async def say(stream: Stream, message: Request) -> Response:
    """One message and its reply."""
    await stream.write(message)
    reply = await stream.read()
    assert isinstance(reply, Response)
    return reply


async def ended(stream: Stream) -> bool:
    """Whether the server has said all it has to say."""
    return not isinstance(await stream.read(), Response)


async def until_answer(stream: Stream) -> None:
    for message in (request_headers(), request_body(), response_headers()):
        await say(stream, message)


# -- conversations -------------------------------------------------------------------------------------------------


async def test_a_whole_conversation() -> None:
    async with service() as served:
        stream = served.open()
        first = await say(stream, request_headers())
        assert first.WhichOneof("response") == "request_headers"
        assert served.in_flight.total == 0

        routed = await say(stream, request_body())
        assert b"include_usage" in routed.request_body.response.body_mutation.body
        assert list(served.in_flight) == [(MODEL, "10.0.0.1:8000", 1)]
        assert served.processor.live == 1

        answered = await say(stream, response_headers())
        assert answered.HasField("mode_override")
        assert (await say(stream, response_body(sse(token())))).WhichOneof("response") == "response_body"
        hidden = await say(stream, response_body(sse(usage(3, 2))))
        assert hidden.response_body.response.body_mutation.clear_body
        await say(stream, response_body(sse("[DONE]"), end=True))
        await stream.done_writing()
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK

        report = await served.report()
        assert (report.outcome, report.request_id, report.served_by) == ("success", "id-1", endpoint(1))
        assert report.usage == Usage(prompt_tokens=3, completion_tokens=2)
        assert len(served.told.decisions) == 1
        assert served.in_flight.total == 0


async def test_a_refusal_ends_the_stream() -> None:
    async with service() as served:
        stream = served.open()
        await say(stream, request_headers())
        answer = await say(stream, request_body(b'{"model":"unknown"}'))
        assert answer.immediate_response.status.code == 404
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        report = await served.report()
        assert (report.outcome, report.error) == ("refused", "model_not_found")
        assert served.told.decisions == []


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
async def test_a_client_that_leaves_leaves_nothing_behind(steps: int) -> None:
    async with service() as served:
        stream = served.open()
        messages = [request_headers(), request_body(), response_headers(), response_body(sse(token()))]
        for message in messages[:steps]:
            await say(stream, message)
        await until(lambda: served.processor.live == 1 or steps == 0)
        stream.cancel()
        if steps == 0:
            await until(lambda: served.processor.live == 0)
            assert len(served.told.reports) <= 1  # the call may not have reached the server at all
        else:
            report = await served.report()
            assert report.outcome == "aborted"
        assert served.in_flight.total == 0
        await asyncio.sleep(0.05)
        assert len(served.told.reports) <= 1


async def test_a_half_closed_stream_is_the_same_end() -> None:
    async with service() as served:
        stream = served.open()
        await until_answer(stream)
        await stream.done_writing()
        assert await ended(stream)
        assert (await served.report()).error == "closed-before-end"
        assert served.in_flight.total == 0


async def test_a_message_of_a_kind_not_known_is_passed_over_and_counted() -> None:
    async with service() as served:
        stream = served.open()
        await stream.write(Request())
        assert (await say(stream, request_headers())).WhichOneof("response") == "request_headers"
        assert len(served.unknown) == 1
        await stream.done_writing()
        report = await served.report()
        assert report.unexpected_messages == 0


async def test_after_a_retry_in_flight_is_where_the_request_is() -> None:
    async with service() as served:
        stream = served.open()
        await say(stream, request_headers())
        await say(stream, request_body())
        await say(stream, response_headers(upstream="10.0.0.2:8000"))
        assert list(served.in_flight) == [(MODEL, "10.0.0.2:8000", 1)]
        stream.cancel()
        assert (await served.report()).served_by == endpoint(2, models=("other",))
        assert served.in_flight.total == 0


async def test_an_answer_of_envoys_own_without_a_pod() -> None:
    async with service() as served:
        stream = served.open()
        await say(stream, request_headers())
        await say(stream, response_headers("408", upstream=""))
        await stream.done_writing()
        assert await ended(stream)
        report = await served.report()
        assert (report.routing, report.error_type) == (None, "client")
        assert served.in_flight.total == 0


async def test_an_answer_of_a_pod_that_nobody_chose_is_an_error_of_ours() -> None:
    async with service() as served:
        stream = served.open()
        await say(stream, request_headers())
        await say(stream, response_headers(upstream="10.0.0.2:8000"))
        await stream.done_writing()
        assert await ended(stream)
        report = await served.report()
        assert (report.outcome, report.error_type) == ("error", "internal")
        assert report.error == "served-undecided"
        assert served.in_flight.total == 0


async def test_bytes_that_are_no_message_end_the_stream() -> None:
    async with service() as served, grpc.aio.insecure_channel(served.address) as channel:
        method = channel.stream_stream(f"/{wire.PROCESS}/Process", bytes, bytes)
        stream = method(None)
        await stream.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: served.processor.live == 0)
        assert len(served.unknown) == 1


async def test_many_streams_at_once() -> None:
    async with service() as served:
        streams = [served.open() for _ in range(20)]
        await asyncio.gather(*(until_answer(stream) for stream in streams))
        assert served.in_flight.total == served.processor.live == 20
        for stream in streams[::2]:
            stream.cancel()
        for stream in streams[1::2]:
            await stream.done_writing()
        await eventually(lambda: served.processor.live == 0)
        assert (served.in_flight.total, len(served.told.reports)) == (0, 20)


# -- the native lane -----------------------------------------------------------------------------------------------


async def until_handed_over(stream: Stream) -> Response:
    await say(stream, request_headers(lua=1))
    return await say(stream, request_body())


async def test_an_exchange_that_is_handed_over_is_held_and_reported_by_its_entry() -> None:
    lane = NativeLane("auto")
    async with service(lane=lane) as served:
        stream = served.open()
        first = await say(stream, request_headers(lua=1))
        assert first.mode_override.response_header_mode == ext_proc_pb2.ProcessingMode.SKIP
        routed = await say(stream, request_body())
        fields = routed.dynamic_metadata.fields[wire.METADATA].struct_value.fields
        assert (fields["native"].number_value, fields["id"].string_value) == (1, "id-1")
        assert list(served.in_flight) == [(MODEL, "10.0.0.1:8000", 1)]
        assert (served.processor.live, lane.ended) == (1, 0)

        await stream.done_writing()
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        await until(lambda: served.processor.live == 0)
        assert (served.in_flight.total, lane.ended, served.told.reports) == (0, 1, [])
        assert len(served.told.decisions) == 1


async def test_a_client_that_leaves_frees_the_place_of_a_native_exchange() -> None:
    lane = NativeLane("auto")
    async with service(lane=lane) as served:
        stream = served.open()
        await until_handed_over(stream)
        stream.cancel()
        await until(lambda: served.processor.live == 0)
        assert (served.in_flight.total, lane.ended, served.told.reports) == (0, 1, [])


async def test_a_stream_that_is_not_held_ends_with_the_decision_and_its_place_with_the_entry() -> None:
    lane = NativeLane("auto")
    async with service(lane=lane, hold=False) as served:
        stream = served.open()
        await until_handed_over(stream)
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        await until(lambda: served.processor.live == 0)
        assert list(served.in_flight) == [(MODEL, "10.0.0.1:8000", 1)]
        assert (lane.ended, served.told.reports) == (1, [])
        lane.report("id-1")
        assert served.in_flight.total == 0


@pytest.mark.parametrize("accounting", ["auto", "stream"])
async def test_the_stream_lane_is_held_whatever_is_said_of_the_native_one(accounting: Accounting) -> None:
    async with service(lane=NativeLane(accounting), hold=False) as served:
        stream = served.open()
        lua = 1 if accounting == "stream" else None
        first = await say(stream, request_headers(lua=lua))
        assert first.mode_override.response_header_mode == ext_proc_pb2.ProcessingMode.SEND
        await say(stream, request_body())
        await say(stream, response_headers())
        await say(stream, response_body(sse(token(), "[DONE]"), end=True))
        await stream.done_writing()
        assert (await served.report()).outcome == "success"
        assert served.in_flight.total == 0


async def test_what_this_server_refuses_in_the_native_lane_it_reports_itself() -> None:
    lane = NativeLane("auto")
    async with service(lane=lane) as served:
        stream = served.open()
        await say(stream, request_headers(lua=1))
        await say(stream, request_body(b'{"model":"unknown"}'))
        assert await ended(stream)
        assert (await served.report()).outcome == "refused"
        assert lane.ended == 0


# -- drain ---------------------------------------------------------------------------------------------------------


async def test_exchanges_handed_over_are_given_back_in_the_last_step_alone() -> None:
    """Their reports do not depend on it, their place in the counts does: so they are held as long as there is time."""
    lane = NativeLane("auto")
    async with service(lane=lane) as served:
        stream = served.open()
        await until_handed_over(stream)
        await served.give_back(held_only=True)
        await asyncio.sleep(0.05)
        assert (served.processor.live, served.in_flight.total) == (1, 1)
        await served.give_back(held_only=False)
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        await until(lambda: served.processor.live == 0)
        assert (served.in_flight.total, lane.ended, served.told.reports) == (0, 1, [])


async def test_streams_of_which_nothing_is_to_be_read_are_given_back() -> None:
    async with service() as served:
        held, reading, waiting = served.open(), served.open(), served.open()
        await say(held, request_headers("/health", end=True))
        await say(held, response_headers(content_type="text/plain"))
        await until_answer(reading)
        await say(waiting, request_headers())

        await served.give_back(held_only=True)
        assert await ended(held)
        assert await held.code() is grpc.StatusCode.OK
        await until(lambda: served.processor.live == 2)
        assert [report.outcome for report in served.told.reports] == ["success"]

        assert (await say(reading, response_body(sse(token())))).WhichOneof("response") == "response_body"
        await served.give_back(held_only=False)
        assert await ended(reading)
        assert await reading.code() is grpc.StatusCode.OK
        await until(lambda: served.processor.live == 1)
        assert served.told.reports[-1].outcome == "drained"

        waiting.cancel()  # it has no pod yet, so it is not given back
        await eventually(lambda: served.processor.live == 0)
        assert served.in_flight.total == 0


async def test_what_is_held_back_goes_out_before_a_stream_is_given_back() -> None:
    async with service() as served:
        stream = served.open()
        await until_answer(stream)
        text = sse(token("one"), token("two"))
        first = await say(stream, response_body(text[:20]))
        assert first.response_body.response.body_mutation.clear_body
        await served.give_back(held_only=False)
        second = await say(stream, response_body(text[20:40]))
        assert second.response_body.response.body_mutation.body == text[:40]
        await served.give_back(held_only=False)
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK


class Impatient(Told):
    """Gives back at the first moment there is: while the reply with the pod is being written."""

    processor: ExternalProcessor

    def decided(self, decision: Decision, seconds: float) -> None:
        super().decided(decision, seconds)
        asyncio.get_running_loop().call_soon(self.give_back)

    def give_back(self) -> None:
        (call,) = self.processor._live.values()
        self.writing = call.writing
        self.processor.give_back(held_only=False)
        self.returning = call.returning


async def test_a_stream_is_not_given_back_in_the_middle_of_a_reply() -> None:
    """GET /v1/models: the first reply is the one with the pod. Cancelled in it, gRPC never ends the stream."""
    impatient = Impatient()
    async with service(hooks=[impatient]) as served, asyncio.timeout(5):
        impatient.processor = served.processor
        stream = served.open()
        reply = await say(stream, request_headers("/health", end=True))
        assert reply.HasField("dynamic_metadata")
        assert (impatient.writing, impatient.returning) == (True, False)

        await served.give_back(held_only=False)
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        assert (await served.report()).outcome == "drained"


async def test_drained_at_once_where_nothing_is_open() -> None:
    async with service() as served:
        async with asyncio.timeout(1):
            await eventually(lambda: served.processor.live == 0)
        await served.give_back(held_only=False)


# -- defects -------------------------------------------------------------------------------------------------------


async def test_a_hook_with_a_defect_disturbs_nobody() -> None:
    async with service(hooks=[BrokenHook()]) as served:
        stream = served.open()
        await until_answer(stream)
        await say(stream, response_body(sse(token(), "[DONE]"), end=True))
        await stream.done_writing()
        assert await ended(stream)
        assert await stream.code() is grpc.StatusCode.OK
        assert (await served.report()).outcome == "success"
        assert len(served.told.decisions) == 1
        assert served.in_flight.total == 0


async def test_a_defect_ends_one_stream_and_no_other() -> None:
    async with service(director=BrokenDirector) as served:
        other, stream = served.open(), served.open()
        await say(other, request_headers())
        await say(stream, request_headers())
        await stream.write(request_body())
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert failed.value.details() == "internal error"
        await until(lambda: served.processor.live == 1)
        (report,) = served.told.reports
        assert (report.outcome, report.error_type, report.error) == ("error", "internal", "Defect")
        assert (await say(other, request_body(b"{"))).immediate_response.status.code == 400
        assert served.in_flight.total == 0


class _Malloc(ctypes.Structure):
    """glibc's mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


RESET: dict[str, tuple[Request, ...]] = {
    "before its body": (request_headers(),),
    "handed over": (request_headers(lua=1), request_body()),
    "before its answer": (request_headers(), request_body()),
    "in its answer": (request_headers(), request_body(), response_headers(), response_body(sse(token()))),
}


@pytest.mark.skipif(sys.platform != "linux", reason="counts with glibc's mallinfo2, which others do not have")
@pytest.mark.parametrize("where", RESET)
async def test_streams_that_envoy_resets_leave_no_memory_behind(where: str) -> None:
    """Bytes that C code holds, which Python's own tools do not see: 112 for each stream whose read is cancelled."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Malloc

    async def reset(served: Service, streams: int) -> None:
        for _ in range(streams):
            stream = served.open()
            for message in RESET[where]:
                await say(stream, message)
            stream.cancel()

    async with service() as served:
        await reset(served, 300)
        held = libc.mallinfo2().uordblks
        await reset(served, 1500)
        await eventually(lambda: not served.processor.live)
        gc.collect()
        assert (libc.mallinfo2().uordblks - held) / 1500 < 60


@pytest.mark.parametrize("where", RESET)
@pytest.mark.parametrize("ends", ["reset", "given back"])
async def test_what_outlives_its_stream_ends_without_a_word(where: str, ends: str) -> None:
    """A read that was under way fails, or brings one message more, when its stream has ended."""
    said: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    before = asyncio.all_tasks()
    async with service() as served:
        for _ in range(20):
            stream = served.open()
            for message in RESET[where]:
                await say(stream, message)
            if ends == "given back" and len(RESET[where]) > 1:
                await served.give_back(held_only=False)
            else:
                stream.cancel()
        await eventually(lambda: not served.processor.live)
        assert len(served.told.reports) == (0 if where == "handed over" else 20)
    await eventually(lambda: asyncio.all_tasks() <= before)
    gc.collect()
    assert said == []


# -- prompts that are counted --------------------------------------------------------------------------------------

ASKED = b'{"model":"llama-3-8b","stream":true,"messages":[{"role":"user","content":"hello"}]}'


class Slow:
    """A tokenizer that answers when a test says so: a number of tokens, or None for none."""

    name = "slow"

    def __init__(self) -> None:
        self.asked: list[SchedulingRequest] = []
        self.answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def count(self, request: SchedulingRequest) -> int:
        self.asked.append(request)
        tokens = await asyncio.shield(self.answer)
        if tokens is None:
            raise Uncounted("timeout")
        return tokens

    async def open(self) -> None: ...

    async def close(self) -> None: ...


def counting(tokenizer: Slow) -> tuple[PromptCounter, list[tuple[str, str | None]]]:
    told: list[tuple[str, str | None]] = []
    counter = PromptCounter(
        tokenizer,
        {"uncounted": None},
        known=lambda model: model == MODEL,
        told=lambda name, _seconds, reason: told.append((name, reason)),
    )
    return counter, told


@pytest.mark.parametrize(("tokens", "reported"), [(1234, 1234), (None, 9)])
async def test_a_decision_waits_for_its_prompt_to_be_counted(tokens: int | None, reported: int) -> None:
    slow = Slow()
    counter, told = counting(slow)
    async with service(counter=counter) as served:
        stream = served.open()
        await say(stream, request_headers())
        await stream.write(request_body(ASKED))
        await until(lambda: len(slow.asked) == 1)
        assert served.told.decisions == []
        assert served.in_flight.total == 0
        slow.answer.set_result(tokens)
        routed = await stream.read()
        assert isinstance(routed, Response)
        assert routed.WhichOneof("response") == "request_body"
        assert list(served.in_flight) == [(MODEL, "10.0.0.1:8000", 1)]
        ((_, decided, _),) = served.processor._parts.director.decisions
        assert (decided.prompt_tokens, decided.tokenizer) == (reported, "slow" if tokens else None)

        await say(stream, response_headers())
        await say(stream, response_body(sse(token(), "[DONE]"), end=True))
        await stream.done_writing()
        report = await served.report()
        assert (report.usage_source, report.usage.prompt_tokens) == ("estimated", reported)
        assert told == [("slow", None if tokens else "timeout")]
        assert served.in_flight.total == 0


async def test_what_an_engine_reports_counts_before_what_was_counted() -> None:
    slow = Slow()
    slow.answer.set_result(1234)
    async with service(counter=counting(slow)[0]) as served:
        stream = served.open()
        await say(stream, request_headers())
        await say(stream, request_body(ASKED))
        await say(stream, response_headers())
        await say(stream, response_body(sse(token(), usage(3, 2), "[DONE]"), end=True))
        await stream.done_writing()
        report = await served.report()
        assert (report.usage_source, report.usage.prompt_tokens) == ("reported", 3)


async def test_in_the_native_lane_the_count_travels_with_the_facts() -> None:
    slow = Slow()
    slow.answer.set_result(1234)
    async with service(counter=counting(slow)[0], lane=NativeLane("native")) as served:
        stream = served.open()
        await say(stream, request_headers(lua=1))
        routed = await say(stream, request_body(ASKED))
        assert '"prompt_tokens_estimate":1234' in str(routed.dynamic_metadata).replace("\\", "")
        stream.cancel()
        await until(lambda: served.processor.live == 0)
        assert served.in_flight.total == 0


@pytest.mark.parametrize(
    "body", [STREAM, b'{"model":"unknown","messages":[]}', b'{"model":"uncounted","messages":[]}']
)
async def test_what_need_not_be_counted_is_not(body: bytes) -> None:
    slow = Slow()
    async with service(counter=counting(slow)[0]) as served:
        stream = served.open()
        await say(stream, request_headers())
        await say(stream, request_body(body))
        assert slow.asked == []
        stream.cancel()


@pytest.mark.parametrize("how", ["cancel", "half-close"])
@pytest.mark.parametrize("lua", [None, 1])
async def test_a_client_that_leaves_while_its_prompt_is_counted(how: str, lua: int | None) -> None:
    slow, lane = Slow(), NativeLane("auto")
    async with service(counter=counting(slow)[0], lane=lane) as served:
        stream = served.open()
        await say(stream, request_headers(lua=lua))
        await stream.write(request_body(ASKED))
        await until(lambda: len(slow.asked) == 1)
        if how == "cancel":
            stream.cancel()
            await until(lambda: served.processor.live == 0)
        else:
            await stream.done_writing()
        slow.answer.set_result(7)
        await until(lambda: served.processor.live == 0)
        await asyncio.sleep(0.05)
        assert served.in_flight.total == 0
        assert len(served.told.decisions) == (0 if how == "cancel" else 1)
        assert (len(served.told.reports), lane.ended) == ((1, 0) if lua is None else (0, 1))
        if lua is None and how == "cancel":
            assert (served.told.reports[0].outcome, served.told.reports[0].routing) == ("aborted", None)


async def test_a_server_that_drains_keeps_a_request_whose_prompt_is_counted() -> None:
    slow = Slow()
    async with service(counter=counting(slow)[0]) as served:
        stream = served.open()
        await say(stream, request_headers())
        await stream.write(request_body(ASKED))
        await until(lambda: len(slow.asked) == 1)
        for held_only in (True, False):
            served.processor.give_back(held_only=held_only)
        await asyncio.sleep(0.05)
        assert served.processor.live == 1
        slow.answer.set_result(7)
        routed = await stream.read()
        assert isinstance(routed, Response)
        assert routed.WhichOneof("response") == "request_body"
        await served.give_back(held_only=False)
        assert await ended(stream)
        report = await served.report()
        assert (report.outcome, report.usage.prompt_tokens) == ("drained", 7)
        assert served.in_flight.total == 0


async def test_a_defect_in_counting_ends_its_exchange_alone() -> None:
    class Broken(Slow):
        async def count(self, request: SchedulingRequest) -> int:
            raise Defect

    async with service(counter=counting(Broken())[0]) as served:
        stream = served.open()
        await say(stream, request_headers())
        await stream.write(request_body(ASKED))
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.read()
        report = await served.report()
        assert (report.outcome, report.error) == ("error", "Defect")
        assert served.in_flight.total == 0
