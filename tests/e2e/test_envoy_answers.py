"""What Envoy answers itself: OpenAI's shape, and when to come again where that helps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from envoy_extproc.simulation.stack import free_port
from tests.support.canned import Answer, canned, head
from tests.support.gateway import MODEL, Gateway, chat, fast_engines

CHAT = "/v1/chat/completions"


async def refusal(
    gateway: Gateway, body: Any = None, **headers: str
) -> tuple[int, Sequence[str], dict[str, Any]]:
    """Status, every `retry-after` and the error of an answer."""
    async with (
        aiohttp.ClientSession(gateway.url) as http,
        http.post(CHAT, json=body or chat(), headers=headers) as answer,
    ):
        assert answer.content_type == "application/json"
        error = (await answer.json())["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        return answer.status, answer.headers.getall("retry-after", []), error


async def test_no_pod_can_be_reached(directory: Path) -> None:
    dead = [{"name": "dead", "address": f"127.0.0.1:{free_port()}", "models": [MODEL]}]
    async with Gateway(directory, pods=dead) as gateway:
        status, retry_after, error = await refusal(gateway)
    assert (status, retry_after) == (503, ["1"])
    assert (error["type"], error["code"]) == ("api_error", "service_unavailable")


async def test_no_server_and_closed(directory: Path) -> None:
    async with (
        fast_engines(1) as engines,
        Gateway(directory, engines=engines, config={"envoy": {"fail_open": False}}) as gateway,
    ):
        await gateway.kill_server()
        status, retry_after, error = await refusal(gateway)
    assert (status, retry_after) == (503, ["1"])
    assert error["message"] == "The gateway cannot route requests at the moment."


async def test_a_pod_that_speaks_no_http_is_no_503(directory: Path) -> None:
    async with canned() as upstream, Gateway(directory, pods=[upstream.pod()]) as gateway:
        upstream.default = Answer((b"no such protocol\r\n\r\n",), close=True)
        status, retry_after, error = await refusal(gateway)
    assert (status, retry_after) == (502, [])
    assert error["code"] == "service_unavailable"


async def test_what_the_server_answers_stays_as_it_is(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(yaml.safe_dump({"endpoints": []}))
    async with Gateway(directory, config={"discovery": {"static": {"file": str(path)}}}) as gateway:
        status, retry_after, error = await refusal(gateway)
        assert (status, retry_after) == (503, ["1"])
        assert (error["type"], error["message"]) == ("overloaded_error", "No endpoint is ready.")
        status, retry_after, error = await refusal(gateway, **{"routing-strategy": "guess"})
        assert (status, retry_after, error["param"]) == (400, [], "routing-strategy")


async def test_what_an_engine_answers_stays_as_it_is(directory: Path) -> None:
    body = b'{"error":{"message":"full","type":"ServiceUnavailableError","param":null,"code":503}}'
    own = head("application/json", f"content-length: {len(body)}", status="503 Service Unavailable") + body
    async with canned() as upstream, Gateway(directory, pods=[upstream.pod()]) as gateway:
        upstream.default = Answer((own,))
        status, retry_after, error = await refusal(gateway)
    assert (status, retry_after, error["message"]) == (503, [], "full")


async def test_a_body_too_large(directory: Path) -> None:
    config = {"server": {"max_body_bytes": 100_000}}
    async with fast_engines(1) as engines, Gateway(directory, engines=engines, config=config) as gateway:
        status, retry_after, error = await refusal(gateway, chat("x" * 300_000))
    assert (status, retry_after, error["code"]) == (413, [], "request_too_large")
