"""How many requests each endpoint is sent per second, by this server's own count."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

from envoy_extproc.endpoints import Snapshot

_SECONDS = 10.0
"""What lies so far back counts 1/e: long enough for one request in some seconds to make a rate, short enough to follow
a load that moves."""


class Rates:
    """Exponentially weighted rates, a number for each endpoint there is."""

    __slots__ = ("_known", "_rates")

    def __init__(self) -> None:
        self._known: AbstractSet[str] = frozenset()
        self._rates: dict[str, tuple[float, float]] = {}

    def update(self, snapshot: Snapshot) -> None:
        """These are the endpoints from now on; others are forgotten."""
        self._known = snapshot.by_address.keys()
        self._rates = {address: rate for address, rate in self._rates.items() if address in self._known}

    def add(self, address: str, at: float) -> float:
        """A request goes to `address` at monotonic second `at`; returns requests per second, this one included."""
        rate, since = self._rates.get(address, (0.0, at))
        rate = rate * math.exp(min(0.0, since - at) / _SECONDS) + 1 / _SECONDS
        if address in self._known:
            self._rates[address] = (rate, max(since, at))
        return rate
