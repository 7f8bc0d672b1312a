"""What single steps cost inside this process: no Envoy, no gRPC, no event loop.

python -m tests.bench.micro        # ten seconds
"""

from __future__ import annotations

import random
import statistics
import timeit
from collections.abc import Callable, Iterator

import msgspec

from envoy_extproc._proto import access_log_pb2
from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.exchange import native
from envoy_extproc.exchange.events import (
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Scheduled,
    StreamClosed,
)
from envoy_extproc.exchange.exchange import Exchange, ExchangeSettings
from envoy_extproc.exchange.native import Facts
from envoy_extproc.exchange.report import routing_of
from envoy_extproc.headers import Headers
from envoy_extproc.openai import request, routes
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server import access_log, wire
from envoy_extproc.server.director import Director, RoutingRules
from tests.bench.client import Load, body
from tests.bench.engine import ANSWER, MODEL, token

_REPEATS = 5
_SECONDS = 0.15  # of one repeat

_NOTES = (
    '{"streamed":true,"ended":true,"done":true,"tokens":80,"text":400,"delivered":16000,"first":1795250656000000,'
    '"last":1795250657000000,"removed":1,"oversized":0,"unreadable":0,"unread":"","failure":false}'
)
_JSON = body(Load(kind="closed-loop"))
_STREAM = body(Load(kind="closed-loop", tokens=128))
_PLAIN = token(" Option")
_NULL_USAGE = token(" Option", ',"usage":null')


def figures() -> Iterator[tuple[str, float]]:
    """Name and microseconds of each."""
    for name, event in (("plain event", _PLAIN), ('"usage":null', _NULL_USAGE)):
        yield f"core + SSE, {name}", _core(event)
        yield f"wire decode + encode, {name}", _wire(event, whole=False)
        yield f"those with parse and serialise, {name}", _wire(event, whole=True)
    yield "core, a JSON exchange from the first message to the report", _exchange()
    yield "native lane, access-log entry to report", _entry()
    yield "request body of 2 KB, decode + rewrite", _rewrite()
    for count in (8, 100):
        yield f"Director.schedule, {count} endpoints", _schedule(count)


def microseconds(call: Callable[[], object]) -> float:
    """Median of a few repeats."""
    timer = timeit.Timer(call)
    once = max(timer.timeit(100) / 100, 1e-8)
    number = int(_SECONDS / once) + 1
    return statistics.median(timer.repeat(_REPEATS, number)) / number * 1e6


def _director(count: int) -> Director:
    endpoints = [
        Endpoint(name=f"pod-{number}", address=f"10.0.{number // 250}.{number % 250}:8000", models=(MODEL,))
        for number in range(count)
    ]
    stats = EngineStats(at=0.0, running=3.0, waiting=0.0, kv_cache_usage=0.125)
    director = Director(
        profiles=registry.build(),
        rules=RoutingRules(),
        in_flight={endpoint.address: number % 3 for number, endpoint in enumerate(endpoints)}.__getitem__,
        states={endpoint.address: EngineState(stats=stats) for endpoint in endpoints},
        rng=random.Random(1),
    )
    director.update(Snapshot(endpoints))
    return director


_ASKED = Headers([(":method", "POST"), (":path", "/v1/chat/completions"), ("x-request-id", "id")])


def _reading() -> Exchange:
    """An exchange in the middle of a stream from which usage is hidden."""
    director = _director(8)
    exchange = Exchange(ExchangeSettings(), director.lookup, lambda: "id")
    exchange.receive(RequestHeaders(0.0, _ASKED, False))
    exchange.receive(RequestBody(0.0, _STREAM, True))
    decision = director.schedule(SchedulingRequest(model=MODEL), 0.0)
    exchange.receive(Scheduled(0.0, decision))
    answered = Headers([(":status", "200"), ("content-type", "text/event-stream; charset=utf-8")])
    exchange.receive(ResponseHeaders(0.0, answered, False, decision.order[0].address))
    return exchange


def _exchange() -> float:
    """All that the core does for an answer in JSON; the decision is given."""
    director, settings = _director(8), ExchangeSettings()
    decision = director.schedule(SchedulingRequest(model=MODEL), 0.0)
    answered = Headers([(":status", "200"), ("content-type", "application/json"), ("content-length", "800")])
    conversation = (
        RequestHeaders(0.0, _ASKED, False),
        RequestBody(0.0, _JSON, True),
        Scheduled(0.0, decision),
        ResponseHeaders(0.0, answered, False, decision.order[0].address),
        ResponseBody(0.0, ANSWER, True),
        StreamClosed(0.0),
    )

    def exchange() -> None:
        receive = Exchange(settings, director.lookup, lambda: "id").receive
        for event in conversation:
            receive(event)

    return microseconds(exchange)


def _core(data: bytes) -> float:
    exchange, event = _reading(), ResponseBody(0.0, data, False)
    return microseconds(lambda: exchange.receive(event))


def _wire(data: bytes, *, whole: bool) -> float:
    exchange = _reading()
    message = wire.ProcessingRequest()
    message.response_body.body = data
    received = message.SerializeToString()
    event = wire.decode(message, 0.0)
    assert event is not None
    (reply,) = exchange.receive(event)

    def alone() -> None:
        wire.decode(message, 0.0)
        wire.encode(reply)  # type: ignore[arg-type]

    def all_of_it() -> bytes:
        event = wire.decode(wire.ProcessingRequest.FromString(received), 0.0)
        (reply,) = exchange.receive(event)  # type: ignore[arg-type]
        return wire.encode(reply).SerializeToString()  # type: ignore[arg-type]

    return microseconds(all_of_it if whole else alone)


def _entry() -> float:
    """All that an answer of the native lane costs when it is over, gRPC, the log line and metrics apart."""
    director = _director(8)
    decision = director.schedule(SchedulingRequest(model=MODEL), 0.0)
    known = Facts(
        request_id="id",
        path="/v1/chat/completions",
        routing=routing_of(decision),
        operation="chat",
        model=MODEL,
        stream=True,
        read=True,
    )
    written = access_log_pb2.HTTPAccessLogEntry()
    common, response = written.common_properties, written.response
    response.response_code.value, response.response_code_details = 200, wire.VIA_UPSTREAM
    address = common.upstream_remote_address.socket_address
    host, _, port = decision.order[0].address.rpartition(":")
    address.address, address.port_value = host, int(port)
    ours = common.metadata.filter_metadata[wire.METADATA].fields
    ours["facts"].string_value = msgspec.json.encode(known).decode()
    told = common.metadata.filter_metadata[wire.LUA_METADATA].fields
    told["answer"].string_value = _NOTES
    told["usage"].string_value = '{"prompt_tokens":512,"total_tokens":592,"completion_tokens":80}'
    received = written.SerializeToString()

    def read() -> None:
        entry = access_log_pb2.HTTPAccessLogEntry.FromString(received)
        facts = entry.common_properties.metadata.filter_metadata[wire.METADATA].fields["facts"]
        native.report(access_log.decode(entry, facts.string_value), director.lookup)

    return microseconds(read)


def _rewrite() -> float:
    route = routes.find("/v1/chat/completions")
    assert route is not None
    return microseconds(lambda: request.ask_for_usage(_STREAM, request.decode(_STREAM, route)))


def _schedule(count: int) -> float:
    director, wanted = _director(count), SchedulingRequest(model=MODEL)
    return microseconds(lambda: director.schedule(wanted, 0.0))


if __name__ == "__main__":
    for name, cost in figures():
        print(f"{cost:10.2f} us  {name}")
