"""Pods that come and go while Envoy runs: it learns of them from the file that the server writes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.gateway import MODEL, Gateway, chat, fast_engines, new_id

CHAT = "/v1/chat/completions"
ROUND_ROBIN = {"routing-strategy": "round-robin"}


class Watched:
    """A file of endpoints that discovery watches, and the file by which Envoy hears of it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.path = directory / "endpoints.yaml"
        self.eds = directory / "pods.json"

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            "discovery": {"static": {"file": str(self.path)}},
            "envoy": {"endpoints_file": str(self.eds)},
        }

    def write(self, pods: Sequence[Mapping[str, Any]]) -> None:
        self.path.write_text(yaml.safe_dump({"endpoints": [dict(pod) for pod in pods]}))


async def envoy_knows(gateway: Gateway, addresses: set[str]) -> None:
    """Waits until Envoy's cluster has these members and no others."""
    async with asyncio.timeout(10), aiohttp.ClientSession(gateway.envoy_admin_url) as session:
        members: set[str] | None = None
        while members != addresses:
            await asyncio.sleep(0.02)
            async with session.get("/clusters?format=json") as answer:
                clusters = (await answer.json())["cluster_statuses"]
            pods = next(each for each in clusters if each["name"] == "pods")
            sockets = [host["address"]["socket_address"] for host in pods.get("host_statuses", ())]
            members = {f"{each['address']}:{each['port_value']}" for each in sockets}


async def served_by(http: aiohttp.ClientSession, count: int = 6) -> set[str]:
    """Which pods served so many requests, as their answers say it."""
    pods = set()
    for _ in range(count):
        async with http.post(CHAT, json=chat(max_tokens=1), headers=ROUND_ROBIN) as answer:
            assert answer.status == 200, await answer.text()
            pods.add(answer.headers["target-pod"])
    return pods


async def test_pods_come_and_go(directory: Path, tmp_path: Path) -> None:
    watched = Watched(tmp_path / "watched")
    async with fast_engines(2) as engines:
        first, second = (
            {"name": engine.options.name, "address": engine.address, "models": [MODEL]} for engine in engines
        )
        watched.write([first])
        async with (
            Gateway(directory, engines=engines, config=watched.config) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):
            await envoy_knows(gateway, {engines[0].address})
            assert await served_by(http) == {"pod-a"}

            watched.write([first, second])
            await envoy_knows(gateway, {engine.address for engine in engines})
            assert await served_by(http) == {"pod-a", "pod-b"}
            assert all(engine.requests for engine in engines)

            watched.write([second])
            await envoy_knows(gateway, {engines[1].address})
            seen = len(engines[0].requests)
            assert await served_by(http) == {"pod-b"}
            assert len(engines[0].requests) == seen

            watched.write([])
            await envoy_knows(gateway, set())
            async with http.post(CHAT, json=chat()) as answer:
                refused = await answer.text()
                assert (answer.status, answer.headers.get("retry-after")) == (503, "1"), refused
            assert {path.name for path in watched.eds.parent.iterdir()} == {"endpoints.yaml", "pods.json"}


async def test_a_stream_outlives_the_removal_of_its_pod(directory: Path, tmp_path: Path) -> None:
    watched = Watched(tmp_path / "watched")
    async with fast_engines(2, tpot_seconds=0.05) as engines:
        pods = [
            {"name": engine.options.name, "address": engine.address, "models": [MODEL]} for engine in engines
        ]
        watched.write(pods[:1])
        async with (
            Gateway(directory, engines=engines, config=watched.config) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):
            request_id = new_id()
            body = chat(stream=True, max_tokens=60)  # 3 s: discovery looks at its file once a second
            async with http.post(CHAT, json=body, headers={"x-request-id": request_id}) as answer:
                await answer.content.readany()
                watched.write(pods[1:])
                await envoy_knows(gateway, {engines[1].address})
                text = await answer.text()
            assert text.endswith("data: [DONE]\n\n")
            report = await gateway.report(request_id)
            assert (report["outcome"], report["gen_ai.usage.output_tokens"]) == ("success", 60)
            assert await served_by(http, 2) == {"pod-b"}
