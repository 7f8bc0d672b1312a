"""Whoever reaches the ext_proc port can say anything: the server answers or hangs up, counts, and stays up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio

from envoy_extproc._proto import ext_proc_pb2
from tests.support.gateway import MODEL, Gateway, chat, new_id

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
MAX_BODY = 1_000_000  # of the shared gateway

Request = ext_proc_pb2.ProcessingRequest
Response = ext_proc_pb2.ProcessingResponse


@pytest_asyncio.fixture(loop_scope="session")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server_ports[0]}", options=options) as opened:
        yield opened


def open_stream(channel: grpc.aio.Channel) -> Any:
    """A stream that takes bytes, so that they need not make sense."""
    method = channel.stream_stream(
        METHOD, request_serializer=lambda each: each, response_deserializer=Response.FromString
    )
    return method(None)


def request_headers(request_id: str, *, path: str = "/v1/chat/completions", end: bool = False) -> bytes:
    message = Request()
    headers = message.request_headers
    headers.end_of_stream = end
    pairs = {":path": path, ":method": "POST", ":authority": "x", "x-request-id": request_id}
    for name, value in pairs.items():
        each = headers.headers.headers.add()
        each.key, each.raw_value = name, value.encode()
    return message.SerializeToString()


def request_body(body: bytes) -> bytes:
    message = Request()
    message.request_body.body = body
    message.request_body.end_of_stream = True
    return message.SerializeToString()


def response_headers(*, status: str = "200", end: bool = False) -> bytes:
    message = Request()
    for name, value in {":status": status, "content-type": "text/event-stream"}.items():
        each = message.response_headers.headers.headers.add()
        each.key, each.raw_value = name, value.encode()
    attributes = message.attributes["envoy.filters.http.ext_proc"].fields
    attributes["upstream.address"].string_value = "127.0.0.1:1"
    attributes["upstream.request_attempt_count"].number_value = 1
    attributes["response.code_details"].string_value = "via_upstream"
    message.response_headers.end_of_stream = end
    return message.SerializeToString()


def response_body(body: bytes, *, end: bool = False) -> bytes:
    message = Request()
    message.response_body.body = body
    message.response_body.end_of_stream = end
    return message.SerializeToString()


def trailers(kind: str) -> bytes:
    message = Request()
    getattr(message, kind).SetInParent()
    return message.SerializeToString()


EMPTY = b""
FIELD_99 = bytes([0x9A, 0x06, 3]) + b"abc"  # (99 << 3) | 2, three bytes
GOOD_BODY = json.dumps(chat(stream=True)).encode()


async def converse(channel: grpc.aio.Channel, messages: Iterable[bytes]) -> list[Any]:
    """All replies to these messages, until the server hangs up or has nothing more to say."""
    call = open_stream(channel)

    async def read() -> list[Any]:
        replies = []
        while (reply := await call.read()) is not EOF:
            replies.append(reply)
        return replies

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        for message in messages:
            await call.write(message)
        await call.done_writing()
        replies = await reading
        assert await call.code() is grpc.StatusCode.OK
    return replies


def kinds(replies: Sequence[Any]) -> list[str | None]:
    return [reply.WhichOneof("response") for reply in replies]


async def check_alive(gateway: Gateway) -> None:
    """It serves, nothing is held, and nothing went wrong inside."""
    request_id = new_id()
    async with (
        aiohttp.ClientSession(gateway.url) as http,
        http.post(
            "/v1/chat/completions", json=chat(max_tokens=1), headers={"x-request-id": request_id}
        ) as answer,
    ):
        assert answer.status == 200
        assert answer.headers["target-pod"] in gateway.engines
    await gateway.report(request_id)
    async with asyncio.timeout(5):
        while await gateway.metric("envoy_extproc_in_flight_requests"):
            await asyncio.sleep(0.02)
    assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
    assert gateway.servers[0] is not None
    assert gateway.servers[0].returncode is None


@pytest.mark.parametrize("message", [EMPTY, FIELD_99], ids=["empty", "field-99"])
async def test_message_of_no_known_kind_gets_no_reply(
    gateway: Gateway, channel: grpc.aio.Channel, message: bytes
) -> None:
    request_id = new_id()
    before = await gateway.metric("envoy_extproc_unknown_messages_total")
    replies = await converse(
        channel, [message, request_headers(request_id), message, request_body(GOOD_BODY)]
    )
    assert kinds(replies) == ["request_headers", "request_body"]
    assert await gateway.metric("envoy_extproc_unknown_messages_total") == before + 2
    report = await gateway.report(request_id)
    assert (report["outcome"], report["gen_ai.request.model"]) == ("aborted", MODEL)
    await check_alive(gateway)


async def test_unknown_field_beside_a_known_one(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    replies = await converse(channel, [FIELD_99 + request_headers(new_id()) + FIELD_99])
    assert kinds(replies) == ["request_headers"]
    await check_alive(gateway)


async def test_bytes_that_are_no_message(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    call = open_stream(channel)
    async with asyncio.timeout(10):
        await call.write(b"\xff" * 100)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "\\xff" not in str(gateway.log_lines())
    await check_alive(gateway)


@pytest.mark.parametrize(
    "name",
    ["request_body", "response_headers", "response_body", "request_trailers", "response_trailers"],
)
async def test_anything_before_the_request_headers(
    gateway: Gateway, channel: grpc.aio.Channel, name: str
) -> None:
    """Gets the empty reply of its own phase, and changes nothing."""
    early = {
        "request_body": request_body(GOOD_BODY),
        "response_headers": response_headers(),
        "response_body": response_body(b"data: [DONE]\n\n", end=True),
        "request_trailers": trailers("request_trailers"),
        "response_trailers": trailers("response_trailers"),
    }[name]
    request_id = new_id()
    before = await gateway.metric("envoy_extproc_unexpected_messages_total")
    replies = await converse(channel, [early, early, request_headers(request_id), request_body(GOOD_BODY)])
    assert kinds(replies) == [name, name, "request_headers", "request_body"]
    assert not replies[0].HasField("dynamic_metadata")
    assert replies[3].HasField("dynamic_metadata")  # the pod
    assert (await gateway.report(request_id))["unexpected_messages"] == 2
    assert await gateway.metric("envoy_extproc_unexpected_messages_total") == before + 2
    await check_alive(gateway)


async def test_every_message_twice(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    request_id = new_id()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":2}}\n\n'
    once = [
        request_headers(request_id),
        request_body(GOOD_BODY),
        response_headers(),
        response_body(usage + b"data: [DONE]\n\n", end=True),
    ]
    before = await gateway.metric("envoy_extproc_requests_total")
    replies = await converse(channel, [message for message in once for _ in (0, 1)])
    assert kinds(replies) == [
        name
        for name in ("request_headers", "request_body", "response_headers", "response_body")
        for _ in (0, 1)
    ]
    assert replies[6].response_body.response.body_mutation.body == b"data: [DONE]\n\n"
    assert not replies[7].response_body.response.HasField("body_mutation")
    report = await gateway.report(request_id)
    assert (report["outcome"], report["unexpected_messages"]) == ("success", 4)
    assert report["gen_ai.usage.output_tokens"] == 2
    assert await gateway.metric("envoy_extproc_requests_total") == before + 1
    await check_alive(gateway)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e300])
async def test_numbers_that_are_none(gateway: Gateway, channel: grpc.aio.Channel, number: float) -> None:
    """The version of the script and the count of attempts come as doubles."""
    request_id = new_id()
    first, last = Request.FromString(request_headers(request_id)), Request.FromString(response_headers())
    first.metadata_context.filter_metadata["envoy_extproc_lua"].fields["v"].number_value = number
    attributes = last.attributes["envoy.filters.http.ext_proc"].fields
    attributes["upstream.request_attempt_count"].number_value = number
    messages = [first.SerializeToString(), request_body(GOOD_BODY), last.SerializeToString()]
    replies = await converse(channel, messages)
    assert kinds(replies) == ["request_headers", "request_body", "response_headers"]
    await gateway.report(request_id)
    await check_alive(gateway)


async def test_a_thousand_request_headers(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    request_id = new_id()
    replies = await converse(channel, [request_headers(request_id)] * 1000)
    assert kinds(replies) == ["request_headers"] * 1000
    assert (await gateway.report(request_id))["unexpected_messages"] == 999
    await check_alive(gateway)


async def test_a_thousand_routed_request_headers(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    """Without a body the headers alone are routed: once."""
    request_id = new_id()
    replies = await converse(channel, [request_headers(request_id, path="/health", end=True)] * 1000)
    assert sum(reply.HasField("dynamic_metadata") for reply in replies) == 1
    await gateway.report(request_id)
    await check_alive(gateway)


async def test_body_beyond_the_limit(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    request_id = new_id()
    body = b'{"model":"llama-3-8b","messages":"' + b"x" * MAX_BODY + b'"}'
    replies = await converse(channel, [request_headers(request_id), request_body(body)])
    assert kinds(replies) == ["request_headers", "immediate_response"]
    assert replies[1].immediate_response.status.code == 413
    assert json.loads(replies[1].immediate_response.body)["error"]["code"] == "request_too_large"
    assert (await gateway.report(request_id))["outcome"] == "refused"
    await check_alive(gateway)


async def test_message_beyond_what_grpc_takes(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    request_id = new_id()
    call = open_stream(channel)
    async with asyncio.timeout(10):
        await call.write(request_headers(request_id))
        assert (await call.read()).WhichOneof("response") == "request_headers"
        await call.write(request_body(b"x" * (MAX_BODY + 2_000_000)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await gateway.report(request_id))["outcome"] == "aborted"
    await check_alive(gateway)


@pytest.mark.parametrize("messages", [0, 1, 2, 3, 4])
async def test_fifty_abrupt_cancels(gateway: Gateway, channel: grpc.aio.Channel, messages: int) -> None:
    """After so many messages, some with their reply not yet read."""
    before = await gateway.metric("envoy_extproc_requests_total")

    async def one(number: int) -> None:
        said = [
            request_headers(new_id()),
            request_body(GOOD_BODY),
            response_headers(),
            response_body(b'data: {"choi'),
        ][:messages]
        call = open_stream(channel)
        for message in said:
            await call.write(message)
        for _ in range(number % (messages + 1)):
            await call.read()
        call.cancel()

    async with asyncio.timeout(20):
        await asyncio.gather(*map(one, range(50)))
    await check_alive(gateway)
    # A stream cancelled before it reached the server was never there; one that was, is accounted once.
    assert await gateway.metric("envoy_extproc_requests_total") <= before + 51


async def test_endless_event_is_not_kept(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    """An event that never ends passes on: at most `max_event_bytes` of it are held back."""
    request_id = new_id()
    piece = b"x" * 500_000
    messages = [
        request_headers(request_id),
        request_body(GOOD_BODY),
        response_headers(),
        *(response_body(piece) for _ in range(40)),
        response_body(b"", end=True),
    ]
    replies = await converse(channel, messages)
    shown = 0
    for reply in replies[3:]:
        mutation = reply.response_body.response.body_mutation
        if mutation.WhichOneof("mutation") == "body":
            shown += len(mutation.body)
    assert shown == 40 * len(piece)
    report = await gateway.report(request_id)
    assert report["oversized_events"] == 1
    await check_alive(gateway)
