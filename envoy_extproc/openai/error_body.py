"""OpenAI's error body: what a client's library turns into an exception with a message worth reading."""

from __future__ import annotations

import msgspec

from envoy_extproc.errors import GatewayError


def error_body(error: GatewayError) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}`` in JSON."""
    message = error.message.encode("utf-8", "replace").decode()  # a header it quotes may hold other bytes
    shape = {"message": message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": shape})
