"""Policies that keep requests together, through a real Envoy and in both lanes: by session, by key, by prompt, by user, in pairs."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.gateway import MODEL, Gateway, chat, fast_engines, new_id

CHAT = "/v1/chat/completions"
LANES = ("stream", "native")
PODS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=LANES)
async def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    config: dict[str, dict[str, Any]] = {
        "responses": {"accounting": request.param},
        "auth": {"mode": "header"},
        "routing": {"policy": "random"},
    }
    directory = tmp_path_factory.mktemp("together")
    async with fast_engines(PODS) as engines, Gateway(directory, engines=engines, config=config) as shared:
        yield shared


@pytest_asyncio.fixture(loop_scope="session")
async def http(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(gateway.url) as session:
        yield session


async def ask(http: aiohttp.ClientSession, prompt: str = "hello", **headers: str) -> dict[str, str]:
    """The answer's headers."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(CHAT, json=chat(prompt, max_tokens=1), headers=sent) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
        return dict(answer.headers)


async def pods(http: aiohttp.ClientSession, times: int, **asked: str) -> Counter[str]:
    return Counter([(await ask(http, **asked))["target-pod"] for _ in range(times)])


async def test_a_session_stays_where_it_began(http: aiohttp.ClientSession) -> None:
    first = await ask(http, routing_strategy="session-affinity")
    session = first["x-session-id"]
    assert base64.b64decode(session).decode() == first["target-pod-ip"]
    found = await pods(http, 12, routing_strategy="session-affinity", x_session_id=session)
    assert found == {first["target-pod"]: 12}


async def test_a_session_names_no_address_of_its_own(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    forged = base64.b64encode(b"169.254.169.254:80").decode()
    for session in (forged, "nonsense", "", "=" * 3000):
        answer = await ask(http, routing_strategy="session-affinity", x_session_id=session)
        assert answer["target-pod"] in gateway.engines
        assert base64.b64decode(answer["x-session-id"]).decode() == answer["target-pod-ip"]


async def test_without_the_policy_there_is_no_session(http: aiohttp.ClientSession) -> None:
    assert "x-session-id" not in await ask(http)


@pytest.mark.parametrize("policy", ["session-affinity", "bounded-load"])
async def test_a_key_stays_with_its_pod(http: aiohttp.ClientSession, policy: str) -> None:
    homes: set[str] = set()
    for number in range(12):
        found = await pods(http, 3, routing_strategy=policy, x_aibrix_session_key=f"key-{number}")
        assert len(found) == 1
        homes |= found.keys()
    assert len(homes) > 1


async def test_a_prompt_goes_where_it_was(http: aiohttp.ClientSession) -> None:
    homes: set[str] = set()
    for number in range(8):
        shared = f"{new_id()} {number} " * 40
        asked = [f"{shared} question {turn}" for turn in range(4)]
        found = {(await ask(http, prompt, routing_strategy="prefix-cache"))["target-pod"] for prompt in asked}
        assert len(found) == 1
        homes |= found
    assert len(homes) > 1


async def test_users_are_told_apart(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    answer = await ask(http, routing_strategy="vtc-basic", user="ann", x_request_id=request_id)
    assert answer["routing-strategy"] == "vtc-basic"
    answer = await ask(http, routing_strategy="vtc-basic")
    assert answer["routing-strategy"] == "least-request"
    assert (await gateway.report(request_id))["policy"] == "vtc-basic"


async def test_control_headers_do_not_reach_a_pod(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    forged = {"x_prefiller_host_port": "169.254.169.254:80", "x_session_id": "x", "x_aibrix_session_key": "k"}
    await ask(http, x_request_id=request_id, routing_strategy="session-affinity", **forged)
    ((_, seen, _),) = gateway.received(request_id)
    assert not {name.replace("_", "-") for name in forged} & seen.keys()


async def test_prefill_and_decode_are_of_one_roleset(directory: Path) -> None:
    async with fast_engines(4) as engines:
        roles = [("one", "prefill"), ("one", "decode"), ("two", "prefill"), ("two", "decode")]
        pairs = {
            engine.options.name: {"roleset-name": roleset, "role-name": role}
            for engine, (roleset, role) in zip(engines, roles, strict=True)
        }
        rows = [
            {
                "name": engine.options.name,
                "address": engine.address,
                "models": [MODEL],
                "labels": pairs[engine.options.name],
            }
            for engine in engines
        ]
        async with (
            Gateway(directory, pods=rows, config={"routing": {"policy": "pd"}}) as gateway,
            aiohttp.ClientSession(gateway.url) as session,
        ):
            by_address = {engine.address: engine.options.name for engine in engines}
            for _ in range(8):
                request_id = new_id()
                answer = await ask(session, x_request_id=request_id)
                decode = answer["target-pod"]
                (seen,) = [
                    each.headers
                    for engine in engines
                    for each in engine.requests
                    if each.headers.get("x-request-id") == request_id
                ]
                prefill = by_address[seen["x-prefiller-host-port"]]
                assert (pairs[decode]["role-name"], pairs[prefill]["role-name"]) == ("decode", "prefill")
                assert pairs[decode]["roleset-name"] == pairs[prefill]["roleset-name"]
                assert answer["prefill-target-pod"] == prefill
