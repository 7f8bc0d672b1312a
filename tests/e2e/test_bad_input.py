"""Every bad input gets a clear OpenAI-style answer, is counted, and says nothing about our insides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import openai
import pytest

from tests.support.gateway import MODEL, Gateway, chat, new_id

CHAT = "/v1/chat/completions"


def body_of(**more: Any) -> bytes:
    return json.dumps(chat(**more)).encode()


BAD: Mapping[str, tuple[bytes, dict[str, str], int, str | None, str]] = {
    # name: body, headers, status, code, a word of the message
    "bad JSON": (b'{"model": "llama', {}, 400, None, "JSON"),
    "empty object": (b"{}", {}, 400, None, "model"),
    "not an object": (b'["model"]', {}, 400, None, "object"),
    "no model": (b'{"messages": []}', {}, 400, None, "model"),
    "model is a number": (b'{"model": 3}', {}, 400, None, "model"),
    "model is empty": (b'{"model": ""}', {}, 400, None, "model"),
    "unknown model": (body_of().replace(MODEL.encode(), b"nobody"), {}, 404, "model_not_found", "nobody"),
    "newline in the model": (b'{"model": "a\\r\\nx: y"}', {}, 404, "model_not_found", "does not exist"),
    "invalid UTF-8": (b'{"model": "llama-3-8b", "user": "\xff\xfe"}', {}, 400, None, "UTF-8"),
    "UTF-16": ('{"model": "llama-3-8b"}'.encode("utf-16"), {}, 400, None, "UTF-8"),
    "nested too deeply": (b'{"model":"llama-3-8b","x":' + b"[" * 100_000, {}, 400, None, "JSON"),
    "compressed": (b"\x1f\x8b\x08", {"content-encoding": "gzip"}, 400, None, "gzip"),
    "unknown policy": (body_of(), {"routing-strategy": "guess"}, 400, None, "guess"),
    "a pin, which is off": (body_of(), {"target-pod-ip": "127.0.0.1:1"}, 400, None, "target-pod-ip"),
    "too large": (body_of(prompt="x" * 1_100_000), {}, 413, "request_too_large", "larger"),
}


async def in_two(body: bytes) -> AsyncIterator[bytes]:
    """So that Envoy does not see too much of a body before its headers are answered: then it would refuse by itself."""
    yield body[:10]
    if len(body) > 1_000_000:
        await asyncio.sleep(0.5)
    yield body[10:]


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_answered_and_counted(
    gateway: Gateway, http: aiohttp.ClientSession, name: str
) -> None:
    body, headers, status, code, word = BAD[name]
    request_id = new_id()
    before = await gateway.metric("envoy_extproc_requests_total", outcome="refused")
    sent = {"x-request-id": request_id, "content-length": str(len(body)), **headers}
    async with http.post(CHAT, data=in_two(body), headers=sent) as answer:
        text = await answer.text()
        assert answer.status == status
        assert answer.content_type == "application/json"
        assert answer.headers["x-request-id"] == request_id
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert word in error["message"]
    assert "Traceback" not in text
    assert "File " not in text
    report = await gateway.report(request_id)
    assert (report["outcome"], report["error.type"], report["status"]) == ("refused", "client", status)
    assert await gateway.metric("envoy_extproc_requests_total", outcome="refused") == before + 1
    assert gateway.received(request_id) == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_envoys_own_refusal_of_a_large_body(gateway: Gateway, chunked: bool) -> None:
    """Without a length Envoy is the first to see that a body is too large: the same answer, the same count."""
    request_id = new_id()
    large = b'{"model":"llama-3-8b","messages":"' + b"x" * 1_500_000
    headers = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    if chunked:
        writer.write(
            headers + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(large) + large + b"\r\n0\r\n\r\n"
        )
    else:
        writer.write(headers + b"content-length: %d\r\n\r\n" % len(large) + large)
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"}}")
    writer.close()
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == "request_too_large"
    report = await gateway.report(request_id)
    assert (report["status"], report["error.type"]) == (413, "client")


async def test_official_client_understands_each_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model=MODEL, messages=[], extra_headers={"routing-strategy": "?"}
        )
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 1_100_000}]
        )
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama-3-8b"}',
        b'{"model":"llama-3-8b","messages":"notalist"}',
        b'{"model":"llama-3-8b","messages":[],"stream_options":{"include_usage":true}}',
    ],
)
async def test_what_an_engine_judges_passes_to_it(
    gateway: Gateway, http: aiohttp.ClientSession, body: bytes
) -> None:
    request_id = new_id()
    async with http.post(CHAT, data=body, headers={"x-request-id": request_id}) as answer:
        theirs = await answer.read()
        status = answer.status
        assert answer.headers["target-pod"] in gateway.engines
    (pod, _, sent), *_ = gateway.received(request_id)
    assert sent == body
    direct = f"http://{gateway.engines[pod].address}{CHAT}"
    async with aiohttp.ClientSession() as session, session.post(direct, data=body) as answer:
        assert (answer.status, await answer.read()) == (status, theirs)


STEERING = {
    "target-pod": "169.254.169.254:80",
    "x-gateway-destination-endpoint": "169.254.169.254:80",
    "x-gateway-destination-endpoint-subset": "169.254.169.254:80",
    "x-gateway-model-name": "spoofed",
    "model": "spoofed",
    "x-model": "spoofed",
    "endpoint-load-metrics-format": "TEXT",
    "config-profile": "auto",
    "external-filter": "!no-such-label",
    "x-session-id": "MTY5LjI1NC4xNjkuMjU0Ojgw",
    "x-aibrix-session-key": "k",
    "x-llm-d-inference-objective": "o",
    "x-gateway-inference-fairness-id": "f",
    "x-llm-d-slo-ttft-ms": "1",
    "x-prefiller-host-port": "169.254.169.254:80",
    "x-prefiller-url": "http://169.254.169.254",
    "x-encoder-hosts-ports": "169.254.169.254:80",
    "x-data-parallel-host-port": "169.254.169.254:80",
    "x-kv-cache-source-host-port": "169.254.169.254:80",
}


async def test_no_client_header_picks_an_address(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    headers = {"x-request-id": request_id, **STEERING}
    async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        assert answer.status == 200
        pod = answer.headers["target-pod"]
    seen_by, seen, _ = gateway.received(request_id)[0]
    assert seen_by == pod
    assert seen["target-pod"] == gateway.engines[pod].address
    assert seen["x-gateway-destination-endpoint"].split(",")[0] == gateway.engines[pod].address
    assert seen["model"] == seen["x-gateway-model-name"] == MODEL
    assert seen["endpoint-load-metrics-format"] == "TEXT"  # ours: asked of every engine
    overwritten = {
        *("target-pod", "x-gateway-destination-endpoint", "model", "x-gateway-model-name"),
        "endpoint-load-metrics-format",
    }
    assert not (STEERING.keys() - overwritten) & seen.keys()


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/v1/none?x=1")])
async def test_no_client_header_picks_an_address_on_paths_that_are_not_read(
    gateway: Gateway, http: aiohttp.ClientSession, method: str, path: str
) -> None:
    request_id = new_id()
    headers = {"x-request-id": request_id, **STEERING}
    del headers["x-model"]  # which is honoured there
    async with http.request(method, path, headers=headers, data=b"{}" if method == "POST" else None):
        pass
    _, seen, _ = gateway.received(request_id)[0]
    ours = {engine.address for engine in gateway.engines.values()}
    assert {seen[name].split(",")[0] for name in ("target-pod", "x-gateway-destination-endpoint")} <= ours
    assert not (STEERING.keys() - {"target-pod", "x-gateway-destination-endpoint"}) & seen.keys()


async def test_credentials_reach_the_engine_and_no_log(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    secret = "Bearer sk-very-secret-0123456789"
    headers = {"x-request-id": request_id, "authorization": secret, "routing-strategy": "no-such-policy"}
    async with http.post(CHAT, json=chat(), headers=headers) as answer:
        assert answer.status == 400
    del headers["routing-strategy"]
    async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        await answer.read()
    assert gateway.received(request_id)[0][1]["authorization"] == secret
    await gateway.report(request_id)
    assert "very-secret" not in json.dumps(gateway.log_lines())
