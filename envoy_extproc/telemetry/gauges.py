"""Gauges and counters that are read where they are kept, at each scrape: there is no second copy of them to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

InFlightRows = Callable[[], Iterable[tuple[str, str, int]]]
"""(model, endpoint's name, exchanges) of all that have any."""

BreakerRows = Callable[[], Iterable[tuple[str, int, Mapping[str, int]]]]
"""(endpoint's name, state, openings by reason) of every endpoint; states are 0 closed, 1 half-open, 2 open."""

PrefixRows = Callable[[], Iterable[tuple[str, int, int]]]
"""(endpoint's name, blocks of prompts remembered of it, blocks that there is room for) of every endpoint with any."""

ForgottenRows = Callable[[], Mapping[str, int]]
"""How often the prompts of an endpoint were forgotten, by reason."""

EndpointRows = Callable[[], Iterable[tuple[str, Mapping[str, int]]]]
"""(model, endpoints by state) of every model that discovery knows, the states without any among them."""

NativeCounts = Callable[[], tuple[int, int]]
"""Exchanges of the native lane: ended, reported."""


WatchRows = Callable[[], Iterable[tuple[str, float, Mapping[str, int]]]]
"""(what is watched, seconds since the Kubernetes API last spoke of it, failures by kind) of every watch."""

UnusableRows = Callable[[], Iterable[tuple[str, int]]]
"""(reason, pods) of those that are ready and make no sense."""

RouteRows = Callable[[], Iterable[tuple[str, bool]]]
"""(model, whether Envoy's Gateway takes a route of it) of every model whose routes are watched."""


class InFlightCollector(Collector):
    """Reads the counts when it is asked, so there is no second copy of them to go wrong."""

    def __init__(self, rows: InFlightRows) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        """The gauge."""
        gauge = GaugeMetricFamily(
            "envoy_extproc_in_flight_requests",
            "Exchanges under way on an endpoint, as this server counts them.",
            labels=["model", "endpoint"],
        )
        for model, endpoint, count in self._rows():
            gauge.add_metric([model, endpoint], count)
        yield gauge


class EndpointCollector(Collector):
    """Likewise of the endpoints: a model that is gone has no series."""

    def __init__(self, rows: EndpointRows) -> None:
        self._rows = rows

    def describe(self) -> Iterator[Metric]:
        """The gauge alone: it is registered before there is anybody to ask."""
        yield self._gauge()

    def collect(self) -> Iterator[Metric]:
        """The gauge."""
        gauge = self._gauge()
        for model, counts in self._rows():
            for state, count in counts.items():
                gauge.add_metric([model, state], count)
        yield gauge

    def _gauge(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "envoy_extproc_endpoints",
            "Endpoints of a model that discovery knows, each in one state: ready, failing, unreachable.",
            labels=["model", "state"],
        )


class BreakerCollector(Collector):
    """Likewise of the breakers: a state that has ended by itself is told as it is now."""

    def __init__(self, rows: BreakerRows) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        """The gauge, and a counter by reason."""
        states = GaugeMetricFamily(
            "envoy_extproc_endpoint_breaker_state",
            "Whether an endpoint is left alone: 0 closed, 1 half-open, 2 open.",
            labels=["endpoint"],
        )
        opened = CounterMetricFamily(
            "envoy_extproc_breaker_opened",
            "Times an endpoint's breaker opened, by what was wrong.",
            labels=["endpoint", "reason"],
        )
        for endpoint, state, openings in self._rows():
            states.add_metric([endpoint], state)
            for reason, count in openings.items():
                opened.add_metric([endpoint, reason], count)
        yield states
        yield opened


class PrefixCollector(Collector):
    """Likewise of what is remembered of prompts."""

    def __init__(self, rows: PrefixRows, forgotten: ForgottenRows) -> None:
        self._rows = rows
        self._forgotten = forgotten

    def collect(self) -> Iterator[Metric]:
        """Two gauges by endpoint, and a counter by reason."""
        held = GaugeMetricFamily(
            "envoy_extproc_prefix_blocks", "Blocks of prompts remembered of an endpoint.", labels=["endpoint"]
        )
        room = GaugeMetricFamily(
            "envoy_extproc_prefix_blocks_limit", "Blocks that may be remembered of it.", labels=["endpoint"]
        )
        for endpoint, blocks, limit in self._rows():
            held.add_metric([endpoint], blocks)
            room.add_metric([endpoint], limit)
        forgotten = CounterMetricFamily(
            "envoy_extproc_prefix_forgotten",
            "Times the prompts of an endpoint were forgotten, by what its engine showed.",
            labels=["reason"],
        )
        for reason, count in self._forgotten().items():
            forgotten.add_metric([reason], count)
        yield from (held, room, forgotten)


class DiscoveryCollector(Collector):
    """What the Kubernetes API said, and when."""

    def __init__(self, watches: WatchRows, unusable: UnusableRows, routes: RouteRows) -> None:
        self._watches = watches
        self._unusable = unusable
        self._routes = routes

    def collect(self) -> Iterator[Metric]:
        """Two gauges and a counter of the watches, a gauge of the routes."""
        silent = GaugeMetricFamily(
            "envoy_extproc_discovery_silent_seconds",
            "Since the Kubernetes API last spoke; it does so once a minute though nothing changes.",
            labels=["watched"],
        )
        failures = CounterMetricFamily(
            "envoy_extproc_discovery_failures",
            "Lists and watches of the Kubernetes API that failed, by kind.",
            labels=["watched", "kind"],
        )
        for watched, seconds, kinds in self._watches():
            silent.add_metric([watched], seconds)
            for kind, count in kinds.items():
                failures.add_metric([watched, kind], count)
        yield from (silent, failures, self._pods(), self._accepted())

    def _pods(self) -> Metric:
        pods = GaugeMetricFamily(
            "envoy_extproc_discovery_unusable_pods",
            "Pods that are ready, but whose labels or annotations make no sense.",
            labels=["reason"],
        )
        for reason, count in self._unusable():
            pods.add_metric([reason], count)
        return pods

    def _accepted(self) -> Metric:
        accepted = GaugeMetricFamily(
            "envoy_extproc_route_accepted",
            "Whether a model has an HTTPRoute that its Gateways take: 1 yes, 0 no.",
            labels=["model"],
        )
        for model, taken in self._routes():
            accepted.add_metric([model], int(taken))
        return accepted


class NativeCollector(Collector):
    """The native lane's books: what ended, and what was reported."""

    def __init__(self, counts: NativeCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """A counter by stage, and the difference that should be nothing."""
        ended, reported = self._counts()
        stages = CounterMetricFamily(
            "envoy_extproc_native_exchanges",
            "Exchanges left to Envoy's access log: ended here, reported by the log to this server.",
            labels=["stage"],
        )
        for stage, count in (("ended", ended), ("reported", reported)):
            stages.add_metric([stage], count)
        yield stages
        yield GaugeMetricFamily(
            "envoy_extproc_native_unreported_exchanges",
            "Ended here, less those reported here. Over all servers of an Envoy the sum is the reports that are missing.",
            value=ended - reported,
        )
