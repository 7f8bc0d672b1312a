"""Exchanges as conversations: what Envoy says, what is done about it, and the report in the end."""

from __future__ import annotations

import json

import msgspec
import pytest

from envoy_extproc import orca
from envoy_extproc.errors import BadRequest, GatewayError, ModelNotFound, NoReadyEndpoint
from envoy_extproc.exchange.commands import (
    HIDE_RESPONSE,
    PASS,
    SHOW_RESPONSE,
    BodyMode,
    Command,
    Continue,
    Finish,
    Heard,
    LoadReport,
    Phase,
    Release,
    Serve,
)
from envoy_extproc.exchange.events import (
    Event,
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
from envoy_extproc.exchange.native import Facts
from envoy_extproc.exchange.record import fault_of, fault_of_envoy, time_per_output_token
from envoy_extproc.exchange.report import Report, routing_of
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from tests.support.builders import MODEL, decision, endpoint, headers, sse, token, usage
from tests.support.playbook import Playbook, asked, handover, reply, respond

STREAM = b'{"model":"llama-3-8b","stream":true}'
PLAIN = b'{"model":"llama-3-8b"}'
DONE = "[DONE]"
ROUTED = {
    "x-gateway-destination-endpoint": "10.0.0.1:8000",
    "target-pod": "10.0.0.1:8000",
}


# -- the whole line ------------------------------------------------------------------------------------------------


def test_a_stream_from_end_to_end() -> None:
    book = Playbook()
    assert reply(book.request()) is SHOW_RESPONSE
    assert asked(book.body(STREAM)) == SchedulingRequest(model=MODEL)
    check_the_routed_stream(book.scheduled(1, 2))
    check_the_answered_stream(reply(book.answer()))

    first, second = sse(token("a")), sse(token("b"))
    assert book.data(first) == first
    assert book.data(second) == second
    assert book.data(sse(usage(5, 7), DONE)) == sse(DONE)
    assert book.data(b"", end=True) == b""

    assert book.closed() == REPORT_OF_THE_STREAM


def check_the_routed_stream(routed: Continue) -> None:
    rewritten = b'{"model":"llama-3-8b","stream":true,"stream_options":{"include_usage":true}}'
    assert routed.phase is Phase.REQUEST_BODY
    assert routed.body == rewritten
    assert routed.destination == ("10.0.0.1:8000", "10.0.0.2:8000")
    assert dict(routed.set_headers) == {
        "x-gateway-destination-endpoint": "10.0.0.1:8000,10.0.0.2:8000",
        "target-pod": "10.0.0.1:8000",
        "model": MODEL,
        "x-gateway-model-name": MODEL,
        "accept-encoding": "identity",
        "endpoint-load-metrics-format": "TEXT",
        "content-length": str(len(rewritten)),
    }


def check_the_answered_stream(answered: Continue) -> None:
    assert answered.phase is Phase.RESPONSE_HEADERS
    assert answered.response_body is BodyMode.STREAMED
    assert dict(answered.set_headers) == {
        "x-request-id": "id-1",
        "request-id": "id-1",
        "routing-strategy": "least-request",
        "target-pod": "pod-1",
        "target-pod-ip": "10.0.0.1:8000",
    }
    assert answered.load_report is None


REPORT_OF_THE_STREAM = Report(
    request_id="id-1",
    path="/v1/chat/completions",
    operation="chat",
    model=MODEL,
    status=200,
    outcome="success",
    error_type=None,
    error=None,
    routing=routing_of(decision(1, 2)),
    served_by=endpoint(1),
    served_address="10.0.0.1:8000",
    attempts=1,
    streamed=True,
    usage=Usage(prompt_tokens=5, completion_tokens=7),
    usage_source="reported",
    duration=8.0,
    time_to_first_token=4.0,
    time_per_output_token=1.0 / 6,
    usage_removed=1,
)


def test_a_json_answer_from_end_to_end() -> None:
    book = Playbook()
    routed = book.until_routed(PLAIN)
    assert routed.body is None
    assert "content-length" not in dict(routed.set_headers)
    answered = reply(book.answer(content_type="application/json", content_length=900))
    assert answered.response_body is BodyMode.STREAMED
    assert answered.remove_headers == ()
    text = json.dumps(
        {"choices": [{"message": {"content": "hello"}}], "usage": usage(3, 2)["usage"]}
    ).encode()
    assert book.data(text, end=True) == text
    report = book.closed()
    assert (report.outcome, report.usage_source) == ("success", "reported")
    assert report.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert (report.streamed, report.time_to_first_token, report.time_per_output_token) == (False, None, None)


def test_a_client_that_leaves_with_the_last_byte_had_its_whole_answer() -> None:
    """Envoy ends the stream before it says that the body is at its end."""
    text = json.dumps(usage(3, 2)).encode()
    for length, outcome, source in (
        (len(text), "success", "reported"),
        (len(text) + 1, "aborted", "estimated"),
    ):
        book = Playbook()
        book.until_routed(PLAIN)
        book.answer(content_type="application/json", content_length=length)
        book.data(text)
        report = book.closed()
        assert (report.outcome, report.usage_source) == (outcome, source)


def test_a_json_answer_in_pieces_passes_as_it_comes() -> None:
    book = Playbook()
    book.until_routed(PLAIN)
    book.answer(content_type="Application/JSON; charset=utf-8")
    assert book.data(b'{"usage":{"prompt_tokens":4') == b'{"usage":{"prompt_tokens":4'
    assert book.data(b"}}") == b"}}"
    assert book.data(b"", end=True) == b""
    assert book.closed().usage == Usage(prompt_tokens=4)


# -- requests ------------------------------------------------------------------------------------------------------


def test_a_request_without_a_body() -> None:
    book = Playbook()
    assert asked(book.request("/health?limit=1", end=True)) == SchedulingRequest()
    routed = book.scheduled()
    assert routed.phase is Phase.REQUEST_HEADERS
    assert dict(routed.set_headers) == ROUTED
    assert routed.request_body is BodyMode.NONE
    assert reply(book.answer(content_type="application/json")).response_body is None
    assert book.state is State.HELD
    report = book.closed()
    assert (report.path, report.operation, report.model) == ("/health", None, None)
    assert (report.outcome, report.usage_source, report.usage) == ("success", "none", Usage())


def test_a_known_path_without_a_body() -> None:
    book = Playbook()
    assert asked(book.request(end=True)) == SchedulingRequest()
    assert book.scheduled().phase is Phase.REQUEST_HEADERS
    assert book.closed().operation is None


def test_a_body_to_an_unknown_path_goes_straight_to_a_pod() -> None:
    book = Playbook()
    asked(book.request("/v1/other", content_length=str(10**12)))
    routed = book.scheduled()
    assert (routed.phase, routed.request_body) == (Phase.REQUEST_HEADERS, BodyMode.NONE)
    assert "accept-encoding" not in dict(routed.set_headers)
    assert reply(book.answer()).response_body is None
    assert (book.closed().outcome, book.state) == ("success", State.CLOSED)


def test_an_unknown_path_is_routed_by_the_model_header() -> None:
    book = Playbook()
    assert asked(book.request("/v1/other", x_model="other")) == SchedulingRequest(model="other")
    routed = book.scheduled()
    assert ("model", "other") in routed.set_headers
    assert routed.remove_headers == ("x-model",)
    assert book.closed().model == "other"


def test_the_model_of_the_body_counts_and_not_the_header() -> None:
    book = Playbook()
    book.request(x_model="other", model="spoofed")
    assert asked(book.body(PLAIN)).model == MODEL
    routed = book.scheduled()
    assert ("model", MODEL) in routed.set_headers
    assert routed.remove_headers == ("x-model",)


def test_what_a_client_pretends_the_model_to_be_goes() -> None:
    book = Playbook()
    book.request("/v1/other", model="spoofed", x_gateway_model_name="spoofed")
    assert set(book.scheduled().remove_headers) == {"model", "x-gateway-model-name"}


def test_what_headers_say_about_choosing() -> None:
    book = Playbook()
    commands = book.request(
        "/x",
        end=True,
        subset=("10.0.0.1",),
        routing_strategy="random",
        target_pod_ip="10.0.0.2",
        x_model="m",
    )
    assert asked(commands) == SchedulingRequest(
        model="m", policy="random", pin="10.0.0.2", subset=("10.0.0.1",)
    )


def test_empty_headers_say_nothing() -> None:
    book = Playbook()
    commands = book.request("/x", end=True, subset=(), routing_strategy="", target_pod_ip="", x_model="")
    assert asked(commands) == SchedulingRequest(subset=())


CONTROL = [
    "config_profile",
    "endpoint_load_metrics_format",
    "external_filter",
    "routing_strategy",
    "target_pod_ip",
    "x_aibrix_session_key",
    "x_gateway_destination_endpoint_subset",
    "x_gateway_model_name_rewrite",
    "x_model",
    "x_session_id",
    "x_slo_tpot_ms",
    "x_slo_ttft_ms",
    "x_llm_d_anything",
    "x_gateway_inference_objective",
    "x_gateway_inference_fairness_id",
]
KEPT = [
    "authorization",
    "traceparent",
    "user_agent",
    "x_llm",
    "x_session",
    "accept",
    "content_type",
    "x_request_id",
]


@pytest.mark.parametrize("name", CONTROL)
def test_control_headers_are_removed(name: str) -> None:
    routed = Playbook().until_routed(PLAIN, 1, **{name: "x"})
    assert routed.remove_headers == (name.replace("_", "-"),)


@pytest.mark.parametrize("name", KEPT)
def test_other_headers_stay(name: str) -> None:
    assert Playbook().until_routed(PLAIN, 1, **{name: "x"}).remove_headers == ()


def test_what_a_client_says_about_the_destination_is_overwritten() -> None:
    spoofed = {"target_pod": "6.6.6.6:1", "x_gateway_destination_endpoint": "6.6.6.6:1", "model": "6"}
    routed = Playbook().until_routed(PLAIN, 1, **spoofed)
    assert dict(routed.set_headers).items() >= ROUTED.items() | {("model", MODEL)}
    assert not any("6.6.6.6" in value for _, value in routed.set_headers)


def test_a_request_without_an_id_gets_one() -> None:
    book = Playbook()
    book.receive(RequestHeaders(0.0, headers(path="/x"), True))
    assert ("x-request-id", "made-up-id") in book.scheduled().set_headers
    assert ("request-id", "made-up-id") in reply(book.answer()).set_headers
    assert book.closed().request_id == "made-up-id"


def test_headers_without_a_path() -> None:
    book = Playbook()
    asked(book.receive(RequestHeaders(0.0, headers(method="OPTIONS"), True)))
    assert book.closed().path == ""


def test_a_new_choice_of_route_is_asked_for_only_where_wanted() -> None:
    assert not Playbook().until_routed(PLAIN).clear_route_cache
    assert Playbook(ExchangeSettings(clear_route_cache=True)).until_routed(PLAIN).clear_route_cache


@pytest.mark.parametrize(
    ("body", "rewritten"),
    [
        (STREAM, True),
        (PLAIN, False),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}', False),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":false}}', True),
        (b'{"model":"m","stream":true,"stream_options":null}', True),
        (b'{"model":"m","stream":true,"stream_options":{}}', False),
        (b'{"model":"m","stream":true,"stream_options":{"continuous_usage_stats":true}}', False),
        (b'{"model":"m","stream":true,"stream_options":7}', False),
        (b'{"model":"m","stream":false,"stream_options":{"include_usage":false}}', False),
    ],
)
def test_usage_is_asked_for_where_the_client_did_not(body: bytes, rewritten: bool) -> None:
    routed = Playbook().until_routed(body)
    assert (routed.body is not None) is rewritten
    length = dict(routed.set_headers).get("content-length")
    assert length == (None if routed.body is None else str(len(routed.body)))


@pytest.mark.parametrize("options", [b'{"include_usage":true}', b"{}"])
def test_usage_that_was_not_added_is_left_to_the_client(options: bytes) -> None:
    book = Playbook()
    book.until_answer(b'{"model":"m","stream":true,"stream_options":%b}' % options)
    text = sse(token(), usage(1, 1), DONE)
    assert book.data(text, end=True) == text
    report = book.closed()
    assert (report.usage, report.usage_removed) == (Usage(prompt_tokens=1, completion_tokens=1), 0)


# -- refusals ------------------------------------------------------------------------------------------------------

LIMITED = ExchangeSettings(max_body_bytes=30)


def test_a_body_announced_too_large_is_refused_before_it_comes() -> None:
    book = Playbook(LIMITED)
    answer = respond(book.request(content_length="31"))
    assert (answer.status, answer.details) == (413, "envoy_extproc_request_too_large")
    assert json.loads(answer.body)["error"]["code"] == "request_too_large"
    assert dict(answer.headers) == {
        "content-type": "application/json",
        "x-request-id": "id-1",
        "request-id": "id-1",
        "x-error-request-body-processing": "true",
    }
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("refused", "client", "request_too_large")
    assert (report.status, report.routing, report.usage_source) == (413, None, "none")


def test_a_request_with_trailers_and_no_body_is_refused() -> None:
    book = Playbook()
    book.request()
    answer = respond(book.trailers())
    assert (answer.status, answer.details) == (400, "envoy_extproc_bad_request")
    assert json.loads(answer.body)["error"]["message"] == "The request has no body."
    report = book.closed()
    assert (report.outcome, report.error_type, report.unexpected_messages) == ("refused", "client", 0)


def test_trailers_behind_a_body_change_nothing() -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.trailers()) is PASS[Phase.REQUEST_TRAILERS]
    assert reply(book.answer()).response_body is BodyMode.STREAMED
    book.data(sse(token(), usage(1, 1), DONE), end=True)
    report = book.closed()
    assert (report.outcome, report.unexpected_messages) == ("success", 0)


def test_a_body_that_is_too_large_is_refused() -> None:
    book = Playbook(LIMITED)
    reply(book.request())
    assert respond(book.body(b" " * 31)).status == 413
    assert book.state is State.ANSWERED


def test_a_body_of_exactly_the_limit_is_read() -> None:
    book = Playbook(LIMITED)
    reply(book.request(content_length="30"))
    asked(book.body(PLAIN.ljust(30)))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":""}', b"\xff", b'{"model":1}'])
def test_a_body_that_makes_no_sense_is_refused(body: bytes) -> None:
    book = Playbook()
    book.request()
    answer = respond(book.body(body))
    assert (answer.status, answer.details) == (400, "envoy_extproc_bad_request")
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    report = book.closed()
    assert (report.outcome, report.error_type, report.model) == ("refused", "client", None)


def test_a_compressed_body_is_refused() -> None:
    book = Playbook()
    book.request(content_encoding="gzip")
    assert respond(book.body(PLAIN)).status == 400


@pytest.mark.parametrize("encoding", ["identity", "", " Identity "])
def test_a_body_that_is_said_to_be_plain_is_read(encoding: str) -> None:
    book = Playbook()
    book.request(content_encoding=encoding)
    asked(book.body(PLAIN))


@pytest.mark.parametrize(
    ("error", "status", "header", "error_type"),
    [
        (ModelNotFound("no"), 404, ("x-error-no-model-backends", "true"), "client"),
        (NoReadyEndpoint("no"), 503, ("retry-after", "1"), "overload"),
        (BadRequest("no"), 400, ("x-error-request-body-processing", "true"), "client"),
        (ModelNotFound("no \udcff"), 404, ("content-type", "application/json"), "client"),
    ],
)
def test_nobody_can_take_it(
    error: GatewayError, status: int, header: tuple[str, str], error_type: str
) -> None:
    book = Playbook()
    book.request()
    book.body(STREAM)
    answer = book.refused(error)
    assert answer.status == status
    assert header in answer.headers
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("refused", error_type, error.detail)
    assert (report.model, report.status, report.usage_source) == (MODEL, status, "none")


# -- answers -------------------------------------------------------------------------------------------------------


def test_after_a_retry_another_endpoint_serves() -> None:
    book = Playbook()
    book.until_routed(STREAM, 1, 2)
    moved, answered = book.answer(upstream="10.0.0.2:8000", attempts=2)
    assert moved == Serve(endpoint(2))
    assert dict(reply([answered]).set_headers)["target-pod"] == "pod-2"
    report = book.closed()
    assert (report.served_by, report.served_address, report.attempts) == (endpoint(2), "10.0.0.2:8000", 2)


def test_an_endpoint_discovery_does_not_know_serves() -> None:
    book = Playbook()
    book.until_routed()
    answered = reply(book.answer(upstream="10.9.9.9:8000"))
    assert dict(answered.set_headers)["target-pod"] == "10.9.9.9:8000"
    assert dict(answered.set_headers)["target-pod-ip"] == "10.9.9.9:8000"
    report = book.closed()
    assert (report.served_by, report.served_address) == (None, "10.9.9.9:8000")


@pytest.mark.parametrize(
    ("status", "details", "error_type", "error"),
    [
        (
            503,
            "upstream_reset_before_response_started{connection_timeout}",
            "network",
            "upstream_reset_before_response_started",
        ),
        (503, "no_healthy_upstream", "network", "no_healthy_upstream"),
        (504, "", "network", "envoy-504"),
        (413, "request_payload_too_large", "client", "request_payload_too_large"),
        (403, "{odd}", "client", "envoy-403"),
        (500, "x" * 1000, "network", "x" * 64),
    ],
)
@pytest.mark.parametrize("attempts", [0, 2])
def test_envoy_answers_by_itself(
    status: int, details: str, error_type: str, error: str, attempts: int
) -> None:
    book = Playbook()
    book.until_routed()
    answered = reply(book.answer(status, "text/plain", upstream=None, attempts=attempts, local_reply=details))
    assert "target-pod" not in dict(answered.set_headers)
    assert answered.response_body is BodyMode.NONE
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("error", error_type, error)
    assert (report.served_by, report.attempts, report.status) == (None, attempts, status)
    assert report.usage_source == "none"


def test_an_answer_of_envoys_own_is_not_read() -> None:
    book = Playbook()
    book.until_routed()
    assert (
        reply(book.answer(200, upstream=None, attempts=0, local_reply="direct_response")).response_body
        is BodyMode.NONE
    )
    assert book.closed().outcome == "success"


def test_envoy_answers_while_the_body_is_awaited() -> None:
    book = Playbook()
    book.request()
    answered = reply(book.answer(408, None, upstream=None, attempts=0, local_reply="request_overall_timeout"))
    assert "routing-strategy" not in dict(answered.set_headers)
    assert book.state is State.HELD
    report = book.closed()
    assert (report.outcome, report.error_type, report.routing) == ("error", "client", None)


@pytest.mark.parametrize(
    ("status", "error_type"),
    [(400, "client"), (404, "client"), (429, "overload"), (500, "model_server"), (503, "overload")],
)
def test_an_engine_answers_with_an_error(status: int, error_type: str) -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.answer(status, "application/json")).response_body is BodyMode.NONE
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("error", error_type, f"status-{status}")
    assert report.served_by == endpoint(1)
    assert report.usage_source == "none"


@pytest.mark.parametrize("status", ["", "abc", "20", "2000"])
def test_a_status_that_is_none(status: str) -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.answer(status)).response_body is BodyMode.NONE  # type: ignore[arg-type]
    assert book.closed().status is None


def test_a_compressed_answer_is_not_read() -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.answer(content_encoding="gzip")).response_body is BodyMode.NONE
    assert book.state is State.HELD
    report = book.closed()
    assert (report.outcome, report.unread, report.streamed) == ("success", "compressed", True)
    assert report.usage_source == "estimated"


@pytest.mark.parametrize("content_type", ["text/plain", "", None, "application/jsonl", "text/event-streams"])
def test_an_answer_of_another_type_is_not_read(content_type: str | None) -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.answer(content_type=content_type)).response_body is BodyMode.NONE
    report = book.closed()
    assert (report.unread, report.usage_source) == ("content-type", "estimated")


def test_an_answer_without_a_body() -> None:
    book = Playbook()
    book.until_routed()
    reply(book.answer(204, None, end=True))
    assert book.state is State.HELD
    assert (book.closed().outcome, book.exchange.record.unread) == ("success", None)


def test_a_stream_a_client_asked_for_can_be_answered_with_json() -> None:
    book = Playbook()
    book.until_routed()
    assert reply(book.answer(content_type="application/json")).response_body is BodyMode.STREAMED
    text = b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
    assert book.data(text, end=True) == text
    assert book.closed().usage_source == "reported"


def test_a_stream_nobody_asked_for_is_read() -> None:
    book = Playbook()
    book.until_answer(PLAIN)
    text = sse(token(), usage(1, 1), DONE)
    assert book.data(text, end=True) == text
    assert book.closed().usage_source == "reported"


def test_an_engines_own_load_report_is_removed() -> None:
    book = Playbook()
    book.until_routed()
    heard, answered = book.answer(endpoint_load_metrics="TEXT eps=1", endpoint_load_metrics_bin="x")
    assert isinstance(answered, Continue)
    assert answered.remove_headers == ("endpoint-load-metrics", "endpoint-load-metrics-bin")
    assert heard == Heard("10.0.0.1:8000", orca.Parsed(flaw=orca.Flaw.MALFORMED))


def test_an_engines_own_load_report_is_heard() -> None:
    book = Playbook()
    book.until_routed()
    heard, _ = book.answer(endpoint_load_metrics="TEXT eps=1")
    assert heard == Heard("10.0.0.1:8000", orca.Parsed(orca.LoadReport(eps=1.0)))


def test_envoys_own_answer_is_no_engines_report() -> None:
    book = Playbook()
    book.until_routed()
    (answered,) = book.answer(503, upstream=None, local_reply="x", endpoint_load_metrics="TEXT eps=1")
    assert isinstance(answered, Continue)


@pytest.mark.parametrize(
    ("body", "removed"),
    [
        (STREAM, ("content-length",)),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}', ()),
    ],
)
def test_the_length_of_a_stream_that_may_lose_an_event_does_not_hold(
    body: bytes, removed: tuple[str, ...]
) -> None:
    book = Playbook()
    book.until_routed(body)
    assert reply(book.answer(content_length=1000)).remove_headers == removed


@pytest.mark.parametrize(
    ("asked_for", "form"),
    [("TEXT", "TEXT"), ("json", "JSON"), (" Bin ", "BIN"), ("XML", None), ("", None), ("TEXT,JSON", None)],
)
def test_the_load_report_a_client_asks_for(asked_for: str, form: str | None) -> None:
    book = Playbook()
    book.until_routed(STREAM, 1, endpoint_load_metrics_format=asked_for)
    wanted = None if form is None else LoadReport(form, decision(1).chosen)
    assert reply(book.answer()).load_report == wanted


def test_trailers_end_an_answer() -> None:
    book = Playbook()
    book.until_answer()
    book.data(sse(token(), usage(2, 1), DONE))
    assert reply(book.receive(ResponseTrailers(book.now()))) is PASS[Phase.RESPONSE_TRAILERS]
    assert book.state is State.HELD
    report = book.closed()
    assert (report.outcome, report.usage_source) == ("success", "reported")


def test_an_event_cut_in_two_is_held_back_until_it_is_whole() -> None:
    book = Playbook()
    book.until_answer()
    text = sse(usage(2, 1))
    assert book.data(sse(token()) + text[:10]) == sse(token())
    assert book.data(text[10:] + sse(DONE)) == sse(DONE)
    book.data(b"", end=True)
    assert book.closed().usage_removed == 1


def test_a_tail_comes_with_the_end() -> None:
    book = Playbook()
    book.until_answer()
    tail = sse(token("tail"))[:-1]
    assert book.data(tail) == b""
    assert book.data(b"", end=True) == tail


def test_the_last_bytes_and_the_end_in_one_message() -> None:
    book = Playbook()
    book.until_answer()
    text = sse(token(), DONE)[:-1]
    assert book.data(text, end=True) == text
    assert book.closed().outcome == "success"


def test_what_is_held_back_is_let_go_with_the_next_reply() -> None:
    book = Playbook()
    book.exchange.let_go()  # nothing is held yet
    book.until_answer()
    text = sse(token("a"), usage(1, 1))
    book.data(text[:20])
    assert book.exchange.holds_back
    book.exchange.let_go()
    assert book.data(text[20:40]) == text[:40]
    assert book.data(text[40:]) == sse(token("a"))[40:]


# -- what can be wrong with an answer ------------------------------------------------------------------------------

ERROR_EVENT = {"error": {"message": "busy", "code": 503}}


@pytest.mark.parametrize(
    ("text", "outcome", "error_type", "error"),
    [
        (sse(token(), DONE), "success", None, None),
        (sse(token()), "error", "content", "no-done"),
        (b"", "error", "content", "no-done"),
        (sse(ERROR_EVENT, DONE), "error", "overload", "error-in-answer"),
        (sse({"error": {"code": 500}}, DONE), "error", "model_server", "error-in-answer"),
        (sse({"error": {"code": 400}}), "error", "client", "error-in-answer"),
        (sse("{", DONE), "error", "content", "unreadable"),
    ],
)
def test_verdicts_on_a_whole_stream(
    text: bytes, outcome: str, error_type: str | None, error: str | None
) -> None:
    book = Playbook()
    book.until_answer()
    book.data(text)
    book.data(b"", end=True)
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == (outcome, error_type, error)
    assert report.status == 200


def test_a_stream_that_nobody_could_read_is_not_called_bad() -> None:
    book = Playbook(ExchangeSettings(max_event_bytes=30))
    book.until_answer()
    text = sse(token("x" * 100)) + b"data: [DONE]"
    book.data(text)
    book.data(b"", end=True)
    report = book.closed()
    assert (report.outcome, report.oversized_events) == ("success", 1)


def test_a_json_answer_beyond_the_limit() -> None:
    book = Playbook(ExchangeSettings(max_json_bytes=10))
    book.until_routed(PLAIN)
    book.answer(content_type="application/json")
    text = b'{"usage":{"prompt_tokens":1}}'
    assert book.data(text, end=True) == text
    report = book.closed()
    assert (report.outcome, report.oversized_events, report.usage_source) == ("success", 1, "estimated")


def test_a_json_answer_that_is_none() -> None:
    book = Playbook()
    book.until_routed(PLAIN)
    book.answer(content_type="application/json")
    book.data(b"<html>", end=True)
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("error", "content", "unreadable")
    assert report.unreadable_events == 1


def test_tokens_are_estimated_where_the_engine_tells_none() -> None:
    book = Playbook()
    prompt = b'{"model":"m","stream":true,"messages":"' + b"x" * 398 + b'"}'
    book.until_answer(prompt)
    book.data(sse(token("a"), token("b"), token("c"), DONE), end=True)
    report = book.closed()
    assert report.usage_source == "estimated"
    assert report.usage == Usage(prompt_tokens=100, completion_tokens=3)


def test_without_accounting_nothing_is_read() -> None:
    book = Playbook(ExchangeSettings(accounting=False))
    routed = book.until_routed()
    assert routed.body is None
    assert "accept-encoding" not in dict(routed.set_headers)
    assert reply(book.answer()).response_body is None
    assert book.state is State.HELD
    report = book.closed()
    assert (report.outcome, report.usage_source, report.usage) == ("success", "none", Usage())


# -- the end -------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_the_answer() -> None:
    book = Playbook()
    book.until_routed()
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("aborted", "client", "closed-before-answer")
    assert (report.status, report.attempts, report.served_by) == (None, 0, None)


def test_a_stream_that_ends_early() -> None:
    book = Playbook()
    book.until_answer()
    book.data(sse(token()))
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("aborted", "network", "closed-before-end")
    assert (report.usage_source, report.usage.completion_tokens) == ("estimated", 1)


def test_a_stream_that_ends_early_has_still_reported_usage() -> None:
    book = Playbook()
    book.until_answer()
    book.data(sse(token() | {"usage": {"prompt_tokens": 4, "completion_tokens": 1}}))
    assert book.closed().usage == Usage(prompt_tokens=4, completion_tokens=1)


def test_a_stream_that_told_of_an_error_and_ended() -> None:
    book = Playbook()
    book.until_answer()
    book.data(sse(ERROR_EVENT))
    assert book.closed().error == "error-in-answer"


@pytest.mark.parametrize("begun", [True, False])
def test_an_exchange_given_back(begun: bool) -> None:
    book = Playbook()
    book.until_routed()
    if begun:
        book.answer()
        book.data(sse(token()))
    report = book.closed(draining=True)
    assert (report.outcome, report.error_type, report.error) == ("drained", None, None)


def test_an_exchange_whose_answer_was_whole_is_no_drained_one() -> None:
    book = Playbook()
    book.until_answer()
    book.data(sse(token(), DONE), end=True)
    assert book.closed(draining=True).outcome == "success"


def test_a_defect_ends_it() -> None:
    book = Playbook()
    book.until_answer()
    report = book.closed(failure="ValueError")
    assert (report.outcome, report.error_type, report.error) == ("error", "internal", "ValueError")


def test_nothing_ever_came() -> None:
    report = Playbook().closed()
    assert (report.outcome, report.duration, report.request_id) == ("aborted", 0.0, "")


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_of_a_pod_that_nobody_chose(status: int) -> None:
    book = Playbook()
    book.request()
    assert reply(book.answer(status)).response_body is None
    assert book.state is State.HELD
    report = book.closed()
    assert (report.outcome, report.error_type, report.error) == ("error", "internal", "served-undecided")
    assert (report.status, report.served_address, report.routing) == (status, "10.0.0.1:8000", None)
    assert report.usage_source == "none"


def test_an_answer_of_envoys_own_while_the_body_is_awaited_is_no_defect() -> None:
    book = Playbook()
    book.request()
    book.answer(408, upstream=None, attempts=0, local_reply="request_overall_timeout")
    assert book.closed().error == "request_overall_timeout"


# -- the native lane -----------------------------------------------------------------------------------------------


def test_a_stream_that_envoy_reads_itself() -> None:
    book = Playbook(native=True)
    assert reply(book.request()) is HIDE_RESPONSE
    assert asked(book.body(STREAM)) == SchedulingRequest(model=MODEL)
    routed = book.scheduled(1, 2)
    check_the_routed_stream(routed)
    assert (routed.request_body, routed.response_headers, routed.response_body) == (None, None, None)
    left = handover(routed)
    assert (left.request_id, left.policy) == ("id-1", "least-request")
    assert left.pods == (("10.0.0.1:8000", "pod-1"), ("10.0.0.2:8000", "pod-2"))
    assert (left.read, left.hide, left.max_event_bytes, left.load_report) == (True, True, 1_048_576, None)
    assert facts(routed) == Facts(
        request_id="id-1",
        path="/v1/chat/completions",
        routing=routing_of(decision(1, 2)),
        operation="chat",
        model=MODEL,
        stream=True,
        read=True,
    )
    assert book.state is State.HANDED_OVER
    assert (book.released(), book.state) == ("id-1", State.CLOSED)


def facts(routed: Continue) -> Facts:
    return msgspec.json.decode(handover(routed).facts, type=Facts)


@pytest.mark.parametrize(("native", "lua"), [(False, 1), (True, 0), (True, 99), (False, 0)])
def test_without_a_script_that_is_understood_the_answer_is_shown_here(native: bool, lua: int) -> None:
    book = Playbook(native=native)
    book.lua = lua
    assert reply(book.request()) is SHOW_RESPONSE
    book.body(STREAM)
    assert book.scheduled().handover is None
    assert reply(book.answer()).response_body is BodyMode.STREAMED
    book.data(sse(token(), usage(1, 1), DONE), end=True)
    assert book.closed().outcome == "success"


@pytest.mark.parametrize(
    ("path", "end"), [("/health", True), ("/v1/chat/completions", True), ("/v1/other", False)]
)
def test_an_answer_that_nobody_reads_is_handed_over_too(path: str, end: bool) -> None:
    book = Playbook(native=True)
    asked(book.request(path, end=end))
    routed = book.scheduled()
    assert (routed.phase, routed.request_body) == (Phase.REQUEST_HEADERS, BodyMode.NONE)
    assert routed.response_headers is False
    assert (handover(routed).read, handover(routed).hide) == (False, False)
    told = facts(routed)
    assert (told.read, told.stream, told.operation, told.path) == (False, False, None, path)
    book.released()


@pytest.mark.parametrize("end", [True, False])
def test_without_the_script_the_headers_of_such_an_answer_are_asked_for(end: bool) -> None:
    book = Playbook()
    book.request("/v1/other", end=end)
    assert book.scheduled().response_headers is True


@pytest.mark.parametrize(
    ("body", "hide"),
    [(STREAM, True), (PLAIN, False), (b'{"model":"m","stream":true,"stream_options":{}}', False)],
)
def test_usage_is_hidden_where_it_was_added(body: bytes, hide: bool) -> None:
    left = handover(Playbook(native=True).until_routed(body))
    assert (left.read, left.hide) == (True, hide)


@pytest.mark.parametrize(("body", "limit"), [(STREAM, 100), (PLAIN, 200)])
def test_an_event_and_a_json_answer_have_limits_of_their_own(body: bytes, limit: int) -> None:
    book = Playbook(ExchangeSettings(max_event_bytes=100, max_json_bytes=200), native=True)
    assert handover(book.until_routed(body)).max_event_bytes == limit


def test_without_accounting_an_answer_is_handed_over_and_not_read() -> None:
    book = Playbook(ExchangeSettings(accounting=False), native=True)
    routed = book.until_routed()
    assert (routed.body, handover(routed).read, handover(routed).hide) == (None, False, False)
    assert (facts(routed).read, facts(routed).operation) == (False, "chat")
    book.released()


def test_the_load_report_of_a_native_answer_is_known_with_the_decision() -> None:
    routed = Playbook(native=True).until_routed(STREAM, 1, endpoint_load_metrics_format="JSON")
    assert handover(routed).load_report == LoadReport("JSON", decision(1).chosen)
    assert routed.load_report is None


def test_what_a_client_wrote_is_cut_and_mended_for_metadata() -> None:
    book = Playbook(native=True)
    book.request("/v1/other\udcff" + "x" * 600, x_request_id="id\udcff" + "y" * 600, x_model="m\udcff")
    routed = book.scheduled()
    told = facts(routed)
    assert (told.request_id, told.model) == ("id?" + "y" * 509, "m?")
    assert told.path == "/v1/other?" + "x" * 502
    assert handover(routed).request_id == "id\udcff" + "y" * 600
    assert book.released() == told.request_id


@pytest.mark.parametrize("error", [ModelNotFound("no"), NoReadyEndpoint("no")])
def test_a_refusal_is_reported_here(error: GatewayError) -> None:
    book = Playbook(native=True)
    book.request()
    book.body(STREAM)
    assert book.refused(error).status == error.status
    assert (book.closed().outcome, book.state) == ("refused", State.CLOSED)


@pytest.mark.parametrize("read", [True, False])
def test_what_ends_before_the_decision_is_told_by_its_entry_too(read: bool) -> None:
    book = Playbook(native=True)
    book.request()
    if read:
        asked(book.body(STREAM))
    assert book.released() == "id-1"


def test_an_answer_of_envoys_own_to_a_native_request_without_its_body() -> None:
    book = Playbook(native=True)
    book.request()
    book.answer(408, upstream=None, attempts=0, local_reply="request_overall_timeout")
    assert book.released() == "id-1"


def test_a_defect_before_the_decision_is_reported_here() -> None:
    book = Playbook(native=True)
    book.request()
    assert book.closed(failure="ValueError").error == "ValueError"


def test_a_stream_without_a_word_is_told_by_its_entry_too() -> None:
    assert Playbook(native=True).released() == ""


def test_what_envoy_shows_of_an_answer_handed_over_passes() -> None:
    book = Playbook(native=True)
    book.until_routed()
    assert reply(book.trailers()) is PASS[Phase.REQUEST_TRAILERS]
    assert reply(book.answer()) is PASS[Phase.RESPONSE_HEADERS]
    assert book.data(sse(usage(1, 1))) == sse(usage(1, 1))  # not asked for: passed, and counted
    assert book.exchange.record.unexpected == 1
    assert not book.exchange.holds_back
    book.released()


@pytest.mark.parametrize(("draining", "failure"), [(True, None), (False, "ValueError")])
def test_however_the_stream_ends_the_report_is_envoys(draining: bool, failure: str | None) -> None:
    book = Playbook(native=True)
    book.until_routed()
    assert book.released(draining=draining, failure=failure) == "id-1"


def test_messages_that_should_not_have_come_travel_with_the_facts() -> None:
    book = Playbook(native=True)
    book.request()
    book.request()
    book.body(STREAM)
    assert facts(book.scheduled()).unexpected == 1


# -- messages that should not come ---------------------------------------------------------------------------------

EVENTS: dict[type[object], Event] = {
    RequestHeaders: RequestHeaders(1.0, headers(path="/v1/chat/completions"), False, None, 1),
    RequestBody: RequestBody(1.0, STREAM, True),
    RequestTrailers: RequestTrailers(1.0),
    ResponseHeaders: ResponseHeaders(
        1.0, headers(status=200, content_type="text/event-stream"), False, "10.0.0.1:8000"
    ),
    ResponseBody: ResponseBody(1.0, sse(token()), False),
    ResponseTrailers: ResponseTrailers(1.0),
    Scheduled: Scheduled(1.0, decision(1)),
    Refused: Refused(1.0, NoReadyEndpoint("no")),
    StreamClosed: StreamClosed(1.0),
}
PATHS: dict[State, tuple[type[object], ...]] = {
    State.AWAIT_REQUEST_HEADERS: (),
    State.AWAIT_REQUEST_BODY: (RequestHeaders,),
    State.AWAIT_DECISION: (RequestHeaders, RequestBody),
    State.AWAIT_RESPONSE_HEADERS: (RequestHeaders, RequestBody, Scheduled),
    State.AWAIT_RESPONSE_BODY: (RequestHeaders, RequestBody, Scheduled, ResponseHeaders),
    State.HELD: (RequestHeaders, RequestBody, Scheduled, ResponseHeaders, ResponseTrailers),
    State.HANDED_OVER: (RequestHeaders, RequestBody, Scheduled),
    State.ANSWERED: (RequestHeaders, RequestBody, Refused),
    State.CLOSED: (StreamClosed,),
}


def in_state(state: State) -> Playbook:
    book = Playbook(native=state is State.HANDED_OVER)
    for kind in PATHS[state]:
        book.receive(EVENTS[kind])
    assert book.state is state
    return book


def test_the_table_and_where_it_leads_name_the_same() -> None:
    assert TABLE.keys() == set(State) == PATHS.keys()
    for state, row in TABLE.items():
        assert row.keys() - {StreamClosed} == NEXT.get(state, {}).keys()
        assert (StreamClosed in row) is (state is not State.CLOSED)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", EVENTS)
def test_what_the_table_does_not_list_changes_nothing(state: State, kind: type[object]) -> None:
    if kind in TABLE[state]:
        return
    book = in_state(state)
    for times in (1, 2):
        commands = book.receive(EVENTS[kind])
        phase = getattr(Phase, _upper(kind), None)
        silent = phase is None or state is State.CLOSED
        assert tuple(commands) == (() if silent else (PASS[phase],))  # type: ignore[index]
        assert book.state is state
        assert book.exchange.record.unexpected == times


def _upper(kind: type[object]) -> str:
    return "".join(f"_{each}" if each.isupper() else each for each in kind.__name__).lstrip("_").upper()


@pytest.mark.parametrize("state", [state for state in State if state is not State.CLOSED])
@pytest.mark.parametrize(
    "closed", [StreamClosed(9.0), StreamClosed(9.0, True), StreamClosed(9.0, False, "E")]
)
def test_the_end_comes_in_every_state_and_is_told_once(state: State, closed: StreamClosed) -> None:
    book = in_state(state)
    (last,) = book.receive(closed)
    assert isinstance(last, Release if state is State.HANDED_OVER else Finish)
    assert book.state is State.CLOSED
    again: list[Command] = []
    for event in EVENTS.values():
        again += book.receive(event)
    assert again == []


def test_unexpected_messages_are_in_the_report() -> None:
    book = Playbook()
    book.until_answer()
    book.request()
    book.body(b"x")
    book.receive(RequestTrailers(book.now()))
    assert book.closed().unexpected_messages == 3


# -- small arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "tokens", "expected"),
    [
        (None, None, 9, None),
        (1.0, 1.0, 0, None),
        (1.0, 1.0, 1, None),
        (1.0, 3.0, 2, 2.0),
        (1.0, 3.0, 5, 0.5),
        (1.0, 1.0, 5, 0.0),
    ],
)
def test_time_per_output_token(
    first: float | None, last: float | None, tokens: int, expected: float | None
) -> None:
    assert time_per_output_token(first, last, tokens) == expected


@pytest.mark.parametrize(
    ("status", "engine", "envoy"),
    [
        (400, "client", "client"),
        (429, "overload", "client"),
        (499, "client", "client"),
        (500, "model_server", "network"),
        (503, "overload", "network"),
        (0, "model_server", "client"),
    ],
)
def test_whose_fault(status: int, engine: str, envoy: str) -> None:
    assert (fault_of(status), fault_of_envoy(status)) == (engine, envoy)
