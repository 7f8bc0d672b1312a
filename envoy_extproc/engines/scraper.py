"""Asks every endpoint's engine how it is, several times a second while it has work, and keeps the last answers.

Each endpoint has a task of its own that sleeps to its next beat, asks, and records; so at most one scrape of an
endpoint is under way and its connection is kept alive. Beats start at a random phase and carry jitter, so that a
fleet's scrapes spread over the interval. Everything runs in one event loop: readers look at `Scraper.states` without
a lock and see whole, frozen values.

An endpoint has work while its engine runs or queues a request, while we have one under way on it, or if it was
chosen since the last scrape. Without work the interval doubles from scrape to scrape, up to `idle_interval`; the
first choice of such an endpoint pulls its next beat forward.

What a failed scrape says of an endpoint:

    refused connection              unreachable at once: nobody listens
    no connection, or no answer     unreachable when it happens twice in a row; once can be a stall
    an answer that is no page       a failure, but somebody answers: reachable

Another task of each endpoint asks for the list of models, rarely, and again when the endpoint comes back.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random
from types import MappingProxyType

import aiohttp
import msgspec
import structlog

from envoy_extproc.endpoints import Endpoint, EngineState, Snapshot
from envoy_extproc.engines.dialects import DIALECTS, Dialect
from envoy_extproc.engines.pace import Alarm, has_work, paced
from envoy_extproc.engines.reading import PageError, Reading, read
from envoy_extproc.engines.served import served_models

log = structlog.get_logger()

UNREACHABLE_AFTER = 2
"""Connection failures in a row that make an endpoint unreachable: one can be a stall of a busy event loop."""

_HEADERS = {
    "Accept-Encoding": "identity"
}  # to unpack a page costs more than to receive it in a local network

OnFailure = Callable[[Endpoint, str], None]
"""Called with the endpoint and the reason of each failed scrape."""


class ScrapeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how patiently engines are asked.

    Attributes:
        interval: seconds between two scrapes of an endpoint that has work. A decision wants queue lengths younger
            than the time in which they change, about a scheduler step or ten; in-flight counts bridge what is younger.
        idle_interval: the most that grows to for an endpoint without work, or out of reach.
        models_interval: seconds between two questions for the list of models.
        jitter: share of the interval by which each beat may come early, so that fleets and replicas do not fall
            into step.
        timeout: seconds for one scrape with its connection. A vLLM front end under load can stall for some hundred
            milliseconds; twice this is how long a pod that is gone without a word stays in choice.
        max_bytes: largest page read. vLLM's has 60 KB; one that has seen many LoRA adapters has several times that.
        concurrency: scrapes under way at once. A scrape that waits costs a socket, not CPU, so the bound is above
            what a healthy fleet ever reaches and only holds back a large one that has gone silent.
    """

    interval: float = 0.2
    idle_interval: float = 2.0
    models_interval: float = 30.0
    jitter: float = 0.1
    timeout: float = 1.0
    max_bytes: int = 4 * 1024 * 1024
    max_models_bytes: int = 1024 * 1024
    concurrency: int = 256


class _Contact(enum.Enum):
    """How far a failed scrape came."""

    REFUSED = enum.auto()
    SILENT = enum.auto()
    ANSWERED = enum.auto()


class _AnswerError(Exception):
    """The endpoint answered with something that is not what was asked for."""

    def __init__(self, reason: str, status: int = 200) -> None:
        super().__init__(reason)
        self.status = status


class _Target:
    """An endpoint that is being followed.

    Attributes:
        interval: seconds from the last scrape to the next.
        chosen: whether it was chosen since the last scrape.
        due: when the next scrape is to be, monotonic seconds.
    """

    __slots__ = (
        "alarm",
        "chosen",
        "defect",
        "dialect",
        "due",
        "endpoint",
        "interval",
        "models_alarm",
        "models_url",
        "reading",
        "silences",
        "state",
        "tasks",
        "url",
    )

    def __init__(
        self, endpoint: Endpoint, dialect: Dialect | None, interval: float, alarm: Callable[[], Alarm]
    ) -> None:
        self.endpoint = endpoint
        self.dialect = dialect
        host, _, port = endpoint.address.rpartition(":")
        if dialect is not None:
            self.url = f"http://{host}:{endpoint.metrics_port or dialect.port or port}{dialect.path}"
            self.models_url = f"http://{endpoint.address}{dialect.models_path}"
        self.state = EngineState()
        self.reading: Reading | None = None
        self.silences = 0
        self.defect: str | None = None
        self.interval = interval
        self.chosen = False
        self.due = 0.0
        self.alarm = alarm()
        self.models_alarm = alarm()
        self.tasks: list[asyncio.Task[None]] = []

    def is_of(self, endpoint: Endpoint) -> bool:
        """Whether what is known here was said by this endpoint, not by an earlier owner of its address."""
        known = self.endpoint
        return (known.name, known.engine, known.metrics_port) == (
            endpoint.name,
            endpoint.engine,
            endpoint.metrics_port,
        )


class Scraper:
    """Follows the endpoints of the current snapshot.

    Args:
        rng: phases and jitter.
        settings: how often and how patiently.
        dialects: how each engine is read, by the name that `Endpoint.engine` gives.
        session: to ask with; None makes one that lives as long as `run`.
        clock: monotonic seconds, for `EngineStats.at`; whoever asks how old it is has the same clock.
        busy: whether a request of ours is under way on an address.
        on_failure: told of each failed scrape.
        alarm: makes what each task sleeps by; its seconds are the clock's.
    """

    def __init__(
        self,
        rng: Random,
        settings: ScrapeSettings | None = None,
        *,
        dialects: Mapping[str, Dialect] = DIALECTS,
        session: aiohttp.ClientSession | None = None,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[str], bool] = lambda _: False,
        on_failure: OnFailure | None = None,
        alarm: Callable[[], Alarm] = Alarm,
    ) -> None:
        self._rng = rng
        self._settings = settings or ScrapeSettings()
        self._dialects = dialects
        self._session = session
        self._clock = clock
        self._busy = busy
        self._on_failure = on_failure
        self._alarm = alarm
        self._targets: dict[str, _Target] = {}
        self._states: dict[str, EngineState] = {}
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(self._settings.concurrency)
        self._patience = aiohttp.ClientTimeout(total=self._settings.timeout)

    @property
    def states(self) -> Mapping[str, EngineState]:
        """What is known of each endpoint of the snapshot, by address; a live view."""
        return MappingProxyType(self._states)

    def update(self, snapshot: Snapshot) -> None:
        """Follows the endpoints of `snapshot` from now on, and forgets those that left."""
        targets = {endpoint.address: self._target(endpoint) for endpoint in snapshot.endpoints}
        for address, target in self._targets.items():
            if targets.get(address) is not target:
                for task in target.tasks:
                    task.cancel()
        self._targets = targets
        for address in self._states.keys() - targets.keys():
            del self._states[address]
        self._states.update((address, target.state) for address, target in targets.items())
        self._changed.set()

    def hurry(self, address: str) -> None:
        """An endpoint was chosen: it has work now. Costs nothing to speak of, for it is called for every request."""
        target = self._targets.get(address)
        if target is not None:
            target.chosen = True
            if target.interval > self._settings.interval:
                self._pull_forward(target)

    async def run(self) -> None:
        """Scrapes until it is cancelled; a failed scrape is a state, never an exception."""
        async with self._client() as session, asyncio.TaskGroup() as group:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for target in self._targets.values():
                    if target.tasks or target.dialect is None:
                        continue
                    if target.dialect.sources:
                        target.tasks.append(group.create_task(self._follow(session, target, target.dialect)))
                    if target.dialect.models_path is not None:
                        target.tasks.append(group.create_task(self._follow_models(session, target)))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._session is not None:
            yield self._session
            return
        # No limit of its own: `concurrency` is the limit. Kept alive past the next beat, however rare beats are.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2 * self._longest() + 15)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield session

    def _longest(self) -> float:
        return max(self._settings.interval, self._settings.idle_interval)

    def _target(self, endpoint: Endpoint) -> _Target:
        known = self._targets.get(endpoint.address)
        if known is not None and known.is_of(endpoint):
            known.endpoint = endpoint
            return known
        dialect = self._dialects.get(endpoint.engine)
        target = _Target(endpoint, dialect, self._settings.interval, self._alarm)
        if target.dialect is None:
            target.state = EngineState(error=f"no dialect for the engine {endpoint.engine!r}")
            log.warning("engine_unknown", endpoint=endpoint.name, engine=endpoint.engine)
        return target

    async def _follow(self, session: aiohttp.ClientSession, target: _Target, dialect: Dialect) -> None:
        target.due = self._clock() + self._rng.uniform(0, target.interval)
        while self._is_followed(target):
            await target.alarm.sleep(target.due - self._clock())
            await self._guarded(target, lambda: self._ask(session, target, dialect))
            # A scrape that took longer than the interval skips the beats it missed: a slow engine is not hurried.
            missed = max(0.0, self._clock() - target.due) // target.interval
            target.due += target.interval * (1 + missed - self._rng.uniform(0, self._settings.jitter))

    def _pull_forward(self, target: _Target) -> None:
        """The next beat comes a short interval from now, by when the engine knows of the request."""
        target.interval = self._settings.interval
        target.due = min(target.due, self._clock() + target.interval)
        target.alarm.hasten(target.due - self._clock())

    def _pace(self, target: _Target, *, busy: bool) -> None:
        target.chosen = False
        settings = self._settings
        target.interval = paced(
            target.interval, busy=busy, quick=settings.interval, idle=settings.idle_interval
        )

    async def _guarded(self, target: _Target, ask: Callable[[], Awaitable[None]]) -> None:
        try:
            async with self._slots:
                await ask()
        except Exception as error:
            # An outermost edge: a defect, here or in the hook, must not end the scraping of a fleet.
            if target.defect != repr(error):  # once, not several times a second
                target.defect = repr(error)
                log.exception("scrape_defect", endpoint=target.endpoint.name)

    async def _ask(self, session: aiohttp.ClientSession, target: _Target, dialect: Dialect) -> None:
        try:
            body = await self._fetch(session, target.url, self._settings.max_bytes)
            reading = read(dialect, body, self._clock(), target.reading)
        except (aiohttp.ClientError, OSError, _AnswerError, PageError) as error:
            self._failed(target, _contact(error), self._reason(error))
        else:
            target.reading = reading
            target.silences = 0
            self._pace(target, busy=self._in_use(target) or has_work(reading.stats))
            served = target.state.served
            self._record(target, EngineState(stats=reading.stats, interval=target.interval, served=served))

    def _in_use(self, target: _Target) -> bool:
        return target.chosen or self._busy(target.endpoint.address)

    async def _fetch(self, session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
        async with session.get(
            url, headers=_HEADERS, timeout=self._patience, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise _AnswerError(f"HTTP status {response.status}", response.status)
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > max_bytes:
                    raise _AnswerError(f"a page of more than {max_bytes} bytes")
            return bytes(body)

    async def _follow_models(self, session: aiohttp.ClientSession, target: _Target) -> None:
        seconds = self._rng.uniform(0, self._settings.interval)
        while self._is_followed(target):
            await target.models_alarm.sleep(seconds)
            if target.state.reachable:
                await self._guarded(target, lambda: self._ask_models(session, target))
            seconds = self._settings.models_interval * (1 - self._rng.uniform(0, self._settings.jitter))

    async def _ask_models(self, session: aiohttp.ClientSession, target: _Target) -> None:
        """Whoever does not answer, or not now, keeps the list that it had; any other answer counts."""
        try:
            body = await self._fetch(session, target.models_url, self._settings.max_models_bytes)
        except _AnswerError as error:
            if error.status >= 500:
                return
            served = None
        except (aiohttp.ClientError, OSError):
            return
        else:
            served = served_models(body)
        self._record(target, msgspec.structs.replace(target.state, served=served))

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._settings.timeout:g} s"
        return str(error) or type(error).__name__

    def _failed(self, target: _Target, contact: _Contact, reason: str) -> None:
        target.silences = 0 if contact is _Contact.ANSWERED else target.silences + 1
        before = target.state
        reachable = contact is _Contact.ANSWERED or (
            before.reachable and contact is _Contact.SILENT and target.silences < UNREACHABLE_AFTER
        )
        # The second silence is to come soon; who is out of reach is asked rarely even if a request hangs on it.
        first_silence = reachable and contact is _Contact.SILENT
        self._pace(target, busy=first_silence or (reachable and self._in_use(target)))
        self._record(
            target,
            msgspec.structs.replace(before, failures=before.failures + 1, error=reason, reachable=reachable),
        )
        if self._on_failure is not None and self._is_followed(target):
            self._on_failure(target.endpoint, reason)

    def _record(self, target: _Target, state: EngineState) -> None:
        if not self._is_followed(target):
            return
        before, target.state = target.state, state
        self._states[target.endpoint.address] = state
        is_new = state.served is None and before.stats is None and state.stats is not None
        if is_new or state.reachable > before.reachable:
            target.models_alarm.hasten(self._rng.uniform(0, self._settings.interval))
        if state.reachable == before.reachable:
            return
        facts = {"endpoint": target.endpoint.name, "address": target.endpoint.address}
        if state.reachable:
            log.info("endpoint_reachable", **facts)
        else:
            log.warning("endpoint_unreachable", **facts, reason=state.error)

    def _is_followed(self, target: _Target) -> bool:
        return self._targets.get(target.endpoint.address) is target


def _contact(error: Exception) -> _Contact:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
        return _Contact.REFUSED
    # TimeoutError, ClientOSError and a plain OSError are all OSError; a peer that hangs up is ClientConnectionError.
    return (
        _Contact.SILENT if isinstance(error, OSError | aiohttp.ClientConnectionError) else _Contact.ANSWERED
    )
