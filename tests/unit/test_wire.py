"""Envoy's messages and the core's values, in both directions."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc._proto import base_pb2, ext_proc_pb2, orca_pb2
from envoy_extproc.endpoints import EngineStats
from envoy_extproc.exchange.commands import (
    HIDE_RESPONSE,
    PASS,
    SHOW_RESPONSE,
    BodyMode,
    Continue,
    Handover,
    LoadReport,
    Phase,
    Respond,
)
from envoy_extproc.exchange.events import (
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
)
from envoy_extproc.exchange.native import LUA_VERSIONS
from envoy_extproc.scheduling.interfaces import Candidate
from envoy_extproc.server import wire
from envoy_extproc.server.wire import decode, encode, header_value
from tests.support.builders import endpoint

Request = ext_proc_pb2.ProcessingRequest
Mode = ext_proc_pb2.ProcessingMode
FILTER = "envoy.filters.http.ext_proc"
HINT, HINT_KEY = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"


# -- decode --------------------------------------------------------------------------------------------------------


def request_headers(*items: tuple[str, bytes, str]) -> Request:
    message = Request()
    message.request_headers.SetInParent()
    for key, raw, text in items:
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value, header.value = key, raw, text
    return message


def decoded_headers(message: Request) -> RequestHeaders:
    event = decode(message, 1.0)
    assert isinstance(event, RequestHeaders)
    return event


@pytest.mark.parametrize(
    ("raw", "text", "value"),
    [
        (b"raw", "", "raw"),
        (b"", "text", "text"),
        (b"raw", "text", "raw"),
        (b"", "", ""),
        ("é".encode(), "", "é"),
        (b"\xff\xfe", "", "\udcff\udcfe"),
    ],
)
def test_header_values(raw: bytes, text: str, value: str) -> None:
    assert decoded_headers(request_headers((":path", raw, text))).headers.get(":path") == value


def test_headers_keep_order_and_repetitions() -> None:
    event = decoded_headers(request_headers(("A", b"1", ""), ("b", b"2", ""), ("a", b"3", "")))
    assert list(event.headers) == [("a", "1"), ("b", "2"), ("a", "3")]
    assert event.headers.get("a") == "1"
    assert event.headers.get_all("a") == ["1", "3"]
    assert (len(event.headers), "b" in event.headers, "c" in event.headers) == (3, True, False)
    assert "1" not in repr(event.headers)  # values can be secrets


def test_bodies_and_trailers() -> None:
    message = Request()
    message.request_body.body, message.request_body.end_of_stream = b"x", True
    assert decode(message, 2.0) == RequestBody(2.0, b"x", True)
    message.response_body.body, message.response_body.end_of_stream = b"y", False
    assert decode(message, 2.0) == ResponseBody(2.0, b"y", False)
    message.request_trailers.SetInParent()
    assert decode(message, 2.0) == RequestTrailers(2.0)
    message.response_trailers.SetInParent()
    assert decode(message, 2.0) == ResponseTrailers(2.0)


def test_a_message_of_a_kind_not_known() -> None:
    assert decode(Request(), 1.0) is None
    assert decode(Request.FromString(b"\xf2\x01\x00"), 1.0) is None  # field 30, of a later Envoy


def hinted(fill: Callable[[Request], object]) -> tuple[str, ...] | None:
    message = request_headers((":path", b"/", ""))
    fill(message)
    return decoded_headers(message).subset


def test_no_subset_hint() -> None:
    assert hinted(Request.SetInParent) is None
    assert hinted(lambda message: message.metadata_context.SetInParent()) is None
    assert hinted(lambda message: message.metadata_context.filter_metadata["envoy.lb"].SetInParent()) is None
    assert hinted(lambda message: message.metadata_context.filter_metadata[HINT].SetInParent()) is None


@pytest.mark.parametrize(
    ("text", "subset"),
    [
        ("10.0.0.1:8000", ("10.0.0.1:8000",)),
        ("10.0.0.1:8000,10.0.0.2", ("10.0.0.1:8000", "10.0.0.2")),
        (" 10.0.0.1 , ,10.0.0.2,", ("10.0.0.1", "10.0.0.2")),
        ("", ()),
        (" , ", ()),
    ],
)
def test_a_subset_hint(text: str, subset: tuple[str, ...]) -> None:
    def as_text(message: Request) -> None:
        message.metadata_context.filter_metadata[HINT].fields[HINT_KEY].string_value = text

    def as_list(message: Request) -> None:
        value = message.metadata_context.filter_metadata[HINT].fields[HINT_KEY].list_value
        value.SetInParent()
        for each in text.split(","):
            value.values.add().string_value = each

    assert hinted(as_text) == subset
    assert hinted(as_list) == subset


def test_an_empty_list_allows_nobody() -> None:
    def fill(message: Request) -> None:
        message.metadata_context.filter_metadata[HINT].fields[HINT_KEY].list_value.SetInParent()

    assert hinted(fill) == ()


@pytest.mark.parametrize("version", [0, 1, 7])
def test_the_version_that_the_script_announces(version: int) -> None:
    message = request_headers((":path", b"/", ""))
    message.metadata_context.filter_metadata[wire.LUA_METADATA].fields["v"].number_value = version
    assert decoded_headers(message).lua == version


def test_no_script() -> None:
    message = request_headers((":path", b"/", ""))
    assert decoded_headers(message).lua == 0
    message.metadata_context.filter_metadata[HINT].SetInParent()
    assert decoded_headers(message).lua == 0
    message.metadata_context.filter_metadata[wire.LUA_METADATA].fields["v"].string_value = "1"
    assert decoded_headers(message).lua == 0  # Lua's numbers are numbers


def answered(**attributes: str | float) -> ResponseHeaders:
    message = Request()
    header = message.response_headers.headers.headers.add()
    header.key, header.raw_value = ":status", b"200"
    fields = message.attributes[FILTER].fields
    for name, value in attributes.items():
        field = fields["response.code_details" if name == "details" else f"upstream.{name}"]
        if isinstance(value, str):
            field.string_value = value
        else:
            field.number_value = value
    event = decode(message, 1.0)
    assert isinstance(event, ResponseHeaders)
    return event


@pytest.mark.parametrize(
    ("attributes", "upstream", "attempts", "local_reply"),
    [
        ({"address": "a:1", "request_attempt_count": 1, "details": "via_upstream"}, "a:1", 1, None),
        ({"address": "a:1", "request_attempt_count": 3, "details": "via_upstream"}, "a:1", 3, None),
        ({"address": "a:1"}, "a:1", 1, None),
        ({"address": "a:1", "request_attempt_count": 2}, "a:1", 2, None),
        ({"address": "a:1", "request_attempt_count": 2, "details": "reset"}, None, 2, "reset"),
        ({"address": "", "request_attempt_count": 0, "details": "no_route"}, None, 0, "no_route"),
        ({}, None, 0, ""),
    ],
)
def test_who_answered(
    attributes: dict[str, str | float], upstream: str | None, attempts: int, local_reply: str | None
) -> None:
    event = answered(**attributes)
    assert (event.upstream, event.attempts, event.local_reply) == (upstream, attempts, local_reply)
    assert event.headers.get(":status") == "200"


def test_an_answer_without_attributes() -> None:
    message = Request()
    message.response_headers.end_of_stream = True
    event = decode(message, 1.0)
    assert isinstance(event, ResponseHeaders)
    assert (event.upstream, event.attempts, event.end_of_stream) == (None, 0, True)


# -- encode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
def test_a_reply_that_changes_nothing(phase: Phase) -> None:
    message = encode(PASS[phase])
    assert message.WhichOneof("response") == phase.name.lower()
    assert not message.HasField("mode_override")
    assert not message.HasField("dynamic_metadata")
    assert message.SerializeToString() == encode(Continue(phase=phase)).SerializeToString()


BODY_PHASES = [Phase.REQUEST_HEADERS, Phase.REQUEST_BODY, Phase.RESPONSE_HEADERS, Phase.RESPONSE_BODY]


def common(reply: Continue) -> ext_proc_pb2.CommonResponse:
    response: ext_proc_pb2.CommonResponse = getattr(encode(reply), reply.phase.name.lower()).response
    return response


@pytest.mark.parametrize("phase", BODY_PHASES)
def test_headers_are_set_in_place_of_others(phase: Phase) -> None:
    mutation = common(
        Continue(phase=phase, set_headers=(("a", "1"), ("b", "é")), remove_headers=("c", "d"))
    ).header_mutation
    assert [(each.header.key, each.header.raw_value) for each in mutation.set_headers] == [
        ("a", b"1"),
        ("b", "é".encode()),
    ]
    overwrite = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    assert {each.append_action for each in mutation.set_headers} == {overwrite}
    assert not any(each.header.value for each in mutation.set_headers)
    assert list(mutation.remove_headers) == ["c", "d"]


@pytest.mark.parametrize(("body", "field"), [(b"x", "body"), (b"", "clear_body"), (None, None)])
@pytest.mark.parametrize("phase", [Phase.REQUEST_BODY, Phase.RESPONSE_BODY])
def test_bodies(phase: Phase, body: bytes | None, field: str | None) -> None:
    mutation = common(Continue(phase=phase, body=body)).body_mutation
    assert mutation.WhichOneof("mutation") == field
    assert mutation.body == (body or b"")


def test_the_destination_goes_into_metadata() -> None:
    message = encode(Continue(phase=Phase.REQUEST_BODY, destination=("10.0.0.1:8000", "10.0.0.2:8000")))
    fields = message.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert fields["x-gateway-destination-endpoint"].string_value == "10.0.0.1:8000,10.0.0.2:8000"
    assert wire.METADATA in message.dynamic_metadata.fields


def test_a_server_that_hears_of_no_log_says_so_where_it_decides() -> None:
    decided = Continue(phase=Phase.REQUEST_BODY, destination=("10.0.0.1:8000",))
    ours = encode(decided, "me").dynamic_metadata.fields[wire.METADATA].struct_value.fields
    assert (ours[wire.PLEA].string_value, ours["v"].number_value) == ("me", 1)
    assert wire.PLEA not in encode(decided).dynamic_metadata.fields[wire.METADATA].struct_value.fields
    for other in (PASS[Phase.RESPONSE_BODY], Continue(phase=Phase.RESPONSE_HEADERS, body=b"x")):
        assert encode(other, "me") == encode(other)


HANDOVER = Handover(
    request_id="id-1",
    policy="least-request",
    pods=(("10.0.0.1:8000", "pod-1"), ("[::1]:8000", "pod two")),
    read=True,
    hide=True,
    max_event_bytes=1000,
    facts=b'{"request_id":"id-1"}',
)


def handed_over(**changes: Any) -> dict[str, object]:
    """The metadata that the script and the log get."""
    handover = msgspec.structs.replace(HANDOVER, **changes)
    message = encode(Continue(phase=Phase.REQUEST_BODY, destination=("10.0.0.1:8000",), handover=handover))
    assert set(message.dynamic_metadata.fields) == {"envoy.lb", wire.METADATA}
    fields = message.dynamic_metadata.fields[wire.METADATA].struct_value.fields
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in fields.items()}


def test_what_an_answer_left_to_envoy_is_handed_over_with() -> None:
    assert handed_over() == {
        "v": 1,
        "native": 1,
        "id": "id-1",
        "policy": "least-request",
        "pods": "10.0.0.1:8000 pod-1\n[::1]:8000 pod two",
        "facts": '{"request_id":"id-1"}',
        "read": True,
        "hide": True,
        "limit": 1000,
    }


def test_an_answer_that_nobody_is_to_read() -> None:
    assert handed_over(read=False, hide=False).keys() == {"v", "native", "id", "policy", "pods", "facts"}
    assert handed_over(hide=False)["hide"] is False


def test_the_load_report_for_an_answer_left_to_envoy() -> None:
    load = LoadReport("TEXT", Candidate(endpoint(1), 4, None))
    assert handed_over(load_report=load)["load"] == wire.report_value(load)


def test_what_the_answer_is_to_tell_besides() -> None:
    sessions = (("10.0.0.1:8000", "MTA="), ("[::1]:8000", "Wzo="))
    assert handed_over(sessions=sessions)["sessions"] == "10.0.0.1:8000 MTA=\n[::1]:8000 Wzo="
    extras = (("x-aibrix-config-profile", "a\nset-cookie: b"), ("prefill-target-pod", "pod\udcff"))
    assert handed_over(extras=extras)["extras"] == (
        "x-aibrix-config-profile aset-cookie: b\nprefill-target-pod pod\ufffd"
    )


@pytest.mark.parametrize(
    ("request_id", "sent"),
    [
        ("a\nset-cookie: b", "aset-cookie: b"),
        ("a\r\n\0b", "ab"),
        ("é", "é"),
        ("id\udcff", "id\ufffd"),
        ("", ""),
    ],
)
def test_the_id_of_an_answer_left_to_envoy_is_a_header_and_text(request_id: str, sent: str) -> None:
    assert handed_over(request_id=request_id)["id"] == sent


def test_the_newest_version_of_the_script_that_is_understood_is_asked_for() -> None:
    assert handed_over()["native"] == max(LUA_VERSIONS)


def test_without_a_handover_metadata_only_marks_that_a_request_came_by() -> None:
    message = encode(Continue(phase=Phase.REQUEST_BODY, destination=("10.0.0.1:8000",)))
    assert list(message.dynamic_metadata.fields[wire.METADATA].struct_value.fields) == ["v"]


@pytest.mark.parametrize("clear", [True, False])
def test_clear_route_cache(clear: bool) -> None:
    assert common(Continue(phase=Phase.REQUEST_BODY, clear_route_cache=clear)).clear_route_cache is clear


@pytest.mark.parametrize(
    ("request_body", "response_body", "modes"),
    [
        (None, BodyMode.STREAMED, (Mode.BUFFERED, Mode.STREAMED, Mode.SEND)),
        (None, BodyMode.BUFFERED, (Mode.BUFFERED, Mode.BUFFERED, Mode.SEND)),
        (None, BodyMode.NONE, (Mode.BUFFERED, Mode.NONE, Mode.SKIP)),
        (BodyMode.NONE, None, (Mode.NONE, Mode.NONE, Mode.SKIP)),
    ],
)
def test_mode_override(
    request_body: BodyMode | None, response_body: BodyMode | None, modes: tuple[int, int, int]
) -> None:
    reply = Continue(phase=Phase.RESPONSE_HEADERS, request_body=request_body, response_body=response_body)
    mode = encode(reply).mode_override
    assert (mode.request_body_mode, mode.response_body_mode, mode.response_trailer_mode) == modes
    assert mode.response_header_mode == Mode.SEND
    # Left unset, request trailers come as Envoy is configured; behind a body that is not read they must not.
    assert mode.request_trailer_mode == (Mode.SKIP if request_body is BodyMode.NONE else Mode.DEFAULT)


@pytest.mark.parametrize(("shown", "mode"), [(True, Mode.SEND), (False, Mode.SKIP)])
def test_whether_the_headers_of_an_answer_come_is_said_with_the_request(shown: bool, mode: int) -> None:
    reply = Continue(phase=Phase.REQUEST_HEADERS, request_body=BodyMode.NONE, response_headers=shown)
    override = encode(reply).mode_override
    assert (override.response_header_mode, override.request_body_mode) == (mode, Mode.NONE)
    assert (override.response_body_mode, override.response_trailer_mode) == (Mode.NONE, Mode.SKIP)


@pytest.mark.parametrize(
    ("reply", "shown", "mode"), [(SHOW_RESPONSE, True, Mode.SEND), (HIDE_RESPONSE, False, Mode.SKIP)]
)
def test_whether_an_answer_is_read_here_is_said_with_the_first_reply(
    reply: Continue, shown: bool, mode: Mode.HeaderSendMode.ValueType
) -> None:
    message = encode(reply)
    assert message.WhichOneof("response") == "request_headers"
    override = message.mode_override
    assert override.response_header_mode == mode
    assert (override.request_body_mode, override.response_body_mode) == (Mode.BUFFERED, Mode.NONE)
    assert override.request_trailer_mode == Mode.SEND  # they may come without a body
    same = Continue(phase=Phase.REQUEST_HEADERS, response_headers=shown)
    assert message.SerializeToString() == encode(same).SerializeToString()


def test_an_immediate_response() -> None:
    message = encode(Respond(status=404, headers=(("a", "1\n2"),), body=b"{}", details="word"))
    immediate = message.immediate_response
    assert (immediate.status.code, immediate.body, immediate.details) == (404, b"{}", "word")
    (option,) = immediate.headers.set_headers
    assert (option.header.key, option.header.raw_value) == ("a", b"12")
    assert option.append_action == base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("plain", b"plain"),
        ("a\r\nset-cookie: b", b"aset-cookie: b"),
        ("a\0b\x7fc", b"abc"),
        ("a\tb", b"a\tb"),
        ("é\u2028😀", "é\u2028😀".encode()),
        ("\udcff", b"\xff"),
        ("\udcff\n", b"\xff"),
        ("", b""),
    ],
)
def test_header_value(value: str, sent: bytes) -> None:
    assert header_value(value) == sent


@given(st.binary())
def test_a_header_passed_on_keeps_its_bytes_apart_from_controls(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    controls = bytes(code for code in (*range(0x20), 0x7F) if code != 0x09)
    assert header_value(text) == raw.translate(None, controls)


# -- ORCA ----------------------------------------------------------------------------------------------------------

STATS = EngineStats(
    at=0.0,
    running=3.0,
    waiting=1.0,
    kv_cache_usage=0.25,
    prefix_cache_hit_rate=0.5,
    generation_tokens_per_second=123.5,
    requests_per_second=2.5,
    mem_utilization=0.75,
)
NAMED = {
    "kv_cache_usage_perc": 0.25,
    "num_requests_running": 3.0,
    "num_requests_waiting": 1.0,
    "prefix_cache_hit_rate": 0.5,
    "tokens_per_second": 123.5,
    "in_flight_requests": 4.0,
}


def load_report(form: str, candidate: Candidate, rate: float = 0.0) -> str:
    reply = Continue(phase=Phase.RESPONSE_HEADERS, load_report=LoadReport(form, candidate, rate))
    (option,) = common(reply).header_mutation.set_headers
    assert option.header.key == "endpoint-load-metrics"
    return option.header.raw_value.decode()


def read_text(header: str) -> orca_pb2.OrcaLoadReport:
    """As Envoy's parser reads TEXT."""
    assert header.startswith("TEXT ")
    message = orca_pb2.OrcaLoadReport()
    for pair in header.removeprefix("TEXT ").split(","):
        name, value = pair.strip().split("=")
        if name.startswith("named_metrics."):
            message.named_metrics[name.removeprefix("named_metrics.")] = float(value)
        else:
            setattr(message, name, float(value))
    return message


def read_json(header: str) -> orca_pb2.OrcaLoadReport:
    assert header.startswith("JSON ")
    values = json.loads(header.removeprefix("JSON "))
    message = orca_pb2.OrcaLoadReport()
    for name, value in values.pop("named_metrics").items():
        message.named_metrics[name] = value
    for name, value in values.items():
        setattr(message, name, value)
    return message


def read_binary(header: str) -> orca_pb2.OrcaLoadReport:
    assert header.startswith("BIN ")
    return orca_pb2.OrcaLoadReport.FromString(base64.b64decode(header.removeprefix("BIN "), validate=True))


READERS = {"TEXT": read_text, "JSON": read_json, "BIN": read_binary}


@pytest.mark.parametrize("form", READERS)
def test_a_load_report_read_again(form: str) -> None:
    message = READERS[form](load_report(form, Candidate(endpoint(1), 4, STATS), 2.0))
    assert dict(message.named_metrics) == NAMED
    assert (message.rps_fractional, message.mem_utilization) == (2.5, 0.75)
    assert message.application_utilization == 0.25


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("stats", [None, EngineStats(at=0.0)])
def test_what_an_engine_does_not_tell_is_left_out(form: str, stats: EngineStats | None) -> None:
    message = READERS[form](load_report(form, Candidate(endpoint(1), 4, stats)))
    assert dict(message.named_metrics) == {"in_flight_requests": 4.0}


@given(
    st.builds(
        EngineStats,
        at=st.just(0.0),
        running=st.none() | st.floats(0, 1e6),
        kv_cache_usage=st.none() | st.floats(0, 1),
        requests_per_second=st.none() | st.floats(0, 1e6),
    )
)
def test_the_three_forms_say_the_same(stats: EngineStats) -> None:
    text, as_json, binary = (
        read(load_report(form, Candidate(endpoint(1), 1, stats), 0.5)) for form, read in READERS.items()
    )
    assert as_json == binary
    assert dict(text.named_metrics) == pytest.approx(dict(binary.named_metrics))
    assert text.rps_fractional == pytest.approx(binary.rps_fractional)
    assert text.application_utilization == pytest.approx(binary.application_utilization)
