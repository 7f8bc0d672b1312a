"""Each row of docs/errors.md on a real Envoy, in both lanes: what the client sees, what is counted, whose fault it is."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import aiohttp
import h2.connection
import pytest
import pytest_asyncio
from h2.config import H2Configuration

from envoy_extproc.envoy.bootstrap import _LOCAL_REPLIES
from tests.e2e.test_captures import cut
from tests.e2e.test_trailers import Connection
from tests.support import captures
from tests.support.canned import STREAM_HEAD, Answer, chunk, document, head, stream
from tests.support.errors_doc import Row, Said, rows
from tests.support.faulty import (
    DEAD,
    DEAF,
    DEFECT,
    HASTY,
    MAX_BODY,
    QUITS,
    RESETS,
    SUBSET,
    Side,
    defect,
    side,
)
from tests.support.gateway import MODEL, chat, eventually, new_id

CHAT = "/v1/chat/completions"
CLOSING = {"connection": "close"}  # Envoy waits a second before it closes any other whose answer is cut off
PAUSE = 0.05  # so that what is written is delivered before the connection ends


@dataclass(frozen=True, slots=True)
class Got:
    """What became of a request, as the client saw it.

    Attributes:
        status: None where the client left before there was one.
        cut: whether the body ended before its end.
        written: the body that the pod wrote; None where there was none.
    """

    request_id: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: bool = False
    written: bytes | None = None


Ask = Callable[[Side], Awaitable[Got]]


async def ask(
    side: Side,
    *,
    answer: Answer | None = None,
    written: bytes | None = None,
    method: str = "POST",
    path: str = CHAT,
    data: Callable[[], Any] | None = None,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Got:
    """A request, and its answer to the end."""
    request_id = new_id()
    if answer is not None:
        side.upstream.answers[request_id] = side.resetting.answers[request_id] = answer
    body: dict[str, Any] = {"json": chat(**members)} if data is None else {"data": data()}
    if method in ("GET", "HEAD"):
        body = {}
    sent = {"x-request-id": request_id, **(headers or {})}
    async with asyncio.timeout(10), side.http.request(method, path, headers=sent, **body) as response:
        text, whole = await read(response)
        return Got(request_id, response.status, dict(response.headers), text, not whole, written)


async def read(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """The body as far as it came, and whether it was whole."""
    text = b""
    try:
        while piece := await response.content.readany():
            text += piece
    except aiohttp.ClientPayloadError:
        return text, False
    return text, True


def asking(**more: Any) -> Ask:
    return partial(ask, **more)


# -- requests ----------------------------------------------------------------------------------------------------------


async def trailers_without_body(side: Side) -> Got:
    reader, writer = await asyncio.open_connection("127.0.0.1", side.gateway.port)
    connection = Connection(reader, writer, h2.connection.H2Connection(H2Configuration()))
    request_id, answer = await connection.ask(CHAT, [], pause=0.05)
    writer.close()
    return Got(request_id, int(answer.status), answer.headers, answer.body)


async def too_large_unannounced() -> AsyncIterator[bytes]:
    yield b" "
    await asyncio.sleep(0.1)  # so that the headers are answered before there is too much
    for _ in range(40):
        yield b" " * 100_000


@dataclass
class Raw:
    """A client that writes what it likes."""

    request_id: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> Got:
        """The answer that comes."""
        async with asyncio.timeout(5):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = dict(line.split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers["content-length"]))
        self.writer.close()
        return Got(self.request_id, int(first.split(" ")[1]), headers, body)

    async def leave(self) -> Got:
        self.writer.close()
        await self.writer.wait_closed()
        return Got(self.request_id)


async def raw(side: Side, body: bytes, *, length: int | None = None) -> Raw:
    request_id = new_id()
    reader, writer = await asyncio.open_connection("127.0.0.1", side.gateway.port)
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "host: x",
        f"content-length: {len(body) if length is None else length}",
        "connection: close",
        f"x-request-id: {request_id}",
    )
    writer.write("\r\n".join((*lines, "\r\n")).encode() + body)
    await writer.drain()
    return Raw(request_id, reader, writer)


async def announces_too_much(side: Side) -> Got:
    return await (await raw(side, b"", length=MAX_BODY + 1)).answer()


async def upload_stalls(side: Side) -> Got:
    return await (await raw(side, b'{"model":', length=100)).answer()


async def upload_ends(side: Side) -> Got:
    client = await raw(side, b'{"model":', length=100)
    await asyncio.sleep(PAUSE)
    return await client.leave()


async def no_http(side: Side) -> Got:
    reader, writer = await asyncio.open_connection("127.0.0.1", side.gateway.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n")
    return await Raw("", reader, writer).answer()


# -- pods --------------------------------------------------------------------------------------------------------------


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


def told(error: Any) -> bytes:
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


FIRST, SECOND, DONE = event("first"), event("second"), b"data: [DONE]\n\n"
JSON = b'{"object":"chat.completion","choices":[{"index":0,"message":{"content":"hello"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'


def streaming(*writes: bytes) -> Ask:
    """A stream of these, to its proper end."""
    return asking(answer=stream(*writes), written=b"".join(writes), stream=True)


def ending(*pieces: bytes, written: bytes, model: str = MODEL, **members: Any) -> Ask:
    """An answer that ends with the connection: by FIN, or by RST where the model is `RESETS`."""
    answer = Answer(pieces, pause=PAUSE, close=True)
    return asking(answer=answer, written=written, model=model, headers=CLOSING, **members)


def silent(*pieces: bytes, **more: Any) -> Ask:
    """An answer that stops."""
    return asking(answer=Answer((*pieces, asyncio.Event())), **{"headers": CLOSING, **more})


def capture(name: str) -> Ask:
    return asking(answer=cut(name), written=captures.body(name))


def failing(status: str, body: bytes, *more: str, kind: str = "application/json") -> Ask:
    """An engine's error answer."""
    start = head(kind, f"content-length: {len(body)}", *more, status=status)
    return asking(answer=Answer((start + body,)), written=body)


def answering(body: bytes, *more: str, kind: str = "application/json") -> Ask:
    start = head(kind, f"content-length: {len(body)}", *more)
    return asking(answer=Answer((start, body)), written=body)


async def one_refuses(side: Side) -> Got:
    side.quitter.close()
    await side.quitter.wait_closed()
    answer = stream(FIRST, DONE)
    headers = {"routing-strategy": "round-robin"}
    return await ask(side, answer=answer, written=FIRST + DONE, model=QUITS, headers=headers, stream=True)


# -- clients -----------------------------------------------------------------------------------------------------------


async def leaves_before_the_answer(side: Side) -> Got:
    client = await raw(side, json.dumps(chat(stream=True)).encode())
    side.upstream.default = Answer((asyncio.Event(),))
    await eventually(lambda: client.request_id in side.upstream.requests)
    side.upstream.default = None
    return await client.leave()


async def leaves_behind(side: Side, *writes: bytes) -> Got:
    """Leaves once these have come of an answer that has no end."""
    request_id = new_id()
    side.upstream.answers[request_id] = stream(*writes, asyncio.Event())
    body, headers = chat(stream=True), {"x-request-id": request_id}
    async with side.http.post(CHAT, json=body, headers=headers) as response:
        text = await response.content.readexactly(sum(map(len, writes)))
        status, seen = response.status, dict(response.headers)
        response.close()
    return Got(request_id, status, seen, text, cut=True, written=FIRST + DONE)


async def leaves_behind_json(side: Side) -> Got:
    """Leaves with the last byte of an answer that told its length."""
    request_id, body = new_id(), captures.body("chat")
    side.upstream.answers[request_id] = document(body)
    async with side.http.post(CHAT, json=chat(), headers={"x-request-id": request_id}) as response:
        text = await response.content.readexactly(len(body))
        status, seen = response.status, dict(response.headers)
        response.close()
    return Got(request_id, status, seen, text, written=body)


# -- this server -------------------------------------------------------------------------------------------------------


async def late(side: Side) -> Got:
    with side.stopped_server():
        return await ask(side, answer=stream(FIRST, DONE), written=FIRST + DONE, stream=True)


async def gone(side: Side) -> Got:
    await side.gateway.kill_server()
    return await ask(side, answer=stream(FIRST, DONE), written=FIRST + DONE, stream=True)


BROKEN = asking(answer=stream(FIRST, DONE), written=FIRST + DONE, model=DEFECT, stream=True)
UNAUTHORIZED = b'{"error":"Unauthorized"}'
HTML = b"<html><body>Bad Gateway</body></html>"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
LONG = event("x" * 1_500_000)  # the limit is 1 MiB
BUSY = {"message": "The engine is currently busy", "type": "Service Unavailable", "param": None, "code": 503}
DIED = {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}
TOO_LONG = {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}
OVERLOADED = {"message": "Overloaded", "type": "overloaded_error"}

CASES: Mapping[str, Ask] = {
    "bad-json": asking(data=lambda: b"{"),
    "no-model": asking(data=lambda: b'{"messages":[]}'),
    "unknown-model": asking(model="nobody"),
    "unknown-strategy": asking(headers={"routing-strategy": "guess"}),
    "bad-filter": asking(headers={"external-filter": "=("}),
    "bad-profile": asking(headers={"config-profile": "none"}),
    "bad-pin": asking(headers={"target-pod-ip": "10.0.0.1:1"}),
    "body-too-large": announces_too_much,
    "headers-too-large": asking(headers={f"x-{number}": "1" for number in range(110)}),
    "body-encoded": asking(data=lambda: b"\x1f\x8b", headers={"content-encoding": "gzip"}),
    "trailers-without-body": trailers_without_body,
    "nobody-ready": asking(headers={SUBSET: "10.0.0.1:1"}),
    "get-refused": asking(method="GET", path="/v1/files", headers={"routing-strategy": "guess"}),
    "head-refused": asking(method="HEAD", path="/v1/files", headers={"routing-strategy": "guess"}),
    "body-too-large-unannounced": asking(data=too_large_unannounced),
    "upload-stalls": upload_stalls,
    "no-http": no_http,
    "pods-refuse": asking(model=DEAD),
    "one-pod-refuses": one_refuses,
    "connect-timeout": asking(model=DEAF),
    "pod-speaks-no-http": ending(b"no such protocol\r\n\r\n", written=b""),
    "pod-resets-at-once": ending(b"", written=b"", model=RESETS),
    "pod-closes-at-once": ending(b"", written=b""),
    "pod-resets-in-json": ending(
        head("application/json", f"content-length: {len(JSON)}"), JSON[:40], written=JSON, model=RESETS
    ),
    "pod-closes-in-json": ending(
        head("application/json", f"content-length: {len(JSON)}"), JSON[:40], written=JSON
    ),
    "pod-resets-in-stream": ending(
        STREAM_HEAD, chunk(FIRST), written=FIRST + SECOND, model=RESETS, stream=True
    ),
    "pod-closes-in-stream": ending(STREAM_HEAD, chunk(FIRST), written=FIRST + SECOND, stream=True),
    "pod-silent": silent(),
    "pod-too-slow": silent(headers={HASTY: "answer"}),
    "pod-too-slow-a-try": silent(headers={HASTY: "try"}),
    "pod-silent-in-stream": silent(STREAM_HEAD, chunk(FIRST), written=FIRST + SECOND, stream=True),
    "no-done": streaming(FIRST, SECOND),
    "bad-event": streaming(FIRST, b"data: {oops\n\n", DONE),
    "json-that-is-none": answering(HTML),
    "event-too-large": streaming(ROLE, LONG, SECOND, DONE),
    "compressed": answering(gzip.compress(JSON), "content-encoding: gzip"),
    "other-content-type": answering(b"hello", kind="text/plain"),
    "engine-400": capture("err_bad_role"),
    "engine-401": failing("401 Unauthorized", UNAUTHORIZED),
    "engine-404": capture("err_unknown_model"),
    "engine-422": failing("422 Unprocessable Entity", b'{"detail":[]}'),
    "engine-429": failing("429 Too Many Requests", b'{"error":{"code":429}}', "retry-after: 7"),
    "engine-500": capture("death_enginekill_nonstream"),
    "engine-502": failing("502 Bad Gateway", HTML, kind="text/html"),
    "engine-503": capture("b_err_queue_full"),
    "engine-504": failing("504 Gateway Timeout", HTML, kind="text/html"),
    "engine-529": failing("529 Site Overloaded", told(OVERLOADED)[6:]),
    "stream-refused": streaming(told(BUSY), DONE),
    "stream-529": streaming(FIRST, told(OVERLOADED | {"code": 529}), DONE),
    "stream-overloaded": streaming(FIRST, told(OVERLOADED), DONE),
    "engine-dies-in-stream": streaming(FIRST, told(DIED), DONE),
    "stream-error-reset": ending(
        STREAM_HEAD, chunk(FIRST + told(DIED)), written=FIRST + told(DIED) + DONE, model=RESETS, stream=True
    ),
    "stream-400": streaming(told(TOO_LONG), DONE),
    "json-error": answering(told(BUSY)[6:]),
    "client-leaves-uploading": upload_ends,
    "client-leaves-waiting": leaves_before_the_answer,
    "client-leaves-in-stream": lambda side: leaves_behind(side, FIRST),
    "client-leaves-behind-done": lambda side: leaves_behind(side, FIRST, DONE),
    "client-leaves-behind-json": leaves_behind_json,
    "defect-open": BROKEN,
    "defect-closed": BROKEN,
    "late-open": late,
    "late-closed": late,
    "gone-open": gone,
    "gone-closed": gone,
}

# -- what is checked of each -------------------------------------------------------------------------------------------

ROWS = rows()
LANES = ("stream", "native")
OURS = {"error": {"message", "type", "param", "code"}}
ENVOYS_WORDS = frozenset(each.message for each in _LOCAL_REPLIES)
ALLOWED = "envoy_http_ext_proc_envoy_extproc_failure_mode_allowed"
COUNTED = (
    "envoy_extproc_bypassed_requests_total",
    "envoy_extproc_oversized_events_total",
    "envoy_extproc_retries_total",
    "envoy_extproc_unread_responses_total",
    "envoy_extproc_unreadable_events_total",
)
QUIET_SECONDS = 0.2  # Envoy sends its access log every 0.1 s


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sides(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mapping[tuple[str, str], Side]]:
    """By lane and fail mode."""
    directory = tmp_path_factory.mktemp("errors")
    found: dict[tuple[str, str], Side] = {}
    async with AsyncExitStack() as stack:
        stack.enter_context(defect(directory / "defect"))
        for lane, mode in itertools.product(LANES, ("closed", "open")):
            opened = side(directory / f"{lane}-{mode}", lane, fail_open=mode == "open")
            found[lane, mode] = await stack.enter_async_context(opened)
        yield found


@pytest.mark.parametrize("name", CASES)
async def test_row(sides: Mapping[tuple[str, str], Side], name: str) -> None:
    mode = "open" if name.endswith("-open") else "closed"
    await asyncio.gather(*(check_row(sides[lane, mode], name) for lane in LANES))


async def check_row(at: Side, name: str) -> None:
    row = ROWS[name]
    if name.startswith("gone"):
        before = await at.allowed()
        check_client(row, await CASES[name](at))
        assert await at.allowed() - before == row.counts.get(ALLOWED, 0)
        return  # nobody is there to count anything else
    books = await Books.of(at)
    got = await CASES[name](at)
    check_client(row, got)
    await books.check(at, row, row.said[at.lane], got)


def check_client(row: Row, got: Got) -> None:
    assert got.status == row.status
    headers = {key.lower(): value for key, value in got.headers.items()}
    told = {
        key: value for key, value in headers.items() if key == "retry-after" or key.startswith("x-error-")
    }
    assert told == row.headers
    if row.body in {"ours", "Envoy's"}:
        error = json.loads(got.body)
        assert {key: set(value) for key, value in error.items()} == OURS
        assert headers["content-type"] == "application/json"
        assert (error["error"]["message"] in ENVOYS_WORDS) == (row.body == "Envoy's")
    else:
        written = got.written or b""
        assert {"pod's": got.body == written, "cut off": written.startswith(got.body), "none": not got.body}[
            row.body
        ]
    assert got.cut == (row.body == "cut off")


@dataclass(frozen=True, slots=True)
class Books:
    """A server's books at one moment.

    Attributes:
        reports: how many lines it has logged about exchanges.
    """

    metrics: Mapping[str, float]
    reports: int

    @classmethod
    async def of(cls, at: Side) -> Self:
        return cls(await at.gateway.metrics(), len(at.gateway.reports()))

    async def check(self, at: Side, row: Row, said: Said, got: Got) -> None:
        """What has been added since, once nothing more comes."""
        wanted = int(said.outcome is not None)
        await eventually(lambda: len(at.gateway.reports()) - self.reports >= wanted)
        await asyncio.sleep(QUIET_SECONDS)
        new = at.gateway.reports()[self.reports :]
        assert len(new) == wanted, new
        for report in new:
            check_report(row, said, got, report)
        now = await Books.of(at)
        requests, errors = (self.grown(now, f"envoy_extproc_{name}_total") for name in ("requests", "errors"))
        assert [(each["outcome"], number) for each, number in requests] == [(said.outcome, 1)] * wanted
        assert [(each["error_type"], number) for each, number in errors] == (
            [] if said.error_type is None else [(said.error_type, 1)]
        )
        counts = {name: sum(number for _, number in self.grown(now, name)) for name in COUNTED}
        assert {name: number for name, number in counts.items() if number} == row.counts

    def grown(self, now: Books, metric: str) -> list[tuple[Mapping[str, str], float]]:
        """The labels of each series of `metric` that has grown, and by how much."""
        return [
            (dict(_LABEL.findall(name)), value - self.metrics.get(name, 0))
            for name, value in now.metrics.items()
            if name.partition("{")[0] == metric and value != self.metrics.get(name, 0)
        ]


_LABEL = re.compile(r'(\w+)="([^"]*)"')


def check_report(row: Row, said: Said, got: Got, report: Mapping[str, Any]) -> None:
    assert report["request_id"] in {got.request_id, *([""] if report["status"] is None else [])}
    assert (report["outcome"], report["error.type"]) == (said.outcome, said.error_type)
    if said.error == "*":
        assert report["error"]
    else:
        assert report["error"] == said.error
    if report["status"] is not None:
        assert report["status"] == row.status
