"""The stream lane and the native lane, side by side: the same bytes, the same headers, the same books."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio
import yaml

from tests.e2e.test_captures import (
    CHAT,
    COUNTED,
    DOCUMENTS,
    DONE,
    ERRORS,
    LINES,
    ONE,
    PLAIN,
    ROLE,
    STREAMS,
    TWO,
    USAGE,
    accounted,
    asking,
    completion,
    cut,
    delta,
    event,
    expected,
    raw,
    reported,
    usage_of,
)
from tests.support import captures
from tests.support.canned import LAST_CHUNK, STREAM_HEAD, Answer, chunk, document, head, stream
from tests.support.lanes import LANES, Lanes, Received, lanes

STRIDE = 41  # bytes between two cuts; the shifts from 0 to here together cut at every byte
LIMIT = 2_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lanes]:
    async with lanes(tmp_path_factory.mktemp("lanes"), server={"max_body_bytes": LIMIT}) as ready:
        yield ready


def pieces(text: bytes, size: int) -> Iterator[bytes]:
    return (text[at : at + size] for at in range(0, len(text), size))


async def test_one_bootstrap_serves_both_lanes(both: Lanes) -> None:
    """Which lane it is, the server decides for each request."""
    first, second = (
        _without_ports(yaml.safe_load((gateway.config_file().parent / "envoy.yaml").read_text("utf-8")))
        for gateway in (both.gateways[lane] for lane in LANES)
    )
    assert first == second


def _without_ports(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_ports(each) for name, each in value.items() if name != "port_value"}
    return [_without_ports(each) for each in value] if isinstance(value, list) else value


# -- captures ----------------------------------------------------------------------------------------------------------


async def check_streams(both: Lanes, name: str, received: Sequence[Received], *, asked: bool) -> None:
    wanted = expected(name, asked=asked)
    for each in received:
        assert (each.status, each.body) == (200, wanted)
        assert each.header["content-type"] == "text/event-stream; charset=utf-8"
        assert each.header["x-request-id"] == each.header["request-id"] == each.request_id
        assert (each.header["target-pod"], each.header["routing-strategy"]) == ("pod-canned", "least-request")
        assert each.header["target-pod-ip"] == both.upstream.address
        assert "endpoint-load-metrics" not in each.header
    usage = reported(name)
    for report in await both.reports(received):
        assert report["outcome"] == "success"
        assert report["usage_source"] == "estimated" if usage is None else accounted(report) == usage


@pytest.mark.parametrize("asked", [False, True], ids=["not-asked", "asked"])
@pytest.mark.parametrize("name", STREAMS)
async def test_stream_cut_at_every_byte(both: Lanes, name: str, asked: bool) -> None:
    """Each answer is written in many pieces; over the answers, there is a cut at every byte, head and framing too."""
    size = len(raw(name))
    cuts = [range(shift, size, STRIDE) for shift in range(1, STRIDE + 1)]
    assert set(itertools.chain(*cuts)) == set(range(1, size))
    answers = [cut(name), *(cut(name, *positions) for positions in cuts)]
    received = await both.ask_all(answers, STREAMS[name], at_once=21, **asking(asked))
    await check_streams(both, name, received, asked=asked)
    sent = json.loads(both.request(received[0]).body)
    assert sent["stream_options"] == {"include_usage": True}


async def test_stream_an_event_a_write(both: Lanes) -> None:
    """As engines write; it is what the native lane's fast way is for."""
    for name, asked in itertools.product(STREAMS, (False, True)):
        received = await both.ask(stream(*captures.events(name)), STREAMS[name], **asking(asked))
        await check_one_body(both, received, expected(name, asked=asked), reported(name))


async def check_one_body(
    both: Lanes, received: Received, body: bytes, usage: tuple[str, int, int] | None
) -> None:
    assert (received.status, received.body) == (200, body)
    report = await both.report(received)
    assert report["outcome"] == "success"
    assert report["usage_source"] == "estimated" if usage is None else accounted(report) == usage


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_document(both: Lanes, name: str) -> None:
    body, size = captures.body(name), len(raw(name))
    answers = [cut(name), *(cut(name, *range(shift, size, STRIDE)) for shift in range(1, STRIDE, 8))]
    received = await both.ask_all(answers, DOCUMENTS[name], at_once=6)
    for each in received:
        assert (each.status, each.body) == (200, body)
        assert each.header["content-length"] == str(len(body))
        assert "endpoint-load-metrics" not in each.header
    for report in await both.reports(received):
        assert (report["outcome"], accounted(report)) == ("success", reported(name))


async def test_errors_of_engines(both: Lanes) -> None:
    for (name, (status, error_type)), streamed in itertools.product(ERRORS.items(), (False, True)):
        received = await both.ask(cut(name), stream=streamed)
        body = captures.body(name)
        assert (received.status, received.body) == (status, body)
        assert received.header["content-length"] == str(len(body))
        report = await both.report(received)
        assert (report["outcome"], report["error.type"], report["status"]) == ("error", error_type, status)
        assert report["attempts"] == (3 if status == 503 else 1)
        assert accounted(report) == ("none", 0, 0)


async def test_paths_that_pass_unread(both: Lanes) -> None:
    for name, path in (("tokenize", "/tokenize"), ("detokenize", "/detokenize"), ("chat", "/v1/whatever")):
        received = await both.ask(cut(name, len(raw(name)) // 2), path)
        assert (received.status, received.body) == (200, captures.body(name))
        report = await both.report(received)
        assert (report["outcome"], report["usage_source"]) == ("success", "none")


# -- what the client asked for ----------------------------------------------------------------------------------------

YES, NO = {"include_usage": True}, {"include_usage": False}
OPTIONS: Mapping[str, tuple[dict[str, Any], bool]] = {
    # name: members of the request, whether the client sees usage
    "absent": ({}, False),
    "null": ({"stream_options": None}, False),
    "empty": ({"stream_options": {}}, True),
    "yes": ({"stream_options": YES}, True),
    "no": ({"stream_options": NO}, False),
    "null inside": ({"stream_options": {"include_usage": None}}, False),
    "continuous alone": ({"stream_options": {"continuous_usage_stats": True}}, True),
    "yes, continuous": ({"stream_options": {**YES, "continuous_usage_stats": True}}, True),
    "no, continuous": ({"stream_options": {**NO, "continuous_usage_stats": True}}, False),
    "a word": ({"stream_options": {"include_usage": "off"}}, False),
    "odd": ({"stream_options": {"include_usage": "perhaps"}}, True),
    "n=2": ({"n": 2}, False),
    "look-alikes in the request": (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"usage": usage_of(9, 9)}}}
            ],
            "usage": usage_of(8, 8),
            "metadata": {"stream": False, "stream_options": YES, "usage": None},
            "response_format": {"type": "json_schema", "json_schema": {"properties": {"usage": {"a": 1}}}},
        },
        False,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
async def test_stream_options(both: Lanes, name: str) -> None:
    more, seen = OPTIONS[name]
    for capture in ("chat_stream", "chat_stream_usage", "chat_stream_usage_continuous"):
        received = await both.ask(stream(*captures.events(capture)), stream=True, **more)
        await check_one_body(both, received, expected(capture, asked=seen), reported(capture))
        sent = json.loads(both.request(received).body)
        assert sent | {"stream_options": None} == sent | {**more, "stream_options": None}
    nulls = await both.ask(stream(*NULLS), stream=True, **more)
    await check_one_body(both, nulls, b"".join(NULLS if seen else UNNULLED), COUNTED)


UNNULLED = (ROLE, *(event(delta(content=text)) for text in ("a", "bc", "", "d\\u00e9\u00e9")), DONE)
NULLS = (*(each[:-3] + b',"usage":null}\n\n' for each in UNNULLED[:-1]), USAGE, DONE)


@pytest.mark.parametrize("spaced", [b',"usage":null}', b', "usage" : null }', b',"usage":null,"x":1}'])
async def test_null_usage_in_every_event(both: Lanes, spaced: bytes) -> None:
    end = {b', "usage" : null }': b" }", b',"usage":null,"x":1}': b',"x":1}'}.get(spaced, b"}")
    writes = [*(each[:-3] + spaced + b"\n\n" for each in UNNULLED[:-1]), USAGE, DONE]
    whole, shown = b"".join(writes), b"".join(each[:-3] + end + b"\n\n" for each in UNNULLED[:-1]) + DONE
    for answer in (stream(*writes), stream(whole), stream(*pieces(whole, 13))):
        await check_one_body(both, await both.ask(answer, stream=True), shown, COUNTED)
        await check_one_body(both, await both.ask(answer, **asking(True)), whole, COUNTED)


# -- streams by hand ---------------------------------------------------------------------------------------------------


async def test_stream_written_otherwise(both: Lanes) -> None:
    wanted, asks = [], []
    for (writes, ours), asked in itertools.product(LINES.values(), (False, True)):
        whole = b"".join(writes)
        shown = b"".join(each for number, each in enumerate(writes) if number not in ours)
        for answer in (stream(*writes), stream(whole), stream(*pieces(whole, 7))):
            wanted.append(whole if asked else shown)
            asks.append(both.ask(answer, **asking(asked)))
    received = await asyncio.gather(*asks)
    assert [each.body for each in received] == wanted
    for report in await both.reports(received):
        assert (report["outcome"], accounted(report)) == ("success", COUNTED)


TAILS: Mapping[str, tuple[bytes, bytes, str | None]] = {
    # name: what comes behind the content, what of it a client sees that did not ask, what is wrong with it
    "whole": (USAGE + DONE, DONE, None),
    "no [DONE]": (USAGE, b"", "no-done"),
    "[DONE] without its empty line": (USAGE + DONE[:-1], DONE[:-1], None),
    "[DONE] without its line end": (USAGE + DONE[:-2], DONE[:-2], None),
    "usage without its empty line": (USAGE + TWO + USAGE[:-1], TWO, "no-done"),
    "usage without its line end": (USAGE + TWO + USAGE[:-2], TWO, "no-done"),
    "content without its line end": (USAGE + TWO[:-2], TWO[:-2], "no-done"),
    "half an event": (USAGE + TWO[:30], TWO[:30], "unreadable"),
    "a comment": (USAGE + DONE + b": x", DONE + b": x", None),
}
SSE = "text/event-stream; charset=utf-8"
CLOSE = "connection: close"


def _start(writes: Sequence[bytes]) -> bytes:
    return head(SSE, f"content-length: {sum(map(len, writes))}")


def _by_length(*writes: bytes) -> Answer:
    return Answer((_start(writes), *writes))


FRAMINGS: Mapping[str, Callable[..., Answer]] = {
    "chunked": stream,
    "chunked, the end with the last": lambda *writes: Answer(
        (STREAM_HEAD, *map(chunk, writes[:-1]), chunk(writes[-1]) + LAST_CHUNK)
    ),
    "chunked, all at once": lambda *writes: Answer((STREAM_HEAD + chunk(b"".join(writes)) + LAST_CHUNK,)),
    "chunked, then closed": lambda *writes: Answer(
        (
            head(SSE, "transfer-encoding: chunked", CLOSE),
            *map(chunk, writes[:-1]),
            chunk(writes[-1]) + LAST_CHUNK,
        ),
        pause=0.0,
        close=True,
    ),
    "content-length": _by_length,
    "content-length, all at once": lambda *writes: Answer((b"".join((_start(writes), *writes)),)),
    "to the close": lambda *writes: Answer((head(SSE, CLOSE), *writes), close=True),
    "to the close, all at once": lambda *writes: Answer(
        (head(SSE, CLOSE) + b"".join(writes),), pause=0.0, close=True
    ),
}


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_end_of_a_stream(both: Lanes, framing: str) -> None:
    """The last chunk with bytes in it may be the end of the stream, or an empty one behind it."""
    kinds = [(tail, asked, size) for tail in TAILS for asked in (False, True) for size in (1000, 11)]
    received = await asyncio.gather(
        *(
            both.ask(FRAMINGS[framing](ROLE, ONE, *pieces(TAILS[tail][0], size)), **asking(asked))
            for tail, asked, size in kinds
        )
    )
    for (tail, asked, _), each, report in zip(kinds, received, await both.reports(received), strict=True):
        end, seen, wrong = TAILS[tail]
        whole = ROLE + ONE + end
        assert each.body == (whole if asked else ROLE + ONE + seen)
        length = str(len(whole)) if asked and framing.startswith("content-length") else None
        assert each.header.get("content-length") == length
        assert (report["error"], accounted(report)) == (wrong, COUNTED)


@pytest.mark.parametrize("answer", ["no body", "only [DONE]", "only a comment", "text alone"])
async def test_streams_that_say_little(both: Lanes, answer: str) -> None:
    body = {"no body": b"", "only [DONE]": DONE, "only a comment": b": x\n\n", "text alone": b"hello"}[answer]
    for written in (_by_length(body), stream(*([body] if body else []))):
        received = await both.ask(written, stream=True)
        assert (received.status, received.body) == (200, body)
        assert (await both.report(received))["usage_source"] == "estimated"


@pytest.mark.parametrize("code", [500, 503, 400, "x"])
async def test_error_inside_a_200(both: Lanes, code: object) -> None:
    told = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": code}}
    error = b"data: " + json.dumps(told).encode() + b"\n\n"
    for writes, asked in itertools.product(
        [(ROLE, ONE, error, DONE), (ROLE + ONE + error,), (error,)], (False, True)
    ):
        received = await both.ask(stream(*writes), **asking(asked))
        assert received.body == b"".join(writes)
        report = await both.report(received)
        assert (report["outcome"], report["error"]) == ("error", "error-in-answer")
        assert report["usage_source"] == "estimated"


async def test_event_beyond_the_limit(both: Lanes) -> None:
    big = event(delta(content="x" * 1_500_000))
    for asked in (False, True):
        received = await both.ask(stream(ROLE, big, TWO, USAGE, DONE, pause=0.0), **asking(asked))
        assert received.body == ROLE + big + TWO + (USAGE if asked else b"") + DONE
        report = await both.report(received)
        assert (report["oversized_events"], accounted(report)) == (1, COUNTED)


async def test_many_tokens(both: Lanes) -> None:
    """Of every length, in one write, an event a write, and cut anywhere; no usage: what was counted is told."""
    tokens = [event(delta(content="w" * (number % 40))) for number in range(400)]
    whole = b"".join((ROLE, *tokens, DONE))
    for answer in (stream(ROLE, *tokens, DONE, pause=0.0), stream(whole), stream(*pieces(whole, 997))):
        received = await both.ask(answer, stream=True)
        assert received.body == whole
        report = await both.report(received)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("estimated", 1950)


@pytest.mark.parametrize("squeezed", [b"".join(PLAIN), completion("hello")], ids=["stream", "document"])
async def test_compressed(both: Lanes, squeezed: bytes) -> None:
    kind = "text/event-stream" if squeezed.startswith(b"data") else "application/json"
    body = gzip.compress(squeezed)
    start = head(kind, f"content-length: {len(body)}", "content-encoding: gzip")
    received = await both.ask(Answer((start, body[:40], body[40:])), stream=True)
    assert received.body == body
    assert (received.header["content-encoding"], received.header["content-length"]) == (
        "gzip",
        str(len(body)),
    )
    report = await both.report(received)
    assert (report["unread"], report["usage_source"]) == ("compressed", "estimated")
    assert both.request(received).headers["accept-encoding"] == "identity"


# -- documents by hand -------------------------------------------------------------------------------------------------


def _answer(content: str, *, before: bool, **more: Any) -> bytes:
    usage = {"usage": usage_of(11, 2)}
    choices = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, **more}]}
    body = {**usage, **choices} if before else {**choices, **usage}
    return json.dumps({"object": "chat.completion", **body, "prompt_logprobs": None}).encode()


LOOK_ALIKES: Mapping[str, bytes] = {
    "in the text": _answer('"usage":{"prompt_tokens":99}}],"usage":{"prompt_tokens":98}}', before=True),
    "in a call": completion("x").replace(
        b'"x"',
        b'"x","tool_calls":[{"function":{"arguments":"{\\"usage\\":{}}","usage":{"prompt_tokens":97}}}]',
    ),
    "in a schema behind it": completion("x")[:-1] + b',"schema":{"usage":{"prompt_tokens":96}}}',
    "in a choice": _answer("x", before=True, usage={"prompt_tokens": 95, "completion_tokens": 95}),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
async def test_look_alike_usage_in_a_document(both: Lanes, name: str) -> None:
    body = LOOK_ALIKES[name]
    json.loads(body)
    for answer in (document(body), Answer((head("application/json", CLOSE), *pieces(body, 5)), close=True)):
        await check_one_body(both, await both.ask(answer), body, COUNTED)


@pytest.mark.parametrize("before", [True, False], ids=["usage-first", "usage-last"])
async def test_document_of_a_megabyte(both: Lanes, before: bool) -> None:
    body = _answer('x "usage": {} ' * 80_000, before=before)
    assert len(body) > 1_000_000
    received = await both.ask(document(body))
    assert received.header["content-length"] == str(len(body))
    await check_one_body(both, received, body, COUNTED)


ODD_DOCUMENTS: Mapping[str, bytes] = {
    "no usage": completion("hello").replace(b'"usage"', b'"used"'),
    "null usage": b'{"object":"chat.completion","choices":[],"usage":null}',
    "an error in it": b'{"error":{"message":"no","type":"x","code":503}}',
    "a list": b"[1]",
    "no JSON": b"<html>",
    "nothing": b"",
}


@pytest.mark.parametrize("name", ODD_DOCUMENTS)
async def test_document_without_usage(both: Lanes, name: str) -> None:
    body = ODD_DOCUMENTS[name]
    received = await both.ask(document(body))
    assert (received.status, received.body) == (200, body)
    assert (await both.report(received))["usage_source"] == "estimated"


async def test_long_document_without_usage(both: Lanes) -> None:
    """The one known difference: the script walks 16 KiB at most, so there is no estimate of a longer text."""
    body = completion("x" * 40_000).replace(b'"usage"', b'"used"')
    received = await both.ask(document(body))
    assert received.body == body
    told = [await both.gateways[lane].report(received.request_id) for lane in LANES]
    assert [report["usage_source"] for report in told] == ["estimated", "estimated"]
    assert [report["gen_ai.usage.output_tokens"] for report in told] == [10_000, 0]


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["TEXT", "JSON", "BIN", "text", "xml"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_load_report(both: Lanes, form: str, streamed: bool) -> None:
    """The engine's own report is for us; a client gets ours, if it asks for one in a form that there is."""
    answer = cut("orca_chat_stream_JSON" if streamed else "orca_chat_TEXT")
    received = await both.ask(answer, headers={"endpoint-load-metrics-format": form}, stream=streamed)
    load = received.header.get("endpoint-load-metrics")
    assert (load or "").partition(" ")[0] == (form.upper() if form != "xml" else "")
    await both.reports([received])


async def test_policy_and_spoofed_headers(both: Lanes) -> None:
    spoofed = {"routing-strategy": "random", "target-pod": "mine", "x-envoy-extproc-served": "mine"}
    received = await both.ask(
        document(completion("x"), "target-pod: mine", "request-id: mine"), headers=spoofed
    )
    assert received.header["routing-strategy"] == "random"
    assert (received.header["target-pod"], received.header["request-id"]) == (
        "pod-canned",
        received.request_id,
    )
    assert "x-envoy-extproc-served" not in received.header
    assert (await both.report(received))["policy"] == "random"


# -- requests that bring no body, and answers that no engine gave ------------------------------------------------------

EMPTY_404 = Answer((head("text/plain", "content-length: 0", status="404 Not Found"),))
FILES = b'{"object":"list","data":[]}'


@pytest.mark.parametrize(
    ("method", "path", "answer", "status"),
    [
        ("GET", "/v1/files", document(FILES), 200),
        ("GET", CHAT, EMPTY_404, 404),
        ("HEAD", "/v1/files", Answer((head("application/json", "content-length: 27"),)), 200),
        ("POST", CHAT, EMPTY_404, 404),
        ("POST", "/v1/whatever", EMPTY_404, 404),
        ("POST", "/v1/whatever", stream(*PLAIN), 200),
        ("DELETE", "/v1/files/1", Answer((head("x/y", status="204 No Content"),)), 204),
        ("GET", "/v1/files/1/content", Answer((head("x/y", "content-length: 0", status="302 Found"),)), 302),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_no_request_body(both: Lanes, method: str, path: str, answer: Answer, status: int) -> None:
    received = await both.ask(answer, path, method=method, data=lambda: None)
    assert received.status == status
    assert (received.header["target-pod"], received.header["x-request-id"]) == (
        "pod-canned",
        received.request_id,
    )
    report = await both.report(received)
    assert report["outcome"] == ("success" if status < 400 else "error")
    assert report["usage_source"] == "none"


async def test_unknown_path_with_a_body(both: Lanes) -> None:
    body = bytes(range(256)) * 3000
    received = await both.ask(None, "/v1/audio/whatever?x=1", data=lambda: io.BytesIO(body))
    assert received.status == 404
    assert both.request(received).body == body
    report = await both.report(received)
    assert (report["path"], report["outcome"]) == ("/v1/audio/whatever", "error")


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b'{"messages":[]}', 400), (b'{"model":"nobody","messages":[]}', 404), (b"", 400)],
    ids=["no-json", "no-model", "unknown-model", "empty-chunked"],
)
async def test_our_own_answers(both: Lanes, body: bytes, status: int) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        yield body

    received = await both.ask(None, data=chunked)
    assert (received.status, received.header["content-type"]) == (status, "application/json")
    assert received.header["x-request-id"] == received.request_id
    assert set(json.loads(received.body)["error"]) == {"message", "type", "param", "code"}
    report = await both.report(received)
    assert (report["outcome"], report["error.type"], report["status"]) == ("refused", "client", status)


async def test_envoys_413(both: Lanes) -> None:
    """A body too long that did not say so beforehand. In the native lane this server is not shown that answer."""

    async def body() -> AsyncIterator[bytes]:
        yield b" "
        await asyncio.sleep(0.2)  # so that the headers are answered before there is too much
        for _ in range(40):
            yield b" " * 100_000

    for lane in LANES:
        received = await both.ask_one(lane, data=body)
        assert (received.status, received.header["x-request-id"]) == (413, received.request_id)
        assert json.loads(received.body)["error"]["code"] == "request_too_large"
        assert "target-pod" not in received.header
        report = await both.gateways[lane].report(received.request_id)
        assert (report["outcome"], report["error.type"], report["status"]) == ("error", "client", 413)


# -- after all of the above --------------------------------------------------------------------------------------------


async def test_nothing_is_left_over(both: Lanes) -> None:
    for gateway in both.gateways.values():
        assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
        assert await gateway.metric("envoy_extproc_unexpected_messages_total") == 0
        assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
        assert await gateway.metric("envoy_extproc_bypassed_requests_total") == 0


async def test_each_went_by_its_lane(both: Lanes) -> None:
    name = "envoy_extproc_native_exchanges_total"
    by_entry = [await both.gateways[lane].metric(name, stage="reported") for lane in LANES]
    assert by_entry[0] == 0
    assert by_entry[1] > 500
    stats = "http.ingress.ext_proc.envoy_extproc.stream_msgs_sent"
    messages = {lane: await both.gateways[lane].envoy_stat(stats) for lane in LANES}
    print(f"messages to the server {messages}, exchanges {by_entry[1]:g}")


async def test_the_script_made_no_error(both: Lanes) -> None:
    log = both.gateways["native"].config_file().parent / "envoy.log"
    assert "script" not in log.read_text("utf-8")
