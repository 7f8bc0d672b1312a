"""How often an endpoint is asked, and the sleep that can be shortened."""

from __future__ import annotations

import asyncio

import pytest

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.pace import Alarm, has_work, paced


@pytest.mark.parametrize(
    ("interval", "busy", "expected"),
    [(0.2, True, 0.2), (2.0, True, 0.2), (0.2, False, 0.4), (1.6, False, 2.0), (2.0, False, 2.0)],
)
def test_the_next_interval(interval: float, busy: bool, expected: float) -> None:
    assert paced(interval, busy=busy, quick=0.2, idle=2.0) == expected


def test_whoever_asks_rarely_anyway_asks_no_more_often_without_work() -> None:
    assert paced(5.0, busy=False, quick=5.0, idle=2.0) == 5.0


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (None, False),
        (EngineStats(at=0.0), False),
        (EngineStats(at=0.0, running=0.0, waiting=0.0), False),
        (EngineStats(at=0.0, running=1.0), True),
        (EngineStats(at=0.0, running=0.0, waiting=1.0), True),
    ],
)
def test_who_has_work(stats: EngineStats | None, expected: bool) -> None:
    assert has_work(stats) == expected


async def test_an_alarm_rings_in_its_time_or_when_it_is_hastened() -> None:
    alarm, clock = Alarm(), asyncio.get_running_loop().time
    begin = clock()
    await alarm.sleep(0.02)
    assert clock() - begin >= 0.019
    sleeper = asyncio.ensure_future(alarm.sleep(60))
    await asyncio.sleep(0)
    alarm.hasten(0.01)
    async with asyncio.timeout(5):
        await sleeper


async def test_to_hasten_nobody_is_nothing() -> None:
    alarm = Alarm()
    alarm.hasten(0)
    await alarm.sleep(-1)
    alarm.hasten(0)


async def test_a_sleeper_that_is_cancelled_leaves_nothing_behind() -> None:
    alarm = Alarm()
    sleeper = asyncio.ensure_future(alarm.sleep(0.01))
    await asyncio.sleep(0)
    sleeper.cancel()
    await asyncio.sleep(0.02)
    assert sleeper.cancelled()
    await alarm.sleep(0)
