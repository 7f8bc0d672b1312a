"""The native lane: an exchange whose answer is read by `native.lua` inside Envoy and whose report comes with the access log.

Nothing of it is remembered here between the decision and the entry. What the decision knew travels as `Facts` in dynamic
metadata, what the script saw as notes beside them, how it ended in the entry itself: so the server that gets the entry can
tell of the exchange alone, whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import ErrorType
from envoy_extproc.exchange.events import StreamClosed
from envoy_extproc.exchange.record import Record
from envoy_extproc.exchange.report import Report, Routing
from envoy_extproc.openai import events, routes
from envoy_extproc.openai.request import InferenceRequest
from envoy_extproc.openai.seen import Seen

LUA_VERSIONS = frozenset({1})
"""Versions of `native.lua` whose notes are understood here."""

MAX_TEXT = 512
"""Characters of a client's own words in `Facts`: metadata is no place for more, and no exporter shows more."""


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of an exchange once it is routed; see `Report` for what each means.

    Attributes:
        routing: None where it never was.
        read: whether the answer is read for its usage.
        opaque: whether an answer of a type that cannot be read is none to be wondered at.
        prompt_tokens_estimate: for an answer no engine reports on.
    """

    request_id: str
    path: str
    routing: Routing | None = None
    operation: str | None = None
    model: str | None = None
    stream: bool = False
    read: bool = False
    opaque: bool = False
    prompt_tokens_estimate: int = 0
    unexpected: int = 0


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """What `native.lua` wrote of an answer; times are microseconds since 1970.

    Attributes:
        ended: whether it saw the answer's end. The figures are of the last note where it did not.
        tokens: pieces of text, reasoning or tool call.
        text: bytes of text in them.
        delivered: bytes the client had been sent by then.
        head: of them, those before the first token.
        unread: why it read nothing; empty if it did.
        failure: whether an error in the script ended reading.
    """

    streamed: bool = False
    ended: bool = False
    done: bool = False
    tokens: int = 0
    text: int = 0
    delivered: int = 0
    head: int = 0
    first: float | None = None
    last: float | None = None
    removed: int = 0
    oversized: int = 0
    unreadable: int = 0
    unread: str = ""
    failure: bool = False


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An access-log entry as far as it matters.

    Attributes:
        facts: JSON of `Facts`; empty where the request ended before it was routed.
        request_id: ``x-request-id``, for an entry without facts.
        path: likewise, as the client wrote it.
        started: when the request came, seconds since 1970.
        duration: seconds from there to the end.
        status: what the client saw; None where it saw none.
        local_reply: Envoy's word for why it answered itself; None where a pod did.
        cut_by: whose doing it was that the answer ended early; None where it did not.
        upstream: address of the pod asked last; None where none was.
        attempts: pods asked.
        body_bytes: of the answer's body, sent to the client.
        notes: JSON of `Notes`; empty where the script wrote none.
        usage: JSON of the engine's usage object, likewise; of a message whose usage comes in two halves an array: of the
            first while that is all there is, then of both.
        error: JSON of an error told of inside the answer, likewise.
        load: what the engine told of its load, as `orca.parse` reads it; empty where it did not.
        headers_after: seconds from `started` to the headers of the pod's answer.
    """

    facts: str
    request_id: str = ""
    path: str = ""
    started: float = 0.0
    duration: float = 0.0
    status: int | None = None
    local_reply: str | None = None
    cut_by: ErrorType | None = None
    upstream: str | None = None
    attempts: int = 0
    body_bytes: int = 0
    notes: str = ""
    usage: str = ""
    error: str = ""
    load: str = ""
    headers_after: float = 0.0


Malformed = msgspec.DecodeError

_FACTS = msgspec.json.Decoder(Facts)
_NOTES = msgspec.json.Decoder(Notes)


def report(entry: Entry, lookup: Callable[[str], Endpoint | None]) -> Report:
    """The report of a native exchange.

    Raises:
        Malformed: the facts or the notes are not this version's.
    """
    facts = _FACTS.decode(entry.facts) if entry.facts else _undecided(entry)
    notes = _NOTES.decode(entry.notes) if entry.notes else None
    record = _record(facts, entry)
    if entry.upstream is not None and entry.local_reply is None and entry.status is not None:
        record.served_address = entry.upstream
        record.served_by = lookup(entry.upstream)
    good = entry.status is not None and entry.status < 300 and entry.local_reply is None
    if facts.read and good:
        _see(record, notes, entry)
        record.streamed = facts.stream if notes is None else notes.streamed
    if record.answer_ended:
        record.cut_by = None
    return record.report(StreamClosed(entry.started + entry.duration))


def _undecided(entry: Entry) -> Facts:
    """What the entry itself tells of a request that ended before anybody decided about it."""
    route = routes.find(entry.path)
    return Facts(
        request_id=entry.request_id,
        path=entry.path.partition("?")[0],
        operation=None if route is None else route.operation,
    )


def _record(facts: Facts, entry: Entry) -> Record:
    record = Record(accounting=facts.read)
    record.started = entry.started
    record.request_id = facts.request_id
    record.path = facts.path
    record.operation = facts.operation
    record.model = facts.model
    record.routing = facts.routing
    record.status = entry.status
    record.local_reply = entry.local_reply
    record.attempts = entry.attempts
    record.cut_by = entry.cut_by
    record.answer_ended = entry.cut_by is None
    record.unexpected = facts.unexpected
    record.opaque = facts.opaque
    if facts.read:
        record.inference = InferenceRequest(
            model=facts.model,
            stream=facts.stream,
            prompt_tokens_estimate=facts.prompt_tokens_estimate,
        )
    return record


def _see(record: Record, notes: Notes | None, entry: Entry) -> None:
    """What the script saw, in the words of the stream lane's reader."""
    if notes is None:
        if entry.cut_by is None:
            record.unread = "script"  # it broke before its first note: Envoy's log has the error
        else:
            record.seen = Seen()
        return
    record.answer_ended = record.answer_ended or notes.ended
    if notes.unread:
        # Without a body there was nothing to read: a 204 has no content type.
        expected = notes.unread == "content-type" and (record.opaque or not entry.body_bytes)
        record.unread = None if expected else notes.unread
        return
    if notes.failure:
        record.unread = "script"  # what was seen until then counts
    seen = record.seen = Seen()
    # The usage is the last one there was; the error's event may have one of its own, from before.
    if entry.error:
        events.note_told(seen, entry.error.encode("utf-8", "replace"), 0.0)
    if entry.usage:
        events.note_usage(seen, entry.usage.encode("utf-8", "replace"))
    seen.token_events, seen.text_length = _extrapolated(notes, entry)
    if notes.first is not None and notes.last is not None:
        # The wall clock may have been put back since the request came, and the last is in whole milliseconds.
        seen.first_token_at = max(entry.started, notes.first / 1e6)
        seen.last_token_at = max(seen.first_token_at, notes.last / 1e6)
    seen.done = notes.done or notes.failure
    seen.removed_events = notes.removed
    seen.oversized = notes.oversized
    seen.unreadable += notes.unreadable


def _extrapolated(notes: Notes, entry: Entry) -> tuple[int, int]:
    """Tokens and text at the end: of an answer cut off, what went out behind the last note counts by its bytes."""
    more, known = entry.body_bytes - notes.delivered, notes.delivered - notes.head
    if notes.ended or more <= 0 or known <= 0:
        return notes.tokens, notes.text
    grown = 1 + more / known
    return round(notes.tokens * grown), round(notes.text * grown)
