"""Envoy's gRPC access log, read for one thing: requests that reached a pod without having come by here.

A breaker that is full or a server that is down lets them pass, if Envoy fails open; every client then sees 200, nothing
is accounted, and nobody would know. Each such entry counts in ``envoy_extproc_bypassed_requests_total``, and the
first of a run is said in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from envoy_extproc._proto import access_log_pb2
from envoy_extproc.server.wire import METADATA

log = structlog.get_logger()

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
_QUIET_SECONDS = 60.0  # between two log lines about bypassing: a flood of requests is not a flood of lines

Message = access_log_pb2.StreamAccessLogsMessage
Response = access_log_pb2.StreamAccessLogsResponse
Context = grpc.aio.ServicerContext[Message, Response]


class AccessLog:
    """The service.

    Args:
        bypassed: told how many requests had not come by here.
        clock: monotonic seconds.
    """

    def __init__(self, bypassed: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._bypassed = bypassed
        self._clock = clock
        self._said: float | None = None
        self._readers: set[asyncio.Task[None]] = set()
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
        """Reads one Envoy worker's entries, for as long as it lives or until this server stops."""
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            await self._read(messages)
        except asyncio.CancelledError:
            if not self._ending:
                raise
            task.uncancel()
        finally:
            self._readers.discard(task)
        return Response()

    def end(self) -> None:
        """Ends the streams, which no Envoy does by itself: a server that stops would wait for them."""
        self._ending = True
        while self._readers:
            self._readers.pop().cancel()

    async def _read(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            count = sum(map(is_bypass, message.http_logs.log_entry))
            if count:
                self._bypassed(count)
                self._say(count)

    def _say(self, count: int) -> None:
        now = self._clock()
        if self._said is None or now - self._said >= _QUIET_SECONDS:
            self._said = now
            log.warning("requests_bypassed", count=count, hint="Envoy failed open: see docs/operations.md")


def is_bypass(entry: access_log_pb2.HTTPAccessLogEntry) -> bool:
    """Whether a request reached a pod without this server's metadata."""
    common = entry.common_properties
    return common.HasField("upstream_remote_address") and METADATA not in common.metadata.filter_metadata
