"""The errors a client can be answered with. Each class knows its HTTP status and OpenAI error type and code.

    GatewayError
    +-- BadRequest 400            the request cannot be understood
    |   +-- UnknownStrategy 400   `routing-strategy` names no policy
    |   +-- BadPin 400            `target-pod-ip` names no ready endpoint of the model, or pinning is off
    |   +-- BadSelector 400       `external-filter` is no label selector
    |   +-- UnknownProfile 400    `config-profile` names no profile of the model
    +-- ModelNotFound 404
    +-- PayloadTooLarge 413
    +-- HeadersTooLarge 431
    +-- NoReadyEndpoint 503       the model is known, but nobody can serve it now
    +-- Internal 500              a defect of this server

The names of `type` and `code` are OpenAI's where it has one for the case.
"""

from __future__ import annotations

from typing import ClassVar, Literal

ErrorType = Literal["network", "model_server", "client", "content", "limit", "overload", "internal"]
"""Whose fault it was: the value of the metric label `error_type`."""


class GatewayError(Exception):
    """An answer this server gives instead of an engine.

    Attributes:
        status: HTTP status code.
        type: OpenAI's error ``type``.
        code: OpenAI's error ``code``, None where OpenAI has none.
        error_type: whose fault, for the metric.
        detail: short machine-readable cause: Envoy's RESPONSE_CODE_DETAILS, so without spaces.
        header: AIBrix's ``x-error-*`` header (name, value) that stands for the case.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    code: ClassVar[str | None] = None
    error_type: ClassVar[ErrorType] = "internal"
    detail: ClassVar[str] = "internal"
    header: ClassVar[tuple[str, str] | None] = None
    retry_after: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(GatewayError):
    """The request cannot be understood."""

    status = 400
    type = "invalid_request_error"
    error_type = "client"
    detail = "bad_request"
    header = ("x-error-request-body-processing", "true")


class UnknownStrategy(BadRequest):
    """The header `routing-strategy` names no policy."""

    detail = "unknown_routing_strategy"
    header = ("x-error-routing", "true")


class BadPin(BadRequest):
    """The header `target-pod-ip` asks for an endpoint the request may not have."""

    detail = "pin_refused"
    header = ("x-error-routing", "true")


class BadSelector(BadRequest):
    """The header `external-filter` is no label selector."""

    detail = "bad_external_filter"
    header = ("x-error-routing", "true")


class UnknownProfile(BadRequest):
    """The header `config-profile` names no profile of the model."""

    detail = "unknown_config_profile"
    header = ("x-error-routing", "true")


class ModelNotFound(GatewayError):
    """No endpoint serves a model of this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    error_type = "client"
    detail = "model_not_found"
    header = ("x-error-no-model-backends", "true")


class HeadersTooLarge(GatewayError):
    """The request's headers leave no room for those that routing adds."""

    status = 431
    type = "invalid_request_error"
    code = "request_headers_too_large"
    error_type = "client"
    detail = "request_headers_too_large"
    header = ("x-error-request-body-processing", "true")


class PayloadTooLarge(GatewayError):
    """The request body is larger than `server.max_body_bytes`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    error_type = "client"
    detail = "request_too_large"
    header = ("x-error-request-body-processing", "true")


class NoReadyEndpoint(GatewayError):
    """The model is known, but no endpoint of it is ready."""

    status = 503
    type = "overloaded_error"
    code = "service_unavailable"
    error_type = "overload"
    detail = "no_ready_endpoint"
    header = ("x-error-no-model-backends", "true")
    retry_after = 1  # seconds; a restarted pod or a new scrape shows within this time


class Internal(GatewayError):
    """A defect of this server; its cause is in the log, not in the answer."""
