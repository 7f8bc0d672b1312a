"""Envoy's access log on a real grpc.aio server: what counts as a bypass, and how its streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from envoy_extproc._proto import access_log_pb2
from envoy_extproc.server.access_log import SERVICE, AccessLog, is_bypass
from envoy_extproc.server.wire import METADATA
from tests.support.gateway import eventually

Message = access_log_pb2.StreamAccessLogsMessage
Response = access_log_pb2.StreamAccessLogsResponse
Stream = grpc.aio.StreamUnaryCall[Message, Response]


def message(*, upstream: bool = True, seen: bool = False) -> Message:
    """One entry: whether a pod answered, and whether this server had been asked."""
    written = Message()
    common = written.http_logs.log_entry.add().common_properties
    if upstream:
        common.upstream_remote_address.SetInParent()
    if seen:
        common.metadata.filter_metadata[METADATA].fields["v"].number_value = 1
    return written


@dataclass
class Served:
    """A server under test."""

    log: AccessLog
    server: grpc.aio.Server
    channel: grpc.aio.Channel
    counts: list[int] = field(default_factory=list)

    def open(self) -> Stream:
        """One Envoy worker."""
        method = self.channel.stream_unary(
            f"/{SERVICE}/StreamAccessLogs",
            request_serializer=Message.SerializeToString,
            response_deserializer=Response.FromString,
        )
        return method(None)


@asynccontextmanager
async def service() -> AsyncIterator[Served]:
    counts: list[int] = []
    log = AccessLog(counts.append)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((log.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(log, server, channel, counts)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("upstream", "seen", "bypass"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_what_a_bypass_is(upstream: bool, seen: bool, bypass: bool) -> None:
    (entry,) = message(upstream=upstream, seen=seen).http_logs.log_entry
    assert is_bypass(entry) is bypass


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
