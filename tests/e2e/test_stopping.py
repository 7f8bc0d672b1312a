"""How a server stops before a real Envoy: in no more time than it needs, and for good."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.gateway import Gateway, chat, eventually, fast_engines, new_id

CHAT = "/v1/chat/completions"


async def ask(gateway: Gateway, *, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    async with http.post(CHAT, json=chat(stream=True), headers={"x-request-id": request_id}) as answer:
        assert answer.status == 200
        await answer.read()
    await gateway.report(request_id)


async def test_stopping_does_not_wait_for_envoys_access_log(directory: Path) -> None:
    """Its streams stay open as long as Envoy does; they are ended as soon as their last entries must have come."""
    async with fast_engines(1) as engines, Gateway(directory, engines=engines) as gateway:
        async with aiohttp.ClientSession(gateway.url) as http:
            for _ in range(3):
                await ask(gateway, http=http)
        await asyncio.sleep(0.3)  # the access log is flushed every 0.1 s: its stream is open
        process = gateway.servers[0]
        assert process is not None
        clock = asyncio.get_running_loop().time
        began = clock()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        seconds = clock() - began
        print(f"stopped after {seconds:.2f} s")
        assert (
            seconds < 5
        )  # with the grace for streams that do not end it would be more than 6.5: 1.5 s to linger, 5 s of grace


async def test_endpoints_that_come_while_draining_make_nobody_ready(directory: Path) -> None:
    async with fast_engines(2) as engines:
        pods = [
            {"name": each.options.name, "address": each.address, "models": list(each.options.models)}
            for each in engines
        ]
        path = directory.parent / "endpoints.yaml"
        path.write_text(yaml.safe_dump({"endpoints": pods[:1]}))
        config: dict[str, dict[str, Any]] = {
            "discovery": {"static": {"file": str(path)}},
            "server": {"drain_seconds": 20},
        }
        async with (
            Gateway(directory, engines=engines, config=config) as gateway,
            aiohttp.ClientSession() as http,
            http.post(gateway.url + CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"}) as answer,
        ):
            assert answer.status == 200
            process = gateway.servers[0]
            assert process is not None
            process.send_signal(signal.SIGTERM)
            await eventually(lambda: any(line["event"] == "draining" for line in gateway.log_lines()))
            path.write_text(yaml.safe_dump({"endpoints": pods}))

            def counts() -> list[int]:
                return [line["count"] for line in gateway.log_lines() if line["event"] == "endpoints"]

            await eventually(lambda: counts() == [1, 2])
            async with http.get(f"{gateway.admin_url()}/readyz") as ready:
                assert ready.status == 503
            answer.close()
            async with asyncio.timeout(10):
                assert await process.wait() == 0
