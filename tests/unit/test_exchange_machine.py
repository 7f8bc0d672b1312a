"""Any conversation at all: the next event is drawn from the table most of the time, else from all there are."""

from __future__ import annotations

import pytest
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from envoy_extproc.errors import BadPin, GatewayError, ModelNotFound, NoReadyEndpoint
from envoy_extproc.exchange.commands import Command, Continue, Finish, Respond, Schedule, Serve
from envoy_extproc.exchange.events import (
    Event,
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
from envoy_extproc.exchange.exchange import NEXT, TABLE, ExchangeSettings, State
from tests.support.builders import decision, headers, sse, token, usage
from tests.support.playbook import Playbook

TEXT = sse(token("a"), usage(3, 4), {"error": {"code": 503}}, "[DONE]", "junk")
AT = st.floats(0, 1e6)
ERRORS: list[GatewayError] = [ModelNotFound("x \udcff"), NoReadyEndpoint("no"), BadPin("no")]

REQUEST_HEADERS = st.fixed_dictionaries(
    {"path": st.sampled_from(["/v1/chat/completions", "/v1/embeddings", "/v1/models", ""])},
    optional={
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
        RequestHeaders, AT, REQUEST_HEADERS, st.booleans(), st.none() | st.just(("10.0.0.1",))
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
    StreamClosed: st.builds(StreamClosed, AT, st.booleans(), st.none() | st.just("ValueError")),
}
# What makes for long conversations; the others come from the 10 % of any event, and at the end.
LIKELY = {
    state: [kind for kind in row if kind not in (StreamClosed, Refused, RequestTrailers, ResponseTrailers)]
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

    asked = [command for command in commands if isinstance(command, Schedule)]
    is_message = isinstance(happened, Message)
    if before is State.CLOSED:
        assert commands == []
    elif asked:
        assert len(commands) == 1
        assert (after, is_message) == (State.AWAIT_DECISION, True)
    elif is_message or (kind in (Scheduled, Refused) and before is State.AWAIT_DECISION):
        assert len(replies(commands)) == 1
    else:
        assert replies(commands) == []
    for command in commands:
        if isinstance(command, Serve):
            assert kind is ResponseHeaders
    assert any(isinstance(command, Respond) for command in commands) <= (after is State.ANSWERED)


@given(data=st.data())
@pytest.mark.parametrize("accounting", [True, False])
@settings(max_examples=200)
def test_any_conversation(data: st.DataObject, accounting: bool) -> None:
    book = Playbook(
        ExchangeSettings(max_body_bytes=100, max_event_bytes=60, max_json_bytes=40, accounting=accounting)
    )
    finishes = 0
    for _ in range(data.draw(st.integers(0, 25))):
        before = book.state
        anything = data.draw(st.integers(0, 9)) == 0
        kinds = (not anything and LIKELY[before]) or list(EVENTS)
        happened = data.draw(EVENTS[data.draw(st.sampled_from(kinds))])
        commands = list(book.receive(happened))
        check_step(before, happened, commands, book.state)
        finishes += sum(isinstance(command, Finish) for command in commands)
    note(book.state.name)
    last = StreamClosed(1e6)
    finishes += sum(isinstance(command, Finish) for command in book.receive(last))
    assert finishes == 1
    assert book.state is State.CLOSED


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
