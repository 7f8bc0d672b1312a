"""OpenAI's error body: what a client's library turns into an exception with a message worth reading."""

from __future__ import annotations

import msgspec

from envoy_extproc.errors import GatewayError


def error_body(error: GatewayError) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}`` in JSON."""
    shape = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": shape})
