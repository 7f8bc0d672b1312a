"""What engines said of themselves in answers, which can be newer than their last scrape.

A report tells a few fields, a scrape many: what a report leaves out stays as it was scraped. The two are joined when
somebody asks, and not when the report comes, so that a scrape that is too old to believe does not live on in a report.
"""

from __future__ import annotations

from collections.abc import Mapping

from envoy_extproc.endpoints import Endpoint, EngineStats, Snapshot
from envoy_extproc.orca import LoadReport, stats_of


class _Told:
    """An endpoint's last report, and what the last join of it with a scrape gave."""

    __slots__ = ("at", "endpoint", "joined", "report", "scraped")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.at = float("-inf")
        self.report = LoadReport()
        self.scraped: EngineStats | None = None
        self.joined: EngineStats | None = None

    def is_of(self, endpoint: Endpoint) -> bool:
        """Whether this endpoint said it, and not an earlier owner of its address."""
        return (self.endpoint.name, self.endpoint.engine) == (endpoint.name, endpoint.engine)


class LoadReports:
    """The last report of each endpoint there is. Times are monotonic seconds of one clock, the scraper's.

    Attributes:
        latest: when each said something last, by address; always the same object.
    """

    __slots__ = ("_endpoints", "_told", "latest")

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._endpoints: Mapping[str, Endpoint] = {}
        self._told: dict[str, _Told] = {}

    def update(self, snapshot: Snapshot) -> None:
        """These are the endpoints from now on; what others said is forgotten."""
        self._endpoints = snapshot.by_address
        self._told = {
            address: told
            for address, told in self._told.items()
            if address in self._endpoints and told.is_of(self._endpoints[address])
        }
        for address in self.latest.keys() - self._told.keys():
            del self.latest[address]

    def note(self, address: str, report: LoadReport, at: float) -> None:
        """The engine at `address` said this in an answer whose headers came at `at`.

        Nothing happens if it says nothing that is known here, if it has said something newer already, since answers do
        not come in the order of their log entries, or if nobody knows the address.
        """
        endpoint = self._endpoints.get(address)
        if endpoint is None or stats_of(report, at, None) is None:
            return
        told = self._told.get(address)
        if told is None:
            told = self._told[address] = _Told(endpoint)
        if at > told.at:
            told.report, told.at, told.scraped = report, at, None
            self.latest[address] = at
            told.joined = stats_of(report, at, None)

    def fresher(self, address: str, scraped: EngineStats | None) -> EngineStats | None:
        """What the engine last said, in an answer or to the scraper.

        Args:
            address: whose.
            scraped: the last scrape; None where that is missing or too old to believe.
        """
        told = self._told.get(address)
        if told is None or (scraped is not None and scraped.at >= told.at):
            return scraped
        if told.scraped is not scraped:
            told.scraped, told.joined = scraped, stats_of(told.report, told.at, scraped)
        return told.joined
