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

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, ServedModel, Snapshot
from envoy_extproc.engines.dialects import dialects
from envoy_extproc.engines.scraper import Scraper, ScrapeSettings

INTERVAL = 0.02  # seconds
FAST = ScrapeSettings(
    interval=INTERVAL, idle_interval=INTERVAL, models_interval=2 * INTERVAL, timeout=0.1, max_bytes=10_000
)
LAZY = ScrapeSettings(interval=INTERVAL, idle_interval=30 * INTERVAL, timeout=0.1)
IDLE = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
MODELS = b'{"object":"list","data":[{"id": "m", "x":[1.0]},{"id":"a","parent":"m"}]}'
PAGE = b'vllm:num_requests_running{engine="0"} 3\nvllm:generation_tokens_total %d\n'


class Engine:
    """A metrics page on a port of its own; `answer` says how it is served."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.page
        self.address = ""
        self.asked: list[float] = []
        self.connections: set[object] = set()
        self.models: bytes | int = MODELS
        self.models_asked: list[float] = []
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

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        self.models_asked.append(time.monotonic())
        if isinstance(self.models, int):
            return web.Response(status=self.models)
        return web.Response(body=self.models)

    async def idle(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=IDLE)

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
            assert 0 < later.stats.generation_tokens_per_second < 20 / INTERVAL


async def test_connections_are_kept_and_scrapes_come_one_at_a_time_one_each_interval() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            await asyncio.sleep(20 * INTERVAL)
        assert len(engine.connections) <= 2  # one to scrape, one for the list of models
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
    settings = ScrapeSettings(interval=0.8, timeout=1)
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
            async with asyncio.timeout(5):
                while not engine.at_once:
                    await asyncio.sleep(INTERVAL)
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


async def idle_one(stack: contextlib.AsyncExitStack, scraper: Scraper) -> Engine:
    """An engine without work, followed for long enough that it is asked rarely."""
    engine = Engine()
    engine.answer = engine.idle
    await stack.enter_async_context(serving(engine))
    scraper.update(Snapshot([engine.endpoint()]))
    await stack.enter_async_context(running(scraper))
    await becomes(scraper, engine.address, lambda state: state.interval == LAZY.idle_interval)
    return engine


async def test_an_engine_without_work_is_asked_ever_more_rarely() -> None:
    async with contextlib.AsyncExitStack() as stack:
        engine = await idle_one(stack, Scraper(Random(1), LAZY))
        assert len(engine.asked) == 5
        assert engine.asked[-1] - engine.asked[0] > 15 * INTERVAL  # 2, 4, 8 and 16 of them, not 4
        engine.asked.clear()
        await asyncio.sleep(10 * INTERVAL)
        assert len(engine.asked) <= 1


async def test_a_choice_pulls_the_next_beat_forward() -> None:
    async with contextlib.AsyncExitStack() as stack:
        scraper = Scraper(Random(1), LAZY)
        engine = await idle_one(stack, scraper)
        engine.asked.clear()
        scraper.hurry("10.0.0.1:1")  # nobody
        scraper.hurry(engine.address)
        chosen = time.monotonic()
        await becomes(scraper, engine.address, lambda state: state.interval == INTERVAL)
        assert engine.asked[0] - chosen < 4 * INTERVAL
        state = await becomes(scraper, engine.address, lambda state: state.interval > INTERVAL)
        assert state.interval == 2 * INTERVAL


async def test_until_the_next_scrape_the_interval_is_that_of_the_last() -> None:
    async with contextlib.AsyncExitStack() as stack:
        scraper = Scraper(Random(1), LAZY)
        engine = await idle_one(stack, scraper)
        scraper.hurry(engine.address)
        assert scraper.states[engine.address].interval == LAZY.idle_interval


async def test_whoever_has_a_request_of_ours_is_asked_quickly() -> None:
    in_flight: set[str] = set()
    async with contextlib.AsyncExitStack() as stack:
        scraper = Scraper(Random(1), LAZY, busy=in_flight.__contains__)
        engine = await idle_one(stack, scraper)
        in_flight.add(engine.address)
        scraper.hurry(engine.address)
        await becomes(scraper, engine.address, lambda state: state.interval == INTERVAL)
        engine.asked.clear()
        await asyncio.sleep(10 * INTERVAL)
        assert len(engine.asked) >= 5
        assert scraper.states[engine.address].interval == INTERVAL


async def test_whoever_is_out_of_reach_is_asked_rarely_and_seen_when_it_is_back() -> None:
    engine, port = Engine(), closed_port()
    engine.address = f"127.0.0.1:{port}"
    failed: list[float] = []
    scraper = Scraper(Random(1), LAZY, on_failure=lambda *_: failed.append(time.monotonic()))
    scraper.update(Snapshot([engine.endpoint()]))
    async with running(scraper):
        await becomes(scraper, engine.address, lambda state: state.failures == 5)
        assert failed[-1] - failed[0] > 15 * INTERVAL  # 2, 4, 8 and 16 of them, not 4
        async with serving(engine, port):
            back = time.monotonic()
            await becomes(scraper, engine.address, lambda state: state.reachable)
            assert time.monotonic() - back < LAZY.idle_interval + LAZY.timeout


SERVED = (
    ServedModel(id="m", entry=b'{"id": "m", "x":[1.0]}'),
    ServedModel(id="a", parent="m", entry=b'{"id":"a","parent":"m"}'),
)


async def test_models_are_listed_and_a_new_one_is_seen() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            state = await becomes(scraper, engine.address, lambda state: state.served is not None)
            assert state.served == SERVED
            engine.models = b'{"data": []}'
            state = await becomes(scraper, engine.address, lambda state: state.served != SERVED)
            assert state.served == ()
            assert (state.failures, state.error) == (0, None)


@pytest.mark.parametrize(
    ("models", "kept"),
    [(404, False), (401, False), (b"<html>", False), (b" " * 2_000_000, False), (503, True)],
)
async def test_a_list_that_is_none_is_no_failure(models: bytes | int, kept: bool) -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint())
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.served is not None)
            engine.models = models
            engine.models_asked.clear()
            async with asyncio.timeout(5):
                while len(engine.models_asked) < 3:
                    await asyncio.sleep(INTERVAL)
            state = scraper.states[engine.address]
        assert state.served == (SERVED if kept else None)
        assert (state.failures, state.error, state.reachable) == (0, None, True)


async def test_models_are_asked_for_again_when_the_endpoint_comes_back() -> None:
    engine, port = Engine(), closed_port()
    engine.address = f"127.0.0.1:{port}"
    scraper = Scraper(
        Random(1), ScrapeSettings(interval=INTERVAL, idle_interval=INTERVAL, models_interval=3600)
    )
    scraper.update(Snapshot([engine.endpoint()]))
    async with running(scraper):
        await becomes(scraper, engine.address, lambda state: state.failures > 3)
        async with serving(engine, port):
            state = await becomes(scraper, engine.address, lambda state: state.served is not None)
            assert state.served == SERVED
        await becomes(scraper, engine.address, lambda state: not state.reachable)
        assert scraper.states[engine.address].served == SERVED
        engine.models = b'{"data": []}'
        async with serving(engine, port):
            await becomes(scraper, engine.address, lambda state: state.served == ())
    assert len(engine.models_asked) <= 3


async def test_an_engine_that_says_nothing_of_itself_is_asked_for_its_models_alone() -> None:
    async with serving(Engine()) as engine:
        scraper = scraping(engine.endpoint(engine="generic"))
        async with running(scraper):
            state = await becomes(scraper, engine.address, lambda state: state.served is not None)
        assert state == EngineState(served=SERVED)
        assert engine.asked == []


async def test_an_engine_without_such_a_list_is_not_asked_for_it() -> None:
    mine = dialects({"mine": {"base": "triton", "port": None, "waiting": "vllm:num_requests_running"}})
    async with serving(Engine()) as engine:
        scraper = Scraper(Random(1), FAST, dialects=mine)
        scraper.update(Snapshot([engine.endpoint(engine="mine")]))
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
            await asyncio.sleep(5 * INTERVAL)
        assert engine.models_asked == []
        assert scraper.states[engine.address].served is None


async def test_the_page_can_be_on_another_port_and_path() -> None:
    mine = dialects({"mine": {"base": "vllm", "path": "/elsewhere/metrics", "port": closed_port()}})
    async with serving(Engine()) as engine, serving(Engine()) as page:
        scraper = Scraper(Random(1), FAST, dialects=mine)
        endpoint = Endpoint(
            name="a",
            address=engine.address,
            models=("m",),
            engine="mine",
            metrics_port=int(page.address.rpartition(":")[2]),
        )
        scraper.update(Snapshot([endpoint]))
        async with running(scraper):
            await becomes(scraper, engine.address, lambda state: state.stats is not None)
            await becomes(scraper, engine.address, lambda state: state.served is not None)
        assert engine.asked == []
        assert page.models_asked == []
