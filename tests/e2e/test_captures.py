"""What engines wrote, byte for byte, through a real Envoy: whole, in pieces, and in every odd shape seen in the wild."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support import captures
from tests.support.canned import LAST_CHUNK, Answer, Canned, canned, chunk, document, head, stream
from tests.support.gateway import Gateway, chat, new_id

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
DONE = b"data: [DONE]\n\n"

STREAMS: Mapping[str, str] = {
    "chat_stream": CHAT,
    "chat_stream_usage": CHAT,
    "chat_stream_usage_continuous": CHAT,
    "completions_stream": COMPLETIONS,
    "completions_stream_usage": COMPLETIONS,
    "orca_chat_stream_JSON": CHAT,
}
DOCUMENTS: Mapping[str, str] = {
    "chat": CHAT,
    "chat_logprobs": CHAT,
    "b_lora_chat": CHAT,
    "err_no_model_field": CHAT,  # vLLM answers 200 where no model is named
    "orca_chat_JSON": CHAT,
    "orca_chat_TEXT": CHAT,
    "completions": COMPLETIONS,
    "completions_batch": COMPLETIONS,
    "e_embeddings": EMBEDDINGS,
    "e_embeddings_base64": EMBEDDINGS,
}
ERRORS: Mapping[str, tuple[int, str]] = {
    "b_err_queue_full": (503, "overload"),
    "chat_n2": (400, "client"),
    "death_enginekill_nonstream": (500, "model_server"),
    "err_404": (404, "client"),
    "err_bad_json": (400, "client"),
    "err_bad_role": (400, "client"),
    "err_context_too_long": (400, "client"),
    "err_missing_messages": (400, "client"),
    "err_stream_options_without_stream": (400, "client"),
    "err_unknown_model": (404, "client"),
    "err_unknown_model_stream": (404, "client"),
    "tools_named": (400, "client"),
    "tools_named_stream": (400, "client"),
}
OTHERS: Mapping[str, str] = {
    "messages": "/v1/messages",
    "messages_stream": "/v1/messages",
    "responses": "/v1/responses",
    "responses_stream": "/v1/responses",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "e_pooling": "/pooling",
    "e_rerank": "/rerank",
    "e_score": "/score",
}


@dataclass(frozen=True, slots=True)
class Received:
    """What the client got."""

    request_id: str
    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """Asks for one answer after telling the upstream what it is."""

    def __init__(self, session: aiohttp.ClientSession, upstream: Canned) -> None:
        self._session = session
        self._upstream = upstream

    async def get(self, answer: Answer, path: str = CHAT, **more: Any) -> Received:
        request_id = new_id()
        self._upstream.answers[request_id] = answer
        headers = {"x-request-id": request_id}
        async with (
            asyncio.timeout(30),
            self._session.post(path, json=chat(input="x", prompt="x", **more), headers=headers) as response,
        ):
            return Received(request_id, response.status, response.headers, await response.read())

    async def get_all(self, answers: Iterable[Answer], path: str = CHAT, **more: Any) -> list[Received]:
        """Many, at most 100 at once."""
        gate = asyncio.Semaphore(100)

        async def one(answer: Answer) -> Received:
            async with gate:
                return await self.get(answer, path, **more)

        return list(await asyncio.gather(*map(one, answers)))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def upstream() -> AsyncIterator[Canned]:
    async with canned() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Canned) -> AsyncIterator[Gateway]:
    async with Gateway(tmp_path_factory.mktemp("captures"), pods=[upstream.pod()]) as shared:
        yield shared


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(gateway: Gateway, upstream: Canned) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(gateway.url, connector=connector, auto_decompress=False) as session:
        yield Client(session, upstream)


def raw(name: str) -> bytes:
    return (captures.FOLDER / f"{name}.raw").read_bytes()


def cut(name: str, *positions: int) -> Answer:
    """The capture as it was on the wire, framing and all, in pieces that end at these positions."""
    text = raw(name)
    bounds = (0, *positions, len(text))
    pieces = tuple(text[start:end] for start, end in itertools.pairwise(bounds))
    return Answer(pieces, close=b"connection: close" in text)


def data(event: bytes) -> Any:
    return None if event == DONE else json.loads(event.removeprefix(b"data: "))


def is_usage_event(event: bytes) -> bool:
    body = data(event)
    return body is not None and body["choices"] == [] and "usage" in body


def without_usage(events: Sequence[bytes]) -> bytes:
    return b"".join(event for event in events if not is_usage_event(event))


def tokens(usage: Mapping[str, Any]) -> tuple[str, int, int]:
    return "reported", usage["prompt_tokens"], usage.get("completion_tokens", 0)


def accounted(report: Mapping[str, Any]) -> tuple[str, int, int]:
    names = ("usage_source", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
    source, prompt, completion = (report[name] for name in names)
    return source, prompt, completion


def expected(name: str, *, asked: bool) -> bytes:
    return captures.body(name) if asked else without_usage(captures.events(name))


def reported(name: str) -> tuple[str, int, int] | None:
    """What the capture says of itself; None where it says nothing."""
    if name in DOCUMENTS:
        return tokens(json.loads(captures.body(name))["usage"])
    found = [body["usage"] for body in map(data, captures.events(name)) if body and body.get("usage")]
    return tokens(found[-1]) if found else None


async def reports(gateway: Gateway, received: Sequence[Received]) -> list[Mapping[str, Any]]:
    """The report of each, however many: the log is read as a whole."""
    async with asyncio.timeout(20):
        while True:
            found = {line["request_id"]: line for line in gateway.reports()}
            if all(each.request_id in found for each in received):
                return [found[each.request_id] for each in received]
            await asyncio.sleep(0.05)


def asking(asked: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if asked else {"stream": True}


async def check_stream(gateway: Gateway, name: str, received: Sequence[Received], *, asked: bool) -> None:
    wanted = expected(name, asked=asked)
    for each in received:
        assert (each.status, each.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert each.body == wanted
    usage = reported(name)
    for report in await reports(gateway, received):
        assert report["outcome"] == "success"
        if usage is None:
            assert report["usage_source"] == "estimated"
        else:
            assert accounted(report) == usage


# -- captures ----------------------------------------------------------------------------------------------------------


async def test_captures_are_what_these_tests_take_them_for() -> None:
    hidden = {name for name in STREAMS if expected(name, asked=False) != captures.body(name)}
    assert hidden == {"chat_stream_usage", "chat_stream_usage_continuous", "completions_stream_usage"}
    assert all(len(list(filter(is_usage_event, captures.events(name)))) == 1 for name in hidden)
    assert reported("chat_stream_usage") == ("reported", 18, 8)
    known = {*STREAMS, *DOCUMENTS, *ERRORS, *OTHERS}
    assert known == {file.stem for file in captures.FOLDER.glob("*.raw")}


@pytest.mark.parametrize("asked", [False, True], ids=["not-asked", "asked"])
@pytest.mark.parametrize("name", STREAMS)
async def test_stream_whole_and_cut_in_two(
    gateway: Gateway, client: Client, upstream: Canned, name: str, asked: bool
) -> None:
    size = len(raw(name))
    answers = [cut(name), *(cut(name, at) for at in range(1, size, size // 24))]
    received = await client.get_all(answers, STREAMS[name], **asking(asked))
    await check_stream(gateway, name, received, asked=asked)
    sent = json.loads(upstream.requests[received[0].request_id][0].body)
    assert sent["stream_options"] == {"include_usage": True}


async def test_byte_by_byte(gateway: Gateway, client: Client) -> None:
    """All at once: each takes as long as it has bytes."""
    kinds = [(name, asked) for name in STREAMS for asked in (False, True)]
    streams = (
        client.get(cut(name, *range(1, len(raw(name)))), STREAMS[name], **asking(asked))
        for name, asked in kinds
    )
    documents = (client.get(cut(name, *range(1, len(raw(name)))), path) for name, path in DOCUMENTS.items())
    received = await asyncio.gather(*streams, *documents)
    for (name, asked), each in zip(kinds, received, strict=False):
        await check_stream(gateway, name, [each], asked=asked)
    for name, each in zip(DOCUMENTS, received[len(kinds) :], strict=True):
        await check_document(gateway, name, [each])


async def test_stream_cut_at_every_position(gateway: Gateway, client: Client) -> None:
    name = "chat_stream_usage"
    start = raw(name).index(b"\r\n\r\n")
    answers = [cut(name, at) for at in range(start, len(raw(name)))]
    assert len(answers) > 2000
    received = await client.get_all(answers, STREAMS[name], stream=True)
    await check_stream(gateway, name, received, asked=False)


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_document_is_identical_and_accounted(gateway: Gateway, client: Client, name: str) -> None:
    size = len(raw(name))
    answers = [cut(name), *(cut(name, at) for at in range(1, size, size // 12))]
    await check_document(gateway, name, await client.get_all(answers, DOCUMENTS[name]))


async def check_document(gateway: Gateway, name: str, received: Sequence[Received]) -> None:
    body = captures.body(name)
    for each in received:
        assert (each.status, each.body) == (200, body)
        assert each.headers["content-length"] == str(len(body))
        assert each.headers["content-type"] == "application/json"
        assert "endpoint-load-metrics" not in each.headers
    for report in await reports(gateway, received):
        assert accounted(report) == reported(name)
        assert report["outcome"] == "success"


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_error_passes_unchanged(
    gateway: Gateway, client: Client, upstream: Canned, name: str, streamed: bool
) -> None:
    status, error_type = ERRORS[name]
    size = len(raw(name))
    received = await client.get_all([cut(name), cut(name, size // 2), cut(name, size - 1)], stream=streamed)
    body = captures.body(name)
    for each in received:
        assert (each.status, each.body) == (status, body)
        assert each.headers["content-length"] == str(len(body))
        assert each.headers["content-type"] == "application/json"
        assert each.headers["x-request-id"] == each.request_id
        assert len(upstream.requests[each.request_id]) == (3 if status == 503 else 1)
    for report in await reports(gateway, received):
        assert (report["outcome"], report["error.type"], report["status"]) == ("error", error_type, status)
        assert accounted(report) == ("none", 0, 0)


@pytest.mark.parametrize("name", OTHERS)
async def test_answer_of_another_path_passes_untouched(gateway: Gateway, client: Client, name: str) -> None:
    received = await client.get_all([cut(name), cut(name, len(raw(name)) // 2)], OTHERS[name])
    for each in received:
        assert (each.status, each.body) == (200, captures.body(name))
    for report in await reports(gateway, received):
        assert report["outcome"] == "success"


# -- streams by hand ---------------------------------------------------------------------------------------------------


def delta(index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": more, "logprobs": None, "finish_reason": None}


def event(*choices: Mapping[str, Any], **more: Any) -> bytes:
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": list(choices), **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


ROLE, ONE, TWO = (
    event(delta(role="assistant", content="")),
    event(delta(content="a")),
    event(delta(content="b")),
)
USAGE = event(usage=usage_of(11, 2))
PLAIN = (ROLE, ONE, TWO, USAGE, DONE)
SEEN = ROLE + ONE + TWO + DONE
COUNTED = ("reported", 11, 2)


async def both(
    gateway: Gateway, client: Client, answer: Answer, shown: bytes, whole: bytes
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a client gets that does not ask for usage, and what one that does; returns the two reports."""
    received = [await client.get(answer, **asking(asked)) for asked in (False, True)]
    assert received[0].body == shown
    assert received[1].body == whole
    hidden, asked = await reports(gateway, received)
    return hidden, asked


LINES: Mapping[str, tuple[Sequence[bytes], Sequence[int]]] = {
    # name: writes, which of them only our asking made
    "plain": (PLAIN, [3]),
    "CRLF": ([each.replace(b"\n", b"\r\n") for each in PLAIN], [3]),
    "CR": ([each.replace(b"\n", b"\r") for each in PLAIN], [3]),
    "no space after the colon": ([each.replace(b"data: ", b"data:") for each in PLAIN], [3]),
    "comments": (
        [b": keep-alive\n\n", b": keep-alive\n\n", ROLE, b":\n\n", ONE, TWO, USAGE, b": bye\n\n", DONE],
        [6],
    ),
    "event names and ids": ([b"event: x\nid: 7\n" + each for each in PLAIN], [3]),
    "two choices": (
        [
            event(delta(0, role="assistant", content=""), delta(1, role="assistant", content="")),
            event(delta(0, content="a")),
            event(delta(1, content="b")),
            USAGE,
            DONE,
        ],
        [3],
    ),
    "reasoning first": (
        [ROLE, event(delta(reasoning_content="hm")), event(delta(content="a")), USAGE, DONE],
        [3],
    ),
    "look-alike usage in a tool call": (
        [
            ROLE,
            event(delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}])),
            event(delta(tool_calls=[{"index": 0, "function": {"arguments": USAGE.decode()}}])),
            event(delta(content='"choices":[],"usage":{"prompt_tokens":999}', usage=usage_of(9, 9))),
            USAGE,
            DONE,
        ],
        [4],
    ),
    "usage before the last content": ([ROLE, USAGE, ONE, TWO, DONE], [1]),
}


@pytest.mark.parametrize("name", LINES)
async def test_stream_written_otherwise(gateway: Gateway, client: Client, name: str) -> None:
    writes, ours = LINES[name]
    whole = b"".join(writes)
    shown = b"".join(each for number, each in enumerate(writes) if number not in ours)
    for answer in (
        stream(*writes),
        stream(whole),
        stream(*(whole[at : at + 7] for at in range(0, len(whole), 7))),
    ):
        for report in await both(gateway, client, answer, shown, whole):
            assert (report["outcome"], accounted(report)) == ("success", COUNTED)
            assert 0 < report["ttft"] < report["duration"]


async def test_many_events_in_one_write(gateway: Gateway, client: Client) -> None:
    content = b"".join(event(delta(content=f"word {number} ")) for number in range(2000))
    answer = stream(ROLE + content + USAGE + DONE)
    for report in await both(gateway, client, answer, ROLE + content + DONE, ROLE + content + USAGE + DONE):
        assert accounted(report) == COUNTED


@pytest.mark.parametrize(
    "null", [b',"usage":null}\n\n', b', "usage": null }\n\n', b',"usage":null,"x":1}\n\n']
)
async def test_null_usage_that_our_asking_made_is_removed(
    gateway: Gateway, client: Client, null: bytes
) -> None:
    """As OpenAI and a few engines write it in every other event, once usage is asked for."""
    end = {b', "usage": null }\n\n': b" }\n\n", b',"usage":null,"x":1}\n\n': b',"x":1}\n\n'}.get(
        null, b"}\n\n"
    )
    writes = [each[:-3] + null for each in (ROLE, ONE, TWO)]
    shown = b"".join(each[:-3] + end for each in (ROLE, ONE, TWO)) + DONE
    whole = b"".join([*writes, USAGE, DONE])
    for answer in (stream(*writes, USAGE, DONE), stream(whole)):
        for report in await both(gateway, client, answer, shown, whole):
            assert accounted(report) == COUNTED


async def test_event_too_large_to_parse_passes_and_is_counted(gateway: Gateway, client: Client) -> None:
    big = event(delta(content="x" * 2_000_000))
    before = await gateway.metric("envoy_extproc_oversized_events_total")
    for report in await both(
        gateway,
        client,
        stream(ROLE, big, TWO, USAGE, DONE, pause=0.0),
        ROLE + big + TWO + DONE,
        ROLE + big + TWO + USAGE + DONE,
    ):
        assert accounted(report) == COUNTED
        assert (report["outcome"], report["oversized_events"]) == ("success", 1)
    assert await gateway.metric("envoy_extproc_oversized_events_total") == before + 2


@pytest.mark.parametrize(
    ("code", "error_type"), [(500, "model_server"), (503, "overload"), (400, "client"), ("x", "model_server")]
)
async def test_error_inside_a_200(gateway: Gateway, client: Client, code: object, error_type: str) -> None:
    error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": code}}
    told = b"data: " + json.dumps(error).encode() + b"\n\n"
    whole = ROLE + ONE + told + DONE
    for report in await both(gateway, client, stream(ROLE, ONE, told, DONE), whole, whole):
        assert (report["status"], report["outcome"], report["error.type"]) == (200, "error", error_type)
        assert report["usage_source"] == "estimated"
        assert report["gen_ai.usage.output_tokens"] == 1


async def test_missing_done(gateway: Gateway, client: Client) -> None:
    answer = stream(ROLE, ONE, TWO, USAGE)
    for report in await both(gateway, client, answer, ROLE + ONE + TWO, ROLE + ONE + TWO + USAGE):
        assert (report["outcome"], report["error.type"], report["error"]) == ("error", "content", "no-done")
        assert accounted(report) == COUNTED


@pytest.mark.parametrize(
    "tail", [b"data: [DONE]\n", b"data: [DONE]", TWO[:-2], b'data: {"choices":[{"ind', b": x"]
)
async def test_unterminated_tail_is_delivered(gateway: Gateway, client: Client, tail: bytes) -> None:
    for answer in (stream(ROLE, ONE, USAGE, tail), stream(ROLE + ONE + USAGE + tail)):
        shown, whole = ROLE + ONE + tail, ROLE + ONE + USAGE + tail
        for report in await both(gateway, client, answer, shown, whole):
            assert accounted(report) == COUNTED
            assert report["outcome"] == ("success" if b"DONE" in tail else "error")


async def test_upstream_that_ends_in_the_middle(gateway: Gateway, upstream: Canned, client: Client) -> None:
    """No last chunk, and a half event held back because usage in it might have to go."""
    answer = Answer((*stream(ROLE, ONE, TWO[:20]).pieces[:-1],), close=True)
    for asked in (False, True):
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.get(answer, **asking(asked))
        request_id = list(upstream.requests)[-1]
        report = await gateway.report(request_id)
        assert (report["outcome"], report["error.type"], report["status"]) == ("aborted", "network", 200)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("estimated", 1)


async def test_compressed_answer_passes_unread(gateway: Gateway, client: Client, upstream: Canned) -> None:
    squeezed = gzip.compress(b"".join(PLAIN))
    start = head("text/event-stream", "transfer-encoding: chunked", "content-encoding: gzip")
    answer = Answer((start, chunk(squeezed[:40]), chunk(squeezed[40:]), LAST_CHUNK))
    before = await gateway.metric("envoy_extproc_unread_responses_total", reason="compressed")
    received = await client.get(answer, stream=True)
    assert received.body == squeezed
    assert received.headers["content-encoding"] == "gzip"
    (report,) = await reports(gateway, [received])
    assert report["unread"] == "compressed"
    assert report["usage_source"] == "estimated"
    assert await gateway.metric("envoy_extproc_unread_responses_total", reason="compressed") == before + 1
    assert upstream.requests[received.request_id][0].headers["accept-encoding"] == "identity"


# -- documents by hand -------------------------------------------------------------------------------------------------


def completion(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage_of(11, 2)}).encode()


async def test_document_without_a_length(gateway: Gateway, client: Client) -> None:
    body = completion("hello")
    start = head("application/json", "transfer-encoding: chunked")
    pieces = (*(chunk(body[at : at + 9]) for at in range(0, len(body), 9)), LAST_CHUNK)
    received = await client.get_all([Answer((start, *pieces)), Answer((b"".join((start, *pieces)),))])
    assert [each.body for each in received] == [body, body]
    for report in await reports(gateway, received):
        assert (report["outcome"], accounted(report)) == ("success", COUNTED)


async def test_document_that_ends_with_the_connection(gateway: Gateway, client: Client) -> None:
    body = completion("hello")
    start = head("application/json", "connection: close")
    received = await client.get(Answer((start, body[:50], body[50:]), close=True))
    assert received.body == body
    (report,) = await reports(gateway, [received])
    assert (report["outcome"], accounted(report)) == ("success", COUNTED)


@pytest.mark.parametrize("size", [60_000, 70_000, 5_000_000])
async def test_large_document(gateway: Gateway, client: Client, size: int) -> None:
    body = completion("x" * size)
    received = await client.get(document(body))
    assert received.body == body
    assert received.headers["content-length"] == str(len(body))
    (report,) = await reports(gateway, [received])
    assert (report["outcome"], accounted(report)) == ("success", COUNTED)


async def test_document_cut_off_in_the_middle(gateway: Gateway, upstream: Canned, client: Client) -> None:
    body = completion("hello")
    pieces = (head("application/json", f"content-length: {len(body)}"), body[:30])
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.get(Answer(pieces, close=True))
    report = await gateway.report(list(upstream.requests)[-1])
    assert (report["outcome"], report["error.type"], report["status"]) == ("aborted", "network", 200)
    assert report["usage_source"] == "estimated"


@pytest.mark.parametrize("streamed", [False, True])
async def test_trailers_of_an_engine_change_nothing(gateway: Gateway, client: Client, streamed: bool) -> None:
    """Envoy drops HTTP/1 trailers; the answer before them is read to its end all the same."""
    kind = "text/event-stream" if streamed else "application/json"
    body = b"".join(PLAIN) if streamed else completion("hello")
    start = head(kind, "transfer-encoding: chunked", "trailer: x-end")
    received = await client.get(Answer((start, chunk(body), b"0\r\nx-end: 1\r\n\r\n")), stream=streamed)
    assert received.body == (SEEN if streamed else body)
    (report,) = await reports(gateway, [received])
    assert (report["outcome"], accounted(report)) == ("success", COUNTED)


async def test_nothing_is_left_over(gateway: Gateway) -> None:
    """After all of the above."""
    assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
    assert await gateway.metric("envoy_extproc_unexpected_messages_total") == 0
    assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
