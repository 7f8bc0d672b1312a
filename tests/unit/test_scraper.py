"""The scraper against real HTTP servers: what it learns, and what a failure means."""

from __future__ import annotations

import asyncio
from random import Random

import aiohttp
import msgspec
import pytest
import structlog.testing
from aiohttp import web

from envoy_extproc.endpoints import Endpoint, EngineState, ServedModel, Snapshot
from envoy_extproc.engines.dialects import dialects
from envoy_extproc.engines.scraper import Scraper, ScrapeSettings
from tests.support.gateway import eventually
from tests.support.scraped import Engine, becomes, closed_port, running, serving

INTERVAL = 0.02  # seconds
FAST = ScrapeSettings(
    interval=INTERVAL, idle_interval=INTERVAL, models_interval=2 * INTERVAL, timeout=10, max_bytes=10_000
)
IMPATIENT = msgspec.structs.replace(
    FAST, timeout=0.1
)  # where somebody is silent: no machine is too busy for that


def scraping(*endpoints: Endpoint, settings: ScrapeSettings = FAST) -> Scraper:
    scraper = Scraper(Random(1), settings)
    scraper.update(Snapshot(endpoints))
    return scraper


async def test_scrapes_under_way_are_bounded() -> None:
    engine = Engine()
    engine.answer = engine.silence
    async with serving(engine), serving(Engine()) as other:
        settings = ScrapeSettings(interval=INTERVAL, timeout=60, concurrency=1)
        scraper = scraping(engine.endpoint("a"), other.endpoint("b"), settings=settings)
        async with running(scraper):
            await eventually(lambda: engine.at_once > 0)
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
        scraper = scraping(engine.endpoint(), settings=IMPATIENT)
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


async def test_one_silence_between_bad_answers_is_not_two_in_a_row() -> None:
    engine = Engine()

    async def sometimes(request: web.Request) -> web.StreamResponse:
        # A client that is hung up on asks once more by itself: two of three make one silence.
        return await (engine.hang_up(request) if len(engine.asked) % 3 else engine.busy(request))

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
            asked, others = len(engine.asked), len(other.asked)
            await eventually(lambda: len(other.asked) > others + 5)
            assert list(scraper.states) == [other.address]
            assert len(engine.asked) <= asked + 1  # one was perhaps on its way
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
            await eventually(lambda: len(engine.models_asked) >= 3)
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
