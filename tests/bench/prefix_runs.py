"""The runs of the bench of prefixes: the same requests by each policy, through Envoy to simulated engines, or on the virtual fleet."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import aiohttp
import msgspec

from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.requests import read_generation
from envoy_extproc.simulation.service_time import PREFILL_TOKENS_PER_TTFT
from envoy_extproc.simulation.stack import Stack
from tests.bench.prefix_client import Answer, Job
from tests.bench.processes import Process, cpu, python, samples
from tests.support.builders import MODEL
from tests.support.virtual_fleet import VirtualFleet
from tests.support.workload import SharedPrefixes

PODS, PROCESSES = 8, 2
POLICIES = (
    "round-robin",
    "least-request",
    "session-affinity",
    "prefix-cache:3,least-request:1",
    "prefix-cache",
)
ENGINE = EngineOptions(models=(MODEL,), kept_requests=0)
"""The defaults: an 8B model on an A10, 10,000 prompt tokens a second, KV blocks for 65,536."""

SHARING = SharedPrefixes(
    rate=36, seconds=26, system_prompts=48, system_tokens=3000, turns=4, user_tokens=100, answer_tokens=32
)
"""Each pod's KV cache has room for 20 of the 48 system prompts, all eight together for three times as many."""

ALONE = SharedPrefixes(
    rate=14, seconds=18, system_prompts=0, system_tokens=3000, turns=1, user_tokens=100, answer_tokens=32
)
"""No two requests have anything in common."""

_HITS, _QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
_DRAINED_SECONDS = 30.0

LATE_SECONDS = 0.03
"""For one request in a hundred, and no more: what an answer that is written to a client at the same time may hold one up."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is.

    Attributes:
        name: of the workload, for the table.
        policy: that routes it.
        workload: the requests.
        warm: seconds in the beginning that are not counted.
        seed: of the requests.
    """

    name: str
    policy: str
    workload: SharedPrefixes
    warm: float
    seed: int = 1


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run, after its first seconds.

    Attributes:
        case: which one.
        virtual: whether it was on the virtual fleet.
        requests: that were due after the first seconds.
        failures: answers of the whole run that were not whole.
        failed: what went wrong with the first of them.
        hit_rate: share of the prompt tokens that engines found in their caches, as they say.
        first: seconds to the first token, of each request.
        completed: answers a second that ended while requests came.
        tokens: of these answers, a second.
        busiest: requests on the pod that had most, as a multiple of the mean.
        late: how late requests were sent, seconds, the 99th percentile.
        cpu: of each process, in percent of a core.
    """

    case: Case
    virtual: bool
    requests: int
    failures: int
    failed: str
    hit_rate: float
    first: tuple[float, ...]
    completed: float
    tokens: float
    busiest: float
    late: float = 0.0
    cpu: Mapping[str, float] = {}

    @property
    def disturbed(self) -> bool:
        """Whether the machine had so much else to do that requests were not sent in time."""
        return self.late > LATE_SECONDS

    def percentile(self, percent: int) -> float:
        """Seconds to the first token."""
        return statistics.quantiles(self.first, n=100, method="inclusive")[percent - 1]


@cache
def capacity(workload: SharedPrefixes) -> float:
    """Prompt tokens of the workload in a second, as a share of what all engines can compute."""
    asked = [read_generation("chat", each.body, ENGINE) for each in workload.arrivals(1)]
    tokens = sum(prompt.tokens for each in asked for prompt in each.prompts) / workload.seconds
    return tokens * ENGINE.ttft_seconds / PREFILL_TOKENS_PER_TTFT / PODS


# -- on the virtual fleet --------------------------------------------------------------------------------------------


def simulated(case: Case) -> Figures:
    """The same requests, engines and policy on a virtual clock."""
    fleet = VirtualFleet(case.policy, pods=PODS, options=ENGINE, seed=case.seed, sessions=False)
    arrivals, warm, end = case.workload.arrivals(case.seed), case.warm, case.workload.seconds
    fleet.run(arrivals, until=end + 300)
    counted = [each for each in fleet.exchanges if each.at >= warm]
    answers = [
        Answer(
            at=each.at,
            first=each.time_to_first_token,
            took=(each.ended_at or end) - each.at,
            tokens=each.tokens,
            pod=each.pod,
            failed="" if each.outcome == "success" else each.outcome,
        )
        for each in fleet.exchanges
    ]
    hits = sum(each.cached_tokens for each in counted) / sum(each.prompt_tokens for each in counted)
    return _figures(case, answers, hits, virtual=True)


# -- through Envoy ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """Everything that is up, for all runs: engines, Envoy, the server, and who asks."""

    addresses: Sequence[str]
    engines: Sequence[Process]
    stack: Stack
    client: Process

    async def run(self, case: Case, number: int) -> Figures:
        """One run; caches are empty when it begins, and nothing of it is known from earlier ones."""
        await self._reset()
        workload = msgspec.structs.replace(case.workload, salt=f"{number:04}")
        job = Job(url=self.stack.url, policy=case.policy, workload=workload, seed=case.seed)
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(self._ask(job))
            measuring = group.create_task(self._measure(case.warm, case.workload.seconds))
        hits, used = measuring.result()
        return _figures(case, asking.result(), hits, virtual=False, used=used)

    async def _ask(self, job: Job) -> list[Answer]:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(msgspec.json.encode(job) + b"\n")
        return msgspec.json.decode(await self.client.stdout.readline(), type=list[Answer])

    async def _measure(self, begin: float, end: float) -> tuple[float, Mapping[str, float]]:
        """Hit rate and CPU between two times from now."""
        began = time.monotonic()
        await asyncio.sleep(begin)
        before, used = await self._cached(), self._cpu()
        await asyncio.sleep(end - (time.monotonic() - began))
        after, used_then = await self._cached(), self._cpu()
        hits, queries = (now - then for now, then in zip(after, before, strict=True))
        percent = {name: 100 * (used_then[name] - used[name]) / (end - begin) for name in used}
        return hits / queries if queries else 0.0, percent

    async def _cached(self) -> tuple[float, float]:
        pages = await asyncio.gather(*(samples(f"http://{each}/metrics") for each in self.addresses))
        lines = [line for page in pages for line in page]
        return _total(lines, _HITS), _total(lines, _QUERIES)

    def _cpu(self) -> Mapping[str, float]:
        engines = {f"engines {number}": cpu(each) for number, each in enumerate(self.engines, 1)}
        own = {
            "envoy": cpu(self.stack.envoy),
            "server": cpu(self.stack.servers[0]),
            "client": cpu(self.client),
        }
        return engines | own

    async def _reset(self) -> None:
        async with asyncio.timeout(_DRAINED_SECONDS), aiohttp.ClientSession() as session:
            for address in self.addresses:
                while True:
                    async with session.get(f"http://{address}/load") as load:
                        if not (await load.json())["server_load"]:
                            break
                    await asyncio.sleep(0.1)
                async with session.post(f"http://{address}/reset_prefix_cache") as answer:
                    answer.raise_for_status()


@contextlib.asynccontextmanager
async def bench(directory: Path) -> AsyncIterator[Bench]:
    """Starts everything."""
    async with contextlib.AsyncExitStack() as exits:
        options = {name: value for name, value in asdict(ENGINE).items() if name != "faults"}
        engines, addresses = [], list[str]()
        for _ in range(PROCESSES):
            arguments = (str(PODS // PROCESSES), msgspec.json.encode(options).decode())
            process = await exits.enter_async_context(python("tests.bench.prefix_engines", *arguments))
            assert process.stdout is not None
            addresses += msgspec.json.decode(await process.stdout.readline(), type=list[str])
            engines.append(process)
        endpoints = [
            {"name": f"pod-{number}", "address": address, "models": [MODEL]}
            for number, address in enumerate(addresses, 1)
        ]
        stack = await exits.enter_async_context(Stack(directory, endpoints))
        client = await exits.enter_async_context(python("tests.bench.prefix_client"))
        yield Bench(addresses, engines, stack, client)


async def measured(cases: Sequence[Case], directory: Path, told: Callable[[str], None]) -> list[Figures]:
    """Every case through Envoy, one after the other; those that something else disturbed once more, and the better one counts."""
    found = []
    async with bench(directory) as up:
        for number, case in enumerate(cases, 1):
            told(f"{number} of {len(cases)}: {case.name}, {case.workload.rate:g}/s, {case.policy}")
            found.append(await up.run(case, number))
        for place, case in enumerate(cases):
            if found[place].disturbed:
                told(f"once more: {case.name}, {case.workload.rate:g}/s, {case.policy}")
                again = await up.run(case, len(cases) + place + 1)
                found[place] = min(found[place], again, key=lambda each: each.late)
    return found


def _total(lines: Iterable[tuple[str, float]], name: str) -> float:
    return sum(value for full, value in lines if full.partition("{")[0] == name)


def _figures(
    case: Case,
    answers: Sequence[Answer],
    hits: float,
    *,
    virtual: bool,
    used: Mapping[str, float] | None = None,
) -> Figures:
    warm, end = case.warm, case.workload.seconds
    counted = [each for each in answers if each.at >= warm]
    ended = [each for each in answers if not each.failed and warm <= each.at + each.late + each.took < end]
    pods = Counter(each.pod for each in counted)
    failed = [each.failed for each in answers if each.failed]
    late = [each.late for each in answers]
    return Figures(
        case=case,
        virtual=virtual,
        requests=len(counted),
        failures=len(failed),
        failed=failed[0] if failed else "",
        hit_rate=hits,
        first=tuple([each.first for each in counted if each.first is not None]),
        completed=len(ended) / (end - warm),
        tokens=sum(each.tokens for each in ended) / (end - warm),
        busiest=max(pods.values()) * PODS / len(counted),
        late=statistics.quantiles(late, n=100, method="inclusive")[98],
        cpu=used or {},
    )
