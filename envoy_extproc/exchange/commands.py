"""What an exchange wants done. `Continue` and `Respond` are replies to the message that was received last."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

import msgspec

from envoy_extproc import orca
from envoy_extproc.endpoints import Endpoint
from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest


class Phase(Enum):
    """Envoy's phases; a reply names the one it belongs to."""

    REQUEST_HEADERS = auto()
    REQUEST_BODY = auto()
    REQUEST_TRAILERS = auto()
    RESPONSE_HEADERS = auto()
    RESPONSE_BODY = auto()
    RESPONSE_TRAILERS = auto()


class BodyMode(Enum):
    """How Envoy is to hand over a body (ProcessingMode.BodySendMode)."""

    NONE = auto()
    STREAMED = auto()
    BUFFERED = auto()


class LoadReport(msgspec.Struct, frozen=True):
    """The ORCA report to add to the response headers.

    Attributes:
        form: ``TEXT``, ``JSON`` or ``BIN``.
        candidate: the endpoint told of.
        rate: requests per second that this server sends there.
    """

    form: str
    candidate: Candidate
    rate: float = 0.0


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """What `native.lua` is to do on the answer, and what the access log brings back.

    Attributes:
        request_id: for the response headers.
        policy: likewise.
        pods: address and name of those who may serve.
        read: whether usage is to be looked for.
        hide: whether usage is in the answer only because this server asked for it.
        max_event_bytes: an event beyond this passes unparsed; a JSON answer, where no stream was asked for.
        facts: JSON for whoever gets the access-log entry.
        load_report: the ORCA report to add to the response headers.
        sessions: address of each who may serve, and the `x-session-id` that stays there; none where sessions do not count.
        extras: further response headers.
    """

    request_id: str
    policy: str
    pods: tuple[tuple[str, str], ...]
    read: bool
    hide: bool
    max_event_bytes: int
    facts: bytes
    load_report: LoadReport | None = None
    sessions: tuple[tuple[str, str], ...] = ()
    extras: tuple[tuple[str, str], ...] = ()


class Continue(msgspec.Struct, frozen=True, kw_only=True):
    """CommonResponse: go on, with these changes.

    Attributes:
        phase: the phase this replies to.
        set_headers: headers to set, in place of any of the same name.
        remove_headers: headers to remove.
        body: what to pass on instead of the body in the message; None leaves it.
        destination: addresses to try in order, for Envoy's ``override_host``.
        request_body: how the request body is to be handed over; None leaves it BUFFERED.
        response_headers: whether the response headers are to be shown here; None leaves the mode.
        response_body: how the response body is to be handed over from here on; None leaves the mode.
        clear_route_cache: whether Envoy chooses its route again.
        load_report: the ORCA report to add to the response headers.
        handover: the answer is Envoy's own to read; None where it is read here.
    """

    phase: Phase
    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    destination: tuple[str, ...] = ()
    request_body: BodyMode | None = None
    response_headers: bool | None = None
    response_body: BodyMode | None = None
    clear_route_cache: bool = False
    load_report: LoadReport | None = None
    handover: Handover | None = None


PASS: Mapping[Phase, Continue] = {phase: Continue(phase=phase) for phase in Phase}
"""Replies that change nothing, made once: every token of an answer gets one."""


SHOW_RESPONSE = Continue(phase=Phase.REQUEST_HEADERS, response_headers=True)
"""The reply to request headers whose answer is to be read here."""


HIDE_RESPONSE = Continue(phase=Phase.REQUEST_HEADERS, response_headers=False)
"""The reply to request headers whose answer is left to `native.lua`: where Envoy was told to show its headers, it need not."""


class Respond(msgspec.Struct, frozen=True, kw_only=True):
    """ImmediateResponse: answer the client instead of an engine.

    Attributes:
        status: HTTP status code.
        headers: to set on the answer.
        body: the answer.
        details: Envoy's RESPONSE_CODE_DETAILS: one word.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    details: str


class Schedule(msgspec.Struct, frozen=True):
    """Choose an endpoint; the answer comes back as `Scheduled` or `Refused`."""

    request: SchedulingRequest


class ListModels(msgspec.Struct, frozen=True):
    """Say which models there are; the answer comes back as `Listed`. `name` is the one asked for, empty for all of them."""

    name: str


class Heard(msgspec.Struct, frozen=True):
    """The engine at `address` told this of its load, or something that cannot be read."""

    address: str
    parsed: orca.Parsed


class Serve(msgspec.Struct, frozen=True):
    """Another endpoint than the chosen one serves the request: in-flight moves there."""

    endpoint: Endpoint


class Finish(msgspec.Struct, frozen=True):
    """The exchange is over: release what it holds and say what happened."""

    report: Report


class Release(msgspec.Struct, frozen=True):
    """The stream of an exchange in the native lane is at its end: its report comes with the access-log entry.

    Attributes:
        request_id: the id by which that report will go.
    """

    request_id: str


Command = Continue | Respond | Schedule | ListModels | Heard | Serve | Finish | Release
