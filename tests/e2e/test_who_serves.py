"""Who is named where another pod serves than the one chosen, and what models' configurations decide, in both lanes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from envoy_extproc.scheduling import registry
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.faults import Faults
from envoy_extproc.simulation.options import EngineOptions
from tests.support.gateway import MODEL, Gateway, chat, fast_engines, new_id

CHAT = "/v1/chat/completions"
LANES = ("stream", "native")
LOCKED = "locked"
PROFILES = {
    "profiles": {
        "short": {"routingStrategy": "power-of-two", "routingConfig": {"promptTokensLt": 500}},
        "long": {"routingStrategy": "session-affinity", "routingConfig": {"promptTokensGte": 500}},
    }
}
ROLES = {"pod-a": "prefill", "pod-b": "decode", "pod-broken": "decode"}


@asynccontextmanager
async def broken() -> AsyncIterator[Engine]:
    """An engine that answers 503, which Envoy takes to another pod."""
    engine = Engine(EngineOptions(name="pod-broken", models=(MODEL, LOCKED), faults=Faults(error=503)))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=LANES)
async def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    async with fast_engines(2, models=(MODEL, LOCKED)) as well, broken() as ill:
        rows = [
            {
                "name": engine.options.name,
                "address": engine.address,
                "models": [MODEL, LOCKED],
                "labels": {"role-name": ROLES[engine.options.name]},
            }
            for engine in (*well, ill)
        ]
        config: dict[str, dict[str, Any]] = {
            "responses": {"accounting": request.param},
            "routing": {"policy": "random", "breaker": {"enabled": False}},
            "models": {
                MODEL: {"config": PROFILES},
                LOCKED: {"config": {"lockedRoutingStrategy": "round-robin"}},
            },
        }
        directory = tmp_path_factory.mktemp("serves")
        async with Gateway(directory, pods=rows, config=config) as shared:
            shared.engines = {engine.options.name: engine for engine in (*well, ill)}
            yield shared


@pytest_asyncio.fixture(loop_scope="session")
async def http(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(gateway.url) as session:
        yield session


def session_of(address: str) -> str:
    return base64.b64encode(address.encode()).decode()


# -- who served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_after_a_retry_the_session_is_at_the_pod_that_served(
    gateway: Gateway, http: aiohttp.ClientSession, stream: bool
) -> None:
    request_id = new_id()
    asked = {
        "x-request-id": request_id,
        "routing-strategy": "session-affinity",
        "x-session-id": session_of(gateway.engines["pod-broken"].address),
    }
    async with http.post(CHAT, json=chat(max_tokens=1, stream=stream), headers=asked) as answer:
        assert answer.status == 200
        await answer.read()
        served = answer.headers["target-pod"]
    assert [pod for pod, _, _ in gateway.received(request_id)] == [served, "pod-broken"]
    assert answer.headers["x-session-id"] == session_of(gateway.engines[served].address)
    assert answer.headers["target-pod-ip"] == gateway.engines[served].address
    assert not {"routing-strategy", "x-session-id"} & gateway.received(request_id)[0][1].keys()


@pytest.mark.parametrize(("fault", "told"), [("error=400", True), ("reset=0", False)])
async def test_an_error_names_the_session_of_the_pod_that_told_it(
    gateway: Gateway, http: aiohttp.ClientSession, fault: str, told: bool
) -> None:
    asked = {"routing-strategy": "session-affinity", "x-simulate": fault}
    async with http.post(CHAT, json=chat(max_tokens=1), headers=asked) as answer:
        assert answer.status >= 400
        await answer.read()
    assert ("x-session-id" in answer.headers) is told
    if told:
        served = gateway.engines[answer.headers["target-pod"]].address
        assert answer.headers["x-session-id"] == session_of(served)


async def test_a_retry_of_a_pair_goes_to_the_other_decode_pod_with_the_same_prefill(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    tried = Counter[str]()
    for _ in range(20):  # which of two idle decode pods comes first is chance
        request_id = new_id()
        asked = {"x-request-id": request_id, "routing-strategy": "pd", "x-prefiller-host-port": "6.6.6.6:1"}
        async with http.post(CHAT, json=chat(max_tokens=1), headers=asked) as answer:
            assert answer.status == 200
            await answer.read()
        assert answer.headers["target-pod"] == "pod-b"
        assert answer.headers["prefill-target-pod"] == "pod-a"
        for pod, headers, _ in gateway.received(request_id):
            tried[pod] += 1
            assert headers["x-prefiller-host-port"] == gateway.engines["pod-a"].address
        if tried["pod-broken"]:
            break
    assert tried["pod-broken"] == 1
    assert "pod-a" not in tried


async def test_a_session_does_not_leave_what_a_client_selects(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    asked = {
        "routing-strategy": "session-affinity",
        "x-session-id": session_of(gateway.engines["pod-b"].address),
        "external-filter": "role-name=prefill",
    }
    async with http.post(CHAT, json=chat(max_tokens=1), headers=asked) as answer:
        assert answer.headers["target-pod"] == "pod-a"
        assert answer.headers["x-session-id"] == session_of(gateway.engines["pod-a"].address)


# -- profiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "length", "asked", "policy", "told"),
    [
        (MODEL, 10, {}, "random", None),
        (MODEL, 10, {"config-profile": "short"}, "power-of-two", None),
        (MODEL, 10, {"config-profile": "auto"}, "power-of-two", "short"),
        (MODEL, 5000, {"config-profile": "Auto"}, "least-request", "long"),  # there is no session to go by
        (MODEL, 5000, {"config-profile": "auto", "routing-strategy": "round-robin"}, "round-robin", "long"),
        (LOCKED, 10, {"routing-strategy": "random"}, "round-robin", None),
        (LOCKED, 10, {"routing-strategy": "nonsense"}, "round-robin", None),
    ],
)
async def test_profiles(
    gateway: Gateway,
    http: aiohttp.ClientSession,
    *,
    model: str,
    length: int,
    asked: dict[str, str],
    policy: str,
    told: str | None,
) -> None:
    request_id = new_id()
    body = chat("x" * length, max_tokens=1) | {"model": model}
    sent = {"x-request-id": request_id, "external-filter": "role-name!=decode", **asked}
    async with http.post(CHAT, json=body, headers=sent) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    assert answer.headers["routing-strategy"] == policy
    assert answer.headers.get("x-aibrix-config-profile") == told
    assert answer.headers.get("x-session-id") is None or told == "long"
    ((_, seen, _),) = gateway.received(request_id)
    assert not asked.keys() & seen.keys()


@pytest.mark.parametrize("model", [MODEL, LOCKED])
async def test_a_profile_there_is_not_is_refused(
    gateway: Gateway, http: aiohttp.ClientSession, model: str
) -> None:
    request_id = new_id()
    before = await gateway.metric("envoy_extproc_errors_total", model=model, error_type="client")
    sent = {"x-request-id": request_id, "config-profile": "none"}
    async with http.post(CHAT, json=chat() | {"model": model}, headers=sent) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["param"]) == (400, "invalid_request_error", "config-profile")
    assert (await gateway.report(request_id))["outcome"] == "refused"
    assert gateway.received(request_id) == []
    after = await gateway.metric("envoy_extproc_errors_total", model=model, error_type="client")
    assert after == before + 1


# -- what is counted and told of it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("session-affinity", "no-session"),
        ("prefix-cache", "no-prompt"),
        ("bounded-load", "no-key"),
        ("vtc-basic", "no-user"),
        ("session-affinity:2,vtc-basic:1", "no-session"),
    ],
)
async def test_fallbacks_are_counted_by_their_reason(
    gateway: Gateway, http: aiohttp.ClientSession, policy: str, reason: str
) -> None:
    labels = {"policy": "mix" if "," in policy else policy, "reason": reason}
    before = await gateway.metric("envoy_extproc_policy_fallbacks_total", 0, **labels)
    async with http.post(CHAT, json=chat(max_tokens=1), headers={"routing-strategy": policy}) as answer:
        assert answer.status == 200
    after = await gateway.metric("envoy_extproc_policy_fallbacks_total", 0, **labels)
    assert after == before + 1


async def test_what_clients_write_makes_no_labels(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    for number in range(40):
        sent = {
            "routing-strategy": f"least-request:{number + 1},session-affinity:{number + 2}",
            "x-session-id": f"hostile-{number}",
            "x-aibrix-session-key": f"hostile-{number}",
            "config-profile": "short" if number % 2 else f"hostile-{number}",
            "user": f"hostile-{number}",
        }
        async with http.post(CHAT, json=chat(max_tokens=1), headers=sent) as answer:
            await answer.read()
    samples = [name for name in await gateway.metrics() if "policy=" in name]
    policies = {name.partition('policy="')[2].partition('"')[0] for name in samples}
    assert policies <= {*registry.POLICIES, "mix"}
    assert not [name for name in await gateway.metrics() if "hostile" in name]


async def test_decisions_are_kept_without_what_was_said(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    for _ in range(3):
        body = chat("a very private prompt " * 50, max_tokens=1)
        async with http.post(CHAT, json=body, headers={"routing-strategy": "prefix-cache"}) as answer:
            await answer.read()
    async with (
        aiohttp.ClientSession(gateway.admin_url()) as admin,
        admin.get("/debug/decisions") as decisions,
    ):
        text = await decisions.text()
    told = json.loads(text)
    assert 3 <= len(told) <= 100
    assert told[0]["policy"] == "prefix-cache"
    assert "private" not in text


# -- several servers, files and adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
async def test_servers_agree_on_keys_and_prompts(directory: Path, lane: str) -> None:
    config = {"responses": {"accounting": lane}}
    async with (
        fast_engines(4) as engines,
        Gateway(directory, engines=engines, config=config, servers=2) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        for sent in (
            {"routing-strategy": "bounded-load"},
            {"routing-strategy": "bounded-load", "x-aibrix-session-key": "k"},
            {"routing-strategy": "session-affinity", "x-aibrix-session-key": "k"},
        ):
            served = set()
            for _ in range(16):
                async with http.post(CHAT, json=chat("a" * 2000, max_tokens=1), headers=sent) as answer:
                    await answer.read()
                    served.add(answer.headers["target-pod"])
            assert len(served) == 1
        decided = [await gateway.metric("envoy_extproc_decision_seconds_count", server) for server in (0, 1)]
        assert min(decided) > 0
        assert sum(decided) == 48


async def test_a_policy_changes_under_load_with_its_file(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"

    def write(engines: list[Engine], policy: str) -> None:
        written = {"profiles": {"default": {"routingStrategy": policy}}}
        rows = [
            {
                "name": engine.options.name,
                "address": engine.address,
                "models": [MODEL],
                "labels": {"model.aibrix.ai/config": json.dumps(written)},
            }
            for engine in engines
        ]
        path.write_text(yaml.safe_dump({"endpoints": rows}))

    async with fast_engines(2) as engines:
        write(engines, "round-robin")
        config = {"discovery": {"static": {"file": str(path)}}}
        async with Gateway(directory, engines=engines, config=config) as gateway:
            async with aiohttp.ClientSession(gateway.url) as http:

                async def ask() -> str:
                    async with http.post(CHAT, json=chat(max_tokens=1)) as answer:
                        assert answer.status == 200
                        await answer.read()
                        return answer.headers["routing-strategy"]

                assert await ask() == "round-robin"
                write(engines, "power-of-two")
                async with asyncio.timeout(10):  # discovery looks at its file once a second
                    while set(await asyncio.gather(*[ask() for _ in range(8)])) != {"power-of-two"}:
                        pass


@dataclass
class Adapters:
    """An engine that says which adapters it has loaded, and which of them run, as vLLM does."""

    name: str
    loaded: list[str]
    running: str = ""
    most: int = 1
    asked: list[str] = field(default_factory=list)
    address: str = ""

    async def models(self, _: web.Request) -> web.Response:
        """Says what it serves."""
        entries = [{"id": MODEL, "object": "model"}]
        entries += [{"id": name, "object": "model", "parent": MODEL} for name in self.loaded]
        return web.json_response({"object": "list", "data": entries})

    async def metrics(self, _: web.Request) -> web.Response:
        """Says how it is."""
        labels = f'max_lora="{self.most}",running_lora_adapters="{self.running}",waiting_lora_adapters=""'
        text = f'vllm:num_requests_running{{model_name="{MODEL}"}} 1\nvllm:lora_requests_info{{{labels}}} 1\n'
        return web.Response(text=text)

    async def chat(self, request: web.Request) -> web.Response:
        """Answers in a word."""
        model = (await request.json())["model"]
        self.asked.append(model)
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({"model": model, "choices": [choice], "usage": usage})

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Adapters]:
        """Listens."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post(CHAT, self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.address = f"127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


async def test_an_adapter_goes_where_it_is_loaded_and_best_where_it_runs(directory: Path) -> None:
    async with Adapters("pod-a", ["lora-1"]).serve() as one, Adapters("pod-b", []).serve() as two:
        rows = [{"name": each.name, "address": each.address, "models": [MODEL]} for each in (one, two)]
        config = {"engines": {"models_interval_ms": 100, "idle_interval_ms": 50, "scrape_interval_ms": 50}}
        async with (
            Gateway(directory, pods=rows, config=config) as gateway,
            aiohttp.ClientSession(gateway.url) as http,
        ):

            async def served(count: int = 1) -> set[str | None]:
                """By whom, None where by nobody: with as many at once as load would spread."""

                async def ask() -> str | None:
                    body = chat(max_tokens=1) | {"model": "lora-1"}
                    async with http.post(CHAT, json=body) as answer:
                        await answer.read()
                        return answer.headers["target-pod"] if answer.status == 200 else None

                return set(await asyncio.gather(*[ask() for _ in range(count)]))

            async def until(pods: set[str | None], count: int = 6) -> None:
                async with asyncio.timeout(10):
                    while await served(count) != pods:
                        await asyncio.sleep(0.05)

            await until({"pod-a"})
            two.loaded, two.running, one.running = ["lora-1"], "lora-1", "lora-2"
            await until({"pod-b"})  # where it runs, though both have it
            two.running = ""
            one.running = "lora-1"
            await until({"pod-a"})
            one.loaded = []
            await until({"pod-b"})
            two.loaded = []
            await until({None})
