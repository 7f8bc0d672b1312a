"""The stream reader: the cuts neither change what is delivered nor what is seen, and only usage is ever taken out."""

from __future__ import annotations

import json
from collections.abc import Iterator

from envoy_extproc.openai.answer import StreamReader
from envoy_extproc.openai.sse import data_of
from tests.fuzz.draw import Draw, cut, seed
from tests.fuzz.targets import reading
from tests.fuzz.targets.sse import _by_lines as by_lines
from tests.support import captures

CHOICES = 4
LIMITS = (1_048_576, 1_048_576, 300, 40)
WORDS = reading.WORDS


def check(data: bytes) -> None:
    """In pieces and whole, hiding usage and not, let go of and not."""
    draw = Draw(data)
    limit, hide, number, let_go_at = draw.choose(LIMITS), draw.flag(), draw.byte(), draw.byte()
    text = draw.text()
    pieces = cut(text, number)
    reader = StreamReader(hide_usage=hide, max_event_bytes=limit)
    delivered = reading.played(reader, pieces, limit)
    whole = StreamReader(hide_usage=hide, max_event_bytes=limit)
    assert delivered == reading.played(whole, [text], limit), "the cuts show in what is delivered"
    assert reading.facts(reader.seen) == reading.facts(whole.seen), "the cuts show in what is seen"
    if not hide:
        assert delivered == text
    elif limit > len(text):
        _check_hidden(text, delivered)
    other = StreamReader(hide_usage=hide, max_event_bytes=limit)
    shown = reading.played(other, pieces, limit, let_go_at % (len(pieces) + 1))
    assert hide or shown == text


def _check_hidden(text: bytes, delivered: bytes) -> None:
    """Event by event: as it was, or gone, or the same without ``"usage":null``."""
    shown = iter([*by_lines(delivered), b""])
    event = next(shown)
    for original in by_lines(text):
        if event == original:
            assert not _has_null_usage(original), "a null usage is shown"
            event = next(shown)
            continue
        value = json.loads(data_of(original).decode("utf-8-sig", "replace"), strict=False)
        if value.get("usage") is None:
            assert _without_usage(data_of(event)) == _without_usage(data_of(original))
            assert _beside_data(event) == _beside_data(original), "another field was changed"
            assert not _has_null_usage(event), "a null usage is shown"
            event = next(shown)
        else:
            assert not value.get("choices"), "an event with choices was taken out"
            assert value.get("error") is None, "an error was taken out"
    assert event == b"", "there is more than there was"


def _has_null_usage(event: bytes) -> bool:
    """Whether it shows what an engine writes once it is asked: at the top, in one line, in an event without a type."""
    data = data_of(event)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or "type" in value or data.count(b"usage") != 1 or b"\n" in data:
        return False
    return value.get("usage", True) is None and isinstance(value.get("choices") or [], list)


def _beside_data(event: bytes) -> list[bytes]:
    return [line for line in event.splitlines() if not line.startswith(b"data:")]


def _without_usage(data: bytes) -> str:
    value = json.loads(data.decode("utf-8-sig", "replace"), strict=False)
    value.pop("usage", None)
    return json.dumps(value)


def seeds() -> Iterator[bytes]:
    """Recorded streams of three APIs, and a null usage in all places."""
    for name in (*captures.STREAMS, "messages_stream", "responses_stream", "tools_named_stream"):
        for hide in (0, 1):
            yield seed(0, hide, 3, 255, text=captures.body(name))
    for event in (
        b'{"choices":[{"delta":{"content":"x"}}],"usage":null}',
        b'{"usage":null,"choices":[{"text":"x"}]}',
        b'{ "usage" : null }',
        b'{"choices":[],"usage":{"prompt_tokens":"7","completion_tokens":7.0}}',
        b'{"choices":[],"usage":{},"error":{"message":"boom","code":"400"}}',
        b'{"error":"boom"}',
    ):
        yield seed(0, 1, 2, 255, text=b"data: " + event + b"\n\ndata: [DONE]\n\n")
        yield seed(0, 1, 2, 1, text=b"data: " + event + b"\r\n\r\ndata: " + event)
