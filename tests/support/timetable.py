"""Time that moves only when a test says so, for a scraper that asks real servers: no machine is too busy for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from envoy_extproc.engines.pace import Alarm


class Timetable:
    """A clock, and who sleeps until when.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self._due: dict[_Sleeper, float] = {}

    def clock(self) -> float:
        """What time it is."""
        return self.now

    def alarm(self) -> Alarm:
        """An alarm by this clock."""
        return _Sleeper(self._due, self.clock)

    async def asleep(self, sleepers: int) -> list[float]:
        """When each wakes, the first one first, once there are so many of them.

        Raises:
            TimeoutError: there are not; a matter of a defect, not of this machine's pace.
        """
        async with asyncio.timeout(60):
            while len(self._due) != sleepers:
                await asyncio.sleep(0.001)
        return sorted(self._due.values())

    async def step(self) -> None:
        """Whoever wakes first does; returns when they sleep again. It is no earlier then, and later if they took time."""
        sleepers = len(self._due)
        first = min(self._due, key=lambda each: self._due[each])
        self.now = max(self.now, self._due[first])
        first.wake()
        await asyncio.sleep(0)
        await self.asleep(sleepers)

    async def until(self, when: float) -> None:
        """Steps through all that comes before."""
        while min(self._due.values()) <= when:
            await self.step()
        self.now = max(self.now, when)


class _Sleeper(Alarm):
    __slots__ = ("_clock", "_due")

    def __init__(self, due: dict[_Sleeper, float], clock: Callable[[], float]) -> None:
        super().__init__()
        self._due = due
        self._clock = clock

    async def sleep(self, seconds: float) -> None:
        self._due[self] = self._clock() + max(0.0, seconds)
        self._sleeper = asyncio.get_running_loop().create_future()
        try:
            await self._sleeper
        finally:
            self._due.pop(self, None)
            self._sleeper = None

    def hasten(self, seconds: float) -> None:
        if self in self._due:
            self._due[self] = self._clock() + seconds

    def wake(self) -> None:
        self._due.pop(self)
        self._ring()
