"""The reader of JSON answers: it passes everything on, sees the same however it is cut, and keeps no more than its limit."""

from __future__ import annotations

from collections.abc import Iterator

from envoy_extproc.openai.answer import JsonReader
from tests.fuzz.draw import Draw, cut, seed
from tests.fuzz.targets import reading
from tests.support import captures

CHOICES = 2
LIMITS = (1_048_576, 1_048_576, 200, 0)
WORDS = reading.WORDS


def check(data: bytes) -> None:
    """In pieces and whole."""
    draw = Draw(data)
    limit, number, text = draw.choose(LIMITS), draw.byte(), draw.text()
    reader, whole = JsonReader(max_body_bytes=limit), JsonReader(max_body_bytes=limit)
    assert reading.played(reader, cut(text, number), limit) == text
    assert reading.played(whole, [text], limit) == text
    assert reading.facts(reader.seen) == reading.facts(whole.seen), "the cuts show in what is seen"
    assert reader.seen.oversized == (len(text) > limit)


def seeds() -> Iterator[bytes]:
    """Recorded answers of every API."""
    for path in sorted(captures.FOLDER.glob("*.raw")):
        if "stream" not in path.stem:
            yield seed(0, 3, text=captures.body(path.stem))
    yield seed(
        0,
        0,
        text=b'{"text":"a","content":[{"text":"b"},3],"output":[{"content":[{"refusal":"c"}]},{"arguments":"{}"}]}',
    )
    yield seed(
        0,
        0,
        text=b'{"usage":{"prompt_tokens":"7","prompt_tokens_details":{"cached_tokens":1}},"choices":[1,null]}',
    )
