"""Pods of a cluster behind a real Envoy: they come and go, and stay while the API is away."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from envoy_extproc.simulation.engine import Engine
from tests.e2e.test_endpoints_file import CHAT, envoy_knows, served_by
from tests.support.cluster import Cluster, Object, pod
from tests.support.gateway import MODEL, Gateway, chat, eventually, fast_engines

PORT = "model.aibrix.ai/port"
CONFIG = "model.aibrix.ai/config"


def pod_of(engine: Engine, **more: Any) -> Object:
    host, _, port = engine.address.rpartition(":")
    return pod(engine.options.name, host, model=MODEL, labels={PORT: port}, **more)


def config(cluster: Cluster, directory: Path) -> dict[str, dict[str, Any]]:
    directory.mkdir()
    return {
        "discovery": {"static": None, "kubernetes": {"kubeconfig": str(cluster.kubeconfig(directory))}},
        "envoy": {"endpoints_file": str(directory / "pods.json")},
    }


async def test_pods_come_and_go_and_stay_while_the_api_is_away(directory: Path, tmp_path: Path) -> None:
    async with fast_engines(2) as engines, Cluster() as cluster:
        first, second = engines
        await cluster.put(pod_of(first))
        await cluster.put(pod_of(second, ready=False))
        async with (
            Gateway(directory, engines=engines, config=config(cluster, tmp_path / "watched")) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):
            await envoy_knows(gateway, {first.address})
            assert await served_by(http) == {"pod-a"}

            await cluster.put(pod_of(second))
            await envoy_knows(gateway, {first.address, second.address})
            assert await served_by(http) == {"pod-a", "pod-b"}

            await cluster.down()
            assert await served_by(http) == {"pod-a", "pod-b"}

            await cluster.delete("pod-a")
            await cluster.up()
            await envoy_knows(gateway, {second.address})
            assert await served_by(http) == {"pod-b"}

            await cluster.delete("pod-b")
            await envoy_knows(gateway, set())
            async with http.post(CHAT, json=chat()) as answer:
                assert answer.status == 503, await answer.text()


async def test_a_label_chooses_among_pods(directory: Path, tmp_path: Path) -> None:
    async with fast_engines(2) as engines, Cluster() as cluster:
        for engine, gpu in zip(engines, ("a10", "h100"), strict=True):
            each = pod_of(engine)
            each["metadata"]["labels"]["gpu"] = gpu
            await cluster.put(each)
        async with (
            Gateway(directory, engines=engines, config=config(cluster, tmp_path / "watched")) as gateway,
            aiohttp.ClientSession(gateway.url, headers={"external-filter": "gpu=h100"}) as http,
        ):
            assert await served_by(http) == {"pod-b"}
            await eventually(lambda: cluster.live == 1)


async def decided(http: aiohttp.ClientSession, **headers: str) -> tuple[str, str | None]:
    """Which policy decided, and which profile the answer tells of."""
    async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers["routing-strategy"], answer.headers.get("x-aibrix-config-profile")


async def comes_to(http: aiohttp.ClientSession, policy: str) -> None:
    """Waits until requests that ask for nothing are decided so."""
    async with asyncio.timeout(10):
        while (await decided(http))[0] != policy:
            await asyncio.sleep(0.05)


async def test_an_annotation_says_how_a_model_is_routed(directory: Path, tmp_path: Path) -> None:
    profiles = {
        "default": {"routingStrategy": "round-robin"},
        "brief": {"routingStrategy": "random", "routingConfig": {"promptTokensLt": 1000}},
    }
    written = json.dumps({"profiles": profiles}, indent=2)
    async with fast_engines(1) as engines, Cluster() as cluster:
        await cluster.put(pod_of(engines[0], annotations={CONFIG: written}))
        async with (
            Gateway(directory, engines=engines, config=config(cluster, tmp_path / "watched")) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):
            await envoy_knows(gateway, {engines[0].address})
            assert await decided(http) == ("round-robin", None)
            assert await decided(http, **{"config-profile": "auto"}) == ("random", "brief")

            locked = json.dumps({"lockedRoutingStrategy": "power-of-two"})
            await cluster.put(pod_of(engines[0], annotations={CONFIG: locked}))
            await comes_to(http, "power-of-two")
            assert await decided(http, **{"routing-strategy": "random"}) == ("power-of-two", None)

            await cluster.put(pod_of(engines[0], annotations={CONFIG: "{"}))
            await comes_to(http, "least-request")
            told = [line for line in gateway.log_lines() if line["event"] == "model_config_ignored"]
            assert [line["endpoint"] for line in told] == ["pod-a"]
