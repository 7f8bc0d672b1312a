"""State of one process, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

from envoy_extproc.endpoints import Endpoint


class Lease:
    """One exchange's place in the counts; however often it is released, it counts once."""

    __slots__ = ("_address", "_in_flight", "_model")

    def __init__(self, in_flight: InFlight, model: str, address: str) -> None:
        self._in_flight = in_flight
        self._model = model
        self._address: str | None = address

    def move(self, endpoint: Endpoint) -> None:
        """Another endpoint serves the exchange from here on; nothing after `release`."""
        if self._address is not None:
            self._in_flight.add(self._model, self._address, -1)
            self._address = endpoint.address
            self._in_flight.add(self._model, self._address, 1)

    def release(self) -> None:
        """The exchange is over. Further calls do nothing."""
        if self._address is not None:
            self._in_flight.add(self._model, self._address, -1)
            self._address = None


class InFlight:
    """Exchanges under way, by endpoint and by model. Counts change through a `Lease` alone, so they cannot drift."""

    __slots__ = ("_by_address", "_by_both")

    def __init__(self) -> None:
        self._by_address: dict[str, int] = {}
        self._by_both: dict[tuple[str, str], int] = {}

    def acquire(self, endpoint: Endpoint, model: str) -> Lease:
        """Counts an exchange of `model` on `endpoint` until the lease is released."""
        self.add(model, endpoint.address, 1)
        return Lease(self, model, endpoint.address)

    def count(self, address: str) -> int:
        """Exchanges on an address now."""
        return self._by_address.get(address, 0)

    @property
    def counts(self) -> Mapping[str, int]:
        """Exchanges by address, a live view of those that have any."""
        return MappingProxyType(self._by_address)

    @property
    def total(self) -> int:
        """Exchanges on all of them."""
        return sum(self._by_address.values())

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """(model, address, exchanges) for every pair that has any."""
        return ((model, address, count) for (model, address), count in self._by_both.items())

    def add(self, model: str, address: str, change: int) -> None:
        """For `Lease` alone. A count at zero is forgotten, so endpoints that left leave nothing behind."""
        _change(self._by_address, address, change)
        _change(self._by_both, (model, address), change)


K = TypeVar("K")


def _change(counts: dict[K, int], key: K, change: int) -> None:
    count = counts.get(key, 0) + change
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
