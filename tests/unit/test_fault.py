"""Whose fault it was: statuses, errors inside answers, Envoy's words. And that the verdict on an exchange follows."""

from __future__ import annotations

from typing import get_args

import pytest

from envoy_extproc.errors import ErrorType
from envoy_extproc.exchange.fault import (
    DETAILS,
    PREFIXES,
    fault_of,
    fault_of_details,
    fault_of_envoy,
    fault_of_error,
    first_word,
)
from envoy_extproc.openai.answer import EngineError

EARLY, LATE = "upstream_reset_before_response_started", "upstream_reset_after_response_started"

ENVOY_1_40 = [
    "absolute_path_rejected",
    "admin_filter_response",
    "cluster_not_found",
    "direct_response",
    "downstream_header_timeout",
    "downstream_local_disconnect",
    "downstream_remote_disconnect",
    "drop_overload",
    "duration_timeout",
    "early_connect_data",
    "filter_added_invalid_request_data",
    "filter_added_invalid_response_data",
    "filter_chain_not_found",
    "filter_removed_required_request_headers",
    "filter_removed_required_response_headers",
    "internal_redirect",
    "invalid_path",
    "low_version",
    "maintenance_mode",
    "max_duration_timeout",
    "missing_host_header",
    "missing_path_rejected",
    "no_healthy_upstream",
    "overload",
    "path_normalization_failed",
    "rejecting_because_detection_failed",
    "request_header_timeout",
    "request_headers_failed_strict_check",
    "request_overall_timeout",
    "request_payload_exceeded_retry_buffer_limit",
    "request_payload_too_large",
    "response_payload_too_large",
    "response_timeout",
    "route_configuration_not_found",
    "route_not_found",
    "stream_idle_timeout",
    "unconditional_drop_overload",
    "upgrade_failed",
    "upstream_max_stream_duration_reached",
    "upstream_per_try_idle_timeout",
    "upstream_per_try_timeout",
    "upstream_reset_after_response_started",
    "upstream_reset_before_response_started",
    "via_upstream",
    "websocket_handshake_unsuccessful",
]
"""The words of its core (`ResponseCodeDetailValues`)."""

BY_STATUS = {"admin_filter_response", "direct_response", "internal_redirect", "via_upstream"}


@pytest.mark.parametrize("word", ENVOY_1_40)
def test_every_word_of_envoys_is_judged_or_left_to_the_status(word: str) -> None:
    assert (word in DETAILS) != (word in BY_STATUS)


def test_faults_are_those_of_the_metric() -> None:
    faults = {*DETAILS.values(), *(fault for _, fault in PREFIXES)}
    assert faults == set(get_args(ErrorType)) - {"content"}


@pytest.mark.parametrize(
    ("status", "details", "fault"),
    [
        (408, "request_overall_timeout", "client"),
        (408, "stream_idle_timeout", "client"),
        (504, "stream_idle_timeout", "model_server"),
        (504, "response_timeout", "model_server"),
        (504, "upstream_per_try_timeout", "model_server"),
        (413, "request_payload_too_large", "client"),
        (503, "no_healthy_upstream", "network"),
        (503, f"{EARLY}{{remote_connection_failure|delayed_connect_error:_Connection_refused}}", "network"),
        (503, f"{EARLY}{{connection_timeout}}", "network"),
        (503, f"{EARLY}{{connection_termination}}", "network"),
        (503, f"{EARLY}{{overflow}}", "overload"),
        (503, f"{EARLY}{{overload_manager_reset}}", "overload"),
        (502, f"{EARLY}{{protocol_error}}", "model_server"),
        (503, "overload", "overload"),
        (429, "request_rate_limited", "limit"),
        (503, "ext_proc_error_gRPC_error_14{connection_failure}", "internal"),
        (503, "ext_proc_error_per-message_timeout_exceeded", "internal"),
        (404, "route_not_found", "internal"),
        (503, "cluster_not_found", "internal"),
        (400, "http1.codec_error", "client"),
        (400, "http2.violation.of.messaging.rule", "client"),
        (400, "direct_response", "client"),
        (500, "direct_response", "network"),
        (403, "rbac_access_denied_matched_policy[none]", "client"),
        (503, "", "network"),
        (429, "", "client"),
    ],
)
def test_what_envoy_answers_itself(status: int, details: str, fault: str) -> None:
    assert fault_of_envoy(status, details) == fault


@pytest.mark.parametrize(
    ("details", "fault"),
    [
        (f"{LATE}{{protocol_error}}", "network"),  # what Envoy says of HTTP/1 that ends too early
        (f"{LATE}{{connection_termination}}", "network"),
        ("downstream_local_disconnect(on_idle_timeout)", "client"),
        ("", None),
        ("via_upstream", None),
    ],
)
def test_details_alone(details: str, fault: str | None) -> None:
    assert fault_of_details(details) == fault


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (400, "client"),
        (401, "client"),
        (408, "client"),
        (429, "overload"),
        (500, "model_server"),
        (502, "model_server"),
        (503, "overload"),
        (504, "model_server"),
        (529, "overload"),
    ],
)
def test_an_engines_status(status: int, fault: str) -> None:
    assert fault_of(status) == fault


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (EngineError(code=503, type="Service Unavailable"), "overload"),
        (EngineError(code=400, type="overloaded_error"), "client"),  # a status says more than a type
        (EngineError(type="overloaded_error"), "overload"),
        (EngineError(type="rate_limit_error"), "overload"),
        (EngineError(type="invalid_request_error"), "client"),
        (EngineError(type="api_error"), "model_server"),
        (EngineError(message="EngineCore died"), "model_server"),
    ],
)
def test_an_error_inside_an_answer(error: EngineError, fault: str) -> None:
    assert fault_of_error(error) == fault


@pytest.mark.parametrize(
    ("details", "word"),
    [
        ("ext_proc_error_gRPC_error_14{upstream_connect_error}", "ext_proc_error_gRPC_error_14"),
        ("ext_proc_error_per-message_timeout_exceeded", "ext_proc_error_per-message_timeout_exceeded"),
        ("http1.codec_error", "http1.codec_error"),
        ("downstream_local_disconnect(x)", "downstream_local_disconnect"),
        ("{odd}", ""),
        ("x" * 1000, "x" * 64),
    ],
)
def test_the_first_word(details: str, word: str) -> None:
    assert first_word(details) == word
