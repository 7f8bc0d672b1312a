"""One simulated engine without a gateway, and a client that sees its chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.options import EngineOptions

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


class Client:
    """A client of one started engine."""

    def __init__(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.session = session

    def request(
        self, path: str, body: dict[str, Any] | str | None = None, *, simulate: str = "", **headers: str
    ) -> Any:
        data = body if isinstance(body, str) else None if body is None else json.dumps(body)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if simulate:
            sent["x-simulate"] = simulate
        method = "GET" if data is None else "POST"
        return self.session.request(method, f"http://{self.engine.address}{path}", data=data, headers=sent)

    async def chunks(self, body: dict[str, Any], path: str = CHAT, simulate: str = "") -> list[bytes]:
        """HTTP chunks of a stream, one by one."""
        got: list[bytes] = []
        part = b""
        async with self.request(path, {"stream": True, **body}, simulate=simulate) as response:
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for data, end in response.content.iter_chunks():
                part += data
                if end:
                    got.append(part)
                    part = b""
        return got

    async def read_into(self, seen: bytearray, body: dict[str, Any], simulate: str) -> None:
        """Reads a chat answer that may break off."""
        async with self.request(CHAT, body, simulate=simulate) as response:
            async for data in response.content.iter_any():
                seen += data

    async def json(self, path: str, body: dict[str, Any] | None = None, *, simulate: str = "") -> Any:
        async with self.request(path, body, simulate=simulate) as response:
            assert response.status == 200
            return json.loads(await response.read())

    async def metrics(self) -> dict[str, float]:
        """Samples by name; a label that tells some apart is appended."""
        async with self.request("/metrics") as response:
            assert response.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
            families = text_string_to_metric_families(await response.text())
        extra = ("finished_reason", "le", "reason")
        return {
            ":".join(
                [
                    sample.name.removeprefix("vllm:"),
                    *(sample.labels[name] for name in extra if name in sample.labels),
                ]
            ): (sample.value)
            for family in families
            for sample in family.samples
        }


@asynccontextmanager
async def serving(**changes: Any) -> AsyncIterator[Client]:
    values: dict[str, Any] = {"ttft_seconds": 0.0, "tpot_seconds": 0.0, "max_model_len": 2048, **changes}
    engine = Engine(EngineOptions(models=("tiny",), **values))
    await engine.start()
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            yield Client(engine, session)
        finally:
            await engine.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.002)
