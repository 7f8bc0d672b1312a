"""Envoy's access log on a real grpc.aio server: what an entry tells, what counts as a bypass, how its streams end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import msgspec
import pytest
from structlog.testing import capture_logs

from envoy_extproc import orca
from envoy_extproc._proto import access_log_pb2
from envoy_extproc.exchange.native import Entry, Facts
from envoy_extproc.exchange.report import Report, routing_of
from envoy_extproc.server.access_log import SERVICE, AccessLog, decode, is_bypass, is_undecided
from envoy_extproc.server.native_lane import Accounting, NativeLane
from envoy_extproc.server.wire import LUA_METADATA, METADATA, PLEA
from tests.support.builders import decision, endpoint
from tests.support.gateway import eventually
from tests.support.playbook import ENDPOINTS

Message = access_log_pb2.StreamAccessLogsMessage
Response = access_log_pb2.StreamAccessLogsResponse
LogEntry = access_log_pb2.HTTPAccessLogEntry
Stream = grpc.aio.StreamUnaryCall[Message, Response]
FACTS = msgspec.json.encode(
    Facts(request_id="id-1", path="/v1/chat/completions", routing=routing_of(decision(1)), read=True)
).decode()


def message(*, upstream: bool = True, seen: bool = False) -> Message:
    """One entry: whether a pod answered, and whether this server had been asked."""
    written = Message()
    common = written.http_logs.log_entry.add().common_properties
    if upstream:
        common.upstream_remote_address.SetInParent()
    if seen:
        common.metadata.filter_metadata[METADATA].fields["v"].number_value = 1
    return written


def entry(
    *flags: str,
    status: int = 200,
    details: str = "via_upstream",
    upstream: tuple[str, int] | None = ("10.0.0.1", 8000),
    facts: str | None = FACTS,
    **notes: str,
) -> LogEntry:
    """One of the native lane: `notes` are the script's."""
    written = LogEntry()
    common, response = written.common_properties, written.response
    for flag in flags:
        setattr(common.response_flags, flag, True)
    response.response_code.value, response.response_code_details = status, details
    if upstream is not None:
        address = common.upstream_remote_address.socket_address
        address.address, address.port_value = upstream
    told = common.metadata.filter_metadata[LUA_METADATA].fields
    told["v"].number_value = 1
    for name, text in notes.items():
        told[name].string_value = text
    if facts is not None:
        ours = common.metadata.filter_metadata[METADATA].fields
        ours["v"].number_value, ours["facts"].string_value = 1, facts
    return written


def message_of(*entries: LogEntry) -> Message:
    written = Message()
    written.http_logs.log_entry.extend(entries)
    return written


@dataclass
class Served:
    """A server under test, whose clock stands at `now`."""

    log: AccessLog
    lane: NativeLane
    now: list[float]
    server: grpc.aio.Server
    channel: grpc.aio.Channel
    address: str
    counts: list[int] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    heard: list[tuple[str, orca.Parsed, float]] = field(default_factory=list)

    def open(self) -> Stream:
        """One Envoy worker."""
        method = self.channel.stream_unary(
            f"/{SERVICE}/StreamAccessLogs",
            request_serializer=Message.SerializeToString,
            response_deserializer=Response.FromString,
        )
        return method(None)

    async def take(self, *entries: LogEntry) -> None:
        """A whole stream of one message."""
        stream = self.open()
        await stream.write(message_of(*entries))
        await stream.done_writing()
        await stream

    async def counted(self, number: int) -> None:
        """Waits until so many bypasses were told of."""
        await eventually(lambda: sum(self.counts) == number)


@asynccontextmanager
async def service(
    accounting: Accounting = "auto", *, wall_clock: Callable[[], float] = time.time
) -> AsyncIterator[Served]:
    heard: list[tuple[str, orca.Parsed, float]] = []
    counts: list[int] = []
    reports: list[Report] = []
    now = [100.0]
    lane = NativeLane(accounting, name="me")
    log = AccessLog(
        lane=lane,
        lookup=ENDPOINTS.get,
        finished=reports.append,
        bypassed=counts.append,
        heard=lambda *told: heard.append(told),
        clock=lambda: now[0],
        wall_clock=wall_clock,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((log.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(log, lane, now, server, channel, address, counts, reports, heard)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("upstream", "seen", "bypass"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_what_a_bypass_is(upstream: bool, seen: bool, bypass: bool) -> None:
    (entry,) = message(upstream=upstream, seen=seen).http_logs.log_entry
    assert is_bypass(entry) is bypass


# -- what an entry says --------------------------------------------------------------------------------------------

DC, DR = "downstream_connection_termination", "downstream_remote_reset"
STARTED, NOT_STARTED = "upstream_reset_after_response_started", "upstream_reset_before_response_started"


@pytest.mark.parametrize(
    ("status", "details", "flags", "cut_by", "local"),
    [
        (200, "via_upstream", [], None, None),
        (200, "", [], None, None),
        (404, "via_upstream", [], None, None),
        (503, "via_upstream", ["upstream_retry_limit_exceeded"], None, None),
        (200, "downstream_remote_disconnect", [DC], "client", None),
        (200, "via_upstream", [DC], "client", None),
        (200, "http2.remote_reset", [DR], "client", None),
        (500, "via_upstream", [DC], "client", None),
        (0, "downstream_remote_disconnect", [DC], "client", None),
        (0, "downstream_local_disconnect(x)", [], "client", None),
        (0, f"{NOT_STARTED}{{connection_termination}}", [], "network", None),
        (0, "", [], "network", None),
        (200, f"{STARTED}{{connection_termination}}", ["upstream_connection_termination"], "network", None),
        (500, f"{STARTED}{{remote_reset}}", ["upstream_remote_reset"], "network", None),
        (200, f"{STARTED}{{protocol_error}}", ["upstream_protocol_error"], "network", None),
        (200, "stream_idle_timeout", ["stream_idle_timeout"], "model_server", None),
        (200, "max_duration_timeout", ["duration_timeout"], "model_server", None),
        (200, "ext_proc_error_gRPC_error_14", [], "internal", None),
        (200, "http2.remote_reset", [], "client", None),
        (200, "what nobody knows", [], "network", None),
        (0, "http1.codec_error", ["downstream_protocol_error"], "client", None),
        (503, f"{NOT_STARTED}{{connection_failure}}", ["upstream_connection_failure"], None, NOT_STARTED),
        (503, "no_healthy_upstream", ["no_healthy_upstream"], None, "no_healthy_upstream"),
        (413, "request_payload_too_large", [], None, "request_payload_too_large"),
        (504, "response_timeout", ["upstream_request_timeout"], None, "response_timeout"),
    ],
)
def test_who_ended_it(
    status: int, details: str, flags: list[str], cut_by: str | None, local: str | None
) -> None:
    told = decode(entry(*flags, status=status, details=details), FACTS)
    assert (told.status, told.cut_by) == (status or None, cut_by)
    assert (None if told.local_reply is None else told.local_reply.partition("{")[0]) == local


@pytest.mark.parametrize(
    ("upstream", "address"),
    [(("10.0.0.1", 8000), "10.0.0.1:8000"), (("::1", 8000), "[::1]:8000"), (None, None)],
)
def test_the_address_of_a_pod_is_as_discovery_writes_it(
    upstream: tuple[str, int] | None, address: str | None
) -> None:
    assert decode(entry(upstream=upstream), FACTS).upstream == address


def test_the_rest_of_an_entry() -> None:
    written = entry(answer="{}", usage="{1}", error="{2}", load="TEXT eps=1")
    common = written.common_properties
    common.start_time.seconds, common.start_time.nanos = 1_000, 250_000_000
    common.duration.seconds, common.duration.nanos = 2, 500_000_000
    common.time_to_first_upstream_rx_byte.seconds = 1
    common.time_to_first_upstream_rx_byte.nanos = 125_000_000
    common.upstream_request_attempt_count = 3
    written.response.response_body_bytes = 77
    written.request.path, written.request.request_id = b"/x\xff", b"id\xff"
    assert decode(written, FACTS) == Entry(
        facts=FACTS,
        request_id="id\ufffd",
        path="/x\ufffd",
        started=1_000.25,
        duration=2.5,
        status=200,
        upstream="10.0.0.1:8000",
        attempts=3,
        body_bytes=77,
        notes="{}",
        usage="{1}",
        error="{2}",
        load="TEXT eps=1",
        headers_after=1.125,
    )


def test_an_entry_without_notes() -> None:
    told = decode(entry(), FACTS)
    assert (told.notes, told.usage, told.error) == ("", "", "")
    bare = LogEntry()
    assert decode(bare, "") == Entry(facts="", cut_by="network")


@pytest.mark.parametrize(
    ("changes", "undecided"),
    [
        ({}, True),
        ({"status": 408, "details": "request_overall_timeout"}, True),
        ({"facts": FACTS}, False),
        ({"upstream": ("10.0.0.1", 8000)}, False),
        ({"status": 404, "details": "envoy_extproc_model_not_found"}, False),
        ({"status": 503, "details": "ext_proc_error_gRPC_error_14{connection_failure}"}, True),
        ({"status": 503, "details": "ext_proc_error_per-message_timeout_exceeded"}, True),
        ({"status": 503, "details": "ext_proc_error_gRPC_error_13{internal_error{via_upstream}}"}, False),
    ],
)
def test_what_ended_before_it_was_routed(changes: dict[str, Any], undecided: bool) -> None:
    given = {"facts": None, "upstream": None, "status": 0, "details": "", **changes}
    assert is_undecided(entry(**given)) is undecided
    assert not is_undecided(LogEntry())  # no script: nothing of it went by the native lane
    other = entry(**given)
    other.common_properties.metadata.filter_metadata[LUA_METADATA].fields["v"].number_value = 99
    assert not is_undecided(other)  # nor of one whose script is not understood


# -- what is made of it --------------------------------------------------------------------------------------------


async def test_an_entry_with_facts_is_a_report_and_no_bypass() -> None:
    async with service() as served, asyncio.timeout(5):
        await served.take(entry(answer='{"streamed":true,"ended":true,"done":true}', usage="{}"))
        (report,) = served.reports
        assert (report.outcome, report.request_id, report.served_by) == ("success", "id-1", endpoint(1))
        assert (served.counts, served.lane.reported) == ([], 1)


@pytest.mark.parametrize(
    ("wall", "at"),
    [(1_001.5, 99.5), (1_001.0, 100.0), (900.0, 100.0)],
    ids=["half a second ago", "now", "Envoy's clock goes before ours"],
)
async def test_what_an_engine_told_in_an_answer_is_heard(wall: float, at: float) -> None:
    written = entry(load="TEXT eps=1")
    written.common_properties.start_time.seconds = 1_000
    written.common_properties.time_to_first_upstream_rx_byte.seconds = 1
    async with service(wall_clock=lambda: wall) as served:
        await served.take(
            written, entry(), entry(status=503, details="no_healthy_upstream", load="TEXT eps=1")
        )
        assert served.heard == [("10.0.0.1:8000", orca.Parsed(orca.LoadReport(eps=1.0)), at)]
        assert len(served.reports) == 3


async def test_entries_of_all_kinds_in_one_message() -> None:
    async with service() as served, asyncio.timeout(5):
        (passed,) = message(seen=True).http_logs.log_entry
        (past,) = message().http_logs.log_entry
        early = entry("downstream_connection_termination", status=0, details="", upstream=None, facts=None)
        with capture_logs() as logs:
            await served.take(entry(), past, passed, entry(), early, past)
        assert [report.outcome for report in served.reports] == ["success", "success", "aborted"]
        assert (served.counts, served.lane.reported) == ([2], 3)
        assert [line["event"] for line in logs] == ["requests_bypassed"]


async def test_in_the_stream_lane_a_request_that_ended_early_is_no_entrys_to_report() -> None:
    async with service("stream") as served, asyncio.timeout(5):
        await served.take(entry(status=0, details="", upstream=None, facts=None))
        assert (served.reports, served.counts) == ([], [])


@pytest.mark.parametrize("kind", [access_log_pb2.DownstreamStart, access_log_pb2.DownstreamPeriodic])
async def test_entries_of_requests_under_way_are_passed_over(
    kind: access_log_pb2.AccessLogType.ValueType,
) -> None:
    async with service() as served, asyncio.timeout(5):
        begun, (past,) = entry(), message().http_logs.log_entry
        for each in (begun, past):
            each.common_properties.access_log_type = kind
        await served.take(begun, past)
        assert (served.reports, served.counts) == ([], [])


@pytest.mark.parametrize("broken", [entry(facts="{"), entry(facts='{"v":2}'), entry(answer="{")])
async def test_entries_of_another_version_are_said_once_and_not_reported(broken: LogEntry) -> None:
    async with service() as served, asyncio.timeout(5):
        with capture_logs() as logs:
            await served.take(broken, entry(), broken)
            await served.take(broken)
        assert len(served.reports) == served.lane.reported == 1
        assert served.counts == []  # it had come by here all the same
        assert [line["event"] for line in logs] == ["entry_unreadable"]
        served.now[0] += 61
        with capture_logs() as logs:
            await served.take(broken)
        assert [line["event"] for line in logs] == ["entry_unreadable"]


async def test_a_clients_bytes_that_are_no_text_cost_no_entry() -> None:
    async with service() as served, asyncio.timeout(5):
        written = message_of(entry()).SerializeToString()
        # HTTPRequestProperties.user_agent (6), which Envoy writes as it came
        request = b"\x1a\x04\x32\x02\xff\xfe"
        inner = entry().SerializeToString() + request
        entries = b"\x0a" + _varint(len(inner)) + inner
        raw = b"\x12" + _varint(len(entries)) + entries
        method = served.channel.stream_unary(f"/{SERVICE}/StreamAccessLogs", bytes, Response.FromString)
        stream = method(None)
        for each in (raw, written):
            await stream.write(each)
        await stream.done_writing()
        await stream
        assert len(served.reports) == 2


def _varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80, number >> 7]) if number > 0x7F else bytes([number])


async def test_a_message_that_is_none_is_said_and_the_next_stream_is_read() -> None:
    async with service() as served, asyncio.timeout(5):
        method = served.channel.stream_unary(f"/{SERVICE}/StreamAccessLogs", bytes, Response.FromString)
        stream = method(None)
        with capture_logs() as logs:
            await stream.write(b"\xff\xff\xff")
            await stream
        assert await stream.code() is grpc.StatusCode.OK
        assert [line["event"] for line in logs] == ["entries_unreadable"]
        await served.take(entry())
        assert len(served.reports) == 1


# -- streams -------------------------------------------------------------------------------------------------------


def waiting(name: str = "other", *, age: float = 0.1) -> Message:
    """A request decided, so many seconds before its end, by a server that hears of no log."""
    written = message(upstream=False)
    common = written.http_logs.log_entry[0].common_properties
    common.metadata.filter_metadata[METADATA].fields[PLEA].string_value = name
    common.duration.FromTimedelta(timedelta(seconds=age))
    return written


async def test_a_stream_is_read_for_as_long_as_envoy_likes() -> None:
    async with service() as served, asyncio.timeout(5):
        stream = served.open()
        for number in range(1, 21):
            await stream.write(message())
            await served.counted(number)
            served.now[0] += 60.0
        assert not stream.done()
        await stream.done_writing()
        await stream


async def asked_for(served: Served) -> Stream:
    """A stream that has been read for its turn, and whose last message says that another server hears of none."""
    stream = served.open()
    await stream.write(message())
    await served.counted(1)
    served.now[0] += 2.1
    await stream.write(waiting())
    await eventually(lambda: served.log._pulse._wanted == 1)
    return stream


async def until_left(stream: Stream) -> int:
    """Writes messages until the server has ended the stream; returns how many were written, the last of them perhaps too late."""
    written = 0
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while not stream.done():
            await stream.write(message())
            written += 1
            await asyncio.sleep(0.05)
    assert isinstance(await stream, Response)
    assert await stream.code() is grpc.StatusCode.OK
    return written


async def test_it_is_left_to_one_that_hears_of_none_behind_a_message_taken_as_it_came() -> None:
    async with service() as served, asyncio.timeout(30):
        stream = await asked_for(served)
        await asyncio.sleep(0.1)
        assert not stream.done()  # it waits for a message, so that none is lost
        assert await until_left(stream) - (sum(served.counts) - 1) in {0, 1}
        assert not served.log._readers
        assert not served.log._pulse._wanted


@pytest.mark.parametrize(
    ("held", "plea"),
    [(1.9, waiting()), (60.0, waiting("me")), (60.0, waiting(age=5.0)), (60.0, message(seen=True))],
    ids=["within its turn", "its own", "long ago", "none"],
)
async def test_what_does_not_end_it(held: float, plea: Message) -> None:
    async with service() as served, asyncio.timeout(5):
        stream = served.open()
        await stream.write(message())
        await served.counted(1)
        served.now[0] += held
        await stream.write(plea)
        await stream.write(message())
        await served.counted(2)
        assert not served.log._pulse._wanted
        await stream.done_writing()
        await stream


async def test_one_stream_is_left_at_a_time() -> None:
    async with service() as served, asyncio.timeout(30):
        first, second = (served.open() for _ in range(2))
        for each in (first, second):
            await each.write(message())
        await served.counted(2)
        served.now[0] += 2.1
        for each in (first, second):
            await each.write(waiting())
        await eventually(lambda: served.log._pulse._wanted == 2)
        await until_left(first)
        for _ in range(5):
            await second.write(message())
            await asyncio.sleep(0.05)
        assert not second.done()
        served.now[0] += 2.1
        await until_left(second)


async def test_it_does_not_wait_for_ever_for_such_a_message() -> None:
    async with service() as served, asyncio.timeout(5):
        stream = await asked_for(served)
        served.log._pulse._timely = -1000  # a loop that is never in time
        await stream.write(message())
        await served.counted(2)
        served.now[0] += 5.1
        assert not stream.done()
        await stream.write(message())
        assert isinstance(await stream, Response)
        await served.counted(3)


async def test_one_that_finds_its_messages_waiting_reads_them_all() -> None:
    """On a machine with too much to do: what came behind the message at which a stream ends would be lost."""
    sent: list[float] = []

    def messages() -> Iterator[Message]:
        while True:
            time.sleep(0.02)
            sent.append(time.monotonic())
            yield message() if len(sent) % 2 else waiting()

    def envoy(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            channel.stream_unary(
                f"/{SERVICE}/StreamAccessLogs",
                request_serializer=Message.SerializeToString,
                response_deserializer=Response.FromString,
            )(messages())

    async with service() as served, asyncio.timeout(10):
        talking = asyncio.ensure_future(asyncio.to_thread(envoy, served.address))
        await served.counted(1)
        served.now[0] += 2.1
        for _ in range(8):
            time.sleep(0.15)  # noqa: ASYNC251  the loop is kept from its work
            await asyncio.sleep(0.015)
            assert not talking.done()
        await talking
        assert len(sent) // 2 - sum(served.counts) <= 1


async def test_each_message_shows_that_the_log_is_wired() -> None:
    async with service() as served, asyncio.timeout(5):
        for number in range(25):
            served.lane.end(2.0 * number)
        assert not served.lane.open
        await served.take()
        assert served.lane.open


async def test_streams_are_read_until_envoy_ends_them() -> None:
    async with service() as served, asyncio.timeout(5):
        stream = served.open()
        for _ in range(3):
            await stream.write(message())
        await stream.done_writing()
        await stream
        assert sum(served.counts) == 3


async def test_streams_that_nobody_ends_are_ended_without_an_error() -> None:
    async with service() as served, asyncio.timeout(5):
        streams = [served.open() for _ in range(3)]
        for stream in streams:
            await stream.write(message())
        await eventually(lambda: sum(served.counts) == 3)
        served.log.end()
        for stream in streams:
            await stream
            assert await stream.code() is grpc.StatusCode.OK


async def test_a_message_under_way_is_not_lost_when_streams_are_ended() -> None:
    async with service() as served, asyncio.timeout(5):
        streams = [served.open() for _ in range(5)]
        for stream in streams:
            await stream.write(message())
        await eventually(lambda: sum(served.counts) == 5)
        for stream in streams:
            await stream.write(message())
        served.log.end()
        for stream in streams:
            await stream
        assert sum(served.counts) == 10


async def test_a_server_that_stops_does_not_wait_for_them() -> None:
    async with service() as served, asyncio.timeout(5):
        stream = served.open()
        await stream.write(message())
        await eventually(lambda: sum(served.counts) == 1)
        stopping = asyncio.ensure_future(served.server.stop(60))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        served.log.end()
        await stopping


async def test_one_that_envoy_breaks_off_is_forgotten() -> None:
    async with service() as served, asyncio.timeout(5):
        stream = served.open()
        await stream.write(message())
        await eventually(lambda: sum(served.counts) == 1)
        stream.cancel()
        await eventually(lambda: not served.log._readers)
        served.log.end()


async def test_one_that_comes_behind_the_end_is_ended_too() -> None:
    async with service() as served, asyncio.timeout(30):
        served.log.end()
        await asyncio.sleep(0.5)  # the others were ended meanwhile
        assert await until_left(served.open()) - sum(served.counts) in {0, 1}
