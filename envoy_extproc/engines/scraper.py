"""Asks every endpoint's engine how it is, several times a second, and keeps the last answers for whoever chooses.

Each endpoint has a task of its own that sleeps to its next beat, asks, and records; so at most one scrape of an
endpoint is under way and its connection is kept alive. Beats start at a random phase and carry jitter, so that a
fleet's scrapes spread over the interval. Everything runs in one event loop: readers look at `Scraper.states` without
a lock and see whole, frozen values.

What a failed scrape says of an endpoint:

    refused connection              unreachable at once: nobody listens
    no connection, or no answer     unreachable when it happens twice in a row; once can be a stall
    an answer that is no page       a failure, but somebody answers: reachable
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random
from types import MappingProxyType

import aiohttp
import msgspec
import structlog

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.engines.dialects import DIALECTS, Dialect, PageError, Reading, read

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
        interval: seconds between two scrapes of one endpoint. A decision wants queue lengths younger than the time
            in which they change, about a scheduler step or ten; in-flight counts bridge what is younger.
        jitter: share of the interval by which each beat varies, so that fleets and replicas do not fall into step.
        timeout: seconds for one scrape with its connection. A vLLM front end under load can stall for some hundred
            milliseconds; twice this is how long a pod that is gone without a word stays in choice.
        max_bytes: largest page read. vLLM's has 60 KB; one that has seen many LoRA adapters has several times that.
        concurrency: scrapes under way at once. A scrape that waits costs a socket, not CPU, so the bound is above
            what a healthy fleet ever reaches and only holds back a large one that has gone silent.
    """

    interval: float = 0.2
    jitter: float = 0.1
    timeout: float = 1.0
    max_bytes: int = 4 * 1024 * 1024
    concurrency: int = 256


class _Contact(enum.Enum):
    """How far a failed scrape came."""

    REFUSED = enum.auto()
    SILENT = enum.auto()
    ANSWERED = enum.auto()


class _AnswerError(Exception):
    """The endpoint answered with something that is no page."""


class _Target:
    """An endpoint that is being followed."""

    __slots__ = ("defect", "endpoint", "reading", "silences", "state", "task", "url")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.url = f"http://{endpoint.address}/metrics"
        self.state = EngineState()
        self.reading: Reading | None = None
        self.silences = 0
        self.defect: str | None = None
        self.task: asyncio.Task[None] | None = None

    def is_of(self, endpoint: Endpoint) -> bool:
        """Whether what is known here was said by this endpoint, not by an earlier owner of its address."""
        return (self.endpoint.name, self.endpoint.engine) == (endpoint.name, endpoint.engine)


class Scraper:
    """Follows the endpoints of the current snapshot.

    Args:
        rng: phases and jitter.
        settings: how often and how patiently.
        session: to ask with; None makes one that lives as long as `run`.
        clock: monotonic seconds; the same clock as the reader's `now` in `fresh`.
        on_failure: told of each failed scrape.
    """

    def __init__(
        self,
        rng: Random,
        settings: ScrapeSettings | None = None,
        *,
        session: aiohttp.ClientSession | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_failure: OnFailure | None = None,
    ) -> None:
        self._rng = rng
        self._settings = settings or ScrapeSettings()
        self._session = session
        self._clock = clock
        self._on_failure = on_failure
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
            if targets.get(address) is not target and target.task is not None:
                target.task.cancel()
        self._targets = targets
        for address in self._states.keys() - targets.keys():
            del self._states[address]
        self._states.update((address, target.state) for address, target in targets.items())
        self._changed.set()

    async def run(self) -> None:
        """Scrapes until it is cancelled; a failed scrape is a state, never an exception."""
        async with self._client() as session, asyncio.TaskGroup() as group:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for target in self._targets.values():
                    dialect = DIALECTS.get(target.endpoint.engine)
                    if target.task is None and dialect is not None:
                        target.task = group.create_task(self._follow(session, target, dialect))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._session is not None:
            yield self._session
            return
        # No limit of its own: `concurrency` is the limit. Kept alive past the next beat, however rare beats are.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2 * self._settings.interval + 15)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield session

    def _target(self, endpoint: Endpoint) -> _Target:
        known = self._targets.get(endpoint.address)
        if known is not None and known.is_of(endpoint):
            known.endpoint = endpoint
            return known
        target = _Target(endpoint)
        if endpoint.engine not in DIALECTS:
            target.state = EngineState(error=f"no dialect for the engine {endpoint.engine!r}")
            log.warning("engine_unknown", endpoint=endpoint.name, engine=endpoint.engine)
        return target

    async def _follow(self, session: aiohttp.ClientSession, target: _Target, dialect: Dialect) -> None:
        interval = self._settings.interval
        due = self._clock() + self._rng.uniform(0, interval)
        while self._is_followed(target):
            await asyncio.sleep(due - self._clock())
            async with self._slots:
                await self._scrape(session, target, dialect)
            # A scrape that took longer than the interval skips the beats it missed: a slow engine is not hurried.
            missed = max(0.0, self._clock() - due) // interval
            due += interval * (1 + missed + self._rng.uniform(-self._settings.jitter, self._settings.jitter))

    async def _scrape(self, session: aiohttp.ClientSession, target: _Target, dialect: Dialect) -> None:
        try:
            await self._ask(session, target, dialect)
        except Exception as error:
            # An outermost edge: a defect, here or in the hook, must not end the scraping of a fleet.
            if target.defect != repr(error):  # once, not several times a second
                target.defect = repr(error)
                log.exception("scrape_defect", endpoint=target.endpoint.name)

    async def _ask(self, session: aiohttp.ClientSession, target: _Target, dialect: Dialect) -> None:
        try:
            body = await self._fetch(session, target.url)
            reading = read(dialect, body, self._clock(), target.reading)
        except (aiohttp.ClientError, OSError, _AnswerError, PageError) as error:
            self._failed(target, _contact(error), self._reason(error))
        else:
            target.reading = reading
            target.silences = 0
            self._record(target, EngineState(stats=reading.stats))

    async def _fetch(self, session: aiohttp.ClientSession, url: str) -> bytes:
        async with session.get(
            url, headers=_HEADERS, timeout=self._patience, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise _AnswerError(f"HTTP status {response.status}")
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > self._settings.max_bytes:
                    raise _AnswerError(f"a page of more than {self._settings.max_bytes} bytes")
            return bytes(body)

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
        self._record(
            target,
            EngineState(stats=before.stats, failures=before.failures + 1, error=reason, reachable=reachable),
        )
        if self._on_failure is not None and self._is_followed(target):
            self._on_failure(target.endpoint, reason)

    def _record(self, target: _Target, state: EngineState) -> None:
        if not self._is_followed(target):
            return
        before, target.state = target.state, state
        self._states[target.endpoint.address] = state
        if state.reachable == before.reachable:
            return
        facts = {"endpoint": target.endpoint.name, "address": target.endpoint.address}
        if state.reachable:
            log.info("endpoint_reachable", **facts)
        else:
            log.warning("endpoint_unreachable", **facts, reason=state.error)

    def _is_followed(self, target: _Target) -> bool:
        return self._targets.get(target.endpoint.address) is target


def fresh(state: EngineState | None, now: float, max_age: float) -> EngineStats | None:
    """The last good scrape if it is at most `max_age` seconds old at monotonic second `now`, else None."""
    if state is None or state.stats is None or now - state.stats.at > max_age:
        return None
    return state.stats


def _contact(error: Exception) -> _Contact:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
        return _Contact.REFUSED
    # TimeoutError, ClientOSError and a plain OSError are all OSError; a peer that hangs up is ClientConnectionError.
    return (
        _Contact.SILENT if isinstance(error, OSError | aiohttp.ClientConnectionError) else _Contact.ANSWERED
    )
