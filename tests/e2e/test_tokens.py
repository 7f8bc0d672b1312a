"""Prompts counted through a real Envoy and in both lanes: by an encoding, by a tokenizer of its own, by the pods themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from envoy_extproc.explain import there
from envoy_extproc.server.explaining import Question
from tests.support import encoding
from tests.support.gateway import MODEL, Gateway, chat, fast_engines, new_id
from tests.support.lanes import LANES
from tests.support.tokenizer import Tokenizer, counted, tokenizer

CHAT = "/v1/chat/completions"
# 100 tokens part the profiles. By their bytes, a quarter of each, these two fall on the other side than by their tokens.
FEW = "hello" * 100
MANY = "a, b! " * 40
PROFILES = {
    "profiles": {
        "few": {"routingStrategy": "random", "routingConfig": {"promptTokensLt": 100}},
        "many": {"routingStrategy": "round-robin", "routingConfig": {"promptTokensGte": 100}},
    }
}


@asynccontextmanager
async def gateway(
    directory: Path, lane: str, pod: Tokenizer, tokens: Mapping[str, Any], **model: Any
) -> AsyncIterator[tuple[Gateway, aiohttp.ClientSession]]:
    """A gateway before two addresses of one pod: one would leave nothing to choose."""
    config: dict[str, Mapping[str, Any]] = {
        "responses": {"accounting": lane},
        "models": {MODEL: {"config": PROFILES, **model}},
        "tokens": tokens,
    }
    pods = [pod.pod("pod-a"), {**pod.pod("pod-b"), "address": pod.address.replace("127.0.0.1", "127.0.0.2")}]
    async with Gateway(directory, pods=pods, config=config) as made, aiohttp.ClientSession(made.url) as http:
        yield made, http


async def asked(
    made: Gateway, http: aiohttp.ClientSession, prompt: str, **headers: str
) -> tuple[str, dict[str, Any]]:
    """The profile that was found, and the report."""
    request_id = new_id()
    sent = {"x-request-id": request_id, "config-profile": "auto", **headers}
    async with http.post(CHAT, json=chat(prompt), headers=sent) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
        profile = answer.headers["x-aibrix-config-profile"]
        policy = PROFILES["profiles"][profile]["routingStrategy"]
        assert answer.headers["routing-strategy"] == policy
    return profile, await made.report(request_id)


def usage(report: Mapping[str, Any]) -> tuple[str, int]:
    return report["usage_source"], report["gen_ai.usage.input_tokens"]


def count_of(prompt: str) -> int:
    return len(counted({"messages": [{"content": prompt}]})["tokens"])


async def estimates(made: Gateway, reason: str, who: str = "remote") -> float:
    return await made.metric("envoy_extproc_token_estimates_total", tokenizer=who, reason=reason)


async def test_by_default_the_bytes_decide(directory: Path) -> None:
    async with tokenizer() as pod, gateway(directory, "stream", pod, {}) as (made, http):
        assert (await asked(made, http, FEW))[0] == "many"
        profile, report = await asked(made, http, MANY)
        assert (profile, usage(report)) == ("few", ("estimated", 69))
        assert pod.requests == []


@pytest.mark.parametrize("lane", LANES)
async def test_an_encoding_decides(directory: Path, tmp_path: Path, lane: str) -> None:
    encoding.write(tmp_path / "encodings", tokens=encoding.ranks(("hello" * 100,)))
    tokens = {"mode": "tiktoken", "encoding": "small", "cache_dir": str(tmp_path / "encodings")}
    async with tokenizer() as pod, gateway(directory, lane, pod, tokens) as (made, http):
        profile, report = await asked(made, http, FEW)
        assert (profile, usage(report)) == ("few", ("estimated", 1 + 7))
        profile, report = await asked(made, http, MANY)
        assert (profile, usage(report)) == ("many", ("estimated", 240 + 7))
        assert await made.metric("envoy_extproc_token_count_seconds_count", tokenizer="tiktoken") == 2
        assert await made.metric("envoy_extproc_token_estimates_total") == 0
        assert pod.requests == []


@pytest.mark.parametrize("lane", LANES)
async def test_the_pods_decide_each_in_its_turn(directory: Path, lane: str) -> None:
    async with tokenizer() as pod, gateway(directory, lane, pod, {"mode": "remote"}) as (made, http):
        profile, report = await asked(made, http, FEW)
        assert (profile, usage(report)) == ("few", ("estimated", count_of(FEW)))
        profile, report = await asked(made, http, MANY)
        assert (profile, usage(report)) == ("many", ("estimated", count_of(MANY)))
        assert [headers["host"] for headers, _ in pod.requests] == [
            pod.address,
            pod.address.replace("127.0.0.1", "127.0.0.2"),
        ]
        assert [body["messages"] for _, body in pod.requests] == [
            chat(FEW)["messages"],
            chat(MANY)["messages"],
        ]


@pytest.mark.parametrize("lane", LANES)
async def test_a_tokenizer_that_fails_leaves_the_estimate(directory: Path, lane: str) -> None:
    async with tokenizer() as there, tokenizer() as pod:
        tokens = {"mode": "remote", "url": there.url, "timeout_ms": 200}
        async with gateway(directory, lane, pod, tokens) as (made, http):
            assert (await asked(made, http, FEW))[0] == "few"
            failing: list[tuple[str, dict[str, Any]]] = [
                ("status", {"status": 500}),
                ("unreadable", {"body": b'{"count":"many"}'}),
                ("unreadable", {"body": b"[" * 5_000_000}),
                ("timeout", {"delay": 30.0}),
            ]
            for reason, how in failing:
                before = await estimates(made, reason)
                with failure(there, how):
                    profile, report = await asked(made, http, FEW)
                assert (profile, usage(report)[0]) == ("many", "estimated")
                assert usage(report)[1] > 100
                assert await estimates(made, reason) == before + 1
                async with asyncio.timeout(20):  # who failed is left alone for a second
                    while (await asked(made, http, FEW))[0] != "few":
                        await asyncio.sleep(0.2)
            assert pod.requests == []


@contextlib.contextmanager
def failure(there: Tokenizer, how: Mapping[str, Any]) -> Any:
    before = {name: getattr(there, name) for name in how}
    for name, value in how.items():
        setattr(there, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(there, name, value)


async def test_no_header_picks_who_counts(directory: Path) -> None:
    async with tokenizer() as pod, tokenizer() as elsewhere:
        async with gateway(directory, "stream", pod, {"mode": "remote"}) as (made, http):
            forged = {
                "host": elsewhere.address,
                "x-gateway-destination-endpoint": elsewhere.address,
                "x-session-id": elsewhere.address,
                "x-model": elsewhere.url,
            }
            assert (await asked(made, http, FEW, **forged))[0] == "few"
            assert (len(pod.requests), elsewhere.requests) == (1, [])


async def test_an_encoding_that_is_missing_is_said_once_and_estimated(
    directory: Path, tmp_path: Path
) -> None:
    tokens = {"mode": "tiktoken", "encoding": "cl100k_base", "cache_dir": str(tmp_path)}
    async with tokenizer() as pod, gateway(directory, "native", pod, tokens) as (made, http):
        (told,) = [line for line in made.log_lines() if line["event"] == "tokens_estimated"]
        assert (told["level"], told["encoding"]) == ("warning", "cl100k_base")
        assert told["reason"].startswith("its file is not there: cl100k_base.tiktoken, or ")
        for _ in range(3):
            assert (await asked(made, http, FEW))[0] == "many"
        assert await estimates(made, "no-encoding", "tiktoken") == 3
        assert len([line for line in made.log_lines() if line["event"] == "tokens_estimated"]) == 1


@pytest.mark.parametrize("lane", LANES)
async def test_who_leaves_or_stops_while_a_prompt_is_counted_leaves_nothing_behind(
    directory: Path, lane: str
) -> None:
    async with tokenizer() as there, tokenizer() as pod:
        tokens = {"mode": "remote", "url": there.url, "timeout_ms": 5000}
        async with gateway(directory, lane, pod, tokens) as (made, http):
            assert (await asked(made, http, FEW))[0] == "few"
            there.delay = 1.0
            gone = new_id()
            with contextlib.suppress(TimeoutError):
                timeout = aiohttp.ClientTimeout(total=0.5)
                await http.post(CHAT, json=chat(FEW), headers={"x-request-id": gone}, timeout=timeout)
            report = await made.report(gone)
            assert (report["outcome"], report["pod"]) == ("aborted", None)
            await asyncio.sleep(1.5)  # until it was counted, for nobody
            assert await made.metric("envoy_extproc_in_flight_requests") == 0

            asking = asyncio.ensure_future(asked(made, http, FEW))
            while len(there.requests) < 3:
                await asyncio.sleep(0.01)
            stopped = asyncio.ensure_future(made.kill_server(number=signal.SIGTERM))
            profile, report = await asking
            assert (profile, usage(report)) == ("few", ("estimated", count_of(FEW)))
            await stopped
            ids = [line["request_id"] for line in made.reports()]
            assert len(ids) == len(set(ids)) == 3
            assert len(pod.chats) == 2


@pytest.mark.parametrize("lane", LANES)
async def test_the_engines_own_count_decides_and_explains(directory: Path, lane: str) -> None:
    """The simulated engine takes four characters for a token, however many bytes they are."""
    config: dict[str, Mapping[str, Any]] = {
        "responses": {"accounting": lane},
        "models": {MODEL: {"config": PROFILES}},
        "tokens": {"mode": "remote"},
    }
    prompt = "\u4e2d\u6587" * 100
    async with fast_engines(2) as engines, Gateway(directory, engines=engines, config=config) as made:
        async with aiohttp.ClientSession(made.url) as http:
            profile, report = await asked(made, http, prompt)
        assert (profile, usage(report)) == ("few", ("reported", 54))
        body = json.dumps(chat(prompt)).encode()
        question = Question(headers=(("config-profile", "auto"),), body=body)
        told = (await there(made.admin_url(), question, None)).explanation
        assert told is not None
        assert (told.policy, told.prompt_tokens, told.tokenizer) == ("random", 54, "remote")
        assert "The prompt has 54 tokens, counted by remote." in told.because
        assert await made.metric("envoy_extproc_token_estimates_total") == 0
