"""Engines as a scraper sees them: real HTTP servers on ports of their own, and a scraper that runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from envoy_extproc.endpoints import Endpoint, EngineState
from envoy_extproc.engines.scraper import Scraper

IDLE = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
MODELS = b'{"object":"list","data":[{"id": "m", "x":[1.0]},{"id":"a","parent":"m"}]}'
PAGE = b'vllm:num_requests_running{engine="0"} 3\nvllm:generation_tokens_total %d\n'


class Engine:
    """A metrics page on a port of its own.

    Args:
        clock: of the times at which it was asked.

    Attributes:
        answer: how the page is served.
        asked, models_asked: when somebody asked for the page, and for the list of models.
        connections: over which.
        at_once, most_at_once: how many scrapes are under way, and were at most.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.page
        self.address = ""
        self.asked: list[float] = []
        self.connections: set[object] = set()
        self.models: bytes | int = MODELS
        self.models_asked: list[float] = []
        self.at_once = 0
        self.most_at_once = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(self._clock())
        self.connections.add(request.transport)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.answer(request)
        finally:
            self.at_once -= 1

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        self.models_asked.append(self._clock())
        if isinstance(self.models, int):
            return web.Response(status=self.models)
        return web.Response(body=self.models)

    async def idle(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=IDLE)

    async def page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=PAGE % len(self.asked))

    async def silence(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(300)
        return web.Response()

    async def hang_up(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def redirect(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/elsewhere")

    async def busy(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async def nonsense(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"<html>hello</html>")

    async def too_much(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=PAGE % 1 + b"#" * 20_000)

    def endpoint(self, name: str = "pod-a", engine: str = "vllm") -> Endpoint:
        return Endpoint(name=name, address=self.address, models=("m",), engine=engine)


@contextlib.asynccontextmanager
async def serving(engine: Engine, port: int = 0) -> AsyncIterator[Engine]:
    """Serves it on a port, by default on any."""
    app = web.Application()
    app.router.add_get("/metrics", engine.handle)
    app.router.add_get("/elsewhere/metrics", engine.handle)
    app.router.add_get("/v1/models", engine.list_models)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    host, bound = runner.addresses[0][:2]
    engine.address = f"{host}:{bound}"
    try:
        yield engine
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def running(scraper: Scraper) -> AsyncIterator[None]:
    """Runs it, and holds that it does not end by itself."""
    task = asyncio.ensure_future(scraper.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def becomes(scraper: Scraper, address: str, wanted: Callable[[EngineState], bool]) -> EngineState:
    """The state of the endpoint at `address`, once it is as wanted.

    Raises:
        TimeoutError: it never is.
    """
    async with asyncio.timeout(30):
        while not wanted(scraper.states[address]):
            await asyncio.sleep(0.005)
    return scraper.states[address]


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
