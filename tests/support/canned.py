"""An upstream that says byte for byte what it is told to: real HTTP/1.1 on a socket, and no opinion of its own."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.support.gateway import MODEL

PAUSE = 0.002  # seconds between two pieces: enough for each to be read by itself on an idle machine


@dataclass(frozen=True, slots=True)
class Answer:
    """What is written, in order.

    Attributes:
        pieces: bytes are written at once, without Nagle's delay; an event is waited for.
        pause: seconds after each piece.
        close: whether the connection is closed behind the last piece.
    """

    pieces: Sequence[bytes | asyncio.Event]
    pause: float = PAUSE
    close: bool = False


@dataclass(slots=True)
class Request:
    """A request as it came."""

    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class Canned:
    """The upstream.

    Attributes:
        answers: by the request's ``x-request-id``.
        default: for every other request that is a POST.
        requests: what came, by ``x-request-id``, retries too.
        cut: ids of requests whose connection was gone before the answer was written.
        address: where it listens.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    default: Answer | None = None
    requests: defaultdict[str, list[Request]] = field(default_factory=lambda: defaultdict(list))
    cut: set[str] = field(default_factory=set)
    address: str = ""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def pod(self, name: str = "pod-canned") -> Mapping[str, Any]:
        """As in `discovery.static.endpoints`."""
        return {"name": name, "address": self.address, "models": [MODEL]}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # by `close` alone
        finally:
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        """Ends every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await _read(reader)
        request_id = request.headers.get("x-request-id", "")
        if request_id:  # what the scraper asks has none
            self.requests[request_id].append(request)
        answer = self.answers.get(request_id, self.default)
        if request.target == "/metrics" or answer is None:
            answer = _NOT_FOUND
        try:
            await _write(writer, answer)
        except ConnectionError:
            self.cut.add(request_id)
            raise
        return not answer.close


@asynccontextmanager
async def canned() -> AsyncIterator[Canned]:
    """A `Canned` that listens."""
    upstream = Canned()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, backlog=4096)
    upstream.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    try:
        yield upstream
    finally:
        server.close()
        await upstream.close()


def head(content_type: str, *more: str, status: str = "200 OK") -> bytes:
    """A status line and headers."""
    lines = (f"HTTP/1.1 {status}", "server: uvicorn", f"content-type: {content_type}", *more)
    return "\r\n".join((*lines, "\r\n")).encode()


def chunk(data: bytes) -> bytes:
    """One chunk of chunked framing."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
STREAM_HEAD = head("text/event-stream; charset=utf-8", "transfer-encoding: chunked")
_NOT_FOUND = Answer((head("text/plain", "content-length: 0", status="404 Not Found"),), pause=0.0)


def stream(*writes: bytes | asyncio.Event, pause: float = PAUSE) -> Answer:
    """An event stream, a chunk for each write."""
    chunks = (each if isinstance(each, asyncio.Event) else chunk(each) for each in writes)
    return Answer((STREAM_HEAD, *chunks, LAST_CHUNK), pause)


def document(body: bytes, *more: str) -> Answer:
    """A JSON answer that tells its length."""
    return Answer((head("application/json", f"content-length: {len(body)}", *more), body))


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    for piece in answer.pieces:
        if isinstance(piece, asyncio.Event):
            await piece.wait()
            continue
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(answer.pause)
    if writer.is_closing():
        raise ConnectionResetError


async def _read(reader: asyncio.StreamReader) -> Request:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = await _read_chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(first.split(" ")[1], headers, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)
