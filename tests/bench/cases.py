"""The cases: the same load against each variant in turn, round by round."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.bench.client import Load
from tests.bench.engine import NULL_MODEL, PODS
from tests.bench.processes import client, pods, post
from tests.bench.rounds import Case, Kind, Plan, Rounds
from tests.bench.targets import NATIVE, NONE, PLAIN, STREAM, TWO, Books, Cost, Target, endpoints, targets

REAL_PAGE = Path(__file__).parents[1] / "captures" / "vllm-0.32-metrics.txt"

_SETTLE = 1.0  # seconds: for the scraper to start, for memory to be taken
_LOAD_SHARE = 0.5  # of the closed loop's rate, for latency under load


FULL = Plan(rounds=7, long_rounds=9, seconds=1.0, latencies=1000, load_rounds=7, idle_seconds=4.0, held=500)
QUICK = Plan(rounds=1, long_rounds=1, seconds=0.5, latencies=200, load_rounds=1, idle_seconds=1.0, held=200)


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
        self._rounds: Rounds
        self._targets: dict[str, Target]

    async def run(self, directory: Path) -> Measured:
        """All of them."""
        async with contextlib.AsyncExitStack() as stack:
            ports = await stack.enter_async_context(pods())
            found = await stack.enter_async_context(targets(directory, endpoints(ports)))
            self._targets = {target.variant: target for target in found}
            self._rounds = Rounds(await stack.enter_async_context(client()), self._plan, self._say)
            await self._rounds.warm_up(found)
            for variant in (NATIVE, STREAM):
                await self._memory(self._targets[variant])
            await self._idle(f"http://127.0.0.1:{ports[0]}/bench/page")
            for kind in KINDS:
                taking_part = [self._targets[variant] for variant in (PLAIN, *kind.variants)]
                self.measured.cases.append(await self._rounds.case(kind, taking_part))
            await self._latency()
            self._say("books")
            self.measured.failures, self.measured.failed = self._rounds.failures, self._rounds.failed
            self.measured.books = [await target.books() for target in found if target.variant != PLAIN]
        return self.measured

    async def _latency(self) -> None:
        self._say("latency, one request at a time")
        both = self._targets[PLAIN], self._targets[NATIVE]
        ports = tuple(target.port for target in both)
        result = await self._rounds.perform(
            Load(kind="alternate", ports=ports, requests=self._plan.latencies)
        )
        for target, latencies in zip(both, result.latencies, strict=True):
            target.sent += len(latencies)
        self.measured.sequential = Pair(*map(sorted, result.latencies))
        self.measured.rate = rate = _LOAD_SHARE * self.measured.case(JSON).rate(NATIVE)
        for number in range(self._plan.load_rounds):
            self._say(f"latency under load: round {number + 1} of {self._plan.load_rounds}")
            load = Load(kind="open-loop", connections=32, rate=rate, seed=number, seconds=self._plan.seconds)
            results = [await self._rounds.load(load, target) for target in both]
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
        await self._rounds.perform(Load(kind="hold", ports=(target.port,), connections=held, tokens=0))
        await asyncio.sleep(_SETTLE)
        self.measured.held[target.variant] = (target.resident() - before).times(1 / held)
        await self._rounds.perform(Load(kind="release"))
        await asyncio.sleep(_SETTLE)
