"""Who may see /debug: loopback, or the bearer of the token."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from envoy_extproc.scheduling import registry
from envoy_extproc.server.admin import Admin
from envoy_extproc.server.director import Director, RoutingRules


@asynccontextmanager
async def served(token: str | None, *, ready: bool = True) -> AsyncIterator[str]:
    """The admin port behind a proxy header, which must not make anybody loopback or not."""
    director = Director(
        profiles=registry.build(),
        rules=RoutingRules(),
        in_flight=lambda _: 0,
        states={},
        rng=random.Random(0),
    )
    admin = Admin(registry=CollectorRegistry(), ready=lambda: ready, director=director, debug_token=token)
    runner = web.AppRunner(admin.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_loopback_sees_debug_without_a_token() -> None:
    async with (
        served(None) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}/debug/endpoints") as answer,
    ):
        assert (answer.status, await answer.json()) == (200, [])


@pytest.mark.parametrize(
    ("sent", "token", "allowed"),
    [
        ("Bearer correct-horse", "correct-horse", True),
        ("Bearer wrong", "correct-horse", False),
        ("", "correct-horse", False),
        ("Bearer ", None, False),
        ("Bearer None", None, False),
    ],
)
def test_others_need_the_token(sent: str, token: str | None, allowed: bool) -> None:
    admin = Admin(
        registry=CollectorRegistry(),
        ready=lambda: True,
        director=Director(
            profiles={}, rules=RoutingRules(), in_flight=lambda _: 0, states={}, rng=random.Random(0)
        ),
        debug_token=token,
    )
    assert admin.allows("10.1.2.3", sent) is allowed
    assert admin.allows("127.0.0.1", sent)
    assert admin.allows("::1", sent)
    assert admin.allows(None, sent) is allowed


async def test_not_ready() -> None:
    async with served(None, ready=False) as url, aiohttp.ClientSession() as session:
        async with session.get(f"{url}/readyz") as answer:
            assert answer.status == 503
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200
