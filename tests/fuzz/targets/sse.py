"""The event decoder: however a stream is cut, the same events come, all bytes among them, and no more than the limit is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from envoy_extproc.openai.sse import Decoder, Unparsed, data_of
from tests.fuzz.draw import Draw, bounded, cut, seed
from tests.support import captures

CHOICES = 2
LIMITS = (1_048_576, 1000, 40, 3, 0)
WORDS = [
    b"\r\n",
    b"\n\n",
    b"\r\r",
    b"\r",
    b"\n",
    b"data: ",
    b"data:",
    b"event: ",
    b": ",
    b"\xef\xbb\xbf",
    b"[DONE]",
    b"id:",
]

Events = Sequence[tuple[bool, bytes]]


def check(data: bytes) -> None:
    """The whole text against its pieces, and against a reader that goes line by line."""
    draw = Draw(data)
    limit, number, text = draw.choose(LIMITS), draw.byte(), draw.text()
    whole = _events([text], limit)
    assert b"".join(event for _, event in whole) == text
    assert _events(cut(text, number), limit) == whole, "the cuts show"
    if limit > len(text):
        assert [event for _, event in whole] == _by_lines(text)
    for is_parsed, event in whole:
        assert not is_parsed or len(event) <= max(limit, 0)
        with bounded():
            found = data_of(event)
        assert found == _data_by_lines(event)


def _events(pieces: Sequence[bytes], limit: int) -> Events:
    """Events that were parsed, and what stands unparsed between them, with an end that is told as well."""
    decoder, found = Decoder(limit), []
    with bounded():
        for piece in pieces:
            found += decoder.feed(piece)
            assert len(decoder.pending) <= max(limit, 3)
        rest = decoder.finish()
    joined: list[tuple[bool, bytes]] = []
    for event in found:
        is_parsed = type(event) is not Unparsed
        if joined and not is_parsed and not joined[-1][0] and not _is_ended(joined[-1][1]):
            joined[-1] = False, joined[-1][1] + event
        else:
            joined.append((is_parsed, bytes(event)))
    if not rest:
        return joined
    if joined and not joined[-1][0] and not _is_ended(joined[-1][1]):
        return [*joined[:-1], (False, joined[-1][1] + rest)]
    return [*joined, (len(rest) <= limit, rest)]


def _is_ended(event: bytes) -> bool:
    return event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").endswith(b"\n\n")


def _by_lines(text: bytes) -> list[bytes]:
    """Events as the standard has them: lines, up to and with an empty one behind another line or an empty one."""
    events, event = [], b""
    lines = text.splitlines(keepends=True)
    if text.endswith(b"\r"):  # which may be half of a CR LF
        lines[-1:] = [lines[-1][:-1]]
    for line in lines:
        is_empty = line in (b"\r\n", b"\n", b"\r") and event != b""
        event += line
        if is_empty:
            events.append(event)
            event = b""
    rest = event + (b"\r" if text.endswith(b"\r") else b"")
    return [*events, rest] if rest else events


def _data_by_lines(event: bytes) -> bytes:
    lines = event.lstrip(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    values = [line[len(b"data:") :] for line in lines if line.startswith(b"data:")]
    return b"\n".join(value.removeprefix(b" ") for value in values)


def seeds() -> Iterator[bytes]:
    """Recorded streams, and every kind of line end."""
    for name in captures.STREAMS:
        yield seed(0, 5, text=captures.body(name))
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        text = end.join(
            (b": ping", b"", b"event: a", b"data: {", b"data:}", b"", b"", b"data: [DONE]", b"", b"")
        )
        yield seed(number, 2, text=text)
        yield seed(3, 0, text=text * 3)
