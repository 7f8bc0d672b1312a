"""Bodies and headers made to hurt, through Envoy and both lanes: each gets its answer, and nothing stays behind.

After every test nothing is in flight, no error of our own is counted, and each server is about as large as it was.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.canned import Answer, document, head, stream
from tests.support.gateway import MODEL, Gateway, chat, new_id
from tests.support.lanes import LANES, Lanes, lanes

CHAT = "/v1/chat/completions"
LIMIT = 33_554_432  # `server.max_body_bytes` by default
SLACK = 128 * 1024 * 1024
"""Bytes a server may have grown by: the largest body a few times over, which malloc keeps for the next."""
DEEP = 100_000
JSON_TYPE = {"content-type": "application/json"}
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":100000,"total_tokens":100011}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ANSWER = document(
    b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lanes]:
    async with lanes(tmp_path_factory.mktemp("lanes")) as ready:
        # What any large body brings with it is there from the first: arenas, buffers of gRPC.
        await ready.ask(None, data=lambda: io.BytesIO(b" " * LIMIT), headers=JSON_TYPE)
        yield ready


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def nothing_stays(both: Lanes) -> AsyncIterator[None]:
    before = {lane: resident(both.gateways[lane]) for lane in LANES}
    yield
    for lane in LANES:
        gateway = both.gateways[lane]
        async with asyncio.timeout(10):
            while await gateway.metric("envoy_extproc_in_flight_requests"):
                await asyncio.sleep(0.02)
        assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
        assert await gateway.envoy_stat("http.ingress.ext_proc.envoy_extproc.failure_mode_allowed") == 0
        assert resident(gateway) < before[lane] + SLACK, lane
        assert gateway.servers[0] is not None
        assert gateway.servers[0].returncode is None


def resident(gateway: Gateway) -> int:
    """Bytes of memory that the server has."""
    assert gateway.servers[0] is not None
    pages = Path(f"/proc/{gateway.servers[0].pid}/statm").read_text("ascii").split()[1]
    return int(pages) * 4096


def bomb(megabytes: int) -> bytes:
    """A gzip that becomes so large: a kilobyte for each megabyte."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    start = squeeze.compress(b"") + squeeze.flush(zlib.Z_FULL_FLUSH)
    megabyte = squeeze.compress(b"0" * 1_048_576) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return start + megabyte * megabytes + squeeze.flush()


async def refused(both: Lanes, body: bytes, headers: Mapping[str, str] = JSON_TYPE, **more: Any) -> Any:
    """What both lanes say of a body that goes nowhere; the upstream must not have seen it."""
    received = await both.ask(None, data=lambda: io.BytesIO(body), headers=headers, **more)
    assert both.upstream.requests[received.request_id] == []
    assert received.header["content-type"] == "application/json"
    for report in await both.reports([received]):
        assert (report["outcome"], report["error.type"]) == ("refused", "client")
    return received.status, json.loads(received.body)["error"]


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_a_gigabyte_in_a_megabyte(both: Lanes) -> None:
    squeezed = bomb(1024)
    assert len(squeezed) < 1_200_000
    began = time.monotonic()
    status, error = await refused(both, squeezed, {**JSON_TYPE, "content-encoding": "gzip"})
    assert (status, "gzip" in error["message"]) == (400, True)
    assert time.monotonic() - began < 10


async def test_a_bomb_that_does_not_say_what_it_is(both: Lanes) -> None:
    status, error = await refused(both, bomb(1))
    assert (status, error["code"]) == (400, None)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
@pytest.mark.parametrize("where", ["messages", "model", "stream_options", "x"])
async def test_nested_deeply(both: Lanes, opening: bytes, closing: bytes, where: str) -> None:
    """Engines read no such thing either: Python's decoder stops at a thousand."""
    nested = opening * DEEP + b"1" + closing * DEEP
    body = b'{"model":"%b","stream":true,"%b":%b}' % (MODEL.encode(), where.encode(), nested)
    status, error = await refused(both, body)
    assert (status, "JSON" in error["message"]) == (400, True)


async def test_as_many_brackets_as_fit(both: Lanes) -> None:
    status, error = await refused(both, b"[" * LIMIT)
    assert (status, len(error["message"]) < 500) == (400, True)


@pytest.mark.parametrize("where", ["messages", "tools", "cache_salt"])
async def test_as_many_values_as_fit_where_the_prompt_decides(both: Lanes, where: str) -> None:
    """They are not built: the gateway is no larger behind them than behind a text of as many bytes."""
    values = b"{}," * (LIMIT // 3 - 100) + b"{}"
    body = b'{"model":"%b","messages":[],"%b":[%b]}' % (MODEL.encode(), where.encode(), values)
    headers = {**JSON_TYPE, "routing-strategy": "prefix-cache"}
    answer = await both.ask(ANSWER, data=lambda: io.BytesIO(body), headers=headers)
    assert (answer.status, answer.header["routing-strategy"]) == (200, "least-request")


async def test_one_byte_more_than_fits(both: Lanes) -> None:
    status, error = await refused(both, b"[" * (LIMIT + 1))
    assert (status, error["code"]) == (413, "request_too_large")


async def test_a_form_of_ten_thousand_parts(both: Lanes) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\nb\r\n'
    body = b"".join(part % number for number in range(10_000)) + b"--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    status, error = await refused(both, body, headers, path="/v1/audio/transcriptions")
    assert (status, "parts" in error["message"]) == (400, True)


async def test_a_model_of_a_megabyte(both: Lanes) -> None:
    """Nobody serves it; neither the answer nor the log repeats it."""
    name = "m" * 1_000_000
    status, error = await refused(both, json.dumps(chat() | {"model": name}).encode())
    assert (status, error["code"]) == (404, "model_not_found")
    assert len(error["message"]) < 10_000
    for gateway in both.gateways.values():
        assert all(len(json.dumps(line)) < 20_000 for line in gateway.log_lines())


async def test_a_hundred_thousand_members(both: Lanes) -> None:
    members = {f"k{number}": number for number in range(100_000)}
    body = json.dumps({**chat(stream=True), **members, "stream_options": None}).encode()
    received = await both.ask(stream(USAGE + DONE), data=lambda: io.BytesIO(body), headers=JSON_TYPE)
    assert (received.status, received.body) == (200, DONE)
    sent = json.loads(both.request(received).body)
    assert sent.pop("stream_options") == {"include_usage": True}
    assert len(sent) == len(members) + 3
    await both.report(received)


# -- headers -----------------------------------------------------------------------------------------------------------


async def raw(gateway: Gateway, headers: Mapping[str, str]) -> tuple[int, str]:
    """Status of a request that has these headers and no other but those it needs; and its id."""
    request_id = new_id()
    body = json.dumps(chat()).encode()
    lines = {
        "host": "x", "x-request-id": request_id, "content-type": "application/json", "content-length": str(len(body)),
        "connection": "close", **headers,
    }  # fmt: skip
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    async with asyncio.timeout(10):
        writer.write(f"POST {CHAT} HTTP/1.1\r\n{text}\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        await reader.read()  # to the end: a client that leaves early is another story
    writer.close()
    return status, request_id


async def blamed(gateway: Gateway, request_id: str) -> str | None:
    """Whose fault the report says it was."""
    whose: str | None = (await gateway.report(request_id))["error.type"]
    return whose


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("more", [{f"x-{number}": "1" for number in range(94)}, {"x-large": "x" * 61_200}])
async def test_headers_near_envoys_limits(both: Lanes, lane: str, more: Mapping[str, str]) -> None:
    both.upstream.default = ANSWER
    status, request_id = await raw(both.gateways[lane], more)
    assert status == 200
    assert await blamed(both.gateways[lane], request_id) is None
    (request,) = both.upstream.requests[request_id]
    assert all(request.headers[name] == value for name, value in more.items())


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("more", [{f"x-{number}": "1" for number in range(110)}, {"x-large": "x" * 63_000}])
async def test_headers_that_leave_no_room_for_ours(both: Lanes, lane: str, more: Mapping[str, str]) -> None:
    """It is the client's to send fewer, not to try again."""
    both.upstream.default = ANSWER
    status, request_id = await raw(both.gateways[lane], more)
    assert both.upstream.requests[request_id] == []
    assert status == 431
    assert await blamed(both.gateways[lane], request_id) == "client"


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("more", [{f"x-{number}": "1" for number in range(130)}, {"x-large": "x" * 70_000}])
async def test_headers_beyond_envoys_limits(both: Lanes, lane: str, more: Mapping[str, str]) -> None:
    status, request_id = await raw(both.gateways[lane], more)
    assert status == 431
    assert both.upstream.requests[request_id] == []


@pytest.mark.parametrize(
    "count",
    [
        80,
        90,
        98,
    ],
)
async def test_an_answer_of_many_headers(both: Lanes, count: int) -> None:
    body = b'{"usage":{"prompt_tokens":1}}'
    received = await both.ask(document(body, *(f"x-{number}: 1" for number in range(count))))
    assert (received.status, received.body) == (200, body)
    assert sum(name.startswith("x-") for name, _ in received.headers) > count
    await both.report(received)


# -- answers -----------------------------------------------------------------------------------------------------------


async def test_an_answer_that_would_become_a_gigabyte(both: Lanes) -> None:
    squeezed = bomb(1024)
    for kind in ("application/json", "text/event-stream"):
        answer = Answer((head(kind, "content-encoding: gzip", f"content-length: {len(squeezed)}"), squeezed))
        received = await both.ask(answer, stream=True)
        assert received.body == squeezed
        report = await both.report(received)
        assert report["usage_source"] == "estimated"


@pytest.mark.parametrize("writes", [1, 7])
async def test_a_hundred_thousand_events(both: Lanes, writes: int) -> None:
    token = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n'
    events = [token % number for number in range(100_000)]
    text = b"".join(events) + USAGE + DONE
    size = -(-len(text) // writes)
    began = time.monotonic()
    received = await both.ask(
        stream(*(text[at : at + size] for at in range(0, len(text), size))), stream=True
    )
    took = time.monotonic() - began
    assert received.body == b"".join(events) + DONE
    report = await both.report(received)
    assert report["usage_source"] == "reported"
    assert report["gen_ai.usage.output_tokens"] == 100_000
    assert took < 20


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_nested_deeply(both: Lanes, streamed: bool) -> None:
    """It is delivered as it is, and what stands around it is read."""
    nested = b'{"choices":' + b"[" * DEEP + b"]" * DEEP + b"}"
    event = b"data: " + nested + b"\n\n"
    answer = stream(event, USAGE, DONE) if streamed else document(nested)
    received = await both.ask(answer, stream=streamed)
    assert received.body == (event + DONE if streamed else nested)
    for lane in LANES:
        report = await both.gateways[lane].report(received.request_id)
        assert report["status"] == 200
        assert report["usage_source"] == ("reported" if streamed else "estimated")
        # The script finds places and does not judge: to it the event says nothing, and is no error.
        assert report.get("unreadable_events", 0) == (lane == "stream")
