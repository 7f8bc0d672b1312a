"""A prompt that the chosen pod refused and another one computed, through a real Envoy and in both lanes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from envoy_extproc.simulation.stack import free_port
from tests.support.canned import Answer, canned, head
from tests.support.gateway import Gateway, fast_engines, new_id

DEAD, FULL = "dead", "full"
"""Models: two pods of each are well, and a third one refuses connections, or every request with 503."""

REFUSAL = Answer((head("application/json", "content-length: 2", status="503 Service Unavailable"), b"{}"))


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["stream", "native"])
async def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    async with fast_engines(2, models=(DEAD, FULL)) as engines, canned() as full:
        full.default = REFUSAL
        bad = [("pod-dead", f"127.0.0.1:{free_port()}", DEAD), ("pod-full", full.address, FULL)]
        pods = [
            {"name": name, "address": address, "models": [model], "engine": "generic"}
            for name, address, model in bad
        ]
        config: dict[str, dict[str, Any]] = {
            "responses": {"accounting": request.param},
            # Nothing but its memory of prompts keeps a request from a pod that has failed.
            "routing": {"policy": "prefix-cache", "breaker": {"enabled": False}},
        }
        directory = tmp_path_factory.mktemp("retried")
        async with Gateway(directory, engines=engines, pods=pods, config=config) as shared:
            yield shared


@pytest_asyncio.fixture(loop_scope="session")
async def http(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(gateway.url) as session:
        yield session


async def ask(gateway: Gateway, http: aiohttp.ClientSession, model: str, prompt: str) -> dict[str, Any]:
    """The report."""
    request_id = new_id()
    body = {"model": model, "prompt": prompt, "max_tokens": 1}
    async with http.post("/v1/completions", json=body, headers={"x-request-id": request_id}) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    return await gateway.report(request_id)


@pytest.mark.parametrize("model", [DEAD, FULL])
async def test_the_next_turn_goes_to_the_pod_that_served(
    gateway: Gateway, http: aiohttp.ClientSession, model: str
) -> None:
    said = ""
    first: dict[str, Any] = {"attempts": 1}
    while first["attempts"] == 1:  # until the bad pod is the first to be asked: one time in three
        said = f"{new_id()} " * 40
        first = await ask(gateway, http, model, said)
    assert first["chosen"] == f"pod-{model}"
    assert first["pod"] != first["chosen"]
    for _ in range(3):
        said += f"{new_id()} " * 10
        turn = await ask(gateway, http, model, said)
        assert (turn["chosen"], turn["pod"], turn["attempts"]) == (first["pod"], first["pod"], 1)
        assert turn["endpoint"]["prefix_match"] > 0.5


async def test_what_was_matched_is_counted(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    said = f"{new_id()} " * 40
    for _ in range(2):
        await ask(gateway, http, FULL, said)
    tokens = "envoy_extproc_prefix_prompt_tokens_total"
    assert 0 < await gateway.metric(tokens, part="matched") < await gateway.metric(tokens, part="all")
    assert await gateway.metric("envoy_extproc_prefix_blocks") > 0


async def test_twice_as_much_is_remembered_as_the_engine_has_room_for(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    pod = (await ask(gateway, http, FULL, f"{new_id()} " * 40))["pod"]
    options = gateway.engines[pod].options
    room = min(31_250, 2 * options.kv_blocks * options.block_size // 64)
    async with asyncio.timeout(5):
        while await gateway.metric("envoy_extproc_prefix_blocks_limit", endpoint=pod) != room:
            await asyncio.sleep(0.1)
