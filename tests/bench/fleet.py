"""What circuit breaking is worth: eight simulated engines behind a real Envoy, three of which fail, with breakers and without.

    python -m tests.bench.fleet        # two minutes

One engine refuses (500 to everything it is asked), one hangs (takes requests and answers none), one resets (closes the
connection, before an answer or in the middle of it). `/health` and `/metrics` of all three are as they should be. Clients
come at a steady rate, whatever became of the others, and wait two seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.faults import Faults
from tests.support.gateway import Gateway, chat, fast_engines

LANES = ("native", "stream")
POLICIES = ("round-robin", "least-request")
PODS = 8
WHOLE = "whole"

_CHAT = "/v1/chat/completions"
_REFUSES, _HANGS, _RESETS = "pod-b", "pod-d", "pod-f"
_COMMON = {_REFUSES: Faults(error=500), _HANGS: Faults(hang=0)}
SCENARIOS: Mapping[str, Mapping[str, Faults]] = {
    "reset before an answer": {**_COMMON, _RESETS: Faults(reset=0)},
    "reset in the middle": {**_COMMON, _RESETS: Faults(reset=3)},
}
"""What goes wrong, by the pod that does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests at a steady rate. Half of them are streams, all where only a stream can fail in its middle.

    Attributes:
        requests: how many.
        rate: of them in a second.
        patience: seconds a client waits for the whole answer.
    """

    requests: int = 400
    rate: float = 40.0
    patience: float = 2.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines and the gateway before them.

    Attributes:
        gateway: what clients talk to.
        http: the clients' connections.
    """

    gateway: Gateway
    http: aiohttp.ClientSession

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines by pod."""
        return self.gateway.engines

    async def perform(self, load: Load, *, streams: bool) -> Counter[str]:
        """How the requests ended, as their clients saw it: `whole`, or what was wrong."""
        async with asyncio.TaskGroup() as group:
            tasks = []
            for number in range(load.requests):
                stream = streams or number % 2 == 0
                tasks.append(group.create_task(self.ask(stream=stream, patience=load.patience)))
                await asyncio.sleep(1 / load.rate)
        return Counter(task.result() for task in tasks)

    async def ask(self, *, stream: bool = True, patience: float = 2.0) -> str:
        """How one request ended."""
        body = chat(stream=stream, max_tokens=8)
        try:
            async with asyncio.timeout(patience), self.http.post(_CHAT, json=body) as answer:
                text = await answer.read()
        except TimeoutError:
            return "timeout"
        except aiohttp.ClientError:
            return "cut off"
        if answer.status != 200:
            return str(answer.status)
        return WHOLE if not stream or text.endswith(b"data: [DONE]\n\n") else "cut off"


@asynccontextmanager
async def fleet(
    directory: Path,
    faults: Mapping[str, Faults],
    *,
    lane: str = "native",
    policy: str = "round-robin",
    pods: int = PODS,
    **breaker: Any,
) -> AsyncIterator[Fleet]:
    """A fleet of its own. `breaker` is what stands in `routing.breaker`; clients are impatient, so silence is short."""
    config: dict[str, dict[str, Any]] = {
        "responses": {"accounting": lane},
        "routing": {"policy": policy, "breaker": {"silent_seconds": 1, **breaker}},
        "engines": {"scrape_interval_ms": 500},
    }
    async with fast_engines(pods, ttft_seconds=0.02, tpot_seconds=0.002) as engines:
        for engine in engines:
            engine.faults = faults.get(engine.options.name, engine.faults)
        async with (
            Gateway(directory, engines=engines, config=config) as gateway,
            aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as http,
        ):
            yield Fleet(gateway, http)


async def before_and_after(
    directory: Path, scenario: str, *, lane: str, policy: str, load: Load
) -> tuple[Counter[str], Counter[str]]:
    """How the requests ended without breakers and with them, both at the same time on fleets of their own."""

    async def one(*, enabled: bool) -> Counter[str]:
        place = directory / f"{lane}-{enabled}"
        async with fleet(place, SCENARIOS[scenario], lane=lane, policy=policy, enabled=enabled) as made:
            return await made.perform(load, streams=scenario == "reset in the middle")

    before, after = await asyncio.gather(one(enabled=False), one(enabled=True))
    return before, after


def failed(ends: Counter[str]) -> int:
    """Requests whose client did not get what it asked for."""
    return ends.total() - ends[WHOLE]


def _cells(ends: Counter[str]) -> Iterator[str]:
    yield str(failed(ends))
    yield ", ".join(f"{ends[kind]} {kind}" for kind in sorted(ends.keys() - {WHOLE}))


async def _table(load: Load) -> Table:
    title = f"{load.requests} requests, {load.rate:g} a second, to {PODS} pods of which 3 fail"
    table = Table("lane", "policy", "third pod", "without", "", "with breakers", "", title=title)
    with tempfile.TemporaryDirectory(prefix="envoy-extproc-fleet-") as directory:
        for number, (lane, policy, scenario) in enumerate(itertools.product(LANES, POLICIES, SCENARIOS)):
            place = Path(directory) / str(number)
            ends = await before_and_after(place, scenario, lane=lane, policy=policy, load=load)
            table.add_row(lane, policy, scenario, *(cell for each in ends for cell in _cells(each)))
            print(f"{number + 1} of {len(LANES) * len(POLICIES) * len(SCENARIOS)}", file=sys.stderr)
    return table


if __name__ == "__main__":
    shown = asyncio.run(_table(Load()))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
