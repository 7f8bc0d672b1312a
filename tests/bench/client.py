"""The load: connections that each send a request when the last answer is whole. A process of its own.

One `Load` a line on standard input, one `Result` a line on standard output. Every answer is checked: status 200, the
announced length or the end of the chunks, exactly the events the engine wrote for the client, and ``[DONE]``. No event
may say anything of usage, since no client here asks for it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Literal, cast

import msgspec
import uvloop

from tests.bench.engine import MODEL

_WORDS = "The quick brown fox jumps over the lazy dog, and the gateway carries every byte of it. "
_ESCAPED = r"He said: \"caf\u00e9\"\n\tand wrote C:\\path, \"quoted\" once more.\n"
_PATIENCE = 60.0  # seconds for one answer

_USAGE = b'"usage"'

Kind = Literal["closed-loop", "open-loop", "alternate", "hold", "release"]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes:
        kind: `closed-loop` sends for so many seconds; `open-loop` sends at `rate` whatever the answers take; `alternate`
            sends one after the other, to each port in turn; `hold` opens streams that stay silent; `release` closes them.
        ports: Envoys on loopback.
        model: decides how the engine writes its events.
        connections: at once; of `open-loop`, at the start.
        seconds: no request is sent later than that.
        requests: of `alternate`, to each port.
        rate: of `open-loop`: requests a second on average, at random times (Poisson).
        seed: of those times, so that two Envoys can be met by the same.
        prompt: bytes of the prompt.
        escaped: whether the prompt is full of JSON escapes.
        tokens: of an answer; None asks for a JSON answer.
    """

    kind: Kind
    ports: tuple[int, ...] = ()
    model: str = MODEL
    connections: int = 1
    seconds: float = 0.0
    requests: int = 0
    rate: float = 0.0
    seed: int = 0
    prompt: int = 2048
    escaped: bool = False
    tokens: int | None = None


class Result(msgspec.Struct, kw_only=True):
    """What came of it.

    Attributes:
        requests: answers that were whole.
        failures: answers that were not.
        events: of streams, ``[DONE]`` and the first one, which carries the role, among them.
        received: bytes.
        seconds: from the first request to the end of the last answer.
        latencies: of `alternate` and `open-loop`: seconds of each request, by port.
        failed: what the first failure was.
    """

    requests: int = 0
    failures: int = 0
    events: int = 0
    received: int = 0
    seconds: float = 0.0
    latencies: list[list[float]] = []
    failed: str = ""


def body(load: Load) -> bytes:
    """The request's body. Members stand in the order in which clients of OpenAI's write them."""
    piece = _ESCAPED if load.escaped else _WORDS
    text = piece * (load.prompt // len(piece) + 1)
    more = f',"max_tokens":{load.tokens or 0},"temperature":0.7' + (
        ',"stream":true' if load.tokens is not None else ""
    )
    message = f'{{"role":"user","content":"{text}"}}'
    return f'{{"model":"{load.model}","messages":[{message}]{more}}}'.encode()


class BadAnswerError(Exception):
    """An answer is not what the engine wrote; its connection is of no more use."""


class Connection(asyncio.Protocol):
    """One keep-alive connection; `ask` sends a request and returns when its answer is whole, or held."""

    def __init__(self, load: Load, result: Result) -> None:
        content = body(load)
        self._request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nuser-agent: OpenAI/Python 2.7.1\r\n"
            b"accept: application/json\r\naccept-encoding: gzip, deflate\r\nauthorization: Bearer none\r\n"
            b"x-stainless-lang: python\r\nx-stainless-runtime: CPython\r\nx-stainless-retry-count: 0\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content
        )
        self._held = load.kind == "hold"
        self._expected = None if load.tokens is None else load.tokens + 2
        self._result = result
        self._transport: asyncio.WriteTransport
        self._answered: asyncio.Future[None] | None = None  # before the first request there is none
        self._in_body = False
        self._missing = 0
        self._events = 0
        self._usages = 0
        self._tail = b""
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's are none of asyncio's classes

    async def ask(self) -> None:
        self._answered = answered = asyncio.get_running_loop().create_future()
        self._in_body, self._events, self._usages, self._tail, self._head = False, 0, 0, b"", b""
        self._transport.write(self._request)
        async with asyncio.timeout(_PATIENCE):
            await answered

    def close(self) -> None:
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError("closed before the answer was whole"))

    def data_received(self, data: bytes) -> None:
        self._result.received += len(data)
        if not self._in_body:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._begin(head)
        if self._expected is None:
            self._missing -= len(data)
            if self._missing <= 0:
                self._end(None if self._missing == 0 else "longer than announced")
        else:
            self._take(data)

    def _begin(self, head: bytes) -> None:
        self._in_body = True
        if not head.startswith(b"HTTP/1.1 200 "):
            self._end(head.partition(b"\r\n")[0].decode())
            return
        length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        self._missing = int(length or b"0")
        if (self._expected is None) != bool(length):
            self._end("a length where none was expected, or none where one was")

    def _take(self, data: bytes) -> None:
        tail = self._tail
        self._events += (tail[-5:] + data).count(b"data: ")
        self._usages += (tail[1 - len(_USAGE) :] + data).count(_USAGE)
        tail = (tail + data)[-32:]
        self._tail = tail
        if self._held and self._events:
            self._end(None)
        elif tail.endswith(b"\r\n0\r\n\r\n"):
            done = tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            whole = done and self._events == self._expected and not self._usages
            told = f"{self._events} events of {self._expected}, {self._usages} usages of 0, end {tail!r}"
            self._end(None if whole else told)

    def _end(self, failure: str | None) -> None:
        if self._answered is None or self._answered.done():
            return
        self._result.events += self._events
        if failure is None:
            self._result.requests += 1
            self._answered.set_result(None)
        else:
            self._answered.set_exception(BadAnswerError(failure))


async def connect(load: Load, port: int, result: Result) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(load, result), "127.0.0.1", port)
    return connection


async def closed_loop(load: Load) -> Result:
    result = Result()
    connections = [await connect(load, load.ports[0], result) for _ in range(load.connections)]
    began = time.monotonic()

    async def repeat(connection: Connection) -> None:
        while True:
            await connection.ask()
            if time.monotonic() - began >= load.seconds:
                return

    for outcome in await asyncio.gather(*map(repeat, connections), return_exceptions=True):
        if outcome is not None:
            result.failures += 1
            result.failed = result.failed or repr(outcome)
    result.seconds = time.monotonic() - began
    for connection in connections:
        connection.close()
    return result


async def alternate(load: Load) -> Result:
    """To each port in turn, so that whatever else the machine does meets both alike."""
    result = Result(latencies=[[] for _ in load.ports])
    connections = [await connect(load, port, result) for port in load.ports]
    began = time.monotonic()
    for _ in range(load.requests):
        for connection, latencies in zip(connections, result.latencies, strict=True):
            sent = time.perf_counter()
            await connection.ask()
            latencies.append(time.perf_counter() - sent)
    result.seconds = time.monotonic() - began
    for connection in connections:
        connection.close()
    return result


async def open_loop(load: Load) -> Result:
    """At its own pace: where no connection is free another one is opened, so no request waits for an earlier answer."""
    loop, rng = asyncio.get_running_loop(), random.Random(load.seed)
    latencies: list[float] = []
    result = Result(latencies=[latencies])
    free = [await connect(load, load.ports[0], result) for _ in range(load.connections)]

    async def one() -> None:
        connection = free.pop() if free else await connect(load, load.ports[0], result)
        sent = time.perf_counter()  # not the time it was due: timers of the loop are a millisecond coarse
        try:
            await connection.ask()
        except (BadAnswerError, OSError) as error:
            result.failures += 1
            result.failed = result.failed or repr(error)
        else:
            latencies.append(time.perf_counter() - sent)
            free.append(connection)

    due = began = loop.time()
    async with asyncio.TaskGroup() as tasks:
        while (due := due + rng.expovariate(load.rate)) < began + load.seconds:
            await asyncio.sleep(due - loop.time())
            tasks.create_task(one())
    result.seconds = loop.time() - began
    for connection in free:
        connection.close()
    return result


class Client:
    """Does one load after the other."""

    def __init__(self) -> None:
        self._held: list[Connection] = []

    async def perform(self, load: Load) -> Result:
        if load.kind == "closed-loop":
            return await closed_loop(load)
        if load.kind == "open-loop":
            return await open_loop(load)
        if load.kind == "alternate":
            return await alternate(load)
        if load.kind == "hold":
            result = Result()
            for _ in range(load.connections):
                connection = await connect(load, load.ports[0], result)
                self._held.append(connection)
                await connection.ask()
            return result
        for connection in self._held:
            connection.close()
        self._held.clear()
        return Result()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    client = Client()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        result = await client.perform(msgspec.json.decode(line, type=Load))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
