"""The composition root: everything is made here, handed to each other, and run in one TaskGroup until told to stop."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import grpc
import structlog
from aiohttp import web

from envoy_extproc import orca
from envoy_extproc.discovery import Discovery
from envoy_extproc.discovery.kubernetes import KubernetesDiscovery
from envoy_extproc.discovery.kubernetes_routes import RouteWatcher
from envoy_extproc.discovery.parse import parse_endpoints
from envoy_extproc.discovery.static import FileDiscovery, StaticDiscovery
from envoy_extproc.endpoints import Endpoint, EngineState, Snapshot
from envoy_extproc.engines.dialects import dialects
from envoy_extproc.engines.scraper import Scraper
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.explain import Explanation
from envoy_extproc.scheduling.interfaces import SchedulingRequest, Scorer
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.server import configured, readiness
from envoy_extproc.server.access_log import AccessLog
from envoy_extproc.server.admin import Admin
from envoy_extproc.server.catalogue import Catalogue
from envoy_extproc.server.director import Director
from envoy_extproc.server.guard import guarded
from envoy_extproc.server.health import Health
from envoy_extproc.server.native_lane import NativeLane
from envoy_extproc.server.servicer import ExternalProcessor, Parts
from envoy_extproc.server.tls import Certificates
from envoy_extproc.settings import Server as ServerSettings
from envoy_extproc.settings import Settings
from envoy_extproc.state.breakers import BreakerRules, Breakers
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.load_reports import LoadReports
from envoy_extproc.state.memory import InFlight
from envoy_extproc.state.prompts import Prompts
from envoy_extproc.state.rates import Rates
from envoy_extproc.telemetry import Hooks
from envoy_extproc.telemetry.gauges import RouteRows, UnusableRows, WatchRows
from envoy_extproc.telemetry.log import RequestLog
from envoy_extproc.telemetry.prometheus import PrometheusMetrics
from envoy_extproc.tokens.building import load_encodings, prompt_counter
from envoy_extproc.tokens.remote import PodTargets

log = structlog.get_logger()

_STOP_GRACE_SECONDS = 5.0
"""For streams that end while the server stops. 0 would reset them, and Envoy then cuts its clients off."""

_DRAIN_STEP_SECONDS = 0.05

_ADAPTERS_SECONDS = 1.0  # engines are asked for their lists far less often

_LOOK_SECONDS = 0.5  # beyond the time of one scrape: for its beat and the list of models
_LOOK_STEP_SECONDS = 0.01

_LOG_FLUSH_SECONDS = 0.5
"""For the entries of the last exchanges: Envoy writes each up to 0.1 s after its end (`buffer_flush_interval`)."""

_NO_SCORERS: Mapping[str, Scorer] = MappingProxyType({})


class App:
    """One server.

    Args:
        settings: the whole configuration.
        on_snapshot: is told of every list of endpoints, just before this server chooses among them.
        scorers: of other packages, by the names of their policies; see `server.plugins`.

    Attributes:
        ext_proc_port: the port gRPC listens on, known once `run` has started.
        admin_port: likewise of the admin HTTP.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_snapshot: Callable[[Snapshot], None] = lambda _: None,
        scorers: Mapping[str, Scorer] = _NO_SCORERS,
    ) -> None:
        self._settings = settings
        self._on_snapshot = on_snapshot
        self._scorers = scorers
        self._in_flight = InFlight()
        name = secrets.token_hex(4)
        self._lane = NativeLane(settings.responses.accounting, name=name)
        self._breakers = Breakers(
            BreakerRules(**settings.routing.breaker.model_dump()),
            jitter=lambda: random.uniform(0.9, 1.1),  # noqa: S311  sets servers apart
        )
        self._metrics = PrometheusMetrics(
            self._in_flight_rows,
            known=lambda model: model in self._director.snapshot.by_model,
            native=lambda: (self._lane.ended, self._lane.reported),
            breakers=self._breakers.rows,
            endpoints=lambda: readiness.by_model(
                self._director.snapshot, self._scraper.states, self._breakers.describe
            ),
        )
        self._rates = Rates()
        self._load_reports = LoadReports()
        self._fairness = Fairness(
            configured.fairness(settings),
            name=name,
            accounting=settings.responses.accounting != "none",
        )
        self._discovered = Snapshot()
        self._look_around()
        self._decide()
        self._count()
        self._listen()
        self.ext_proc_port = 0
        self.admin_port = 0

    def _look_around(self) -> None:
        """Makes what finds endpoints, and what asks them."""
        settings = self._settings
        self._discovery = _discovery(settings)
        self._routes = _routes(settings, lambda: self._director.snapshot.models)
        self._metrics.follow_discovery(*_discovery_rows(self._discovery, self._routes))
        self._scraper = Scraper(
            random.Random(),  # noqa: S311  phases, not secrets
            configured.scraping(settings),
            dialects=dialects(settings.engines.dialects),
            busy=lambda address: self._in_flight.count(address) > 0,
            on_failure=lambda endpoint, _: self._metrics.scrape_failed(endpoint.name),
        )

    def _decide(self) -> None:
        """Makes what chooses among endpoints."""
        foreign = {
            name: guarded(name, scorer, self._metrics.scorer_failed) for name, scorer in self._scorers.items()
        }
        policies = registry.build(configured.tuning(self._settings), foreign)
        self._prompts = Prompts(policies.prefixes, name=secrets.token_hex(4))
        self._director = Director(
            profiles=policies,
            rules=configured.rules(self._settings),
            in_flight=self._in_flight.count,
            counts=self._in_flight.counts,
            states=self._scraper.states,
            rng=random.Random(),  # noqa: S311  breaks ties
            avoided=self._breakers.avoided,
            doubted=self._breakers.doubted,
            fresher=self._load_reports.fresher,
            reports=self._load_reports.latest,
            chosen=self._scraper.hurry,
            fairness=self._fairness,
            prompts=self._prompts,
        )
        self._metrics.follow_prefixes(
            lambda: self._prefix_rows(policies.prefixes), lambda: self._prompts.caches.forgotten
        )
        self._catalogue = Catalogue(
            self._scraper.states, avoided=self._breakers.avoided, created=int(time.time())
        )

    def _count(self) -> None:
        """Makes what counts prompts; encodings are loaded here, before anybody is served."""
        settings = self._settings
        loaded = load_encodings(settings)
        for encoding, flaw in loaded.flaws.items():
            log.warning("tokens_estimated", encoding=encoding, reason=flaw)
        known = dialects(settings.engines.dialects)
        self._counter = prompt_counter(
            settings,
            loaded,
            pods=PodTargets(
                lambda model: self._director.snapshot.by_model.get(model, ()),
                form=lambda endpoint: known[endpoint.engine].tokenize if endpoint.engine in known else None,
                ready=lambda endpoint: self._director.is_ready(endpoint.address, time.monotonic()),
            ),
            known=lambda model: model in self._director.snapshot.by_model,
            told=self._metrics.prompt_counted,
        )

    def _listen(self) -> None:
        """Makes what Envoy, probes and people ask."""
        settings = self._settings
        hook = Hooks(self._metrics, RequestLog(), self._breakers, self._fairness, self._prompts)
        self._processor = ExternalProcessor(
            Parts(
                settings=configured.exchange(settings),
                director=self._director,
                in_flight=self._in_flight,
                hook=hook,
                lane=self._lane,
                catalogue=self._catalogue,
                rates=self._rates,
                counter=self._counter,
                heard=self._engine_told,
                hold=settings.responses.hold_streams,
                left=self._fairness.left,
            ),
            message_unknown=self._metrics.message_unknown,
        )
        self._access_log = AccessLog(
            lane=self._lane,
            lookup=self._director.lookup,
            finished=hook.finished,
            bypassed=self._metrics.bypassed,
            heard=self._engine_told,
        )
        self._health = Health()
        self._admin = Admin(
            registry=self._metrics.registry,
            ready=lambda: self._health.ready,
            director=self._director,
            debug_token=settings.server.debug_token,
            trust_user=settings.auth.mode == "header",
            counted=self.counted,
            breaker=self._breakers.describe,
            routes=None if self._routes is None else self._routes.described,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then drains.

        Raises:
            EndpointError: discovery has nothing valid to start with.
            OSError: a port cannot be had.
        """
        async with self._counting(), self._grpc() as server, self._http(), asyncio.TaskGroup() as group:
            work = [self._discover(), self._scraper.run(), self._follow_adapters()]
            work += [] if self._routes is None else [self._routes.run()]
            tasks = [group.create_task(each) for each in work]
            log.info("serving", ext_proc_port=self.ext_proc_port, admin_port=self.admin_port)
            await stop.wait()
            await self._drain(server)
            for task in tasks:
                task.cancel()

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[Callable[[SchedulingRequest], Explanation]]:
        """Asks every engine once, without serving; gives what explains requests by what they said.

        Raises:
            EndpointError: discovery has nothing valid.
        """
        self._discovered = await anext(self._discovery.snapshots())
        self._scraper.update(self._discovered)
        async with asyncio.TaskGroup() as group:
            scraping = group.create_task(self._scraper.run())
            await self._hear_of_all()
            scraping.cancel()
        self._choose_among(self._catalogue.with_adapters(self._discovered))
        now = time.monotonic()
        async with self._counting():
            yield lambda request: self._director.explain(request, now)

    async def counted(self, request: SchedulingRequest) -> SchedulingRequest:
        """`request` with its prompt counted, if there is somebody to do so."""
        return request if self._counter is None else await self._counter.counted(request)

    async def _hear_of_all(self) -> None:
        """Waits until every engine has answered or failed, though not for one that never will."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.engines.scrape_timeout_ms / 1000 + _LOOK_SECONDS
        while clock() < until and not all(  # noqa: ASYNC110  the scraper keeps states, not events
            map(_heard_of, self._scraper.states.values())
        ):
            await asyncio.sleep(_LOOK_STEP_SECONDS)

    async def _discover(self) -> None:
        async for snapshot in self._discovery.snapshots():
            self._on_snapshot(snapshot)
            self._discovered = snapshot
            self._scraper.update(snapshot)
            self._choose_among(self._catalogue.with_adapters(snapshot))
            log.info("endpoints", count=len(snapshot.endpoints), models=list(snapshot.models))
            if not self._health.ready:
                await self._health.set_ready(True)

    async def _follow_adapters(self) -> None:
        """Adapters come and go in a pod without a word from discovery; so does what its cache holds."""
        while True:
            await asyncio.sleep(_ADAPTERS_SECONDS)
            self._director.look(time.monotonic())
            snapshot = self._catalogue.with_adapters(self._discovered)
            if snapshot != self._director.snapshot:
                log.info("adapters", models=list(snapshot.models))
                self._choose_among(snapshot)

    def _choose_among(self, snapshot: Snapshot) -> None:
        self._metrics.snapshot_changed(self._director.snapshot, snapshot)
        self._breakers.update(snapshot)
        self._rates.update(snapshot)
        self._load_reports.update(snapshot)
        self._director.update(snapshot)

    async def _drain(self, server: grpc.aio.Server) -> None:
        """Readiness off, then serve on until nobody comes and all have gone, then give back what is left, then stop."""
        log.info("draining", streams=self._processor.live)
        await self._health.drain()
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.server.linger_seconds  # streams still come until Envoy has heard
        try:
            async with asyncio.timeout(self._settings.server.drain_seconds):
                while self._processor.live or clock() < until:
                    self._processor.give_back(held_only=True)
                    await asyncio.sleep(_DRAIN_STEP_SECONDS)
        except TimeoutError:
            if self._processor.live:
                log.warning("drain_timeout", streams=self._processor.live)
        await self._hear_the_last()
        await self._stop(server)

    async def _hear_the_last(self) -> None:
        """Waits for the entries of the last exchanges, which come behind their streams: no log is taken any more then."""
        clock = asyncio.get_running_loop().time
        until = clock() + _LOG_FLUSH_SECONDS
        while self._lane.missing > 0 and clock() < until:  # noqa: ASYNC110  a count, not an event
            await asyncio.sleep(_DRAIN_STEP_SECONDS)

    async def _stop(self, server: grpc.aio.Server) -> None:
        """Takes no more streams; gives back those that are left, and ends Envoy's access logs behind the last."""
        clock = asyncio.get_running_loop().time
        stopping = asyncio.ensure_future(server.stop(_STOP_GRACE_SECONDS))
        quiet_since = clock()
        while not stopping.done():
            self._processor.give_back(held_only=False)  # those that got their pod only now, too
            if self._processor.live:
                quiet_since = clock()
            elif clock() - quiet_since >= _LOG_FLUSH_SECONDS:
                self._access_log.end()
            await asyncio.wait([stopping], timeout=_DRAIN_STEP_SECONDS)

    @asynccontextmanager
    async def _counting(self) -> AsyncIterator[None]:
        async with nullcontext() if self._counter is None else self._counter:
            yield

    @asynccontextmanager
    async def _grpc(self) -> AsyncIterator[grpc.aio.Server]:
        settings = self._settings.server
        server = grpc.aio.server(options=list(_grpc_options(settings.max_body_bytes)))
        server.add_generic_rpc_handlers((self._processor.handler(), self._access_log.handler()))
        self._health.add_to(server)
        await self._health.start()
        self.ext_proc_port = _bind(server, settings)
        await server.start()
        try:
            yield server
        finally:
            await server.stop(None)

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        host, _, port = self._settings.server.admin.rpartition(":")
        runner = web.AppRunner(self._admin.app(), access_log=None, handle_signals=False)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host.strip("[]"), int(port))
            await site.start()
            self.admin_port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    def _engine_told(self, address: str, parsed: orca.Parsed, at: float) -> None:
        if parsed.report is not None:
            self._load_reports.note(address, parsed.report, at)
        elif parsed.flaw is not None:
            self._metrics.load_report_unread(parsed.flaw)

    def _in_flight_rows(self) -> Iterator[tuple[str, str, int]]:
        for model, address, count in self._in_flight:
            endpoint = self._director.lookup(address)
            yield model, address if endpoint is None else endpoint.name, count

    def _prefix_rows(self, index: PrefixIndex) -> Iterator[tuple[str, int, int]]:
        for address, blocks in index.held().items():
            endpoint = self._director.lookup(address)
            yield address if endpoint is None else endpoint.name, blocks, index.limit(address)


def static_endpoints(settings: Settings) -> tuple[Endpoint, ...]:
    """The endpoints written in the configuration itself; none where a file lists them.

    Raises:
        EndpointError: one of them is wrong.
    """
    source = settings.discovery.static
    if source is None or source.endpoints is None:
        return ()
    engines = dialects(settings.engines.dialects).keys()
    return parse_endpoints({"endpoints": [dict(each) for each in source.endpoints]}, engines=engines)


def _discovery(settings: Settings) -> Discovery:
    kubernetes, source = settings.discovery.kubernetes, settings.discovery.static
    if kubernetes is not None:
        return KubernetesDiscovery(kubernetes, engines=dialects(settings.engines.dialects).keys())
    if source is not None and source.file is not None:
        return FileDiscovery(source.file, engines=dialects(settings.engines.dialects).keys())
    return StaticDiscovery(static_endpoints(settings))


def _routes(settings: Settings, models: Callable[[], Sequence[str]]) -> RouteWatcher | None:
    kubernetes = settings.discovery.kubernetes
    return RouteWatcher(kubernetes, models=models) if kubernetes is not None and kubernetes.routes else None


def _discovery_rows(
    discovery: Discovery, routes: RouteWatcher | None
) -> tuple[WatchRows, UnusableRows, RouteRows]:
    pods = discovery if isinstance(discovery, KubernetesDiscovery) else None
    watchers = [each for each in (pods, routes) if each is not None]
    return (
        lambda: [(each.what, each.silent, each.failures) for watcher in watchers for each in watcher.healths],
        lambda: [] if pods is None else pods.unusable.items(),
        lambda: [] if routes is None else [(each.model, each.state == "accepted") for each in routes.states],
    )


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> int:
    try:
        if settings.tls is None:
            return server.add_insecure_port(settings.listen)
        return server.add_secure_port(settings.listen, Certificates(settings.tls).credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {settings.listen}: the port is taken or not allowed") from error


def _grpc_options(max_body_bytes: int) -> Iterator[tuple[str, Any]]:
    yield (
        "grpc.max_receive_message_length",
        max_body_bytes + 1_048_576,
    )  # the default of 4 MiB is a 500 in Envoy
    yield "grpc.max_send_message_length", max_body_bytes + 1_048_576
    yield "grpc.so_reuseport", 0  # a stale process on the port would silently take connections
    # A burst waits its turn. By default gRPC cancels some of more than 1,000 streams that have not been taken up yet, and
    # Envoy, failing open, then serves those requests without us.
    yield "grpc.server.max_pending_requests", 1_000_000
    yield "grpc.server.max_pending_requests_hard_limit", 1_000_000
    yield "grpc.http2.max_ping_strikes", 0  # Envoy's keepalive pings would be answered with GOAWAY


def _heard_of(state: EngineState) -> bool:
    return state.error is not None or (state.stats is not None and state.served is not None)
