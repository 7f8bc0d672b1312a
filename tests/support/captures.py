"""Recorded answers of a real vLLM 0.32, as an HTTP client read them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "captures" / "vllm-0.32"

CHAT_STREAMS = ("chat_stream", "chat_stream_usage", "chat_stream_usage_continuous")
COMPLETION_STREAMS = ("completions_stream", "completions_stream_usage")
STREAMS = (*CHAT_STREAMS, *COMPLETION_STREAMS)


def body(name: str) -> bytes:
    """The body of an answer, chunk framing undone."""
    head, _, rest = (FOLDER / f"{name}.raw").read_bytes().partition(b"\r\n\r\n")
    return _dechunked(rest) if b"transfer-encoding: chunked" in head.lower() else rest


def events(name: str) -> list[bytes]:
    """The events of a stream, each with its empty line: vLLM writes LF alone."""
    text = body(name)
    assert b"\r" not in text
    assert text.endswith(b"\n\n")
    return [event + b"\n\n" for event in text.split(b"\n\n")[:-1]]


def _dechunked(rest: bytes) -> bytes:
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            break
        parts.append(rest[:length])
        rest = rest[length + 2 :]
    return b"".join(parts)
