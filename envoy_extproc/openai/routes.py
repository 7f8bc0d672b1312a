"""Which paths an OpenAI-style engine serves, and how a request to each is read: one row a path.

A path without a row passes to a ready pod untouched, routed by what the headers tell.
"""

from __future__ import annotations

from enum import Enum, auto

import msgspec


class Body(Enum):
    """How a request body is read."""

    GENERATE = auto()  # JSON with `model`, perhaps `stream` and `stream_options`
    EMBED = auto()  # JSON with `model` and `input`; never a stream


class Route(msgspec.Struct, frozen=True):
    """One path of the API.

    Attributes:
        path: as in OpenAI's reference, without a prefix.
        operation: OpenTelemetry's ``gen_ai.operation.name``.
        body: how the request is read.
        prompt: the member of the request body that carries the prompt.
    """

    path: str
    operation: str
    body: Body
    prompt: str


ROUTES: tuple[Route, ...] = (
    Route("/v1/chat/completions", "chat", Body.GENERATE, "messages"),
    Route("/v1/completions", "text_completion", Body.GENERATE, "prompt"),
    Route("/v1/embeddings", "embeddings", Body.EMBED, "input"),
)

_BY_PATH = {route.path: route for route in ROUTES}


def find(path: str) -> Route | None:
    """The route of a request path, query string, trailing slash and a prefix before ``/v1/`` set aside."""
    known = _BY_PATH.get(path)
    if known is not None:
        return known
    bare = path.partition("?")[0].rstrip("/")
    start = bare.rfind("/v1/")
    return _BY_PATH.get(bare[start:]) if start >= 0 else None
