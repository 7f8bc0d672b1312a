"""What can happen to an exchange. One Envoy message is one event and gets one reply; `at` is monotonic seconds."""

from __future__ import annotations

import msgspec

from envoy_extproc.errors import GatewayError
from envoy_extproc.headers import Headers
from envoy_extproc.scheduling.interfaces import Decision


class RequestHeaders(msgspec.Struct, frozen=True):
    """ProcessingRequest.request_headers.

    Attributes:
        subset: the endpoints that the picker protocol's subset hint allows; None where there is no hint.
        lua: the version that `native.lua` announced; 0 where it is not there.
    """

    at: float
    headers: Headers
    end_of_stream: bool
    subset: tuple[str, ...] | None = None
    lua: int = 0


class RequestBody(msgspec.Struct, frozen=True):
    """ProcessingRequest.request_body: the whole body, since the mode is BUFFERED."""

    at: float
    data: bytes
    end_of_stream: bool


class RequestTrailers(msgspec.Struct, frozen=True):
    """ProcessingRequest.request_trailers."""

    at: float


class ResponseHeaders(msgspec.Struct, frozen=True):
    """ProcessingRequest.response_headers.

    Attributes:
        upstream: ``upstream.address``, who answered; None where Envoy answered itself.
        attempts: ``upstream.request_attempt_count``; 0 where no pod was asked.
        local_reply: Envoy's ``response.code_details`` where it answered itself; None where a pod did.
    """

    at: float
    headers: Headers
    end_of_stream: bool
    upstream: str | None = None
    attempts: int = 1
    local_reply: str | None = None


class ResponseBody(msgspec.Struct, frozen=True):
    """ProcessingRequest.response_body: what came in one read."""

    at: float
    data: bytes
    end_of_stream: bool


class ResponseTrailers(msgspec.Struct, frozen=True):
    """ProcessingRequest.response_trailers."""

    at: float


class Scheduled(msgspec.Struct, frozen=True):
    """The answer to `Schedule`: where the request goes.

    Attributes:
        rate: requests per second that this server sends to the chosen endpoint, this one included.
        prompt_tokens: of the request, where somebody counted them; None where the estimate stands.
    """

    at: float
    decision: Decision
    rate: float = 0.0
    prompt_tokens: int | None = None


class Refused(msgspec.Struct, frozen=True):
    """The other answer to `Schedule`: why it goes nowhere."""

    at: float
    error: GatewayError


class Listed(msgspec.Struct, frozen=True):
    """The answer to `ListModels`: JSON; None where nobody serves the model that was asked for."""

    at: float
    body: bytes | None


class StreamClosed(msgspec.Struct, frozen=True):
    """The ext_proc stream is over, however it ended.

    Attributes:
        draining: whether this server ended it, because it is about to stop.
        failure: name of the exception when a defect of this server ended it.
    """

    at: float
    draining: bool = False
    failure: str | None = None


Message = RequestHeaders | RequestBody | RequestTrailers | ResponseHeaders | ResponseBody | ResponseTrailers
"""What Envoy says; it waits for exactly one reply to each."""

Event = Message | Scheduled | Refused | Listed | StreamClosed
