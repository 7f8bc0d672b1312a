"""The pods: eight canned engines in one process, as light as they can be, so that they take little from what is measured.

A stream gets one event at each tick of its pod, in vLLM 0.32's shape and each written by itself, so that Envoy reads
one event at a time as it does behind a real engine. Every stream of a pod is written at the same tick, as a batch is;
the pods tick one after the other.

    POST /v1/chat/completions   `max_tokens` events; with 0, one event and then silence. The model `tiny-null` writes
                                `"usage":null` into each event once usage is asked for, as many engines do
    GET /metrics                a page of the metrics the server reads
    POST /bench/page            from here on `/metrics` is the page in the body; with an empty one, the small page again
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from typing import cast

import msgspec
import uvloop

PODS = 8
MODEL = "tiny"
NULL_MODEL = "tiny-null"
TICK = 0.002  # seconds from one token of a stream to the next

_MAX_TOKENS = re.compile(rb'"max_tokens":(\d+)')
_NULL_NAMED = f'"model":"{NULL_MODEL}"'.encode()
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WORDS = ("ify", " Option", "     ", "", "\u00e9cate", "us", "ields", " '.", " and", "\\n")

_TEXT = " ".join(["The gateway chooses a pod by what its engine says of itself."] * 6)
_ANSWER = (
    '{"id":"chatcmpl-ac38654b757565c2","object":"chat.completion","created":1795250638,"model":"tiny","choices":'
    '[{"index":0,"message":{"role":"assistant","content":"%s","refusal":null,"reasoning":null},"logprobs":null,'
    '"finish_reason":"length","stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":'
    '"vllm-0.32.0-16b828e4","usage":{"prompt_tokens":512,"total_tokens":592,"completion_tokens":80,'
    '"prompt_tokens_details":{"cached_tokens":0}},"prompt_logprobs":null,"kv_transfer_params":null}'
)
_PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.125
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 4096.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 2048.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 512.0
"""


def event(choices: str, rest: str = "") -> bytes:
    """One event of a stream."""
    return (
        'data: {"id":"chatcmpl-8afe11d823cb9fdd","object":"chat.completion.chunk","created":1795250656,'
        f'"model":"{MODEL}","choices":[{choices}]{rest}}}\n\n'
    ).encode()


def token(text: str, rest: str = "") -> bytes:
    """The event of one token."""
    delta = (
        f'{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":null,"token_ids":null}}'
    )
    return event(delta, rest)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _whole(kind: bytes, body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, kind, len(body)) + body


_NULL = ',"usage":null'
_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _start(more: str) -> bytes:
    """The answer's headers and its first event, which carries the role."""
    role = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
    return _HEAD + _chunk(event(role, f'{more},"prompt_token_ids":null,"prompt_text":null'))


class _Shape(msgspec.Struct, frozen=True):
    """How the events of a stream are written: its start, then its tokens."""

    start: bytes
    tokens: tuple[bytes, ...]


_PLAIN_SHAPE, _NULL_SHAPE = (
    _Shape(_start(more), tuple(_chunk(token(word, more)) for word in _WORDS)) for more in ("", _NULL)
)
_USAGE = _chunk(
    event(
        "",
        ',"usage":{"prompt_tokens":512,"total_tokens":592,"completion_tokens":80,"prompt_tokens_details":'
        '{"cached_tokens":0,"created_cache_tokens":0}},"system_fingerprint":"vllm-0.32.0-16b828e4"',
    )
)
_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
ANSWER = (_ANSWER % _TEXT).encode()
"""An answer in JSON."""

_JSON = _whole(b"application/json", ANSWER)
_MODELS = _whole(
    b"application/json",
    b'{"object":"list","data":[{"id":"tiny","object":"model","created":1795250638,"owned_by":"vllm"}]}',
)


class Page:
    """What every pod answers to a scrape."""

    def __init__(self) -> None:
        self.answer = b""
        self.set(_PAGE.encode())

    def set(self, text: bytes) -> None:
        self.answer = _whole(b"text/plain; version=0.0.4; charset=utf-8", text)


class Stream:
    """An answer under way."""

    __slots__ = ("_left", "_tail", "_transport", "_words")

    def __init__(self, transport: asyncio.WriteTransport, tokens: int, *, usage: bool, nulls: bool) -> None:
        shape = _NULL_SHAPE if usage and nulls else _PLAIN_SHAPE
        self._transport = transport
        self._left = tokens
        self._tail = _USAGE + _END if usage else _END
        self._words = itertools.cycle(shape.tokens)
        transport.write(shape.start)

    def tick(self) -> bool:
        """Writes the next event; False after the last."""
        if self._transport.is_closing():
            return False
        if self._left:
            self._left -= 1
            self._transport.write(next(self._words))
            return True
        self._transport.write(self._tail)
        return False


class Pod:
    """One engine: its streams and the tick they share."""

    def __init__(self, page: Page, phase: float) -> None:
        self.page = page
        self.streams: list[Stream] = []
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.time() + phase
        self._ticking = False

    def add(self, stream: Stream) -> None:
        self.streams.append(stream)
        if not self._ticking:
            self._ticking = True
            while self._next <= self._loop.time():
                self._next += TICK
            self._loop.call_at(self._next, self._tick)

    def _tick(self) -> None:
        self.streams = [stream for stream in self.streams if stream.tick()]
        self._ticking = bool(self.streams)
        if self._ticking:
            self._next = max(self._next + TICK, self._loop.time())
            self._loop.call_at(self._next, self._tick)


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as Envoy and the scraper speak it: whole requests, one after the other, with their length."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._head = b""
        self._parts: list[bytes] = []
        self._missing = 0
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's are none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            data = b"".join((self._head, data))
            head, end, data = data.partition(b"\r\n\r\n")
            self._head = head
            if not end:
                return
            length = _LENGTH.search(head)
            self._missing = int(length[1]) if length else 0
        self._parts.append(data)
        self._missing -= len(data)
        if not self._missing:
            head, body = self._head, b"".join(self._parts)
            self._head = b""
            self._parts.clear()
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST /v1/chat/completions"):
            self._generate(body)
        elif head.startswith(b"GET /metrics"):
            self._transport.write(self._pod.page.answer)
        elif head.startswith(b"POST /bench/page"):
            self._pod.page.set(body or _PAGE.encode())
            self._transport.write(_MODELS)
        elif head.startswith(b"GET /v1/models"):
            self._transport.write(_MODELS)
        else:
            self._transport.write(_whole(b"application/json", b"{}", b"404 Not Found"))

    def _generate(self, body: bytes) -> None:
        if b'"stream":true' not in body:
            self._transport.write(_JSON)
            return
        said = _MAX_TOKENS.search(body)
        tokens = int(said[1]) if said else 0
        stream = Stream(
            self._transport,
            tokens,
            usage=b'"include_usage":true' in body,
            nulls=_NULL_NAMED in body[:64],  # the model is the body's first member
        )
        if tokens:
            self._pod.add(stream)


async def _serve() -> None:
    loop, page = asyncio.get_running_loop(), Page()
    ports = []
    for number in range(PODS):
        pod = Pod(page, number * TICK / PODS)
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        ports.append(listening.getsockname()[1])
        await loop.create_server(lambda pod=pod: Connection(pod), sock=listening)  # type: ignore[misc]
    print(msgspec.json.encode(ports).decode(), flush=True)
    await loop.create_future()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
