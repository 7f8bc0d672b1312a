"""The cases: the same load against each variant in turn, round by round."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from tests.bench.client import Load, Result
from tests.bench.engine import MODEL, NULL_MODEL, PODS
from tests.bench.processes import client, pods, post
from tests.bench.targets import NATIVE, NONE, PLAIN, STREAM, TWO, Books, Cost, Target, targets

REAL_PAGE = Path(__file__).parents[1] / "captures" / "vllm-0.32-metrics.txt"

_SETTLE = 1.0  # seconds: for the scraper to start, for memory to be taken
_LOG_SECONDS = 0.2  # until the access log of a round has been written and read: its cost belongs to the round
_LOAD_SHARE = 0.5  # of the closed loop's rate, for latency under load


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything.

    Attributes:
        rounds: of each variant in each case.
        long_rounds: likewise of streams of 1,000 tokens, where the difference looked for is smallest.
        seconds: of one round; streams that began in it are waited for.
        latencies: requests one after the other, to each of both.
        load_rounds: of latency under load, to each of both.
        idle_seconds: for each idle figure.
        held: streams at once, for memory.
    """

    rounds: int
    long_rounds: int
    seconds: float
    latencies: int
    load_rounds: int
    idle_seconds: float
    held: int


FULL = Plan(rounds=7, long_rounds=9, seconds=1.0, latencies=1000, load_rounds=7, idle_seconds=4.0, held=500)
QUICK = Plan(rounds=1, long_rounds=1, seconds=0.5, latencies=200, load_rounds=1, idle_seconds=1.0, held=200)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A load, and the variants it is put on besides plain Envoy."""

    name: str
    load: Load
    variants: tuple[str, ...]

    @property
    def per_event(self) -> bool:
        """Whether tokens are counted, not requests."""
        return (self.load.tokens or 0) > 1

    @property
    def long(self) -> bool:
        """Whether one answer takes longer than a round should."""
        return (self.load.tokens or 0) > 500


_BASE = Load(kind="closed-loop", connections=16)
_PACED = Load(kind="closed-loop", connections=PODS)  # with a token a tick each: 4,000 a second
_MOST = (NATIVE, STREAM, NONE)

JSON = Kind(name="JSON answer, 2 KB prompt", load=_BASE, variants=(*_MOST, TWO))
SHORT = Kind(name="128 tokens", load=msgspec.structs.replace(_PACED, tokens=128), variants=_MOST)
LONG = Kind(name="1,000 tokens", load=msgspec.structs.replace(_PACED, tokens=1000), variants=(*_MOST, TWO))
NULLS = Kind(
    name='1,000 tokens, "usage":null',
    load=msgspec.structs.replace(_PACED, tokens=1000, model=NULL_MODEL),
    variants=_MOST,
)
PROMPT = Kind(
    name="1 MB prompt, rewritten",
    load=msgspec.structs.replace(_BASE, connections=4, tokens=1, prompt=1_000_000, escaped=True),
    variants=(NATIVE, STREAM),
)
KINDS = (JSON, SHORT, LONG, NULLS, PROMPT)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one round used, and what was done with it.

    Attributes:
        cost: CPU seconds for the load alone.
        idle: CPU seconds a second that were subtracted: what the same processes used while others of the round had the load.
        messages: to the servers, in ext_proc.
    """

    cost: Cost
    idle: Cost
    requests: int
    events: int
    seconds: float
    messages: float


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The time in which one variant had the load.

    Attributes:
        seconds: its length, until the access log was written.
        costs: CPU seconds of every variant of the case in that time.
    """

    seconds: float
    costs: dict[str, Cost]
    result: Result
    messages: float


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """The rounds of one load, by variant and in their order; plain Envoy's are the first."""

    name: str
    per_event: bool
    rounds: dict[str, list[Usage]]

    def each(self, variant: str, part: Callable[[Cost], float]) -> list[float]:
        """CPU seconds per request or token, round by round."""
        return [
            part(usage.cost) / max(1, usage.events if self.per_event else usage.requests)
            for usage in self.rounds[variant]
        ]

    def median(self, variant: str, part: Callable[[Cost], float]) -> float:
        """CPU seconds per request or token."""
        return statistics.median(self.each(variant, part))

    def ratios(self, variant: str) -> list[float]:
        """(Envoy + server) / plain Envoy, each within one round: what disturbs a round disturbs both."""
        ours = self.each(variant, lambda cost: cost.envoy + cost.server)
        plain = self.each(PLAIN, lambda cost: cost.envoy)
        return [one / other for one, other in zip(ours, plain, strict=True)]

    def rate(self, variant: str) -> float:
        """Requests a second."""
        return statistics.median(usage.requests / usage.seconds for usage in self.rounds[variant])


class Pair(msgspec.Struct, frozen=True):
    """Seconds of each request, sorted: by plain Envoy, and by the native lane."""

    plain: list[float]
    ours: list[float]

    def at(self, share: float) -> tuple[float, float]:
        """The percentile, of both."""
        plain, ours = (each[int(share * (len(each) - 1))] for each in (self.plain, self.ours))
        return plain, ours


class Measured(msgspec.Struct, kw_only=True):
    """Everything that processes told.

    Attributes:
        idle: CPU seconds a second without load, by variant: 8 pods scraped at 200 ms, the bench's small page.
        idle_real_page: the same of the servers with vLLM's page of 60 KB.
        cases: by what they are about.
        sequential: latency of one request at a time.
        rate: requests a second under which `loaded` was taken: half of what the native lane does at most.
        loaded: latency at that rate, by round.
        held: bytes for each stream held open, by variant.
        books: of each variant with servers.
        failures: answers that were not whole, of all.
        failed: what the first failure was.
    """

    idle: dict[str, Cost] = {}
    idle_real_page: dict[str, Cost] = {}
    cases: list[Case] = []
    sequential: Pair = Pair([0.0], [0.0])
    rate: float = 0.0
    loaded: list[Pair] = []
    held: dict[str, Cost] = {}
    books: list[Books] = []
    failures: int = 0
    failed: str = ""

    def case(self, kind: Kind) -> Case:
        """The rounds of a kind."""
        return next(case for case in self.cases if case.name == kind.name)

    @property
    def right(self) -> bool:
        """Whether every answer was whole and is in the books of the servers."""
        return not self.failures and all(books.right for books in self.books)


class Bench:
    """Runs the cases one after the other over one set of processes.

    Args:
        plan: how much of everything.
        say: told what comes next.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.measured = Measured()
        self._plan = plan
        self._say = say
        self._perform: Callable[[Load], Awaitable[Result]]
        self._targets: dict[str, Target]

    async def run(self, directory: Path) -> Measured:
        """All of them."""
        async with contextlib.AsyncExitStack() as stack:
            ports = await stack.enter_async_context(pods())
            endpoints = [
                {"name": f"pod-{number}", "address": f"127.0.0.1:{port}", "models": [MODEL, NULL_MODEL]}
                for number, port in enumerate(ports)
            ]
            found = await stack.enter_async_context(targets(directory, endpoints))
            self._targets = {target.variant: target for target in found}
            self._perform = await stack.enter_async_context(client())
            await self._warm_up()
            for variant in (NATIVE, STREAM):
                await self._memory(self._targets[variant])
            await self._idle(f"http://127.0.0.1:{ports[0]}/bench/page")
            for kind in KINDS:
                await self._case(kind)
            await self._latency()
            self._say("books")
            self.measured.books = [await target.books() for target in found if target.variant != PLAIN]
        return self.measured

    async def _warm_up(self) -> None:
        self._say("warm-up")
        for target in self._targets.values():
            for tokens in (None, 16):
                load = Load(kind="closed-loop", connections=32, seconds=0.4, tokens=tokens)
                await self._load(load, target)

    async def _case(self, kind: Kind) -> None:
        taking_part = [self._targets[variant] for variant in (PLAIN, *kind.variants)]
        case = Case(
            name=kind.name, per_event=kind.per_event, rounds={each.variant: [] for each in taking_part}
        )
        self.measured.cases.append(case)
        load = msgspec.structs.replace(kind.load, seconds=self._plan.seconds)
        count = self._plan.long_rounds if kind.long else self._plan.rounds
        for number in range(count):
            self._say(f"{kind.name}: round {number + 1} of {count}")
            # Another one begins each time, so that none is always the farthest from plain Envoy.
            first = number % len(taking_part)
            windows = {
                target.variant: await self._window(load, target, taking_part)
                for target in taking_part[first:] + taking_part[:first]
            }
            for variant in windows:
                case.rounds[variant].append(_usage(variant, windows))

    async def _window(self, load: Load, target: Target, watched: Sequence[Target]) -> Window:
        loop = asyncio.get_running_loop()
        messages = await target.messages()
        began, before = loop.time(), [each.cpu() for each in watched]
        result = await self._load(load, target)
        if target.variant != PLAIN:
            await asyncio.sleep(_LOG_SECONDS)
        seconds, after = loop.time() - began, [each.cpu() for each in watched]
        return Window(
            seconds=seconds,
            costs={each.variant: now - then for each, then, now in zip(watched, before, after, strict=True)},
            result=result,
            messages=await target.messages() - messages,
        )

    async def _load(self, load: Load, target: Target) -> Result:
        result = await self._perform(msgspec.structs.replace(load, ports=(target.port,)))
        target.sent += result.requests
        self._note_failures(result)
        return result

    def _note_failures(self, result: Result) -> None:
        self.measured.failures += result.failures
        self.measured.failed = self.measured.failed or result.failed

    async def _latency(self) -> None:
        self._say("latency, one request at a time")
        both = self._targets[PLAIN], self._targets[NATIVE]
        ports = tuple(target.port for target in both)
        result = await self._perform(Load(kind="alternate", ports=ports, requests=self._plan.latencies))
        self._note_failures(result)
        for target, latencies in zip(both, result.latencies, strict=True):
            target.sent += len(latencies)
        self.measured.sequential = Pair(*map(sorted, result.latencies))
        self.measured.rate = rate = _LOAD_SHARE * self.measured.case(JSON).rate(NATIVE)
        for number in range(self._plan.load_rounds):
            self._say(f"latency under load: round {number + 1} of {self._plan.load_rounds}")
            load = Load(kind="open-loop", connections=32, rate=rate, seed=number, seconds=self._plan.seconds)
            results = [await self._load(load, target) for target in both]
            self.measured.loaded.append(Pair(*(sorted(each.latencies[0]) for each in results)))

    async def _idle(self, page: str) -> None:
        self._say("idle")
        self.measured.idle = await self._idle_shares()
        small = None
        with contextlib.suppress(OSError):
            small = REAL_PAGE.read_bytes()
        if small is not None:
            await post(page, small)
            await asyncio.sleep(_SETTLE)
            self.measured.idle_real_page = await self._idle_shares()
            await post(page, b"")
            await asyncio.sleep(_SETTLE)

    async def _idle_shares(self) -> dict[str, Cost]:
        """Of all at the same time."""
        loop, found = asyncio.get_running_loop(), list(self._targets.values())
        before = [target.cpu() for target in found]
        began = loop.time()
        await asyncio.sleep(self._plan.idle_seconds)
        after = [target.cpu() for target in found]
        seconds = loop.time() - began
        return {
            target.variant: (now - then).times(1 / seconds)
            for target, then, now in zip(found, before, after, strict=True)
        }

    async def _memory(self, target: Target) -> None:
        """First of all, so that no memory freed by other loads is used again."""
        self._say(f"memory: {target.variant}")
        held, before = self._plan.held, target.resident()
        await self._perform(Load(kind="hold", ports=(target.port,), connections=held, tokens=0))
        await asyncio.sleep(_SETTLE)
        self.measured.held[target.variant] = (target.resident() - before).times(1 / held)
        await self._perform(Load(kind="release"))
        await asyncio.sleep(_SETTLE)


def _usage(variant: str, windows: Mapping[str, Window]) -> Usage:
    """What a variant used for its load.

    Scraping goes on all the time, and for 4,000 tokens a second it is not little. What it costs is taken from the other
    windows of the same round: there the variant is idle, and the machine is as fast and as busy as it was for the load.
    """
    own = windows[variant]
    others = [window for other, window in windows.items() if other != variant]
    idle = Cost(
        sum(window.costs[variant].envoy for window in others),
        sum(window.costs[variant].server for window in others),
    ).times(1 / sum(window.seconds for window in others))
    return Usage(
        cost=own.costs[variant] - idle.times(own.seconds),
        idle=idle,
        requests=own.result.requests,
        events=max(0, own.result.events - 2 * own.result.requests),
        seconds=own.result.seconds,
        messages=own.messages,
    )


def messages_per_event(rounds: Sequence[Usage]) -> float:
    """Well below 1 if Envoy, hurried, reads several events at once: then a token is cheaper than in life."""
    return statistics.median(each.messages / max(1, each.events) for each in rounds)
