"""The pod is chosen by live load; what is dead is passed over; who may be chosen can change."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from envoy_extproc.explain import question, there
from envoy_extproc.simulation.stack import free_port
from tests.support.gateway import MODEL, Gateway, chat, eventually, fast_engines, new_id

CHAT = "/v1/chat/completions"


async def served_by(http: aiohttp.ClientSession, **headers: str) -> str:
    async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return str(answer.headers["target-pod"])


async def test_least_request_avoids_the_busy_pod(directory: Path) -> None:
    async with fast_engines(2) as engines, Gateway(directory, engines=engines) as gateway:
        async with aiohttp.ClientSession(gateway.url) as http:
            hanging = await http.post(CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"})
            busy = hanging.headers["target-pod"]
            others = [await served_by(http) for _ in range(6)]
            hanging.close()
            assert busy not in others


async def test_streams_spread_evenly(directory: Path) -> None:
    async with fast_engines(3) as engines, Gateway(directory, engines=engines) as gateway:
        async with aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as http:
            asked = [
                http.post(CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"}) for _ in range(30)
            ]
            answers = await asyncio.gather(*asked)
            spread = Counter(answer.headers["target-pod"] for answer in answers)
            for answer in answers:
                answer.close()
        assert sorted(spread.values()) == [10, 10, 10]
        await eventually(lambda: all(engine.running == 0 for engine in engines))


async def test_least_kv_cache_follows_the_engines(directory: Path) -> None:
    async with fast_engines(2, kv_blocks=64, tpot_seconds=0.5) as engines:
        config: dict[str, dict[str, Any]] = {
            "routing": {"policy": "least-kv-cache"},
            "engines": {"scrape_interval_ms": 50, "idle_interval_ms": 50},  # the load comes past the gateway
        }
        async with Gateway(directory, engines=engines, config=config) as gateway:
            full = engines[0]
            async with aiohttp.ClientSession() as direct, aiohttp.ClientSession(gateway.url) as http:
                url = f"http://{full.address}{CHAT}"
                hog = await direct.post(url, json=chat("word " * 400, stream=True, max_tokens=60))
                await asyncio.sleep(0.4)
                async with http.post(CHAT, json=chat(max_tokens=1)) as answer:
                    assert answer.headers["routing-strategy"] == "least-kv-cache"
                    assert answer.headers["target-pod"] == engines[1].options.name
                hog.close()


async def test_policy_without_its_data_says_so(directory: Path) -> None:
    pods = [{"name": "mute", "address": "127.0.0.1:9", "models": [MODEL]}]
    async with fast_engines(1) as engines:
        async with Gateway(
            directory,
            engines=engines,
            pods=pods,
            config={
                "routing": {"policy": "least-kv-cache"},
                "engines": {"scrape_interval_ms": 60_000, "max_stats_age_ms": 20},
            },
        ) as gateway:
            request_id = new_id()
            async with aiohttp.ClientSession(gateway.url) as http:
                await asyncio.sleep(0.1)
                async with http.post(
                    CHAT, json=chat(max_tokens=1), headers={"x-request-id": request_id}
                ) as answer:
                    assert answer.headers["routing-strategy"] == "least-request"
            report = await gateway.report(request_id)
            assert (report["policy_asked"], report["policy_fallback"]) == ("least-kv-cache", "no-stats")
            fallbacks = await gateway.metric(
                "envoy_extproc_policy_fallbacks_total", policy="least-kv-cache", reason="no-stats"
            )
            assert fallbacks == 1


async def test_least_latency_learns_who_is_quick(directory: Path) -> None:
    async with fast_engines(1, tpot_seconds=0.03) as slow, fast_engines(2, tpot_seconds=0.003) as engines:
        quick = engines[1]
        pods = [{"name": "slow", "address": slow[0].address, "models": [MODEL]}]
        config = {"engines": {"scrape_interval_ms": 50}}
        async with Gateway(directory, engines=[quick], pods=pods, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                for pod in ("slow", quick.options.name) * 3:
                    headers = {"routing-strategy": "round-robin"}
                    async with http.post(
                        CHAT, json=chat(max_tokens=20, ignore_eos=True), headers=headers
                    ) as answer:
                        assert answer.status == 200, pod
                await asyncio.sleep(0.3)
                request_id = new_id()
                headers = {"routing-strategy": "least-latency", "x-request-id": request_id}
                async with http.post(
                    CHAT, json=chat(max_tokens=20, ignore_eos=True), headers=headers
                ) as answer:
                    assert answer.headers["routing-strategy"] == "least-latency"
                    assert answer.headers["target-pod"] == quick.options.name


async def test_clients_mix_policies(directory: Path) -> None:
    config: dict[str, dict[str, Any]] = {
        "routing": {"policy": "least-kv-cache:1,least-request:9"},
        "engines": {"scrape_interval_ms": 50},
    }
    async with fast_engines(2) as engines, Gateway(directory, engines=engines, config=config) as gateway:
        async with aiohttp.ClientSession(gateway.url) as http:
            await asyncio.sleep(0.3)
            for asked, decided in {
                "": "least-kv-cache:1,least-request:9",
                " least-kv-cache:2 , least-request ": "least-kv-cache:2,least-request:1",
                "least-kv-cache:0,least-request": "least-request",
            }.items():
                headers = {"routing-strategy": asked} if asked else {}
                async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
                    assert (answer.status, answer.headers["routing-strategy"]) == (200, decided)
            headers = {"routing-strategy": "least-kv-cache:2,random"}
            async with http.post(CHAT, json=chat(), headers=headers) as answer:
                assert answer.status == 400
                error = (await answer.json())["error"]
        assert (error["param"], "does not score" in error["message"]) == ("routing-strategy", True)


async def test_a_locked_model_keeps_its_policy(directory: Path) -> None:
    config: dict[str, dict[str, Any]] = {"models": {MODEL: {"policy": "round-robin", "locked": True}}}
    async with fast_engines(1) as engines, Gateway(directory, engines=engines, config=config) as gateway:
        async with aiohttp.ClientSession(gateway.url) as http:
            for asked in ("random", "no-such-policy"):
                async with http.post(
                    CHAT, json=chat(max_tokens=1), headers={"routing-strategy": asked}
                ) as answer:
                    assert (answer.status, answer.headers["routing-strategy"]) == (200, "round-robin")


async def test_external_filter_selects_by_label(directory: Path) -> None:
    async with fast_engines(3) as engines:
        labels: list[dict[str, str]] = [{"gpu": "a10"}, {"gpu": "l4"}, {"gpu": "l4", "spot": "yes"}]
        pods = [
            {"name": each.options.name, "address": each.address, "models": [MODEL], "labels": label}
            for each, label in zip(engines, labels, strict=True)
        ]
        config = {"routing": {"allow_pinning": True}}
        async with (
            Gateway(directory, pods=pods, config=config) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):
            turns = {"routing-strategy": "round-robin"}
            for selector, names in {
                "gpu=l4": {"pod-b", "pod-c"},
                "gpu in (a10, l4), !spot": {"pod-a", "pod-b"},
                "gpu notin (l4)": {"pod-a"},
            }.items():
                headers = turns | {"external-filter": selector}
                assert {await served_by(http, **headers) for _ in range(6)} == names
                async with http.get("/ping", headers=headers) as answer:  # without a body, too
                    assert answer.headers["target-pod"] in names
            for headers, status in (
                ({"external-filter": "gpu=h100"}, 503),
                ({"external-filter": "gpu in l4"}, 400),
                ({"external-filter": "gpu=l4", "target-pod-ip": engines[0].address}, 400),
            ):
                async with http.post(CHAT, json=chat(), headers=headers) as answer:
                    assert answer.status == status
                    assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
            assert all(
                "external-filter" not in each.headers for engine in engines for each in engine.requests
            )


async def test_explain_tells_what_will_be_and_leaves_no_trace(directory: Path) -> None:
    async with fast_engines(2) as engines, Gateway(directory, engines=engines) as gateway:
        asked = question(CHAT, ["routing-strategy: round-robin"], json.dumps(chat(max_tokens=1)).encode())
        async with aiohttp.ClientSession(gateway.url) as http:
            for _ in range(4):
                told = [(await there(gateway.admin_url(), asked, None)).explanation for _ in range(3)]
                names = {None if each is None else each.chosen for each in told}
                assert names == {await served_by(http, **{"routing-strategy": "round-robin"})}
            hanging = await http.post(CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"})
            by_load = question(CHAT, [], json.dumps(chat()).encode())
            live = (await there(gateway.admin_url(), by_load, None)).explanation
            assert live is not None
            assert [row.in_flight for row in live.endpoints] == [0, 1]
            assert live.endpoints[1].name == hanging.headers["target-pod"]
            hanging.close()
        decided = await gateway.metric("envoy_extproc_decision_seconds_count")
        assert decided == 5
        assert sum(seen.path == CHAT for engine in engines for seen in engine.requests) == 5


def dead_pod(name: str) -> dict[str, Any]:
    """Nobody is at its address, and only requests find that out: an engine of no dialect is not scraped."""
    address = f"127.0.0.1:{free_port()}"
    return {"name": name, "address": address, "models": [MODEL], "engine": "generic"}


async def test_dead_pods_cost_no_request(directory: Path) -> None:
    dead = [dead_pod(f"dead-{number}") for number in range(2)]
    async with fast_engines(1) as engines:
        async with Gateway(directory, engines=engines, pods=dead) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                ids = [new_id() for _ in range(8)]
                for request_id in ids:
                    headers = {"x-request-id": request_id, "routing-strategy": "round-robin"}
                    assert await served_by(http, **headers) == "pod-a"
            reports = [await gateway.report(request_id) for request_id in ids]
            assert {report["attempts"] for report in reports} == {1, 2, 3}
            assert {report["pod"] for report in reports} == {"pod-a"}
            assert await gateway.metric("envoy_extproc_retries_total", model=MODEL) > 0
            assert await gateway.metric("envoy_extproc_in_flight_requests") == 0


async def test_a_pod_that_failed_is_passed_over_at_once(directory: Path) -> None:
    async with (
        fast_engines(1) as engines,
        Gateway(directory, engines=engines, pods=[dead_pod("dead")]) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        attempts = 1
        while attempts == 1:
            request_id = new_id()
            await served_by(http, **{"x-request-id": request_id, "routing-strategy": "round-robin"})
            attempts = (await gateway.report(request_id))["attempts"]
        ids = [new_id() for _ in range(4)]
        for request_id in ids:
            await served_by(http, **{"x-request-id": request_id, "routing-strategy": "round-robin"})
        reports = [await gateway.report(request_id) for request_id in ids]
        assert [report["attempts"] for report in reports] == [1] * 4
        assert {report["candidates"] for report in reports} == {1}


async def test_scraper_takes_dead_pods_out(directory: Path) -> None:
    dead = [{"name": "dead", "address": f"127.0.0.1:{free_port()}", "models": [MODEL]}]
    async with fast_engines(1) as engines:
        config = {"engines": {"scrape_interval_ms": 50}}
        async with Gateway(directory, engines=engines, pods=dead, config=config) as gateway:
            await asyncio.sleep(0.3)
            async with aiohttp.ClientSession(gateway.url) as http:
                ids = [new_id() for _ in range(6)]
                for request_id in ids:
                    await served_by(http, **{"x-request-id": request_id, "routing-strategy": "random"})
            assert {(await gateway.report(request_id))["attempts"] for request_id in ids} == {1}


async def test_no_pod_answers(directory: Path) -> None:
    dead = [{"name": "dead", "address": f"127.0.0.1:{free_port()}", "models": [MODEL]}]
    async with Gateway(directory, pods=dead) as gateway, aiohttp.ClientSession(gateway.url) as http:
        request_id = new_id()
        async with http.post(CHAT, json=chat(), headers={"x-request-id": request_id}) as answer:
            assert answer.status == 503
            error = (await answer.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        report = await gateway.report(request_id)
        assert (report["outcome"], report["error.type"]) == ("error", "network")


async def refused_by_the_network(gateway: Gateway, http: aiohttp.ClientSession, model: str, pin: str) -> None:
    """A request nobody may answer: its one pod is dead, and it is asked as often as there are tries."""
    request_id = new_id()
    headers = {"x-request-id": request_id} | ({"target-pod-ip": pin} if pin else {})
    async with http.post(CHAT, json=chat(model=model), headers=headers) as answer:
        assert answer.status == 503, await answer.text()
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
    report = await gateway.report(request_id)
    assert (report["outcome"], report["error.type"], report["attempts"]) == ("error", "network", 3)
    assert gateway.received(request_id) == []


@pytest.mark.parametrize("pinned", [False, True], ids=["model", "pin"])
async def test_retries_stay_with_the_model_and_the_pin(directory: Path, pinned: bool) -> None:
    """Envoy's own balancer, which knows of neither, would send the last tries to a pod that is alive."""
    model = MODEL if pinned else "another-model"
    address = f"127.0.0.1:{free_port()}"
    dead = [dead_pod("dead") | {"address": address, "models": [model]}]
    config = {"routing": {"allow_pinning": pinned, "tries": 3}}
    async with fast_engines(1) as engines:
        async with Gateway(directory, engines=engines, pods=dead, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                for _ in range(6):  # a balancer can draw the dead pod by chance
                    await refused_by_the_network(gateway, http, model, address if pinned else "")
                assert (
                    await served_by(http, **({"target-pod-ip": engines[0].address} if pinned else {}))
                    == "pod-a"
                )
            errors = "envoy_extproc_errors_total"
            assert await gateway.metric(errors, model=model, error_type="network") == 6
            assert await gateway.metric(errors) == 6


async def test_watched_file_changes_who_is_chosen(directory: Path, tmp_path: Path) -> None:
    async with fast_engines(2) as engines:
        rows = [{"name": e.options.name, "address": e.address, "models": [MODEL]} for e in engines]
        path = tmp_path / "endpoints.yaml"
        path.write_text(yaml.safe_dump({"endpoints": rows}))
        config = {"discovery": {"static": {"file": str(path)}}}
        async with Gateway(directory, engines=engines, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                headers = {"routing-strategy": "round-robin"}
                assert {await served_by(http, **headers) for _ in range(4)} == {"pod-a", "pod-b"}
                path.write_text(yaml.safe_dump({"endpoints": rows[1:]}))
                await eventually(
                    lambda: len([x for x in gateway.log_lines() if x["event"] == "endpoints"]) > 1
                )
                assert {await served_by(http, **headers) for _ in range(4)} == {"pod-b"}
                path.write_text("endpoints: [broken")
                await eventually(lambda: any("unusable" in x["event"] for x in gateway.log_lines()))
                assert await served_by(http) == "pod-b"


async def counted(metric: Callable[[], Awaitable[float]]) -> float:
    """Waits until a metric is above 0; returns what it then is."""
    async with asyncio.timeout(5):
        while not (value := await metric()):
            await asyncio.sleep(0.02)
    return value


async def test_what_is_counted_of_a_model_goes_with_it(directory: Path, tmp_path: Path) -> None:
    async with fast_engines(2) as engines:
        stays = {"name": "stays", "address": engines[0].address, "models": [MODEL]}
        moves = {"name": "moves", "address": f"127.0.0.1:{free_port()}", "models": ["short-lived"]}
        path = tmp_path / "endpoints.yaml"
        path.write_text(yaml.safe_dump({"endpoints": [stays, moves]}))
        config: dict[str, dict[str, Any]] = {
            "discovery": {"static": {"file": str(path)}},
            "engines": {"scrape_interval_ms": 50},
        }
        async with Gateway(directory, engines=engines, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                headers = {"routing-strategy": "no-such-policy"}
                async with http.post(CHAT, json=chat(model="short-lived"), headers=headers) as answer:
                    assert answer.status == 400
            errors = partial(gateway.metric, "envoy_extproc_errors_total", model="short-lived")
            assert await counted(errors) == 1
            scrapes = partial(gateway.metric, "envoy_extproc_scrape_failures_total", endpoint="moves")
            failures = await counted(scrapes)
            moves |= {"address": engines[1].address, "models": [MODEL]}
            path.write_text(yaml.safe_dump({"endpoints": [stays, moves]}))
            async with asyncio.timeout(5):
                while any("short-lived" in sample for sample in await gateway.metrics()):
                    await asyncio.sleep(0.02)
            assert await scrapes() >= failures


@pytest.mark.parametrize("pin", ["address", "ip"])
async def test_pinning_where_it_is_allowed(directory: Path, pin: str) -> None:
    async with fast_engines(2) as engines:
        config = {"routing": {"allow_pinning": True}}
        async with Gateway(directory, engines=engines, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:
                address = engines[1].address
                headers = {"target-pod-ip": address if pin == "address" else address.rpartition(":")[0]}
                pods = {await served_by(http, **headers) for _ in range(4)}
                assert len(pods) == 1
                assert pin == "ip" or pods == {"pod-b"}
                for elsewhere in ("169.254.169.254:80", "127.0.0.1:1", "nonsense"):
                    async with http.post(CHAT, json=chat(), headers={"target-pod-ip": elsewhere}) as answer:
                        assert answer.status == 400
