"""What a request would be told, asked by hand: its path, headers and body in, an explanation or the refusal out.

It is read as an exchange reads it, but nothing is counted, remembered or sent anywhere.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from envoy_extproc.errors import BadRequest, GatewayError
from envoy_extproc.exchange import control
from envoy_extproc.headers import Headers
from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes
from envoy_extproc.openai.error_body import error_body
from envoy_extproc.scheduling.explain import Explanation
from envoy_extproc.scheduling.interfaces import SchedulingRequest

Counted = Callable[[SchedulingRequest], Awaitable[SchedulingRequest]]
"""Has the prompt of a request counted, as for one that is to be decided."""


async def uncounted(request: SchedulingRequest) -> SchedulingRequest:
    """Leaves the estimate."""
    return request


class QuestionError(ValueError):
    """What came to `/debug/explain` is no question; the message says why."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A request that somebody wonders about.

    Attributes:
        path: of the request.
        headers: name and value of each.
        body: as it would be sent; empty for a request without one.
    """

    path: str = "/v1/chat/completions"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What comes of a question.

    Attributes:
        status: 200, or that of the refusal a client would get.
        headers: of the refusal.
        body: the explanation in JSON, or the refusal's.
        explanation: None for a refusal.
    """

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    explanation: Explanation | None = None


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str = Question().path
    headers: dict[str, str] | tuple[tuple[str, str], ...] = ()
    body: msgspec.Raw = msgspec.Raw(b"")
    body_base64: str | None = None


_DECODER = msgspec.json.Decoder(_Asked)


def encode(question: Question) -> bytes:
    """`question` as `decode` reads it."""
    return msgspec.json.encode(
        {
            "path": question.path,
            "headers": question.headers,
            "body_base64": base64.b64encode(question.body).decode(),
        }
    )


def decode(text: bytes) -> Question:
    """The question in JSON: ``path``, ``headers`` (an object or a list of pairs), and ``body`` or ``body_base64``.

    `body` is the request's body in JSON itself, or a string that holds its text.

    Raises:
        QuestionError: it is something else.
    """
    try:
        asked = _DECODER.decode(text)
        body = _body(asked)
    except (msgspec.MsgspecError, binascii.Error, UnicodeError) as error:
        raise QuestionError(str(error)) from None
    headers = asked.headers.items() if isinstance(asked.headers, dict) else asked.headers
    return Question(path=asked.path, headers=tuple(headers), body=body)


async def answer(
    question: Question,
    explain: Callable[[SchedulingRequest], Explanation],
    *,
    counted: Counted = uncounted,
    trust_user: bool = False,
) -> Answer:
    """What comes of `question`, by whoever decides; `trust_user` as in `ExchangeSettings`."""
    try:
        explanation = explain(await counted(read(question, trust_user=trust_user)))
    except GatewayError as error:
        return _refusal(error)
    return Answer(status=200, body=msgspec.json.encode(explanation), explanation=explanation)


def read(question: Question, *, trust_user: bool = False) -> SchedulingRequest:
    """What the request lets choosing know.

    Raises:
        BadRequest: its body cannot be read.
    """
    headers = Headers(question.headers)
    route = routes.find(question.path) if question.body else None
    if route is None:
        return control.scheduling_request(headers, model=None, subset=None, trust_user=trust_user)
    if control.body_is_encoded(headers):
        encoding = headers.get("content-encoding")
        raise BadRequest(f"A request body with content-encoding {encoding!r} cannot be read.")
    inference, prompt = openai_request.read(question.body, route, headers.get("content-type") or "")
    return control.scheduling_request(
        headers,
        model=inference.model,
        subset=None,
        inference=inference,
        prompt=prompt,
        trust_user=trust_user,
    )


def _body(asked: _Asked) -> bytes:
    if asked.body_base64 is not None:
        return base64.b64decode(asked.body_base64, validate=True)
    raw = bytes(asked.body)
    return msgspec.json.decode(raw, type=str).encode() if raw[:1] == b'"' else raw


def _refusal(error: GatewayError) -> Answer:
    headers: Sequence[tuple[str, str] | None] = (
        error.header,
        None if error.retry_after is None else ("retry-after", str(error.retry_after)),
    )
    return Answer(
        status=error.status,
        body=error_body(error),
        headers=tuple([each for each in headers if each is not None]),
    )
