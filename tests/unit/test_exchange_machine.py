"""Any conversation at all: the next event is drawn from the table most of the time, else from all there are."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from envoy_extproc.endpoints import Snapshot
from envoy_extproc.errors import BadPin, GatewayError, ModelNotFound, NoReadyEndpoint
from envoy_extproc.exchange.commands import (
    Command,
    Continue,
    Finish,
    ListModels,
    Release,
    Respond,
    Schedule,
    Serve,
)
from envoy_extproc.exchange.events import (
    Event,
    Listed,
    Message,
    Refused,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Scheduled,
    StreamClosed,
)
from envoy_extproc.exchange.exchange import NEXT, TABLE, Exchange, ExchangeSettings, State
from envoy_extproc.exchange.native import Facts
from envoy_extproc.scheduling import registry
from envoy_extproc.server.catalogue import Catalogue
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.server.native_lane import NativeLane
from envoy_extproc.server.servicer import Call, Parts
from envoy_extproc.state.memory import InFlight
from envoy_extproc.telemetry import Hooks
from tests.support.builders import decision, endpoint, headers, sse, token, usage
from tests.support.playbook import Playbook

pytestmark = pytest.mark.unmeasured

TEXT = sse(token("a"), usage(3, 4), {"error": {"code": 503}}, "[DONE]", "junk")
AT = st.floats(0, 1e6)
ERRORS: list[GatewayError] = [ModelNotFound("x \udcff"), NoReadyEndpoint("no"), BadPin("no")]

REQUEST_HEADERS = st.fixed_dictionaries(
    {
        "path": st.sampled_from(
            [
                "/v1/chat/completions",
                "/v1/embeddings",
                "/v1/models",
                "/v1/messages/count_tokens",
                "/v1/audio/speech",
                "",
            ]
        )
    },
    optional={
        "method": st.sampled_from(["GET", "POST"]),
        "x_request_id": st.sampled_from(["", "id\udcff", "id"]),
        "content_length": st.sampled_from(["5", "100000", "x", ""]),
        "content_encoding": st.sampled_from(["gzip", "identity"]),
        "routing_strategy": st.text(max_size=3),
        "x_model": st.text(max_size=3),
        "endpoint_load_metrics_format": st.sampled_from(["TEXT", "BIN", "?"]),
    },
).map(lambda values: headers(**values))
RESPONSE_HEADERS = st.fixed_dictionaries(
    {"content_type": st.sampled_from(["text/event-stream", "application/json", "text/plain", ""])},
    optional={
        "status": st.sampled_from(["200", "204", "404", "503", "x"]),
        "content_length": st.sampled_from(["5", "100000"]),
        "content_encoding": st.sampled_from(["gzip", "identity"]),
    },
).map(lambda values: headers(**values))
BODIES = st.sampled_from(
    [
        b'{"model":"m","stream":true}',
        b'{"model":"m"}',
        b'{"model":"m","stream":true,"stream_options":{"continuous_usage_stats":true}}',
        b'{"model":7}',
        b"",
        b"{",
        b"x" * 200,
    ]
) | st.binary(max_size=20)
PIECES = st.tuples(st.integers(0, len(TEXT)), st.integers(0, 60)).map(
    lambda cut: TEXT[cut[0] : cut[0] + cut[1]]
) | st.binary(max_size=10)

EVENTS: dict[type[object], st.SearchStrategy[Event]] = {
    RequestHeaders: st.builds(
        RequestHeaders,
        AT,
        REQUEST_HEADERS,
        st.booleans(),
        st.none() | st.just(("10.0.0.1",)),
        st.sampled_from([1, 1, 0, 2]),
    ),
    RequestBody: st.builds(RequestBody, AT, BODIES, st.booleans()),
    RequestTrailers: st.builds(RequestTrailers, AT),
    ResponseHeaders: st.builds(
        ResponseHeaders,
        AT,
        RESPONSE_HEADERS,
        st.booleans(),
        st.sampled_from([None, "10.0.0.1:8000", "10.0.0.2:8000", "10.9.9.9:1"]),
        st.integers(0, 3),
        st.sampled_from([None, None, "", "no_healthy_upstream"]),
    ),
    ResponseBody: st.builds(ResponseBody, AT, PIECES, st.booleans()),
    ResponseTrailers: st.builds(ResponseTrailers, AT),
    Scheduled: st.builds(Scheduled, AT, st.sampled_from([decision(1), decision(2, 1), decision(3)])),
    Refused: st.builds(Refused, AT, st.sampled_from(ERRORS)),
    Listed: st.builds(Listed, AT, st.sampled_from([b"{}", None])),
    StreamClosed: st.builds(StreamClosed, AT, st.booleans(), st.none() | st.just("ValueError")),
}
# What makes for long conversations; the others come from the 10 % of any event, and at the end.
LIKELY = {
    state: [
        kind for kind in row if kind not in (StreamClosed, Refused, Listed, RequestTrailers, ResponseTrailers)
    ]
    for state, row in TABLE.items()
}


def replies(commands: list[Command]) -> list[Continue | Respond]:
    return [command for command in commands if isinstance(command, Continue | Respond)]


def check_step(before: State, happened: Event, commands: list[Command], after: State) -> None:
    kind = type(happened)
    if kind not in TABLE[before]:
        assert after is before
    elif kind is StreamClosed:
        assert after is State.CLOSED
    else:
        assert after in NEXT[before][kind]

    asked = [command for command in commands if isinstance(command, Schedule | ListModels)]
    is_message = isinstance(happened, Message)
    if before is State.CLOSED:
        assert commands == []
    elif asked:
        assert len(commands) == 1
        assert (after, is_message) == (State.AWAIT_DECISION, True)
    elif is_message or (kind in (Scheduled, Refused, Listed) and before is State.AWAIT_DECISION):
        assert len(replies(commands)) == 1
    else:
        assert replies(commands) == []
    for command in commands:
        if isinstance(command, Serve):
            assert kind is ResponseHeaders
            assert before is not State.HANDED_OVER
        if isinstance(command, Continue):
            assert (command.handover is not None) is (after is State.HANDED_OVER and kind is Scheduled)
            if command.handover is not None:
                told = msgspec.json.decode(command.handover.facts, type=Facts)
                assert (told.read, told.routing is None) == (command.handover.read, False)
    assert any(isinstance(command, Respond) for command in commands) <= (after is State.ANSWERED)


@given(data=st.data())
@pytest.mark.parametrize("accounting", [True, False])
@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=200)
def test_any_conversation(data: st.DataObject, accounting: bool, native: bool) -> None:
    book = Playbook(
        ExchangeSettings(max_body_bytes=100, max_event_bytes=60, max_json_bytes=40, accounting=accounting),
        native=native,
    )
    ends: list[Finish | Release] = []
    for _ in range(data.draw(st.integers(0, 25))):
        before = book.state
        anything = data.draw(st.integers(0, 9)) == 0
        kinds = (not anything and LIKELY[before]) or list(EVENTS)
        happened = data.draw(EVENTS[data.draw(st.sampled_from(kinds))])
        commands = list(book.receive(happened))
        check_step(before, happened, commands, book.state)
        ends += [command for command in commands if isinstance(command, Finish | Release)]
        assert not (before is State.HANDED_OVER and any(isinstance(each, Finish) for each in commands))
    note(book.state.name)
    ends += [command for command in book.receive(StreamClosed(1e6)) if isinstance(command, Finish | Release)]
    (end,) = ends
    assert native or isinstance(end, Finish)
    assert book.state is State.CLOSED


MESSAGES = [kind for kind in EVENTS if kind not in (Scheduled, Refused, Listed, StreamClosed)]


def parts(lane: NativeLane, in_flight: InFlight, *, hold: bool) -> Parts:
    director = Director(
        profiles=registry.build(),
        rules=RoutingRules(),
        in_flight=in_flight.count,
        states={},
        rng=random.Random(1),
    )
    director.update(Snapshot([endpoint(1, models=("m",)), endpoint(2, models=("m",))]))
    return Parts(
        settings=ExchangeSettings(),
        director=director,
        in_flight=in_flight,
        hook=Hooks(),
        lane=lane,
        catalogue=Catalogue({}),
        hold=hold,
    )


@given(data=st.data())
@pytest.mark.parametrize(("native", "hold"), [(False, True), (True, True), (True, False)])
def test_what_an_exchange_holds_is_free_in_the_end(data: st.DataObject, native: bool, hold: bool) -> None:
    lane, in_flight = NativeLane("native" if native else "stream"), InFlight()
    made = parts(lane, in_flight, hold=hold)
    exchange = Exchange(made.settings, made.director.lookup, lambda: "made-up-id", native=lane.open)
    call = Call(exchange, made)
    for _ in range(data.draw(st.integers(0, 8))):
        anything = data.draw(st.integers(0, 9)) == 0
        likely = [kind for kind in LIKELY[exchange.state] if kind in MESSAGES]
        call.receive(data.draw(EVENTS[data.draw(st.sampled_from((not anything and likely) or MESSAGES))]))
        assert in_flight.total == (exchange.record.routing is not None)
    routed, left = exchange.record.routing is not None, lane.ended
    (end,) = exchange.receive(StreamClosed(1e6))
    call._perform(end, 1e6)
    note(type(end).__name__)
    assert lane.ended - left == isinstance(end, Release)
    assert in_flight.total == (routed and isinstance(end, Release) and not hold)
    if isinstance(end, Release):
        lane.report(end.request_id)
    assert in_flight.total == 0


@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=8))
def test_the_cutting_of_an_answer_does_not_show_in_the_report(cuts: list[int]) -> None:
    def conversation(places: list[int]) -> tuple[bytes, object]:
        book = Playbook()
        book.until_answer()
        shown = b"".join(
            book.data(TEXT[start:end]) for start, end in zip([0, *places], [*places, len(TEXT)], strict=True)
        )
        shown += book.data(b"", end=True)
        report = book.closed()
        return shown, (report.outcome, report.error, report.usage, report.usage_source, report.usage_removed)

    assert conversation(sorted(cuts)) == conversation([])
