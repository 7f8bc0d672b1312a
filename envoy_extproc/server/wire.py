"""Between Envoy's messages and the core's values. The only module beside `access_log` that knows protobuf.

Fields are set by attribute and `.add()`: nested constructor arguments cost three times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import assert_never

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from envoy_extproc._proto import base_pb2, ext_proc_pb2, orca_pb2
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
from envoy_extproc.exchange.control import DESTINATION
from envoy_extproc.exchange.events import (
    Message,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
)
from envoy_extproc.exchange.native import LUA_VERSIONS
from envoy_extproc.headers import Headers
from envoy_extproc.server import orca

PROCESS = "envoy.service.ext_proc.v3.ExternalProcessor"
"""The gRPC service's name; the messages' own package is private to this project, which the wire does not see."""

METADATA = "envoy_extproc"
"""Namespace of dynamic metadata by which an access-log entry shows that a request came by here."""

PLEA = "unheard"
"""Its member in which a server that hears of no access log says its name."""

LUA_METADATA = "envoy_extproc_lua"
"""Namespace in which `native.lua` announces its version, and notes what it saw of an answer."""

ProcessingRequest = ext_proc_pb2.ProcessingRequest
ProcessingResponse = ext_proc_pb2.ProcessingResponse

_FILTER = "envoy.filters.http.ext_proc"
VIA_UPSTREAM = "via_upstream"  # response.code_details of an answer that a pod gave
_SUBSET_NAMESPACE = "envoy.lb.subset_hint"
_SUBSET_KEY = "x-gateway-destination-endpoint-subset"
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_MODE = ext_proc_pb2.ProcessingMode
_BODY_MODES: Mapping[BodyMode, ext_proc_pb2.ProcessingMode.BodySendMode.ValueType] = {
    BodyMode.NONE: _MODE.NONE,
    BodyMode.STREAMED: _MODE.STREAMED,
    BodyMode.BUFFERED: _MODE.BUFFERED,
}
_NO_CONTROL = {code: None for code in (*range(0x20), 0x7F) if code != 0x09}


def decode(message: ext_proc_pb2.ProcessingRequest, at: float) -> Message | None:
    """The event a message stands for; None for a message of a kind not known here."""
    decoder = _DECODERS.get(message.WhichOneof("request"))
    return None if decoder is None else decoder(message, at)


def encode(reply: Continue | Respond, plea: str = "") -> ext_proc_pb2.ProcessingResponse:
    """The message of a reply; where it names a pod, the request's access-log entry brings back the plea (see `native_lane`)."""
    if isinstance(reply, Respond):
        return _immediate(reply)
    if reply is HIDE_RESPONSE:
        return _HIDE_RESPONSE
    if reply is SHOW_RESPONSE:
        return _SHOW_RESPONSE
    return _READY[reply.phase] if reply is PASS[reply.phase] else _continue(reply, plea)


def _headers(headers: ext_proc_pb2.HttpHeaders) -> Headers:
    # Envoy fills raw_value; others may fill value.
    return Headers(
        [
            (each.key, each.raw_value.decode("utf-8", "surrogateescape") if each.raw_value else each.value)
            for each in headers.headers.headers
        ]
    )


def _request_headers(message: ext_proc_pb2.ProcessingRequest, at: float) -> RequestHeaders:
    headers = message.request_headers
    return RequestHeaders(
        at, _headers(headers), headers.end_of_stream, _subset(message), _lua_version(message)
    )


def _request_body(message: ext_proc_pb2.ProcessingRequest, at: float) -> RequestBody:
    return RequestBody(at, message.request_body.body, message.request_body.end_of_stream)


def _response_body(message: ext_proc_pb2.ProcessingRequest, at: float) -> ResponseBody:
    return ResponseBody(at, message.response_body.body, message.response_body.end_of_stream)


def _response_headers(message: ext_proc_pb2.ProcessingRequest, at: float) -> ResponseHeaders:
    attributes = message.attributes[_FILTER].fields if _FILTER in message.attributes else {}
    address = attributes["upstream.address"].string_value if "upstream.address" in attributes else ""
    name = "upstream.request_attempt_count"
    # Without the attribute, which a hand-written configuration may not ask for, an address means an attempt.
    attempts = _whole(attributes[name].number_value) if name in attributes else int(bool(address))
    details = (
        attributes["response.code_details"].string_value if "response.code_details" in attributes else ""
    )
    local = details if details != VIA_UPSTREAM and (details or not attempts) else None
    headers = message.response_headers
    # After connections that failed, Envoy still names the last address it tried: nobody answered from there.
    served_by = None if local is not None else address or None
    return ResponseHeaders(at, _headers(headers), headers.end_of_stream, served_by, attempts, local)


def _lua_version(message: ext_proc_pb2.ProcessingRequest) -> int:
    """What `native.lua` announced; 0 where it is not there."""
    namespaces = message.metadata_context.filter_metadata
    if LUA_METADATA not in namespaces:
        return 0
    return _whole(namespaces[LUA_METADATA].fields["v"].number_value)


def _whole(number: float) -> int:
    """A count that comes as a double; 0 for what is no number."""
    return int(number) if math.isfinite(number) else 0


def _subset(message: ext_proc_pb2.ProcessingRequest) -> tuple[str, ...] | None:
    """The picker protocol's subset hint, a list or a comma string; None where there is none."""
    if not message.HasField("metadata_context"):
        return None
    namespaces = message.metadata_context.filter_metadata
    if _SUBSET_NAMESPACE not in namespaces or _SUBSET_KEY not in namespaces[_SUBSET_NAMESPACE].fields:
        return None
    value = namespaces[_SUBSET_NAMESPACE].fields[_SUBSET_KEY]
    if value.WhichOneof("kind") == "list_value":
        texts = [each.string_value for each in value.list_value.values]
    else:
        texts = value.string_value.split(",")
    return tuple(text.strip() for text in texts if text.strip())


def _continue(reply: Continue, plea: str = "") -> ext_proc_pb2.ProcessingResponse:
    message = ProcessingResponse()
    match reply.phase:
        case Phase.REQUEST_HEADERS:
            common = message.request_headers.response
        case Phase.REQUEST_BODY:
            common = message.request_body.response
        case Phase.RESPONSE_HEADERS:
            common = message.response_headers.response
        case Phase.RESPONSE_BODY:
            common = message.response_body.response
        case Phase.REQUEST_TRAILERS:
            message.request_trailers.SetInParent()
            return message
        case Phase.RESPONSE_TRAILERS:
            message.response_trailers.SetInParent()
            return message
        case _:
            assert_never(reply.phase)
    common.SetInParent()
    _fill(common, reply)
    if reply.destination:
        _direct(message.dynamic_metadata.fields, reply, plea)
    if (reply.request_body, reply.response_headers, reply.response_body) != (None, None, None):
        _set_mode(message.mode_override, reply)
    return message


def _direct(namespaces: MutableMapping[str, struct_pb2.Value], reply: Continue, plea: str) -> None:
    """Where Envoy sends the request, and what its access-log entry brings back."""
    destination = namespaces["envoy.lb"].struct_value.fields[DESTINATION]
    destination.string_value = ",".join(reply.destination)
    ours = namespaces[METADATA].struct_value.fields
    ours["v"].number_value = 1
    if plea:
        ours[PLEA].string_value = plea
    if reply.handover is not None:
        _hand_over(ours, reply.handover)


def _hand_over(fields: MutableMapping[str, struct_pb2.Value], handover: Handover) -> None:
    """What `native.lua` reads, and what the access log is to bring back."""
    fields["native"].number_value = max(LUA_VERSIONS)
    fields["id"].string_value = header_value(handover.request_id).decode("utf-8", "replace")
    fields["policy"].string_value = handover.policy
    fields["pods"].string_value = _lines(handover.pods)
    fields["facts"].string_value = handover.facts.decode()
    if handover.read:
        fields["read"].bool_value = True
        fields["hide"].bool_value = handover.hide
        fields["limit"].number_value = handover.max_event_bytes
    if handover.load_report is not None:
        fields["load"].string_value = report_value(handover.load_report)
    if handover.sessions:
        fields["sessions"].string_value = _lines(handover.sessions)
    if handover.extras:
        extras = [(name, header_value(value).decode("utf-8", "replace")) for name, value in handover.extras]
        fields["extras"].string_value = _lines(extras)


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join([f"{name} {value}" for name, value in pairs])


def _fill(common: ext_proc_pb2.CommonResponse, reply: Continue) -> None:
    if reply.set_headers or reply.remove_headers or reply.load_report is not None:
        mutation = common.header_mutation
        _set_headers(mutation, reply.set_headers)
        mutation.remove_headers.extend(reply.remove_headers)
        if reply.load_report is not None:
            _set_headers(mutation, (("endpoint-load-metrics", report_value(reply.load_report)),))
    if reply.body:
        common.body_mutation.body = reply.body
    elif reply.body is not None:
        common.body_mutation.clear_body = True
    if reply.clear_route_cache:
        common.clear_route_cache = True


def _set_mode(mode: ext_proc_pb2.ProcessingMode, reply: Continue) -> None:
    """An override stands for the whole mode, so what is not meant to change is said again."""
    mode.request_body_mode = _BODY_MODES[reply.request_body or BodyMode.BUFFERED]
    if reply.request_body is BodyMode.NONE:
        # To ask about trailers, Envoy 1.40 stops behind a body that it has passed on already, and then passes on what
        # it keeps of it for retries a second time (envoyproxy/envoy#45470).
        mode.request_trailer_mode = _MODE.SKIP
    elif reply.phase is Phase.REQUEST_HEADERS:
        # Trailers without a body come in its place; a gateway whose configuration cannot ask for them lets such requests past.
        mode.request_trailer_mode = _MODE.SEND
    mode.response_header_mode = _MODE.SKIP if reply.response_headers is False else _MODE.SEND
    mode.response_body_mode = _BODY_MODES[reply.response_body or BodyMode.NONE]
    # Trailers end a body that is read, in place of a last empty message.
    read = reply.response_body in (BodyMode.STREAMED, BodyMode.BUFFERED)
    mode.response_trailer_mode = _MODE.SEND if read else _MODE.SKIP


def _immediate(reply: Respond) -> ext_proc_pb2.ProcessingResponse:
    message = ProcessingResponse()
    immediate = message.immediate_response
    immediate.status.code = reply.status
    immediate.body = reply.body
    immediate.details = reply.details
    _set_headers(immediate.headers, reply.headers)
    return message


def _set_headers(mutation: ext_proc_pb2.HeaderMutation, headers: tuple[tuple[str, str], ...]) -> None:
    for name, value in headers:
        option = mutation.set_headers.add()
        option.append_action = _OVERWRITE  # Envoy's default is to append
        option.header.key = name
        option.header.raw_value = header_value(value)


def header_value(value: str) -> bytes:
    """A header's value without what would end the header early: Envoy answers 500 to a newline in one."""
    if not value.isprintable():
        value = value.translate(_NO_CONTROL)
    return value.encode("utf-8", "surrogateescape")


def report_value(report: LoadReport) -> str:
    """The value of ``endpoint-load-metrics``."""
    fields = orca.fields(report.candidate, report.rate)
    if report.form == "BIN":
        return orca.binary(_orca_message(fields))
    return orca.text(fields) if report.form == "TEXT" else orca.json(fields)


def _orca_message(fields: Mapping[str, float]) -> bytes:
    message = orca_pb2.OrcaLoadReport()
    for name, value in fields.items():
        named = name.removeprefix("named_metrics.")
        if named != name:
            message.named_metrics[named] = value
        else:
            setattr(message, name, value)
    return message.SerializeToString()


_DECODERS: Mapping[str | None, Callable[[ext_proc_pb2.ProcessingRequest, float], Message]] = {
    "request_headers": _request_headers,
    "request_body": _request_body,
    "request_trailers": lambda _, at: RequestTrailers(at),
    "response_headers": _response_headers,
    "response_body": _response_body,
    "response_trailers": lambda _, at: ResponseTrailers(at),
}
_READY: Mapping[Phase, ext_proc_pb2.ProcessingResponse] = {
    phase: _continue(reply) for phase, reply in PASS.items()
}
_HIDE_RESPONSE, _SHOW_RESPONSE = _continue(HIDE_RESPONSE), _continue(SHOW_RESPONSE)

__all__ = [
    "LUA_METADATA",
    "METADATA",
    "PLEA",
    "PROCESS",
    "DecodeError",
    "ProcessingRequest",
    "ProcessingResponse",
    "decode",
    "encode",
]
