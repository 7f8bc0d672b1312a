"""OpenAI traffic through a real Envoy: routed, accounted to the token, and the client none the wiser."""

from __future__ import annotations

import io
import json

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.gateway import MODEL, Gateway, chat, new_id


async def chunks_of(client: openai.AsyncOpenAI, request_id: str, **more: object) -> list[ChatCompletionChunk]:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "tell me"}],
        max_tokens=7,
        stream=True,
        extra_headers={"x-request-id": request_id},
        **more,  # type: ignore[call-overload]
    )
    return [chunk async for chunk in stream]


async def test_official_client_streams_and_sees_no_usage(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    request_id = new_id()
    chunks = await chunks_of(client, request_id)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    report = await gateway.report(request_id)
    assert report["usage_source"] == "reported"
    assert report["gen_ai.usage.output_tokens"] == 7
    assert report["gen_ai.usage.input_tokens"] > 0
    assert report["ttft"] > 0
    assert report["outcome"] == "success"


async def test_official_client_that_asks_for_usage_gets_it(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    request_id = new_id()
    chunks = await chunks_of(client, request_id, stream_options={"include_usage": True})
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert (await gateway.report(request_id))["gen_ai.usage.output_tokens"] == 7


@pytest.mark.parametrize(
    "options",
    [
        {"include_usage": False},
        {"include_usage": "off"},
        {"include_usage": None},
        {"include_usage": 0, "continuous_usage_stats": True},
        None,
    ],
    ids=json.dumps,
)
async def test_usage_not_asked_for_is_hidden_and_counted(
    gateway: Gateway, http: aiohttp.ClientSession, options: object
) -> None:
    request_id = new_id()
    body = chat(max_tokens=5, stream=True, stream_options=options)
    async with http.post("/v1/chat/completions", json=body, headers={"x-request-id": request_id}) as answer:
        text = await answer.text()
    assert '"usage"' not in text
    assert text.endswith("data: [DONE]\n\n")
    report = await gateway.report(request_id)
    assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 5)


@pytest.mark.parametrize(
    "options", [{}, {"continuous_usage_stats": True}, {"include_usage": "Yes"}], ids=json.dumps
)
async def test_usage_that_an_engine_writes_by_itself_is_shown(
    gateway: Gateway, http: aiohttp.ClientSession, options: object
) -> None:
    """To vLLM, options that do not say no mean yes."""
    request_id = new_id()
    body = json.dumps(chat(max_tokens=5, stream=True, stream_options=options)).encode()
    async with http.post("/v1/chat/completions", data=body, headers={"x-request-id": request_id}) as answer:
        text = await answer.text()
    assert '"choices":[],"usage":{' in text
    assert gateway.received(request_id)[0][2] == body
    report = await gateway.report(request_id)
    assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 5)


async def test_options_that_an_engine_refuses_are_for_it_to_refuse(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    request_id = new_id()
    body = chat(stream=True, stream_options={"include_usage": "perhaps"})
    async with http.post("/v1/chat/completions", json=body, headers={"x-request-id": request_id}) as answer:
        assert answer.status == 400
        assert "valid boolean" in await answer.text()
    assert json.loads(gateway.received(request_id)[0][2]) == body


async def test_official_client_without_stream(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    request_id = new_id()
    completion = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "tell me"}],
        max_tokens=4,
        extra_headers={"x-request-id": request_id},
    )
    assert completion.id == f"chatcmpl-{request_id}"
    assert completion.usage is not None
    report = await gateway.report(request_id)
    assert report["gen_ai.usage.output_tokens"] == completion.usage.completion_tokens == 4
    assert report["gen_ai.usage.input_tokens"] == completion.usage.prompt_tokens


async def test_official_client_completion_and_embedding(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    ids = [new_id(), new_id()]
    completion = await client.completions.create(
        model=MODEL, prompt="once upon", max_tokens=3, extra_headers={"x-request-id": ids[0]}
    )
    embedding = await client.embeddings.create(
        model=MODEL, input=["a", "b"], extra_headers={"x-request-id": ids[1]}
    )
    assert completion.usage is not None
    reports = [await gateway.report(each) for each in ids]
    assert [each["gen_ai.operation.name"] for each in reports] == ["text_completion", "embeddings"]
    assert reports[0]["gen_ai.usage.output_tokens"] == 3
    assert reports[1]["gen_ai.usage.input_tokens"] == embedding.usage.prompt_tokens
    assert len(embedding.data) == 2


async def test_official_client_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == [MODEL]


async def test_official_client_raises_what_openai_would(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody", messages=[])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_answer_says_who_served_and_keeps_its_length(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    request_id = new_id()
    async with http.post(
        "/v1/chat/completions", json=chat(max_tokens=2), headers={"x-request-id": request_id}
    ) as answer:
        await answer.read()
        headers = answer.headers
    assert headers["x-request-id"] == headers["request-id"] == request_id
    assert headers["routing-strategy"] == "least-request"
    pod = headers["target-pod"]
    assert headers["target-pod-ip"] == gateway.engines[pod].address
    assert "content-length" in headers
    assert gateway.received(request_id)[0][0] == pod


async def test_body_is_untouched_where_nothing_is_asked(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    request_id = new_id()
    body = (
        b'{ "model" : "llama-3-8b",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}], "seed":'
        b'12345678901234567890123, "x":1, "x":2, "temperature":1.0e0, "max_tokens":2}  '
    )
    async with http.post("/v1/chat/completions", data=body, headers={"x-request-id": request_id}) as answer:
        assert answer.status == 200
    assert gateway.received(request_id)[0][2] == body


async def test_stream_body_differs_by_the_one_member(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    body = b'{"model":"llama-3-8b","messages":[],"n":1,"n":1,"stream":true,"max_tokens":2 }'
    async with http.post("/v1/chat/completions", data=body, headers={"x-request-id": request_id}) as answer:
        await answer.read()
    _, headers, sent = gateway.received(request_id)[0]
    assert sent == body[:-1] + b',"stream_options":{"include_usage":true}}'
    assert headers["content-length"] == str(len(sent))
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(("form", "start"), [("TEXT", "TEXT "), ("json", "JSON {"), ("bin", "BIN ")])
async def test_load_report_on_demand(http: aiohttp.ClientSession, form: str, start: str) -> None:
    headers = {"endpoint-load-metrics-format": form}
    async with http.post("/v1/chat/completions", json=chat(max_tokens=2), headers=headers) as answer:
        assert answer.headers["endpoint-load-metrics"].startswith(start)


async def test_unknown_path_passes_untouched(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    body = bytes(range(256)) * 3000  # no text, no JSON: nobody reads it
    async with http.post(
        "/v1/audio/whatever?x=1", data=io.BytesIO(body), headers={"x-request-id": request_id}
    ) as answer:
        assert answer.status == 404
        assert await answer.json() == {"detail": "Not Found"}
    assert gateway.received(request_id)[0][2] == body
    assert (await gateway.report(request_id))["usage_source"] == "none"


async def test_policy_for_one_request(http: aiohttp.ClientSession) -> None:
    served = []
    for _ in range(6):
        headers = {"routing-strategy": "round-robin"}
        async with http.post("/v1/chat/completions", json=chat(max_tokens=1), headers=headers) as answer:
            served.append(answer.headers["target-pod"])
            assert answer.headers["routing-strategy"] == "round-robin"
    assert served[:3] == served[3:]
    assert len(set(served)) == 3


async def test_in_flight_returns_to_zero(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    request_id = new_id()
    async with http.post(
        "/v1/chat/completions", json=chat(max_tokens=3, stream=True), headers={"x-request-id": request_id}
    ) as answer:
        await answer.read()
    await gateway.report(request_id)
    assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
