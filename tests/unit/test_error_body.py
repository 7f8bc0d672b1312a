from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc import errors
from envoy_extproc.errors import GatewayError
from envoy_extproc.openai.error_body import error_body


def subclasses(parent: type[GatewayError]) -> list[type[GatewayError]]:
    return [each for child in parent.__subclasses__() for each in (child, *subclasses(child))]


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (
            errors.BadRequest("no", param="model"),
            400,
            {"message": "no", "type": "invalid_request_error", "param": "model", "code": None},
        ),
        (
            errors.ModelNotFound("none"),
            404,
            {"message": "none", "type": "invalid_request_error", "param": None, "code": "model_not_found"},
        ),
        (
            errors.PayloadTooLarge("large"),
            413,
            {"message": "large", "type": "invalid_request_error", "param": None, "code": "request_too_large"},
        ),
        (
            errors.NoReadyEndpoint("later"),
            503,
            {"message": "later", "type": "overloaded_error", "param": None, "code": "service_unavailable"},
        ),
        (errors.Internal("oh"), 500, {"message": "oh", "type": "api_error", "param": None, "code": None}),
    ],
)
def test_shape(error: GatewayError, status: int, body: object) -> None:
    assert error.status == status
    assert json.loads(error_body(error)) == {"error": body}


@given(st.text(st.characters()))
def test_any_message_can_be_written(message: str) -> None:
    assert (
        json.loads(error_body(errors.BadRequest(message)))["error"]["message"]
        == message.encode("utf-8", "replace").decode()
    )


@pytest.mark.parametrize("message", ["model \udcff", "\ud800", 'a "b" \n\0'])
def test_bytes_that_are_no_text_do_not_raise(message: str) -> None:
    assert json.loads(error_body(errors.ModelNotFound(message, param="model")))["error"]["param"] == "model"


@pytest.mark.parametrize("kind", subclasses(GatewayError))
def test_every_error_knows_its_meaning(kind: type[GatewayError]) -> None:
    assert 400 <= kind.status < 600
    assert kind.type
    assert kind.detail.replace("_", "").isalnum()  # one word: Envoy puts it into a log field without quotes
    assert kind.__doc__
    assert str(kind("sentence")) == "sentence"


def test_details_tell_errors_apart() -> None:
    kinds = subclasses(GatewayError)
    assert len({kind.detail for kind in kinds if kind is not errors.Internal}) == len(kinds) - 1
