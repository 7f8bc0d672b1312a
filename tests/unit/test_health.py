"""grpc.health.v1 as a client asks for it, and a drain that nothing undoes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from envoy_extproc.server import wire
from envoy_extproc.server.health import Health

SERVICES = ("", "readiness", wire.PROCESS)
Ask = Callable[[str], Awaitable[bool]]


@asynccontextmanager
async def serving(health: Health) -> AsyncIterator[Ask]:
    server = grpc.aio.server()
    health.add_to(server)
    await health.start()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def ask(service: str) -> bool:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            yield ask
    finally:
        await server.stop(None)


@pytest.mark.parametrize("service", SERVICES)
async def test_ready_once_it_is_said(service: str) -> None:
    health = Health()
    async with serving(health) as ask:
        assert (health.ready, await ask(service), await ask("liveness")) == (False, False, True)
        await health.set_ready(True)
        assert (health.ready, await ask(service), await ask("liveness")) == (True, True, True)


@pytest.mark.parametrize("service", SERVICES)
async def test_a_drain_is_final(service: str) -> None:
    health = Health()
    async with serving(health) as ask:
        await health.set_ready(True)
        await health.drain()
        await health.set_ready(True)
        assert (health.ready, await ask(service), await ask("liveness")) == (False, False, True)


async def test_a_drain_that_meets_a_change_wins() -> None:
    health = Health()
    async with serving(health) as ask:
        await asyncio.gather(health.set_ready(True), health.drain(), health.set_ready(True))
        assert not health.ready
        assert not any([await ask(service) for service in SERVICES])
