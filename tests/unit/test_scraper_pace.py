"""How often the scraper asks, and how gently: real HTTP servers, and a clock that the tests move."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest
from aiohttp import web

from envoy_extproc.endpoints import EngineState, EngineStats, Snapshot
from envoy_extproc.engines.scraper import Scraper, ScrapeSettings
from tests.support.scraped import Engine, closed_port, running, serving
from tests.support.timetable import Timetable

INTERVAL = 1.0
IDLE_INTERVAL = 30.0
EVEN = ScrapeSettings(
    interval=INTERVAL, idle_interval=IDLE_INTERVAL, models_interval=5.0, jitter=0, timeout=60
)
JITTER = 0.1


class Followed:
    """An engine, a scraper that follows it, and the time of both.

    Attributes:
        time, engine, scraper: these.
        in_flight: addresses that have a request of ours.
    """

    def __init__(self, settings: ScrapeSettings, answer: str) -> None:
        self.time = Timetable()
        self.engine = Engine(self.time.clock)
        self.engine.answer = getattr(self.engine, answer)
        self.in_flight: set[str] = set()
        self.scraper = Scraper(
            Random(1),
            settings,
            busy=self.in_flight.__contains__,
            clock=self.time.clock,
            alarm=self.time.alarm,
        )

    @property
    def state(self) -> EngineState:
        return self.scraper.states[self.engine.address]

    async def scrapes(self, count: int) -> list[float]:
        """The seconds between so many more scrapes, the last of those before among them."""
        before = len(self.engine.asked)
        while len(self.engine.asked) < before + count:
            await self.time.step()
        return [
            later - earlier for earlier, later in itertools.pairwise(self.engine.asked[max(0, before - 1) :])
        ]


@contextlib.asynccontextmanager
async def following(
    settings: ScrapeSettings = EVEN, answer: str = "page", *, port: int | None = None
) -> AsyncIterator[Followed]:
    """`port` has nobody there until the test puts somebody."""
    made = Followed(settings, answer)
    async with contextlib.AsyncExitStack() as stack:
        if port is None:
            await stack.enter_async_context(serving(made.engine))
        else:
            made.engine.address = f"127.0.0.1:{port}"
        made.scraper.update(Snapshot([made.engine.endpoint()]))
        await stack.enter_async_context(running(made.scraper))
        await made.time.asleep(2)  # one to scrape, one for the list of models
        yield made


def jittered(**more: Any) -> ScrapeSettings:
    return ScrapeSettings(interval=INTERVAL, idle_interval=IDLE_INTERVAL, jitter=JITTER, timeout=60, **more)


async def test_a_page_becomes_stats_and_two_become_rates() -> None:
    async with following(jittered()) as at:
        assert at.state == EngineState()
        await at.scrapes(1)
        first = at.engine.asked[0]
        expected = EngineState(stats=EngineStats(at=first, running=3.0), interval=INTERVAL)
        assert at.state == expected
        (seconds,) = await at.scrapes(1)  # each page tells of one more token
        assert at.state.stats is not None
        assert at.state.stats.generation_tokens_per_second == pytest.approx(1 / seconds)
        assert at.state.stats.at == first + seconds


async def test_connections_are_kept_and_scrapes_come_one_at_a_time_one_each_interval() -> None:
    async with following(jittered(models_interval=3.0)) as at:
        gaps = await at.scrapes(20)
        assert len(gaps) == 19
        assert all((1 - JITTER) * INTERVAL - 1e-9 <= gap <= INTERVAL + 1e-9 for gap in gaps)
        assert len({round(gap, 6) for gap in gaps}) == 19  # fleets do not fall into step
        assert len(at.engine.connections) == 1
        assert at.engine.most_at_once == 1
        assert len(at.engine.models_asked) > 3


async def test_a_slow_engine_is_not_hurried() -> None:
    async with following() as at:

        async def slowly(request: web.Request) -> web.StreamResponse:
            at.time.now += 2.5 * INTERVAL
            return await at.engine.page(request)

        at.engine.answer = slowly
        assert await at.scrapes(5) == pytest.approx([3 * INTERVAL] * 4)  # the beats it missed are skipped
        assert at.engine.most_at_once == 1


async def test_scrapes_spread_over_the_interval() -> None:
    time = Timetable()
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(serving(Engine(time.clock))) for _ in range(12)]
        scraper = Scraper(Random(1), EVEN, clock=time.clock, alarm=time.alarm)
        scraper.update(Snapshot([engine.endpoint(engine.address) for engine in engines]))
        await stack.enter_async_context(running(scraper))
        await time.asleep(24)
        begin = time.now
        await time.until(begin + INTERVAL)
        firsts = sorted(asked - begin for engine in engines for asked in engine.asked)
    assert len(firsts) == 12
    assert firsts[-1] - firsts[0] > INTERVAL / 2
    assert max(later - earlier for earlier, later in itertools.pairwise(firsts)) < INTERVAL / 2


async def test_an_engine_without_work_is_asked_ever_more_rarely() -> None:
    async with following(answer="idle") as at:
        assert await at.scrapes(8) == pytest.approx([2, 4, 8, 16, 30, 30, 30])


async def rarely_asked(at: Followed) -> None:
    """Follows an engine without work for long enough that it is asked rarely."""
    await at.scrapes(6)
    assert at.state.interval == IDLE_INTERVAL


async def test_a_choice_pulls_the_next_beat_forward() -> None:
    async with following(answer="idle") as at:
        await rarely_asked(at)
        at.scraper.hurry("10.0.0.1:1")  # nobody
        at.scraper.hurry(at.engine.address)
        assert at.state.interval == IDLE_INTERVAL  # that of the last scrape, until there is another
        # It has work when it was chosen, and none from the scrape after that one on.
        assert await at.scrapes(4) == pytest.approx([1, 1, 2, 4])


async def test_a_choice_in_the_middle_of_a_long_interval_counts_from_there() -> None:
    async with following(answer="idle") as at:
        await rarely_asked(at)
        await at.time.until(at.engine.asked[-1] + 10)
        at.scraper.hurry(at.engine.address)
        assert await at.scrapes(2) == pytest.approx([11, 1])


async def test_whoever_has_a_request_of_ours_is_asked_quickly() -> None:
    async with following(answer="idle") as at:
        await rarely_asked(at)
        at.in_flight.add(at.engine.address)
        at.scraper.hurry(at.engine.address)
        assert await at.scrapes(5) == pytest.approx([1] * 5)
        at.in_flight.clear()
        assert await at.scrapes(3) == pytest.approx([1, 2, 4])


async def test_whoever_is_out_of_reach_is_asked_rarely_and_seen_when_it_is_back() -> None:
    port = closed_port()
    async with following(port=port) as at:
        failed: list[float] = []
        at.scraper._on_failure = lambda *_: failed.append(at.time.now)
        while len(failed) < 7:
            await at.time.step()
        gaps = [later - earlier for earlier, later in itertools.pairwise(failed)]
        assert gaps == pytest.approx([2, 4, 8, 16, 30, 30])
        async with serving(at.engine, port):
            await at.scrapes(1)
            assert at.state.reachable
            assert at.time.now - failed[-1] == pytest.approx(IDLE_INTERVAL)
