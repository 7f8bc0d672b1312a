"""Cutting a byte stream into server-sent events, wherever the network cut it before.

An event ends at an empty line; a line ends at LF, CRLF or CR (WHATWG HTML, section 9.2.5). A CR that is the last byte
seen may be half of a CRLF, so it waits for the byte behind it.

The decoder owns its buffer and a limit on it. An event beyond the limit is not held back to be understood: its pieces
come out as `Unparsed`, and reading starts afresh at the event behind it.
"""

from __future__ import annotations

import re

_EOL = rb"(?:\r\n|\n|\r(?=[^\n]))"
_BLANK = re.compile(_EOL + _EOL)
_KEEP = 3  # bytes at the end of a piece that may be the start of the empty line: CR LF CR


class Unparsed(bytes):
    """A piece of an event that was too large to be parsed."""

    __slots__ = ()


class Decoder:
    """Bytes in, whole events out, each with the empty line that ends it.

    Args:
        limit: bytes of one event beyond which it passes unparsed.

    Attributes:
        oversized: events that were beyond the limit.
    """

    __slots__ = ("_buffer", "_limit", "_scanned", "_skipping", "oversized")

    def __init__(self, limit: int) -> None:
        self._buffer = b""
        self._limit = limit
        self._scanned = 0
        self._skipping = False
        self.oversized = 0

    @property
    def pending(self) -> bytes:
        """What has come of an event that is not whole yet."""
        return self._buffer

    def feed(self, data: bytes) -> list[bytes]:
        """The events, or pieces of oversized ones, that `data` completes."""
        end = data.find(b"\n\n") + 2
        alone = 1 < end == len(data) <= self._limit  # 1: there is no empty line
        if alone and not self._buffer and not self._skipping and b"\r" not in data:
            return [data]  # one event a read, as engines write them
        self._buffer = self._buffer + data if self._buffer else data
        return self._cut()

    def finish(self) -> bytes:
        """What was left when the stream ended: an event without its empty line, or nothing."""
        rest, self._buffer, self._scanned = self._buffer, b"", 0
        return rest

    def _cut(self) -> list[bytes]:
        events: list[bytes] = []
        buffer, start, scan = self._buffer, 0, self._scanned
        crs = b"\r" in buffer
        while True:
            if crs:
                found = _BLANK.search(buffer, scan)
                end = found.end() if found else -1
            else:
                lf = buffer.find(b"\n\n", scan)
                end = lf + 2 if lf >= 0 else -1
            if end < 0:
                break
            self._emit(events, buffer[start:end])
            start = scan = end
        self._keep(events, buffer[start:] if start else buffer)
        return events

    def _emit(self, events: list[bytes], event: bytes) -> None:
        if self._skipping:
            self._skipping = False
            events.append(Unparsed(event))
        elif len(event) > self._limit:
            self.oversized += 1
            events.append(Unparsed(event))
        else:
            events.append(event)

    def _keep(self, events: list[bytes], rest: bytes) -> None:
        if len(rest) > self._limit and not self._skipping:
            self._skipping = True
            self.oversized += 1
        if self._skipping and len(rest) > _KEEP:
            events.append(Unparsed(rest[:-_KEEP]))
            rest = rest[-_KEEP:]
        self._buffer = rest
        self._scanned = max(0, len(rest) - _KEEP)


def data_of(event: bytes) -> bytes:
    """The event's ``data``: of several ``data`` lines joined with LF, comments and other fields left out."""
    if event[:6] == b"data: " and event.find(b"\n", 6) == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    if event[:7] == b"event: " and b"\r" not in event:
        start = event.find(b"\n", 7) + 1
        if event[start : start + 6] == b"data: " and event.find(b"\n", start) == len(event) - 2:
            return event[start + 6 : -2]
    lines = [line[5:] for line in event.lstrip(b"\xef\xbb\xbf").splitlines() if line.startswith(b"data:")]
    return b"\n".join(line[1:] if line[:1] == b" " else line for line in lines)
