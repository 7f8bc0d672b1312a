"""What is taken from an answer by its headers: who reads its body, or why nobody does, and what its engine told of its load.

The mode of the body is decided here and not with the request, where it could be too: only here it is known what comes,
and Envoy takes the `content-length` off an answer that it is to stream before it shows us the headers.
"""

from __future__ import annotations

from envoy_extproc import orca
from envoy_extproc.exchange import control
from envoy_extproc.exchange.commands import BodyMode, Heard
from envoy_extproc.exchange.events import ResponseHeaders
from envoy_extproc.exchange.record import Record
from envoy_extproc.exchange.states import ExchangeSettings
from envoy_extproc.headers import Headers
from envoy_extproc.openai.answer import JsonReader, Reader, StreamReader

_STREAM, _JSON = "text/event-stream", "application/json"
_ENGINE_REPORT = (orca.HEADER, orca.BINARY_HEADER)  # for us; a client gets ours


def start(
    record: Record, event: ResponseHeaders, settings: ExchangeSettings, *, hide_usage: bool
) -> tuple[Reader | None, BodyMode | None]:
    """Who reads the answer, None if there is nothing to read; and how its body is to come, None for as it would anyway.

    Notes in `record` what is read, or why a good answer is not.
    """
    if record.inference is None or not record.accounting:
        return None, None
    good = record.status is not None and record.status < 300 and record.local_reply is None
    if not good or event.end_of_stream:
        return None, BodyMode.NONE
    content_type = (event.headers.get("content-type") or "").partition(";")[0].strip().lower()
    record.streamed = content_type == _STREAM
    if control.body_is_encoded(event.headers):
        record.unread = "compressed"
        return None, BodyMode.NONE
    reader = _reader(content_type, settings, hide_usage=hide_usage)
    if reader is None:
        record.unread = None if record.opaque else "content-type"
        return None, BodyMode.NONE
    record.seen = reader.seen
    return reader, BodyMode.STREAMED


def _reader(content_type: str, settings: ExchangeSettings, *, hide_usage: bool) -> Reader | None:
    if content_type == _STREAM:
        return StreamReader(hide_usage=hide_usage, max_event_bytes=settings.max_event_bytes)
    return JsonReader(max_body_bytes=settings.max_json_bytes) if content_type == _JSON else None


def removed_headers(headers: Headers, *, rewritten: bool) -> tuple[str, ...]:
    """An engine's own ORCA report is for us; a length does not hold for an answer that loses an event."""
    names = (*_ENGINE_REPORT, "content-length") if rewritten else _ENGINE_REPORT
    return tuple(name for name in names if name in headers)


def heard(event: ResponseHeaders) -> tuple[Heard, ...]:
    """What the engine told of its load; nothing where it told nothing, or Envoy answered itself."""
    parsed = orca.of(event.headers)
    return () if event.upstream is None or parsed is orca.ABSENT else (Heard(event.upstream, parsed),)
