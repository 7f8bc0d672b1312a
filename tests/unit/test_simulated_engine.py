"""The simulated engine from outside: bytes like vLLM 0.32's, its refusals, its metrics, and the faults on demand.

`EVENTS` and `ANSWERS` are what a real vLLM 0.32.0 sent; ids, texts and numbers differ, keys and their order may not.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from envoy_extproc.simulation.engine import EngineOptions, Received, run_engine
from envoy_extproc.simulation.faults import Faults
from tests.support.simulated import CHAT, COMPLETIONS, EMBEDDINGS, Client, serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LOREM = "The gateway chooses a pod by the prefix its cache holds already. " * 8

_CHUNK = (
    '{"id":"chatcmpl-8da5","object":"chat.completion.chunk","created":1795250656,"model":"tiny","choices":['
)
_ROLE = _CHUNK + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
_TOKEN = (
    _CHUNK + '{"index":0,"delta":{"content":"ify"},"logprobs":null,"finish_reason":null,"token_ids":null}]'
)
_LAST = _CHUNK + (
    '{"index":0,"delta":{"content":" \'."},"logprobs":null,"finish_reason":"length",'
    '"stop_reason":null,"token_ids":null}]'
)
_FINGERPRINT = ',"system_fingerprint":"vllm-0.32.0-16b828e4"}'
_PROMPT = ',"prompt_token_ids":null,"prompt_text":null}'
_SO_FAR = (
    ',"usage":{"prompt_tokens":18,"total_tokens":18,"completion_tokens":0,"completion_tokens_details":null}'
)
_USAGE = _CHUNK + (
    '],"usage":{"prompt_tokens":18,"total_tokens":26,"completion_tokens":8,'
    '"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0}}' + _FINGERPRINT
)
_TEXT = (
    '{"id":"cmpl-8f68","object":"text_completion","created":1795250657,"model":"tiny","choices":[{"index":0,'
    '"text":" response","logprobs":null,"finish_reason":null,"stop_reason":null,'
    '"prompt_token_ids":null,"token_ids":null}]'
)
_TEXT_LAST = _TEXT.replace('"finish_reason":null', '"finish_reason":"length"')
_TEXT_USAGE = (
    '{"id":"cmpl-8982","object":"text_completion","created":1795250657,"model":"tiny","choices":[],'
    '"usage":{"prompt_tokens":2,"total_tokens":10,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":0}}'
    + _FINGERPRINT
)
INCLUDE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}
# path, stream_options, the events of an answer of two tokens
EVENTS: list[tuple[str, dict[str, bool] | None, list[str]]] = [
    (CHAT, None, [_ROLE + _PROMPT, _TOKEN + "}", _LAST + _FINGERPRINT]),
    (CHAT, INCLUDE, [_ROLE + _PROMPT, _TOKEN + "}", _LAST + "}", _USAGE]),
    (CHAT, CONTINUOUS, [_ROLE + _SO_FAR + _PROMPT, _TOKEN + _SO_FAR + "}", _LAST + _SO_FAR + "}", _USAGE]),
    (COMPLETIONS, None, [_TEXT + "}", _TEXT_LAST + _FINGERPRINT]),
    (COMPLETIONS, INCLUDE, [_TEXT + "}", _TEXT_LAST + "}", _TEXT_USAGE]),
]
_DETAILS = (
    '"system_fingerprint":"vllm-0.32.0-16b828e4","usage":{"prompt_tokens":18,"total_tokens":26,"completion_tokens":8,'
    '"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0,"multimodal_tokens":null},'
    '"completion_tokens_details":null},'
)
ANSWERS = {
    CHAT: '{"id":"chatcmpl-ac38","object":"chat.completion","created":1795250638,"model":"tiny","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"ify","refusal":null,"annotations":null,"audio":null,'
    '"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,'
    '"token_ids":null,"routed_experts":null}],"service_tier":null,' + _DETAILS + '"prompt_logprobs":null,'
    '"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}',
    COMPLETIONS: '{"id":"cmpl-b125","object":"text_completion","created":1795250656,"model":"tiny","choices":['
    '{"index":0,"text":" response","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,'
    '"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,'
    + _DETAILS.replace('"created_cache_tokens":0', '"created_cache_tokens":null')
    + '"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}',
    EMBEDDINGS: '{"id":"embd-9c73","object":"list","created":1795251134,"model":"tiny","data":[{"index":0,'
    '"object":"embedding","embedding":"hIg="}],"usage":{"prompt_tokens":4,"total_tokens":4,"completion_tokens":0,'
    '"prompt_tokens_details":null,"completion_tokens_details":null}}',
    "/v1/models": '{"object":"list","data":[{"id":"tiny","object":"model","created":1795250638,"owned_by":"vllm",'
    '"root":"model","parent":null,"max_model_len":2048,"permission":[{"id":"modelperm-b8cc",'
    '"object":"model_permission","created":1795250638,"allow_create_engine":false,"allow_sampling":true,'
    '"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,'
    '"organization":"*","group":null,"is_blocking":false}]}]}',
}
_INVALID = '{"error":{"message":"1 validation error:\\n  {'
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
# request, status and the whole body, as a real vLLM answered
REFUSALS = [
    (
        '{"model":"tiny", broken',
        400,
        _INVALID
        + "'type': 'json_invalid', 'loc': 'body.17', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', "
        "'ctx': {'error': 'Expecting property name enclosed in double quotes'}}\",\"type\":\"Bad Request\","
        '"param":"body.17","code":400}}',
    ),
    (
        '{"model":"tiny"}',
        400,
        _INVALID
        + "'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict of 1 items>'}\","
        '"type":"Bad Request","param":"body.messages","code":400}}',
    ),
    (
        '{"model":"tiny","messages":"notalist"}',
        400,
        _INVALID + "'type': 'list_type', 'loc': 'body.messages', 'msg': 'Input should be a valid list', "
        '\'input\': \'notalist\'}","type":"Bad Request","param":"body.messages","code":400}}',
    ),
    (
        '{"model":"nope","messages":[{"role":"user","content":"x"}]}',
        404,
        (
            '{"error":{"message":"The model `nope` does not exist. Valid aliases: tiny.","type":"NotFoundError",'
            '"param":"model","code":404}}'
        ),
    ),
    (
        '{"model":"nope","stream":true,"messages":[{"role":"user","content":"x"}]}',
        404,
        (
            '{"error":{"message":"The model `nope` does not exist. Valid aliases: tiny.","type":"NotFoundError",'
            '"param":"model","code":404}}'
        ),
    ),
    (
        '{"messages":[],"stream_options":{"include_usage":true}}',
        400,
        (
            '{"error":{"message":"Stream options can only be defined when `stream=True`. (parameter=stream_options)",'
            '"type":"BadRequestError","param":"stream_options","code":400}}'
        ),
    ),
    (
        '{"messages":[],"temperature":0,"n":2}',
        400,
        (
            '{"error":{"message":"n must be 1 when using greedy sampling, got 2.","type":"BadRequestError",'
            '"param":null,"code":400}}'
        ),
    ),
    (
        '{"max_tokens":4000,"messages":[{"role":"user","content":"x"}]}',
        400,
        (
            '{"error":{"message":"max_tokens=4000 cannot be greater than max_model_len=2048. Please request fewer output '
            'tokens. (parameter=max_tokens, value=4000)","type":"BadRequestError","param":"max_tokens","code":400}}'
        ),
    ),
]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as started:
        yield started


def asks(path: str, **more: Any) -> dict[str, Any]:
    texts: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "def read(self, size):"}]},
        COMPLETIONS: {"prompt": "import os"},
        EMBEDDINGS: {"input": "import os", "encoding_format": "base64"},
    }
    return {"model": "tiny", **texts[path], **({} if path == EMBEDDINGS else {"max_tokens": 2}), **more}


def shape(value: Any) -> Any:
    """Keys in their order at each level, and the types of the leaves."""
    if isinstance(value, dict):
        return [(key, shape(each)) for key, each in value.items()]
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value).__name__


def events(chunks: list[bytes]) -> list[Any]:
    """The decoded events; each is one chunk, and [DONE] the last."""
    assert chunks[-1] == b"data: [DONE]\n\n"
    return [json.loads(chunk.removeprefix(b"data: ").removesuffix(b"\n\n")) for chunk in chunks[:-1]]


@pytest.mark.parametrize(("path", "options", "captured"), EVENTS)
async def test_events_have_the_shape_of_vllm(
    client: Client, path: str, options: dict[str, bool] | None, captured: list[str]
) -> None:
    body = asks(path) if options is None else asks(path, stream_options=options)
    chunks = await client.chunks(body, path)
    assert [shape(event) for event in events(chunks)] == [shape(json.loads(event)) for event in captured]
    assert not any(b'": ' in chunk for chunk in chunks)  # compact, unlike an error event


@pytest.mark.parametrize("path", ANSWERS)
async def test_answers_have_the_shape_of_vllm(client: Client, path: str) -> None:
    answer = await client.json(path, None if path == "/v1/models" else asks(path))
    assert shape(answer) == shape(json.loads(ANSWERS[path]))


@pytest.mark.parametrize(("body", "status", "answer"), REFUSALS)
async def test_refusals_are_those_of_vllm(client: Client, body: str, status: int, answer: str) -> None:
    async with client.request(CHAT, body) as response:
        assert (response.status, await response.text()) == (status, answer)
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, "[]"),
        (CHAT, ""),
        (CHAT, b"\xff".decode("latin-1")),
        (CHAT, "[" * 100_000),
        (CHAT, '{"messages":["x"]}'),
        (CHAT, '{"messages":[],"max_tokens":0}'),
        (CHAT, '{"messages":[],"max_tokens":"many"}'),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]})),
        (COMPLETIONS, "{}"),
        (COMPLETIONS, '{"prompt":{}}'),
        (COMPLETIONS, '{"prompt":[{}]}'),
        (EMBEDDINGS, "{}"),
    ],
)
async def test_what_cannot_be_understood_is_400(client: Client, path: str, body: str) -> None:
    async with client.request(path, body) as response:
        error = json.loads(await response.read())["error"]
    assert response.status == 400
    assert list(error) == ["message", "type", "param", "code"]


@pytest.mark.parametrize(
    ("path", "body", "status", "answer"),
    [
        ("/v1/nope", "{}", 404, b'{"detail":"Not Found"}'),
        ("/", None, 404, b'{"detail":"Not Found"}'),
        (CHAT, None, 405, b'{"detail":"Method Not Allowed"}'),
        ("/health", None, 200, b""),
        ("/ping", None, 200, b""),
        ("/load", None, 200, b'{"server_load":0}'),
        ("/version", None, 200, b'{"version":"0.32.0"}'),
    ],
)
async def test_other_paths(client: Client, path: str, body: str | None, status: int, answer: bytes) -> None:
    async with client.request(path, body) as response:
        assert (response.status, await response.read()) == (status, answer)
        assert status != 405 or response.headers["allow"] == "POST"


async def test_without_a_model_the_only_one_answers(client: Client) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 8}, {"type": "image_url"}]}]
    }
    answer = await client.json(CHAT, body)
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 4 + 5  # the role's 4, and ceil((8 + len("[image_url]")) / 4)


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("x", 1), ("x" * 9, 3), ([1, 2, 3], 3), (["xxxx", "xxxxx"], 3), ([[1], [2, 3]], 3)]
)
async def test_prompt_tokens(client: Client, prompt: Any, tokens: int) -> None:
    answer = await client.json(COMPLETIONS, {"prompt": prompt, "max_tokens": 5})
    choices = len(answer["choices"])
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 5 * choices


async def test_several_choices(client: Client) -> None:
    got = events(await client.chunks(asks(CHAT, n=3, stream_options=INCLUDE)))
    indexes = [choice["index"] for event in got for choice in event["choices"]]
    assert indexes == [0, 1, 2] * 3
    assert got[-1]["usage"]["prompt_tokens"] == 10
    assert got[-1]["usage"]["completion_tokens"] == 6


async def test_max_completion_tokens_goes_before_max_tokens(client: Client) -> None:
    answer = await client.json(CHAT, asks(CHAT, max_tokens=9, max_completion_tokens=4))
    assert answer["usage"]["completion_tokens"] == 4


async def test_greedy_answers_repeat_and_streams_say_the_same(client: Client) -> None:
    body = asks(CHAT, temperature=0, max_tokens=40)
    first, second = [await client.json(CHAT, body) for _ in range(2)]
    streamed = events(await client.chunks(body))
    text = first["choices"][0]["message"]["content"]
    assert text == second["choices"][0]["message"]["content"]
    assert text == "".join(event["choices"][0]["delta"]["content"] for event in streamed)


@pytest.mark.parametrize(
    ("path", "prefix"), [(CHAT, "chatcmpl-"), (COMPLETIONS, "cmpl-"), (EMBEDDINGS, "embd-")]
)
async def test_the_request_id_goes_into_the_id(client: Client, path: str, prefix: str) -> None:
    async with client.request(path, asks(path), x_request_id='my-"42"') as response:
        assert json.loads(await response.read())["id"] == prefix + 'my-"42"'


async def test_usage_null_is_written_when_asked_for() -> None:
    async with serving(usage_null=True) as client:
        got = events(await client.chunks(asks(CHAT, stream_options=INCLUDE)))
        assert [event["usage"] is None for event in got] == [True, True, True, False]
        assert all("usage" not in event for event in events(await client.chunks(asks(CHAT))))


async def test_embeddings_in_both_forms_are_the_same(client: Client) -> None:
    floats = await client.json(EMBEDDINGS, {"input": ["a", "b"]})
    coded = await client.json(EMBEDDINGS, {"input": "b", "encoding_format": "base64"})
    vector = floats["data"][1]["embedding"]
    assert struct.pack(f"<{len(vector)}f", *vector) == base64.b64decode(coded["data"][0]["embedding"])
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    assert (await client.metrics())["generation_tokens_total"] == 0


@pytest.mark.parametrize(
    ("asked", "report"),
    [
        ("JSON", 'JSON {"named_metrics": {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}}'),
        ("text", "TEXT named_metrics.num_requests_waiting=0.0, named_metrics.kv_cache_usage_perc=0.0"),
        ("BIN", None),
    ],
)
async def test_the_load_report(client: Client, asked: str, report: str | None) -> None:
    for body, expected in ((asks(CHAT), report), (asks(CHAT, stream=True), None), ({}, None)):
        async with client.request(CHAT, body, endpoint_load_metrics_format=asked) as response:
            assert response.headers.get("endpoint-load-metrics") == expected


async def test_what_was_received_can_be_looked_at() -> None:
    async with serving(kept_requests=2) as client:
        for number in range(3):
            async with client.request(f"/v1/x?n={number}", str(number), X_Two="b") as response:
                await response.read()
        assert [received.path for received in client.engine.requests] == ["/v1/x?n=1", "/v1/x?n=2"]
        last = client.engine.requests[-1]
        assert isinstance(last, Received)
        assert (last.method, last.body, last.headers["x-two"]) == ("POST", b"2", "b")


async def test_metrics_count(client: Client) -> None:
    for _ in range(2):
        await client.json(CHAT, asks(CHAT, messages=[{"role": "user", "content": LOREM}], max_tokens=5))
    metrics = await client.metrics()
    prompt = 4 + len(LOREM) // 4
    assert metrics["prompt_tokens_total"] == metrics["prefix_cache_queries_total"] == 2 * prompt
    assert metrics["prefix_cache_hits_total"] == (prompt - 1) // 16 * 16
    assert metrics["generation_tokens_total"] == 10
    assert metrics["request_success_total:length"] == 2
    assert metrics["request_success_total:abort"] == 0
    assert metrics["time_to_first_token_seconds_count"] == metrics["e2e_request_latency_seconds_count"] == 2
    assert (
        metrics["inter_token_latency_seconds_count"]
        == metrics["inter_token_latency_seconds_bucket:+Inf"]
        == 8
    )
    assert metrics["num_requests_running"] == metrics["kv_cache_usage_perc"] == 0


async def test_metrics_are_labelled_like_vllms(client: Client) -> None:
    async with client.request("/metrics") as response:
        text = await response.text()
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0\n' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 0.0\n' in text
    assert 'vllm:cache_config_info{block_size="16",' in text
    assert 'num_gpu_blocks="4096"' in text


async def test_a_cached_prompt_is_told_in_usage(client: Client) -> None:
    body = asks(CHAT, messages=[{"role": "user", "content": LOREM}])
    details = [(await client.json(CHAT, body))["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert [each["cached_tokens"] for each in details] == [0, 128]
    assert [each["created_cache_tokens"] for each in details] == [128, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_dropped_at_once(stream: bool) -> None:
    async with serving(tpot_seconds=0.01, max_running=1) as client:
        body = asks(CHAT, max_tokens=1000, stream=stream)
        waits = [asyncio.ensure_future(client.request(CHAT, body).__aenter__()) for _ in range(2)]
        await until(lambda: (client.engine.running, client.engine.waiting) == (1, 1))
        assert (await client.metrics())["kv_cache_usage_perc"] > 0
        await client.session.close()
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await until(lambda: (client.engine.running, client.engine.waiting) == (0, 0))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue(stream: bool) -> None:
    async with serving(max_running=1, max_queued=0) as client:
        async with client.request(CHAT, asks(CHAT, stream=True), simulate="hang=1"):
            async with client.request(CHAT, asks(CHAT, stream=stream)) as response:
                text = await response.text()
            metrics = await client.metrics()
        kind = {"message": BUSY, "type": "Service Unavailable", "param": None, "code": 503}
        spaced = f"data: {json.dumps({'error': kind})}\n\ndata: [DONE]\n\n"
        compact = json.dumps({"error": kind}, separators=(",", ":"))
        assert (response.status, text) == ((200, spaced) if stream else (503, compact))
        assert "retry-after" not in response.headers
        assert metrics["admission_rejections_total:max_num_queued_reqs"] == 1


async def test_tokens_come_in_time() -> None:
    async with serving(ttft_seconds=0.05, tpot_seconds=0.01) as client:
        clock = asyncio.get_running_loop().time
        began = clock()
        async with client.request(CHAT, asks(CHAT, stream=True, max_tokens=6)) as response:
            times = [clock() - began async for _ in response.content.iter_chunks()]
    assert times[0] >= 0.05
    assert times[-1] >= 0.1


async def test_many_streams_at_once() -> None:
    async with serving(max_running=64) as client:
        got = await asyncio.gather(*(client.chunks(asks(CHAT, max_tokens=20)) for _ in range(100)))
        assert {len(chunks) for chunks in got} == {22}
        assert (await client.metrics())["generation_tokens_total"] == 2000


async def test_a_slow_reader_stops_its_own_stream_only() -> None:
    async with serving(max_model_len=40_000) as client:
        async with client.request(
            CHAT, asks(CHAT, stream=True, max_tokens=20_000), simulate="big-event=4000000"
        ) as slow:
            await asyncio.sleep(0.05)
            assert len(await client.chunks(asks(CHAT))) == 4
            assert client.engine.running == 1
            body = await slow.read()
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.count(b"\n\n") == 20_002


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_fault_error(client: Client, path: str, status: int) -> None:
    async with client.request(path, asks(path), simulate=f"error={status}") as response:
        error = json.loads(await response.read())["error"]
    assert (response.status, error["code"], error["param"]) == (status, status, None)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
async def test_an_engine_that_fails_whatever_it_is_asked(path: str) -> None:
    async with serving(faults=Faults(error=500)) as client:

        async def status(asked: str, simulate: str = "") -> int:
            body = asks(path) if asked == path else None
            async with client.request(asked, body, simulate=simulate) as response:
                return int(response.status)

        assert [await status("/health"), await status("/metrics")] == [200, 200]
        assert [await status(path), await status(path, simulate="tokens=1")] == [500, 200]
        client.engine.faults = Faults()
        assert await status(path) == 200


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_fault_error_event(client: Client, count: int) -> None:
    chunks = await client.chunks(asks(CHAT), simulate=f"error-event={count}")
    assert len(chunks) == (2 if count == 0 else 3 + count)
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert chunks[-2].startswith(b'data: {"error": {"message": "EngineCore encountered an issue.')
    assert chunks[-2].endswith(b'"type": "InternalServerError", "param": null, "code": 500}}\n\n')
    assert client.engine.running == 0
    async with client.request(CHAT, asks(CHAT), simulate=f"error-event={count}") as response:
        assert response.status == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
async def test_fault_reset(client: Client, count: int, stream: bool) -> None:
    seen = bytearray()
    with pytest.raises((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
        await client.read_into(seen, asks(CHAT, stream=stream), f"reset={count}")
    assert seen.count(b"\n\n") == (count + 1 if stream and count else 0)
    await until(lambda: client.engine.running == 0)


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_fault_hang(client: Client, count: int) -> None:
    seen = bytearray()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.read_into(seen, asks(CHAT, stream=True), f"hang={count}"), 0.1)
    assert seen.count(b"\n\n") == (count + 1 if count else 0)
    await until(lambda: client.engine.running == 0)


async def test_fault_no_done(client: Client) -> None:
    chunks = await client.chunks(asks(CHAT, stream_options=INCLUDE), simulate="no-done")
    assert len(chunks) == 4
    assert b'"usage":' in chunks[-1]


async def test_fault_no_usage(client: Client) -> None:
    got = events(await client.chunks(asks(CHAT, stream_options=CONTINUOUS), simulate="no-usage"))
    assert not any("usage" in event for event in got)
    assert "system_fingerprint" in got[-1]
    assert "usage" not in await client.json(CHAT, asks(CHAT), simulate="no-usage")


@pytest.mark.parametrize(("more", "end"), [("", b"data: [DONE]"), (",no-done", b'"}')])
async def test_fault_tail(client: Client, more: str, end: bytes) -> None:
    chunks = await client.chunks(asks(CHAT, stream_options=INCLUDE), simulate="tail" + more)
    assert chunks[-1].endswith(end)
    assert all(chunk.endswith(b"\n\n") for chunk in chunks[:-1])


async def test_fault_crlf(client: Client) -> None:
    chunks = await client.chunks(asks(CHAT), simulate="crlf")
    assert len(chunks) == 4
    assert all(chunk.endswith(b"\r\n\r\n") and chunk.count(b"\n") == 2 for chunk in chunks)


async def test_fault_gzip(client: Client) -> None:
    chunks = await client.chunks(asks(CHAT), simulate="gzip")
    unpacker = zlib.decompressobj(wbits=31)
    plain = [unpacker.decompress(chunk) for chunk in chunks]  # each event can be read when it comes
    assert unpacker.eof
    assert len(events(plain)) == 3
    async with client.request(CHAT, asks(CHAT), simulate="gzip", accept_encoding="identity") as response:
        assert response.headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(await response.read()))["object"] == "chat.completion"


@pytest.mark.parametrize(("path", "events_like"), [(CHAT, 2), (COMPLETIONS, 2)])
async def test_fault_lookalike(client: Client, path: str, events_like: int) -> None:
    chunks = await client.chunks(asks(path, max_tokens=4), path, simulate="lookalike")
    assert sum(b'"prompt_tokens":999' in chunk for chunk in chunks) == events_like
    assert sum(b'\\"prompt_tokens\\":999' in chunk for chunk in chunks) == events_like
    assert not any("usage" in event for event in events(chunks))
    assert any(b"tool_calls" in chunk for chunk in chunks) == (path == CHAT)
    answer = await client.json(path, asks(path, max_tokens=4), simulate="lookalike")
    assert answer["usage"]["prompt_tokens"] < 999
    assert '"prompt_tokens": 999' in json.dumps(answer["choices"])


@pytest.mark.parametrize(("tokens", "reason"), [(1, "stop"), (2, "length"), (30, "length")])
async def test_fault_tokens(client: Client, tokens: int, reason: str) -> None:
    answer = await client.json(CHAT, asks(CHAT), simulate=f"tokens={tokens}")
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == reason


async def test_fault_delay_and_big_event(client: Client) -> None:
    began = asyncio.get_running_loop().time()
    chunks = await client.chunks(asks(CHAT), simulate="delay=0.05, big-event=100000")
    assert asyncio.get_running_loop().time() - began >= 0.05
    assert len(chunks[1]) > 100_000
    answer = await client.json(CHAT, asks(CHAT), simulate="big-event=1000")
    assert len(answer["choices"][0]["message"]["content"]) >= 1000


@pytest.mark.parametrize(
    "header", ["nope", "reset", "reset=x", "no-done=1", "error=999", "delay=long", "reset=-1"]
)
async def test_a_fault_nobody_knows_is_400(client: Client, header: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Faults.parse(header)
    async with client.request(CHAT, asks(CHAT), simulate=header) as response:
        assert response.status == 400


async def test_stopping_does_not_wait_for_answers() -> None:
    async with (
        serving() as client,
        client.request(CHAT, asks(CHAT, stream=True), simulate="hang=1") as response,
    ):
        async with asyncio.timeout(1):
            await client.engine.stop()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
        with pytest.raises(RuntimeError):
            _ = client.engine.address


async def test_run_engine_serves_until_cancelled() -> None:
    started = asyncio.Event()
    task = asyncio.ensure_future(run_engine(EngineOptions(port=0), started=started))
    async with asyncio.timeout(2):
        await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_taken_port_is_an_error(client: Client) -> None:
    port = int(client.engine.address.rpartition(":")[2])
    with pytest.raises(OSError, match="address"):
        await run_engine(EngineOptions(port=port))
