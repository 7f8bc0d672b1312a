"""Whose fault it was, told from a status, an error inside an answer, or Envoy's word for why it ended a request itself.

    network       no pod could be reached, or its connection broke
    model_server  an engine failed, spoke no HTTP, or was silent for too long
    client        the request was wrong, came too slowly, or its client left
    overload      an engine, or Envoy, has too much to do
    limit         a limit on requests was reached
    internal      this server or the gateway's configuration

`content`, a 2xx that makes no sense, is seen by readers of answers alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from envoy_extproc.errors import ErrorType
from envoy_extproc.openai.answer import EngineError

_OVERLOAD = frozenset({429, 503, 529})
"""Statuses by which engines say that they have too much to do; 529 is Anthropic's."""

_TYPES: Mapping[str, ErrorType] = {
    "authentication_error": "client",
    "invalid_request_error": "client",
    "not_found_error": "client",
    "overloaded_error": "overload",
    "permission_error": "client",
    "rate_limit_error": "overload",
    "request_too_large": "client",
}
"""OpenAI's and Anthropic's error types, for an error inside an answer that has no status of its own."""

_NO_STATUS = 500  # what `EngineError` has where the engine gave none

DETAILS: Mapping[str, ErrorType] = {
    # The client's: what it sent, how slowly, and that it left.
    "absolute_path_rejected": "client",
    "downstream_header_timeout": "client",
    "downstream_local_disconnect": "client",
    "downstream_remote_disconnect": "client",
    "downstream_remote_reset": "client",
    "early_connect_data": "client",
    "invalid_path": "client",
    "low_version": "client",
    "missing_host_header": "client",
    "missing_path_rejected": "client",
    "path_normalization_failed": "client",
    "rejecting_because_detection_failed": "client",
    "request_header_timeout": "client",
    "request_headers_failed_strict_check": "client",
    "request_overall_timeout": "client",
    "request_payload_too_large": "client",
    "upgrade_failed": "client",
    # A pod that cannot be reached, or breaks off.
    "no_healthy_upstream": "network",
    "request_payload_exceeded_retry_buffer_limit": "network",  # a retry was due: a pod had failed
    "upstream_reset_after_response_started": "network",
    "upstream_reset_before_response_started": "network",
    # A pod that has the request and takes longer than Envoy waits: connections that break are told above.
    "duration_timeout": "model_server",
    "max_duration_timeout": "model_server",
    "response_timeout": "model_server",
    "stream_idle_timeout": "model_server",
    "upstream_max_stream_duration_reached": "model_server",
    "upstream_per_try_idle_timeout": "model_server",
    "upstream_per_try_timeout": "model_server",
    "upstream_response_timeout": "model_server",  # as older documentation names it
    "websocket_handshake_unsuccessful": "model_server",
    # Envoy has too much to do, or was told to let nobody through.
    "drop_overload": "overload",
    "maintenance_mode": "overload",
    "overload": "overload",
    "unconditional_drop_overload": "overload",
    # Envoy's own rate limits.
    "local_rate_limited": "limit",
    "request_rate_limited": "limit",
    # The gateway's configuration, or a filter in it.
    "cluster_not_found": "internal",
    "filter_added_invalid_request_data": "internal",
    "filter_added_invalid_response_data": "internal",
    "filter_chain_not_found": "internal",
    "filter_removed_required_request_headers": "internal",
    "filter_removed_required_response_headers": "internal",
    "response_payload_too_large": "internal",
    "route_configuration_not_found": "internal",
    "route_not_found": "internal",
}
"""Envoy's response code details: the first word, without what stands in braces or brackets behind it.

The list is that of Envoy 1.40, but for `via_upstream`, which is a pod's answer, and `admin_filter_response`,
`direct_response` and `internal_redirect`, which are what somebody configured: there the status tells.
"""

PREFIXES: tuple[tuple[str, ErrorType], ...] = (
    ("ext_proc_error", "internal"),  # this server was down, too late, or broke
    ("http1.", "client"),
    ("http2.", "client"),
    ("http3.", "client"),
    # Where it was not the connection that failed: a pod that speaks no HTTP, a breaker of Envoy's, its overload manager.
    # Behind the headers, Envoy says `protocol_error` of a connection that ends too early.
    ("upstream_reset_before_response_started{protocol_error", "model_server"),
    ("upstream_reset_before_response_started{overflow", "overload"),
    ("upstream_reset_before_response_started{overload_manager", "overload"),
)
"""Details by their beginning; they go before those by their first word.

Those of a codec are about the client: of a pod's, the word stands in braces.
"""


def fault_of(status: int) -> ErrorType:
    """Whose fault an engine's error status is: 429, 503 and 529 mean it has too much to do."""
    if status in _OVERLOAD:
        return "overload"
    return "client" if 400 <= status < 500 else "model_server"


def fault_of_error(error: EngineError) -> ErrorType:
    """Whose fault an error inside an answer is: its status tells, or its type where it has none."""
    if error.code == _NO_STATUS and error.type in _TYPES:
        return _TYPES[error.type]
    return fault_of(error.code)


def fault_of_envoy(status: int, details: str = "") -> ErrorType:
    """Whose fault it is that Envoy answered by itself.

    Args:
        status: what it answered.
        details: its response code details. Where they are not known, a status below 500 is the client's fault, and any
            other means that no pod could be reached.
    """
    known = fault_of_details(details)
    if status == 408 and known == "model_server":
        return (
            "client"  # an idle stream: Envoy says 408 while it waits for the request, and 504 for the answer
        )
    if known is not None:
        return known
    return "client" if status < 500 else "network"


def fault_of_details(details: str) -> ErrorType | None:
    """Whose fault it is by Envoy's details alone; None where they are not known."""
    fault = next((fault for prefix, fault in PREFIXES if details.startswith(prefix)), None)
    return DETAILS.get(first_word(details)) if fault is None else fault


def first_word(details: str) -> str:
    """Envoy's response code details without what it says in braces, which has no bound."""
    return re.split(r"[^A-Za-z0-9_.-]", details[:64])[0]
