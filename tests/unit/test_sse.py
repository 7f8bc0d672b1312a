"""Events come out whole, in order and complete, wherever the network cut the bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai.sse import Decoder, Unparsed, data_of

BIG = 1_000_000


def decoded(pieces: list[bytes], limit: int = BIG) -> tuple[list[bytes], bytes, Decoder]:
    """What came out, what was left at the end, and the decoder."""
    decoder = Decoder(limit)
    events: list[bytes] = []
    for piece in pieces:
        events += decoder.feed(piece)
    return events, decoder.finish(), decoder


def cut(text: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(text) + 1) for place in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def single_bytes(text: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in text]


STREAMS = {
    "lf": [b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n"],
    "crlf": [b"data: one\r\n\r\n", b"data: two\r\n\r\n", b"data: [DONE]\r\n\r\n"],
    # A CR at the very end may be half of a CRLF, so a comment follows.
    "cr": [b"data: one\r\r", b"data: two\r\r", b": end\n\n"],
    "mixed": [b"data: one\r\n\n", b"data: two\n\r\n", b"data: 3\r\r\n", b"data: 4\r\n\r", b"data: 5\n\n"],
    "multi-line": [b"data: one\ndata: two\n\n", b"event: x\r\ndata: three\r\n\r\n", b"data:\n\n"],
    "comments": [b": keep-alive\n\n", b"data: x\n: inside\n\n", b":\n\n"],
    "empty lines": [b"\n\n", b"\n\n", b"data: x\n\n"],
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_once_anywhere_gives_the_same_events(name: str) -> None:
    events = STREAMS[name]
    text = b"".join(events)
    for place in range(len(text) + 1):
        assert decoded([text[:place], text[place:]])[:2] == (events, b""), place


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_at_every_byte_gives_the_same_events(name: str) -> None:
    events = STREAMS[name]
    assert decoded(single_bytes(b"".join(events)))[:2] == (events, b"")


@pytest.mark.parametrize("name", STREAMS)
def test_many_events_come_in_one_read(name: str) -> None:
    events = STREAMS[name]
    assert Decoder(BIG).feed(b"".join(events)) == events


def test_a_read_of_nothing_changes_nothing() -> None:
    decoder = Decoder(BIG)
    assert decoder.feed(b"") == []
    assert decoder.feed(b"data") == []
    assert decoder.feed(b"") == []
    assert decoder.pending == b"data"
    assert decoder.feed(b": x\n\n") == [b"data: x\n\n"]
    assert decoder.pending == b""


def test_a_single_byte_is_no_event() -> None:
    assert Decoder(BIG).feed(b"d") == []


def test_an_unterminated_tail_is_left_for_the_end() -> None:
    assert decoded([b"data: a\n\ndata: b\n"])[:2] == ([b"data: a\n\n"], b"data: b\n")


def test_finish_leaves_nothing_behind() -> None:
    decoder = Decoder(BIG)
    decoder.feed(b"data: a")
    assert decoder.finish() == b"data: a"
    assert decoder.finish() == b""
    assert decoder.pending == b""


def test_a_cr_at_the_end_waits_for_what_follows() -> None:
    decoder = Decoder(BIG)
    assert decoder.feed(b"data: a\r\r") == []
    assert decoder.feed(b"\n") == [b"data: a\r\r\n"]


# -- the limit -----------------------------------------------------------------------------------------------------

SMALL = 20
LARGE = b"data: " + b"x" * 50 + b"\n\n"
BEFORE, AFTER = b"data: a\n\n", b"data: b\n\n"


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [SMALL + 1, SMALL + 3, 50, 200])
def test_an_event_beyond_the_limit_passes_unparsed_wherever_it_is_cut(eol: bytes, size: int) -> None:
    large = b"data: " + b"x" * size + eol + eol
    text = BEFORE + large + AFTER + AFTER
    cuttings = [[text[:place], text[place:]] for place in range(len(text) + 1)]
    for pieces in [*cuttings, single_bytes(text)]:
        events, rest, decoder = decoded(pieces, SMALL)
        assert b"".join(events) + rest == text
        assert [event for event in events if type(event) is not Unparsed] == [BEFORE, AFTER, AFTER]
        assert b"".join(event for event in events if type(event) is Unparsed) == large
        assert decoder.oversized == 1


def test_an_event_of_exactly_the_limit_is_parsed() -> None:
    event = b"data: " + b"x" * (SMALL - 8) + b"\n\n"
    assert len(event) == SMALL
    for place in range(len(event) + 1):
        events, rest, decoder = decoded([event[:place], event[place:]], SMALL)
        assert (events, rest, decoder.oversized) == ([event], b"", 0)
        assert type(events[0]) is bytes


def test_oversized_events_in_a_row_are_counted_each() -> None:
    _, _, decoder = decoded(single_bytes(LARGE * 3), SMALL)
    assert decoder.oversized == 3


def test_an_oversized_event_is_not_kept() -> None:
    decoder = Decoder(SMALL)
    for _ in range(1000):
        decoder.feed(b"x" * 1000)
        assert len(decoder.pending) <= SMALL
    assert decoder.oversized == 1


# -- properties ----------------------------------------------------------------------------------------------------

EOL = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINE = st.one_of(
    st.sampled_from([b"data: [DONE]", b"data:x", b": comment", b"event: message", b"data", b"data: "]),
    st.binary(max_size=30).map(
        lambda text: b"data: " + text.translate(None, b"\r\n"),
    ),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    parts = []
    for _ in range(draw(st.integers(0, 8))):
        for _ in range(draw(st.integers(1, 3))):
            parts += [draw(LINE), draw(EOL)]
        parts.append(draw(EOL))
    parts.append(draw(st.binary(max_size=10)))
    return b"".join(parts)


CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@given(text=streams(), cuts=CUTS, limit=st.integers(1, 60))
def test_nothing_is_lost_added_or_moved(text: bytes, cuts: list[int], limit: int) -> None:
    events, rest, _ = decoded(cut(text, cuts), limit)
    assert b"".join(events) + rest == text


@given(text=streams(), cuts=CUTS)
def test_the_cutting_does_not_show(text: bytes, cuts: list[int]) -> None:
    whole, whole_rest, _ = decoded([text])
    events, rest, _ = decoded(cut(text, cuts))
    assert (events, rest) == (whole, whole_rest)


@given(text=streams(), cuts=CUTS, limit=st.integers(1, 60))
def test_the_cutting_does_not_show_with_a_limit(text: bytes, cuts: list[int], limit: int) -> None:
    def parsed(pieces: list[bytes]) -> tuple[list[bytes], int]:
        events, _, decoder = decoded(pieces, limit)
        return [event for event in events if type(event) is not Unparsed], decoder.oversized

    assert parsed(cut(text, cuts)) == parsed([text])


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: x\r\n\r\n", b"x"),
        (b"data: x\r\r", b"x"),
        (b"data: x\r\n\n", b"x"),
        (b"data: x\n\r\n", b"x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"data: a\r: comment\n\n", b"a"),
        (b"data: a\r\ndata:b\r\n\r\n", b"a\nb"),
        (b"data: a\n: comment\ndata: b\n\n", b"a\nb"),
        (b"event: error\ndata: x\nid: 7\n\n", b"x"),
        (b": keep-alive\n\n", b""),
        (b"\n\n", b""),
        (b"data:\n\n", b""),
        (b"data: \n\n", b""),
        (b"dataset: x\n\n", b""),
        (b"\xef\xbb\xbfdata: x\n\n", b"x"),
        (b"data: x", b"x"),
        (b"data: x\n", b"x"),
        (b"data: \xe2\x80\xa8 \x0b\x0c\x1c\x85\n\n", b"\xe2\x80\xa8 \x0b\x0c\x1c\x85"),
    ],
)
def test_data_of(event: bytes, data: bytes) -> None:
    assert data_of(event) == data
