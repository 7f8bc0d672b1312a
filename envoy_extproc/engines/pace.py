"""How often an endpoint is asked: quickly while it has work, ever more rarely while it has none."""

from __future__ import annotations

import asyncio

from envoy_extproc.endpoints import EngineStats


def paced(interval: float, *, busy: bool, quick: float, idle: float) -> float:
    """Seconds to the next scrape of an endpoint whose last was `interval` seconds after the one before.

    Args:
        interval: as it was.
        busy: whether it has work.
        quick: for those that have.
        idle: the most that the interval, doubled each time, grows to without work.
    """
    return quick if busy else min(2 * interval, max(idle, quick))


def has_work(stats: EngineStats | None) -> bool:
    """Whether the engine says that it runs or queues a request."""
    return stats is not None and bool(stats.running or stats.waiting)


class Alarm:
    """A sleep that can be shortened from outside; one sleeper at a time."""

    __slots__ = ("_sleeper", "_timer")

    def __init__(self) -> None:
        self._sleeper: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def sleep(self, seconds: float) -> None:
        """Returns in `seconds`, or when `hasten` says; always lets others run."""
        loop = asyncio.get_running_loop()
        self._sleeper = loop.create_future()
        self._timer = loop.call_later(max(0.0, seconds), self._ring)
        try:
            await self._sleeper
        finally:
            self._timer.cancel()
            self._sleeper = self._timer = None

    def hasten(self, seconds: float) -> None:
        """Whoever sleeps wakes in `seconds`; nothing if nobody does."""
        if self._sleeper is not None and self._timer is not None:
            self._timer.cancel()
            self._timer = self._sleeper.get_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)
