"""The cases: the same load against plain Envoy and against Envoy with this server, in turn, round by round."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from envoy_extproc.simulation.stack import Stack
from tests.bench.client import Load, Result
from tests.bench.engine import MODEL
from tests.bench.processes import (
    Process,
    client,
    counters,
    cpu,
    plain_envoy,
    pods,
    post,
    resident_bytes,
)

REAL_PAGE = Path(__file__).parents[1] / "captures" / "vllm-0.32-metrics.txt"

_MESSAGES = "http.ingress.ext_proc.envoy_extproc.stream_msgs_sent"
_SUCCESS = 'envoy_extproc_requests_total{model="tiny",outcome="success"}'
_REPORTED = 'envoy_extproc_usage_total{usage_source="reported"}'
_SETTLE = 1.0  # seconds: for the scraper to start, for memory to be taken


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything.

    Attributes:
        rounds: against each of both; odd, for the median.
        seconds: of one round; streams that began in it are waited for.
        latencies: requests one after the other, to each of both.
        idle_seconds: for each idle figure.
        held: streams at once, for memory.
    """

    rounds: int
    seconds: float
    latencies: int
    idle_seconds: float
    held: int


FULL = Plan(rounds=3, seconds=2.5, latencies=600, idle_seconds=4.0, held=500)
QUICK = Plan(rounds=1, seconds=1.0, latencies=200, idle_seconds=1.5, held=500)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one round used: seconds of CPU, and what was done with them."""

    envoy: float
    server: float
    requests: int
    events: int
    seconds: float
    messages: float


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Both kinds of rounds of one load, in their order. `per_event`: tokens are counted, not requests."""

    name: str
    per_event: bool
    plain: tuple[Usage, ...]
    ours: tuple[Usage, ...]

    def units(self, usage: Usage) -> int:
        """What the costs are divided by."""
        return usage.events if self.per_event else usage.requests

    def median(self, part: Callable[[Usage], float], rounds: tuple[Usage, ...]) -> float:
        """CPU seconds per request or token."""
        return statistics.median(part(usage) / self.units(usage) for usage in rounds)

    @property
    def ratio(self) -> float:
        """(Envoy + server) / plain Envoy: of each pair of rounds, then the median."""
        return statistics.median(
            ((ours.envoy + ours.server) / self.units(ours)) / (plain.envoy / self.units(plain))
            for plain, ours in zip(self.plain, self.ours, strict=True)
        )

    @property
    def spread(self) -> float:
        """Of the server's figure over the rounds: (highest - lowest) / median."""
        each = [usage.server / self.units(usage) for usage in self.ours]
        return (max(each) - min(each)) / statistics.median(each)


class Measured(msgspec.Struct, kw_only=True):
    """Everything that processes told.

    Attributes:
        idle: CPU seconds per second of the server, 8 pods scraped at 200 ms, the bench's small page.
        idle_real_page: the same with vLLM's page of 60 KB.
        cases: by what they are about.
        latencies: sorted seconds of a request, plain and ours.
        held_server: bytes of the server for each stream held.
        held_envoy: likewise of Envoy.
        sent: requests the client had whole answers to, through Envoy with us.
        failures: answers that were not whole, of all.
        failed: what the first failure was.
        served: exchanges the server says it has seen to a good end; less than `sent` if Envoy went past it.
        reported: of them, those with the engine's own usage.
    """

    idle: float = 0.0
    idle_real_page: float = 0.0
    cases: list[Case] = []
    latencies: tuple[list[float], list[float]] = ([], [])
    held_server: float = 0.0
    held_envoy: float = 0.0
    sent: int = 0
    failures: int = 0
    failed: str = ""
    served: float = 0.0
    reported: float = 0.0


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
        self._stack: Stack
        self._plain: Process
        self._plain_port = 0

    async def run(self, directory: Path) -> Measured:
        """All of them."""
        async with contextlib.AsyncExitStack() as stack:
            ports = await stack.enter_async_context(pods())
            endpoints = [
                {"name": f"pod-{number}", "address": f"127.0.0.1:{port}", "models": [MODEL]}
                for number, port in enumerate(ports)
            ]
            self._stack = await stack.enter_async_context(Stack(directory, endpoints))
            plain = await stack.enter_async_context(plain_envoy(directory, _text(directory / "envoy.yaml")))
            self._plain, self._plain_port = plain
            self._perform = await stack.enter_async_context(client())
            await self._warm_up()
            await self._memory()
            await self._idle(f"http://127.0.0.1:{ports[0]}/bench/page")
            await self._loads()
            await self._latency()
            await self._account()
        return self.measured

    async def _warm_up(self) -> None:
        self._say("warm-up")
        for port in (self._plain_port, self._stack.port):
            for tokens in (None, 16):
                await self._load(
                    Load(kind="closed-loop", ports=(port,), connections=32, seconds=0.4, tokens=tokens)
                )

    async def _loads(self) -> None:
        base = Load(kind="closed-loop", seconds=self._plan.seconds)
        loads = (
            ("non-stream JSON, 2 KB prompt", msgspec.structs.replace(base, connections=16)),
            ("stream of 128 tokens", msgspec.structs.replace(base, connections=16, tokens=128)),
            ("stream of 1,000 tokens", msgspec.structs.replace(base, connections=16, tokens=1000)),
            (
                "1 MB prompt, escaped, rewritten",
                msgspec.structs.replace(base, connections=4, tokens=1, prompt=1_000_000, escaped=True),
            ),
        )
        for name, load in loads:
            self._say(name)
            plain: list[Usage] = []
            ours: list[Usage] = []
            for _ in range(self._plan.rounds):
                plain.append(await self._plain_round(load))
                ours.append(await self._our_round(load))
            per_event = load.tokens is not None and load.tokens > 1
            self.measured.cases.append(
                Case(name=name, per_event=per_event, plain=tuple(plain), ours=tuple(ours))
            )

    async def _plain_round(self, load: Load) -> Usage:
        before = cpu(self._plain)
        result = await self._load(msgspec.structs.replace(load, ports=(self._plain_port,)))
        return Usage(
            envoy=cpu(self._plain) - before,
            server=0.0,
            requests=result.requests,
            events=max(0, result.events - 2 * result.requests),
            seconds=result.seconds,
            messages=0.0,
        )

    async def _our_round(self, load: Load) -> Usage:
        """Idle CPU, for the scrapes, is taken off the server's."""
        stack = self._stack
        messages = await self._messages()
        began = asyncio.get_running_loop().time()
        before = cpu(stack.envoy), cpu(stack.servers[0])
        result = await self._load(msgspec.structs.replace(load, ports=(stack.port,)))
        after = cpu(stack.envoy), cpu(stack.servers[0])
        idle = self.measured.idle * (asyncio.get_running_loop().time() - began)
        return Usage(
            envoy=after[0] - before[0],
            server=after[1] - before[1] - idle,
            requests=result.requests,
            events=max(0, result.events - 2 * result.requests),
            seconds=result.seconds,
            messages=await self._messages() - messages,
        )

    async def _messages(self) -> float:
        url = f"{self._stack.envoy_admin_url}/stats?filter=stream_msgs_sent"
        return (await counters(url, (_MESSAGES,)))[_MESSAGES]

    async def _load(self, load: Load) -> Result:
        result = await self._perform(load)
        self.measured.failures += result.failures
        self.measured.failed = self.measured.failed or result.failed
        if load.ports == (self._stack.port,):
            self.measured.sent += result.requests
        return result

    async def _latency(self) -> None:
        self._say("latency")
        ports = (self._plain_port, self._stack.port)
        result = await self._load(Load(kind="alternate", ports=ports, requests=self._plan.latencies))
        self.measured.sent += len(result.latencies[1])
        plain, ours = map(sorted, result.latencies)
        self.measured.latencies = plain, ours

    async def _idle(self, page: str) -> None:
        self._say("idle")
        self.measured.idle = await self._idle_share()
        small = None
        with contextlib.suppress(OSError):
            small = REAL_PAGE.read_bytes()
        if small is not None:
            await post(page, small)
            await asyncio.sleep(_SETTLE)
            self.measured.idle_real_page = await self._idle_share()
            await post(page, b"")

    async def _idle_share(self) -> float:
        server = self._stack.servers[0]
        before = cpu(server)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(self._plan.idle_seconds)
        return (cpu(server) - before) / (asyncio.get_running_loop().time() - began)

    async def _memory(self) -> None:
        """First of all, so that no memory freed by other loads is used again."""
        self._say("memory")
        held, stack = self._plan.held, self._stack
        before = resident_bytes(stack.servers[0]), resident_bytes(stack.envoy)
        await self._perform(Load(kind="hold", ports=(stack.port,), connections=held, tokens=0))
        await asyncio.sleep(_SETTLE)
        self.measured.held_server = (resident_bytes(stack.servers[0]) - before[0]) / held
        self.measured.held_envoy = (resident_bytes(stack.envoy) - before[1]) / held
        await self._perform(Load(kind="release"))
        await asyncio.sleep(_SETTLE)

    async def _account(self) -> None:
        found = await counters(f"{self._stack.admin_url()}/metrics", (_SUCCESS, _REPORTED))
        self.measured.served, self.measured.reported = found[_SUCCESS], found[_REPORTED]


def _text(path: Path) -> str:
    return path.read_text("utf-8")
