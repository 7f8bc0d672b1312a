"""Reading what an engine answers: usage, first and last token, errors. And hiding what only our asking added.

One reader an exchange, either for an event stream or for a JSON body; both write what they see into a `Seen`. What an
event says is `events`' to know.
"""

from __future__ import annotations

import re
from typing import Protocol

import msgspec

from envoy_extproc.openai import events, lenient, splice
from envoy_extproc.openai.events import Body
from envoy_extproc.openai.seen import EngineError as EngineError
from envoy_extproc.openai.seen import Seen as Seen
from envoy_extproc.openai.seen import engine_error as engine_error
from envoy_extproc.openai.sse import Decoder, Unparsed, data_of
from envoy_extproc.openai.usage import Usage as Usage

_DATA = re.compile(rb"(?:^|[\r\n]|\xef\xbb\xbf)data: ?\Z")
"""What stands right before an event's data."""


class Reader(Protocol):
    """Reads one body as it comes."""

    seen: Seen

    def feed(self, data: bytes, now: float) -> bytes | None:
        """Takes what came at `now`; returns what to pass on instead, None to pass it on as it is."""

    def finish(self, now: float) -> bytes:
        """Takes the end of the body; returns what is still to be passed on."""

    @property
    def holds_back(self) -> bool:
        """Whether bytes wait here for more: they can only go out with what `feed` returns next."""

    def let_go(self) -> None:
        """From the next `feed` on nothing is held back."""


class StreamReader:
    """Reads a stream of server-sent events.

    Args:
        hide_usage: whether usage is in the stream only because this server asked for it.
        max_event_bytes: an event beyond this passes unparsed.
    """

    __slots__ = ("_decoder", "_hide_usage", "_letting_go", "seen")

    def __init__(self, *, hide_usage: bool, max_event_bytes: int) -> None:
        self._decoder = Decoder(max_event_bytes)
        self._hide_usage = hide_usage
        self._letting_go = False
        self.seen = Seen()

    @property
    def holds_back(self) -> bool:
        """See `Reader`."""
        return self._hide_usage and bool(self._decoder.pending)

    def let_go(self) -> None:
        """See `Reader`. What is cut off from its event this way is not read."""
        self._letting_go = True

    def feed(self, data: bytes, now: float) -> bytes | None:
        """See `Reader`. Bytes of an event that may have to go are held back until it is whole."""
        decoder = self._decoder
        held = decoder.pending
        whole = decoder.feed(data)
        if len(whole) == 1 and whole[0] is data:  # one event a read, as engines write them
            shown = self._read(data, now)
            return None if shown is data else shown
        changed = False
        kept: list[bytes] = []
        for event in whole:
            shown = event if type(event) is Unparsed else self._read(event, now)
            changed = changed or shown is not event
            kept.append(shown)
        self.seen.oversized = decoder.oversized
        if not self._hide_usage or not (changed or held or decoder.pending):
            return None
        if self._letting_go:
            kept.append(decoder.finish())
        return b"".join(kept)

    def finish(self, now: float) -> bytes:
        """See `Reader`. A tail without its empty line is read like an event, and delivered like one."""
        rest = self._decoder.finish()
        shown = self._read(rest, now) if rest else b""
        return shown if self._hide_usage else b""

    def _read(self, event: bytes, now: float) -> bytes:
        data = data_of(event)
        body = self._note(data, now)
        if body is None or body.usage is msgspec.UNSET or not self._hide_usage or events.is_typed(body):
            return event
        if body.usage is None:
            return _without_null_usage(event, data)
        if not body.choices and body.error is None:
            self.seen.removed_events += 1
            return b""
        return event

    def _note(self, data: bytes, now: float) -> Body | None:
        if not data:
            return None
        if data == b"[DONE]":
            self.seen.done = True
            return None
        try:
            body = events.decode(data)
        except lenient.Malformed:
            self.seen.unreadable += 1
            return None
        events.note(self.seen, body, now)
        return body


class JsonReader:
    """Reads a JSON answer; passes everything on as it is.

    Args:
        max_body_bytes: a body beyond this passes unparsed.
    """

    __slots__ = ("_max_body_bytes", "_parts", "_size", "seen")

    def __init__(self, *, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self.seen = Seen()

    @property
    def holds_back(self) -> bool:
        """See `Reader`: it only looks on."""
        return False

    def let_go(self) -> None:
        """See `Reader`."""

    def feed(self, data: bytes, now: float) -> None:
        """See `Reader`."""
        self._size += len(data)
        if self._size <= self._max_body_bytes:
            self._parts.append(data)
        elif not self.seen.oversized:
            self.seen.oversized = 1
            self._parts.clear()

    def finish(self, now: float) -> bytes:
        """See `Reader`."""
        text = b"".join(self._parts)
        self._parts.clear()
        if self.seen.oversized or not text:
            return b""
        try:
            body = events.decode(text)
        except lenient.Malformed:
            self.seen.done = events.is_bare(text)
            self.seen.unreadable += not self.seen.done
            return b""
        events.note_document(self.seen, body, now)
        self.seen.first_token_at = self.seen.last_token_at = None  # a JSON answer comes at once
        self.seen.done = True
        return b""


def _without_null_usage(event: bytes, data: bytes) -> bytes:
    start = _place(event, data)
    if start < 0:
        return event
    if data.endswith(b',"usage":null}'):
        return b"".join((event[:start], data[:-14], b"}", event[start + len(data) :]))
    member = splice.find(data, "usage")
    if member is None:
        return event
    return event[:start] + splice.remove(data, member) + event[start + len(data) :]


def _place(event: bytes, data: bytes) -> int:
    """Where the one line of data stands, which another field may repeat; -1 for data over several: left as it is."""
    if event.startswith(b"data: ") and event.startswith(data, 6):
        return 6
    start = event.find(data)
    while start >= 0 and _DATA.search(event[max(0, start - 10) : start]) is None:
        start = event.find(data, start + 1)
    return start
