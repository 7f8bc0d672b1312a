"""Whether this process comes to its work at once, or finds it waiting."""

from __future__ import annotations

import asyncio

_STEP_SECONDS = 0.01
_STEPS = 3  # in time, one behind another: what had been waiting until then was taken between them


class Pulse:
    """Beats in the running loop while somebody asks for it; a beat that is late shows a loop that was kept from its work."""

    def __init__(self) -> None:
        self._wanted = 0
        self._timely = 0
        self._at = 0.0
        self._next: asyncio.TimerHandle | None = None

    @property
    def prompt(self) -> bool:
        """Whether what comes to hand now has come within the last 20 milliseconds; False without a beat."""
        return self._timely >= _STEPS and self._in_time(asyncio.get_running_loop().time())

    def start(self) -> None:
        """Somebody asks."""
        self._wanted += 1
        if self._next is None:
            self._at, self._timely = asyncio.get_running_loop().time(), 0
            self._arm()

    def stop(self) -> None:
        """Somebody asks no more: once for each `start`."""
        self._wanted -= 1
        if self._wanted == 0 and self._next is not None:
            self._next.cancel()
            self._next = None
            self._timely = 0

    def _in_time(self, now: float) -> bool:
        return now - self._at <= 2 * _STEP_SECONDS

    def _arm(self) -> None:
        self._next = asyncio.get_running_loop().call_later(_STEP_SECONDS, self._beat)

    def _beat(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timely = self._timely + 1 if self._in_time(now) else 0
        self._at = now
        self._arm()
