"""Envoy's gRPC access log: one entry for each request, however it ended.

An entry that carries this server's facts is the report of an exchange in the native lane, whichever replica decided it. An
entry of a request that reached a pod without having come by here is a bypass: a breaker that is full or a server that is
down lets requests past, if Envoy fails open; every client then sees 200, nothing is accounted, and nobody would know.

Envoy keeps a log stream with one server until it ends, and what it has sent into a stream that ends is lost: no protocol tells
it. So a stream is read for as long as Envoy likes. Two things end it here: a server that stops, and another server that has
heard nothing for long (see `native_lane`). Then it ends right behind a message that was taken as it came, when Envoy has just
sent what it had and sends again only after its interval; a server that finds its messages waiting reads on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import structlog
from google.protobuf import duration_pb2

from envoy_extproc import orca
from envoy_extproc._proto import access_log_pb2, base_pb2
from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import ErrorType
from envoy_extproc.exchange import native
from envoy_extproc.exchange.fault import fault_of_details
from envoy_extproc.exchange.report import Report
from envoy_extproc.server.native_lane import NativeLane
from envoy_extproc.server.pulse import Pulse
from envoy_extproc.server.wire import LUA_METADATA, METADATA, PLEA, VIA_UPSTREAM, DecodeError

log = structlog.get_logger()

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
_QUIET_SECONDS = 60.0  # between two log lines about the same: a flood of requests is not a flood of lines
_DEFECT = "{internal_error"
"""What Envoy makes of the message with which the servicer ends a stream after a defect."""

_TURN_SECONDS = 2.0
"""How long a log stream is read at least, though others ask for it, and how long it is between two that are left to them."""

_PATIENCE_SECONDS = 5.0
"""How long such a stream waits for a message that was taken as it came, before it ends behind any other."""

_LAST_SECONDS = 0.3
"""How long a stream that is to end may be without a message before it is ended without one: three of Envoy's intervals."""

_LAST_TRIES = 5
"""How often that is put off, by a server that does not come to its work."""

_UNFINISHED = (access_log_pb2.DownstreamStart, access_log_pb2.DownstreamPeriodic)
"""Entries of requests under way, which `access_log_options` can ask Envoy for: the one at the end says it all."""

Message = access_log_pb2.StreamAccessLogsMessage
Response = access_log_pb2.StreamAccessLogsResponse
LogEntry = access_log_pb2.HTTPAccessLogEntry
Context = grpc.aio.ServicerContext[Message, Response]


class AccessLog:
    """The service.

    Args:
        lane: told what is heard.
        lookup: the endpoint of an address.
        finished: told each report.
        bypassed: told how many requests had not come by here.
        heard: told what the engine at an address said of its load, and when, in seconds of `clock`.
        clock: monotonic seconds.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        lane: NativeLane,
        lookup: Callable[[str], Endpoint | None],
        finished: Callable[[Report], None],
        bypassed: Callable[[int], None],
        heard: Callable[[str, orca.Parsed, float], None] = lambda _address, _parsed, _at: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._lane = lane
        self._lookup = lookup
        self._finished = finished
        self._bypassed = bypassed
        self._heard = heard
        self._clock = clock
        self._wall_clock = wall_clock
        self._said: dict[str, float] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._pulse = Pulse()
        self._left = -math.inf
        self._ending = False

    def handler(self) -> grpc.GenericRpcHandler[Message, Response]:
        """What a gRPC server needs to serve it, under Envoy's name."""
        method = grpc.stream_unary_rpc_method_handler(
            self.stream_access_logs,
            request_deserializer=Message.FromString,
            response_serializer=Response.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": method})

    async def stream_access_logs(self, messages: AsyncIterator[Message], _: Context) -> Response:
        """Reads one Envoy worker's entries; behind a stream that ends here Envoy opens another one, with some server."""
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            await self._read(messages)
        except DecodeError as error:
            self._say("entries_unreadable", reason=str(error), hint="what a message of the log held is lost")
        except asyncio.CancelledError:
            if not self._ending:
                raise
            task.uncancel()
        finally:
            self._readers.discard(task)
        return Response()

    def end(self) -> None:
        """Ends the streams, which no Envoy does by itself: a server that stops would wait for them.

        Each right behind its next message, since a message under way would be lost; those that are silent a little later.
        """
        if not self._ending:
            self._ending = True
            self._pulse.start()
            self._cut_later(_LAST_TRIES)

    def _cut_later(self, tries: int) -> None:
        asyncio.get_running_loop().call_later(_LAST_SECONDS, self._cut, tries)

    def _cut(self, tries: int) -> None:
        if not self._pulse.prompt and tries:
            self._cut_later(tries - 1)
            return
        while self._readers:
            self._readers.pop().cancel()

    async def _read(self, messages: AsyncIterator[Message]) -> None:
        opened = self._clock()
        asked: float | None = None
        try:
            async for message in messages:
                self._lane.heard()
                now = self._clock()
                moved = self._take(message.http_logs.log_entry)
                if moved and asked is None and now - opened >= _TURN_SECONDS:
                    asked = now
                    self._pulse.start()
                if self._is_over(asked):
                    return
        finally:
            if asked is not None:
                self._pulse.stop()

    def _is_over(self, asked: float | None) -> bool:
        """Whether a stream ends behind the message it has just taken, if others ask for it since `asked`."""
        if self._ending:
            return self._pulse.prompt
        now = self._clock()
        if asked is None or now - self._left < _TURN_SECONDS:
            return False
        if not self._pulse.prompt and now - asked < _PATIENCE_SECONDS:
            return False
        self._left = now
        return True

    def _take(self, entries: Sequence[LogEntry]) -> bool:
        """Takes what a message tells; returns whether another server hears of no log."""
        bypassed, moved = 0, False
        for entry in entries:
            if entry.common_properties.access_log_type in _UNFINISHED:
                continue
            moved = moved or self._lane.moved_by(*_plea(entry))
            facts = _facts(entry)
            if facts or (self._lane.open and is_undecided(entry)):
                self._report(entry, facts)
            elif is_bypass(entry):
                bypassed += 1
        if bypassed:
            self._bypassed(bypassed)
            self._say("requests_bypassed", count=bypassed, hint="Envoy failed open: see docs/operations.md")
        return moved

    def _report(self, entry: LogEntry, facts: str) -> None:
        try:
            decoded = decode(entry, facts)
            report = native.report(decoded, self._lookup)
        except native.Malformed as error:
            self._say("entry_unreadable", reason=str(error), hint="written by another version of this server")
            return
        self._lane.report(report.request_id)
        self._finished(report)
        if decoded.load and report.served_address is not None:
            # Envoy's clock told when; how long ago that is holds on ours. A clock put back makes it now.
            ago = max(0.0, self._wall_clock() - decoded.started - decoded.headers_after)
            self._heard(report.served_address, orca.parse(decoded.load), self._clock() - ago)

    def _say(self, event: str, **fields: object) -> None:
        now = self._clock()
        said = self._said.get(event)
        if said is None or now - said >= _QUIET_SECONDS:
            self._said[event] = now
            log.warning(event, **fields)


def is_bypass(entry: LogEntry) -> bool:
    """Whether a request reached a pod without this server's metadata."""
    common = entry.common_properties
    return common.HasField("upstream_remote_address") and METADATA not in common.metadata.filter_metadata


def is_undecided(entry: LogEntry) -> bool:
    """Whether a request ended before it was routed: its client left, or Envoy refused it.

    What this server refused it has reported itself, and so it has its own defects. Of a reply that came too late, or of a
    stream to it that broke, it knows nothing: there the entry alone tells.
    """
    common = entry.common_properties
    namespaces = common.metadata.filter_metadata
    if LUA_METADATA not in namespaces or METADATA in namespaces or common.HasField("upstream_remote_address"):
        return False
    if namespaces[LUA_METADATA].fields["v"].number_value not in native.LUA_VERSIONS:
        return False  # it went by the stream lane, which has reported it
    details = entry.response.response_code_details
    return not (
        details.startswith("envoy_extproc_") or (details.startswith("ext_proc_error") and _DEFECT in details)
    )


def decode(entry: LogEntry, facts: str) -> native.Entry:
    """What the entry says of the exchange whose facts it carries."""
    common, response = entry.common_properties, entry.response
    status = response.response_code.value or None  # 0: it ended before there was one
    details = response.response_code_details
    cut_by = _cut_by(common.response_flags, status, details)
    local = None if cut_by is not None or details in ("", VIA_UPSTREAM) else details
    notes = common.metadata.filter_metadata[LUA_METADATA].fields if _has_notes(common) else {}
    return native.Entry(
        facts=facts,
        request_id=entry.request.request_id.decode("utf-8", "replace"),
        path=entry.request.path.decode("utf-8", "replace"),
        started=common.start_time.seconds + common.start_time.nanos / 1e9,
        duration=common.duration.seconds + common.duration.nanos / 1e9,
        status=status,
        local_reply=local,
        cut_by=cut_by,
        upstream=_address(common),
        attempts=common.upstream_request_attempt_count,
        body_bytes=response.response_body_bytes,
        notes=notes["answer"].string_value if "answer" in notes else "",
        usage=notes["usage"].string_value if "usage" in notes else "",
        error=notes["error"].string_value if "error" in notes else "",
        load=notes["load"].string_value if "load" in notes else "",
        headers_after=_seconds(common.time_to_first_upstream_rx_byte),
    )


def _facts(entry: LogEntry) -> str:
    return _ours(entry, "facts")


def _plea(entry: LogEntry) -> tuple[str, float]:
    """What a server that hears of no log has said, and how long ago, in seconds."""
    return _ours(entry, PLEA), _seconds(entry.common_properties.duration)


def _ours(entry: LogEntry, name: str) -> str:
    namespaces = entry.common_properties.metadata.filter_metadata
    if METADATA not in namespaces:
        return ""
    fields = namespaces[METADATA].fields
    return fields[name].string_value if name in fields else ""


def _has_notes(common: access_log_pb2.AccessLogCommon) -> bool:
    return LUA_METADATA in common.metadata.filter_metadata


def _cut_by(flags: access_log_pb2.ResponseFlags, status: int | None, details: str) -> ErrorType | None:
    """Whose doing it was that it ended early; None where it ended by itself, or Envoy gave an answer of its own instead."""
    if flags.downstream_connection_termination or flags.downstream_remote_reset:
        return "client"
    if status is None:
        return fault_of_details(details) or "network"
    begun = status < 300 or details.startswith("upstream_reset_after_response_started")
    if not begun or details in ("", VIA_UPSTREAM):
        return None
    return fault_of_details(details) or "network"


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _address(common: access_log_pb2.AccessLogCommon) -> str | None:
    if not common.HasField("upstream_remote_address"):
        return None
    socket: base_pb2.SocketAddress = common.upstream_remote_address.socket_address
    host = f"[{socket.address}]" if ":" in socket.address else socket.address
    return f"{host}:{socket.port_value}"
