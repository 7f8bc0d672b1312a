"""A gateway under test: `Stack` (real Envoy, real server processes) over upstreams that live in the test's own loop."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiohttp

from envoy_extproc import cli
from envoy_extproc.envoy.bootstrap import bootstrap
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.stack import ServerProcess, Stack
from tests.support.forking import Copy

MODEL = "llama-3-8b"


class Gateway(Stack):
    """A `Stack` whose engines are at hand.

    Attributes:
        engines: simulated ones, by pod name; empty where the upstreams are something else.
        copies: whether servers are copies of a process that has loaded them; by itself each starts.
    """

    copies: ClassVar[bool] = False

    def __init__(
        self,
        directory: Path,
        *,
        engines: Sequence[Engine] = (),
        pods: Sequence[Mapping[str, Any]] = (),
        config: Mapping[str, Mapping[str, Any]] | None = None,
        servers: int = 1,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        self.engines = {engine.options.name: engine for engine in engines}
        own = [
            {"name": engine.options.name, "address": engine.address, "models": list(engine.options.models)}
            for engine in engines
        ]
        super().__init__(directory, [*own, *pods], config=config, servers=servers, edit=edit)

    async def _printed(self) -> str:
        """The same without a process of its own, which takes a second of a core; where packages of others matter it has one."""
        if "PYTHONPATH" in os.environ:
            return await super()._printed()
        settings = cli._settings(self.config_file())
        return bootstrap(cli.bootstrap_options(settings, cli._endpoints(settings)))

    async def _serve(self, config: Path, log: Path) -> ServerProcess:
        """Likewise."""
        if not self.copies or "PYTHONPATH" in os.environ:
            return await super()._serve(config, log)
        return Copy(["serve", "-c", str(config)], log)

    def received(self, request_id: str) -> list[tuple[str, Mapping[str, str], bytes]]:
        """(pod, headers, body) of every time an engine saw the request."""
        return [
            (name, seen.headers, seen.body)
            for name, engine in self.engines.items()
            for seen in engine.requests
            if seen.headers.get("x-request-id") == request_id
        ]

    async def metrics(self, server: int = 0) -> Mapping[str, float]:
        """Samples of a server's exposition, by name with labels as they stand there."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.admin_url(server)}/metrics") as answer,
        ):
            lines = (await answer.text()).splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    async def metric(self, name: str, server: int = 0, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for sample, value in (await self.metrics(server)).items()
            if sample.partition("{")[0] == name and all(each in sample for each in wanted)
        )

    async def envoy_stat(self, name: str) -> int:
        """One of Envoy's own counters or gauges."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.envoy_admin_url}/stats", params={"filter": f"^{name}$"}) as answer,
        ):
            text = await answer.text()
        return int(text.rpartition(": ")[2]) if ": " in text else 0


@asynccontextmanager
async def fast_engines(count: int, **options: Any) -> AsyncIterator[list[Engine]]:
    """Simulated engines called pod-a, pod-b, ... that answer as fast as they can."""
    settings: dict[str, Any] = {"models": (MODEL,), "ttft_seconds": 0.0, "tpot_seconds": 0.0, **options}
    engines = [Engine(EngineOptions(name=f"pod-{chr(97 + number)}", **settings)) for number in range(count)]
    for engine in engines:
        await engine.start()
    try:
        yield engines
    finally:
        for engine in engines:
            await engine.stop()


def new_id() -> str:
    """A request id that no other request has."""
    return f"test-{uuid.uuid4().hex}"


def chat(prompt: str = "hello", **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}


async def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until something holds.

    Raises:
        TimeoutError: it did not.
    """
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
