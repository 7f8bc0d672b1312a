"""The scraper against real HTTP servers: what it learns, what a failure means, and how gently it asks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random

import aiohttp
import pytest
import structlog.testing
from aiohttp import web

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.engines.scraper import Scraper, ScrapeSettings, fresh

INTERVAL = 0.02  # seconds
FAST = ScrapeSettings(interval=INTERVAL, timeout=0.1, max_bytes=10_000)
PAGE = b'vllm:num_requests_running{engine="0"} 3\nvllm:generation_tokens_total %d\n'


class Engine:
    """A metrics page on a port of its own; `answer` says how it is served."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.page
        self.address = ""
        self.asked: list[float] = []
        self.connections: set[object] = set()
        self.at_once = 0
        self.most_at_once = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(time.monotonic())
        self.connections.add(request.transport)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.answer(request)
        finally:
            self.at_once -= 1

    async def page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=PAGE % len(self.asked))

    async def silence(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
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
    app = web.Application()
    app.router.add_get("/metrics", engine.handle)
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
    task = asyncio.ensure_future(scraper.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def becomes(scraper: Scraper, address: str, wanted: Callable[[EngineState], bool]) -> EngineState:
    async with asyncio.timeout(5):
        while not wanted(scraper.states[address]):
            await asyncio.sleep(INTERVAL / 4)
    return scraper.states[address]


def scraping(*endpoints: Endpoint, settings: ScrapeSettings = FAST) -> Scraper:
    scraper = Scraper(Random(1), settings)
    scraper.update(Snapshot(endpoints))
    return scraper


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def test_a_page_becomes_stats_and_two_become_rates() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        assert scraper.states == {engine.address: EngineState()}
        async with running(scraper):
            first = await becomes(scraper, engine.address, lambda state: state.stats is not None)
            assert first.stats == EngineStats(at=first.stats.at if first.stats else 0.0, running=3.0)
            assert (first.failures, first.error, first.reachable) == (0, None, True)
            later = await becomes(
                scraper,
                engine.address,
                lambda state: (
                    state.stats is not None and state.stats.generation_tokens_per_second is not None
                ),
            )
            assert later.stats is not None
            assert later.stats.generation_tokens_per_second is not None
            assert 0 < later.stats.generation_tokens_per_second < 2 / INTERVAL


async def test_one_connection_one_scrape_at_a_time_one_each_interval() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            await asyncio.sleep(20 * INTERVAL)
        assert len(engine.connections) == 1
        assert engine.most_at_once == 1
        assert 10 <= len(engine.asked) <= 22


async def test_a_slow_engine_is_not_hurried() -> None:
    engine = Engine()

    async def slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(2.5 * INTERVAL)
        return await engine.page(request)

    engine.answer = slowly
    async with serving(engine):
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            await asyncio.sleep(20 * INTERVAL)
        assert engine.most_at_once == 1
        assert 3 <= len(engine.asked) <= 8


async def test_scrapes_spread_over_the_interval() -> None:
    settings = ScrapeSettings(interval=0.2, timeout=1)
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(serving(Engine())) for _ in range(12)]
        scraper = scraping(*(each.endpoint(each.address) for each in engines), settings=settings)
        async with running(scraper):
            for engine in engines:
                await becomes(scraper, engine.address, lambda state: state.stats is not None)
        firsts = sorted(engine.asked[0] for engine in engines)
        assert firsts[-1] - firsts[0] > settings.interval / 2
        assert max(later - earlier for earlier, later in itertools.pairwise(firsts)) < settings.interval / 2


async def test_scrapes_under_way_are_bounded() -> None:
    engine = Engine()
    engine.answer = engine.silence
    async with serving(engine), serving(Engine()) as other:
        settings = ScrapeSettings(interval=INTERVAL, timeout=5, concurrency=1)
        scraper = scraping(engine.endpoint("a"), other.endpoint("b"), settings=settings)
        async with running(scraper):
            await asyncio.sleep(5 * INTERVAL)
            engine.asked.clear()
            other.asked.clear()
            await asyncio.sleep(5 * INTERVAL)
        assert (engine.asked, other.asked) == ([], [])


async def test_a_refused_connection_is_unreachable_at_once_and_success_reachable_again() -> None:
    port = closed_port()
    engine = Engine()
    engine.address = f"127.0.0.1:{port}"
    failures: list[tuple[str, str]] = []
    scraper = Scraper(
        Random(1), FAST, on_failure=lambda endpoint, reason: failures.append((endpoint.name, reason))
    )
    scraper.update(Snapshot([engine.endpoint()]))
    with structlog.testing.capture_logs() as logs:
        async with running(scraper):
            state = await becomes(scraper, engine.address, lambda state: state.failures > 0)
            assert (state.reachable, state.failures, state.stats) == (False, 1, None)
            await becomes(scraper, engine.address, lambda state: state.failures > 3)
            async with serving(engine, port):
                state = await becomes(scraper, engine.address, lambda state: state.reachable)
                assert (state.failures, state.error) == (0, None)
                assert state.stats is not None
    assert [(log["event"], log["endpoint"]) for log in logs][:2] == [
        ("endpoint_unreachable", "pod-a"),
        ("endpoint_reachable", "pod-a"),
    ]
    assert len(logs) <= 3  # perhaps once more unreachable, while the test ended
    assert len(failures) >= 4
    assert failures[0][0] == "pod-a"


@pytest.mark.parametrize("answer", ["silence", "hang_up"])
async def test_silence_is_unreachable_the_second_time(answer: str) -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            good = await becomes(scraper, engine.address, lambda state: state.stats is not None)
            engine.answer = getattr(engine, answer)
            first = await becomes(scraper, engine.address, lambda state: state.failures == 1)
            assert first.reachable
            second = await becomes(scraper, engine.address, lambda state: state.failures == 2)
            assert not second.reachable
            assert second.stats is not None
            assert second.stats.at >= good.stats.at if good.stats else False
            engine.answer = engine.busy  # somebody answers, if badly
            third = await becomes(scraper, engine.address, lambda state: state.error == "HTTP status 503")
            assert third.reachable
            assert third.failures > 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("busy", "HTTP status 503"),
        ("redirect", "HTTP status 302"),
        ("nonsense", "the page holds no metric that this engine should tell"),
        ("too_much", "a page of more than 10000 bytes"),
    ],
)
async def test_a_bad_answer_is_a_failure_of_somebody_reachable(answer: str, error: str) -> None:
    engine = Engine()
    engine.answer = getattr(engine, answer)
    async with serving(engine):
        scraper = scraping(engine.endpoint())
        with structlog.testing.capture_logs() as logs:
            async with running(scraper):
                state = await becomes(scraper, engine.address, lambda state: state.failures >= 3)
        assert (state.reachable, state.stats, state.error) == (True, None, error)
        assert logs == []


@pytest.mark.parametrize(
    ("wire", "reachable"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nvllm:num_requests_running 1\n", True),
        (b"", False),
    ],
)
async def test_what_speaks_no_http_or_stops_in_the_middle(wire: bytes, reachable: bool) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(wire)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        scraper = scraping(Endpoint(name="a", address=address, models=("m",)))
        async with running(scraper):
            state = await becomes(scraper, address, lambda state: state.failures >= 3)
    assert (state.reachable, state.stats) == (reachable, None)


async def test_one_timeout_between_bad_answers_is_not_two_in_a_row() -> None:
    engine = Engine()

    async def sometimes(request: web.Request) -> web.StreamResponse:
        return await (engine.silence(request) if len(engine.asked) % 2 else engine.busy(request))

    engine.answer = sometimes
    async with serving(engine):
        scraper = scraping(engine.endpoint())
        with structlog.testing.capture_logs() as logs:
            async with running(scraper):
                await becomes(scraper, engine.address, lambda state: state.failures >= 4)
        assert logs == []


async def test_who_left_is_forgotten_and_no_longer_asked() -> None:
    async with serving(Engine()) as engine, serving(Engine()) as other:
        scraper = scraping(engine.endpoint("a"), other.endpoint("b"))
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
            scraper.update(Snapshot([other.endpoint("b")]))
            assert list(scraper.states) == [other.address]
            await asyncio.sleep(INTERVAL)
            asked = len(engine.asked)
            await asyncio.sleep(5 * INTERVAL)
            assert list(scraper.states) == [other.address]
            assert len(engine.asked) == asked
            assert len(other.asked) > 3
            scraper.update(Snapshot([engine.endpoint("a")]))
            await becomes(scraper, engine.address, lambda state: state.stats is not None)


async def test_a_pod_with_other_models_is_the_same_and_one_with_another_name_is_not() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint("a"))
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
            scraper.update(Snapshot([Endpoint(name="a", address=engine.address, models=("m", "lora"))]))
            assert scraper.states[engine.address].stats is not None
            scraper.update(Snapshot([engine.endpoint("b")]))
            assert scraper.states[engine.address] == EngineState()
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
        assert engine.most_at_once == 1


async def test_an_engine_that_nobody_can_read_is_said_so_and_not_asked() -> None:
    async with serving(Engine()) as engine:
        with structlog.testing.capture_logs() as logs:
            scraper = scraping(engine.endpoint(engine="unheard-of"))
            async with running(scraper):
                await asyncio.sleep(3 * INTERVAL)
        assert scraper.states[engine.address].error == "no dialect for the engine 'unheard-of'"
        assert [log["event"] for log in logs] == ["engine_unknown"]
        assert engine.asked == []


async def test_a_hook_that_raises_ends_nothing_and_is_logged_once() -> None:
    def hook(endpoint: Endpoint, reason: str) -> None:
        raise RuntimeError(f"a defect that says {endpoint.name}: {reason}")

    engine = Engine()
    engine.answer = engine.busy
    async with serving(engine):
        scraper = Scraper(Random(1), FAST, on_failure=hook)
        scraper.update(Snapshot([engine.endpoint()]))
        with structlog.testing.capture_logs() as logs:
            async with running(scraper):
                await becomes(scraper, engine.address, lambda state: state.failures >= 3)
        assert [log["event"] for log in logs] == ["scrape_defect"]


async def test_an_address_that_is_none_is_a_failure() -> None:
    address = "127.0.0.1:99999"
    scraper = scraping(Endpoint(name="a", address=address, models=("m",)))
    async with running(scraper):
        assert (await becomes(scraper, address, lambda state: state.failures >= 2)).stats is None


async def test_a_session_that_was_handed_in_is_left_open() -> None:
    async with serving(Engine()) as engine, aiohttp.ClientSession() as session:
        scraper = Scraper(Random(1), FAST, session=session)
        scraper.update(Snapshot([engine.endpoint()]))
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
        assert not session.closed


@pytest.mark.parametrize(("now", "is_fresh"), [(10.0, True), (11.0, True), (11.01, False)])
def test_freshness_is_the_readers_question(now: float, is_fresh: bool) -> None:
    stats = EngineStats(at=10.0, running=1.0)
    assert fresh(EngineState(stats=stats, failures=3), now, 1.0) == (stats if is_fresh else None)


def test_what_was_never_read_is_not_fresh() -> None:
    assert fresh(EngineState(), 0.0, 1.0) is None
    assert fresh(None, 0.0, 1.0) is None
