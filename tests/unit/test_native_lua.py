"""`native.lua` against the stream lane's own reader: the same bytes to the client, the same facts, however it is cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import events as reading
from envoy_extproc.openai.answer import JsonReader, Reader, StreamReader
from envoy_extproc.openai.seen import Seen
from tests.support import captures, formats
from tests.support.lua import JSON, STREAM, Script, Told

pytestmark = pytest.mark.unmeasured

LIMIT = 1_048_576
DONE = b"data: [DONE]\n\n"
CHAT_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


def event(value: object, end: bytes = b"\n\n") -> bytes:
    return b"data: " + msgspec.json.encode(value) + end


def token(text: str = "x", *, index: int = 0, **more: object) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
    return event({**CHAT_HEAD, "choices": [choice], **more})


def usage_event(completion: int = 7, **more: object) -> bytes:
    usage = {"prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 5 + completion}
    return event({**CHAT_HEAD, "choices": [], "usage": usage, **more})


def cuttings(text: bytes, step: int = 1) -> Iterable[list[bytes]]:
    """The text whole, byte by byte, and cut once at every place, or every few."""
    yield [text]
    yield [text[place : place + 1] for place in range(len(text))]
    for place in range(1, len(text), step):
        yield [text[:place], text[place:]]


def streamed(pieces: Iterable[bytes], *, hide: bool, limit: int = LIMIT) -> tuple[bytes, Reader]:
    """What the stream lane delivers and sees."""
    reader = StreamReader(hide_usage=hide, max_event_bytes=limit)
    body = b""
    for piece in pieces:
        shown = reader.feed(piece, 0.0)
        body += piece if shown is None else shown
    return body + reader.finish(0.0), reader


def facts_of(reader: Reader) -> dict[str, object]:
    seen = reader.seen
    return {
        "usage": seen.usage,
        "begun": seen.begun if seen.usage is None else None,  # else nobody needs it
        "error": seen.error,
        "done": seen.done,
        "tokens": seen.token_events,
        "text": seen.text_length,
        "removed": seen.removed_events,
        "oversized": seen.oversized,
        "unreadable": seen.unreadable,
    }


def facts_told(told: Told) -> dict[str, object]:
    assert told.answer is not None
    assert not told.answer["failure"]
    seen = Seen()  # what the server makes of the notes
    if told.error is not None:
        reading.note_told(seen, msgspec.json.encode(told.error), 0.0)
    if told.usage is not None:
        reading.note_usage(seen, msgspec.json.encode(told.usage))
    assert seen.unreadable == 0
    return {
        "usage": seen.usage,
        "begun": seen.begun if seen.usage is None else None,  # else nobody needs it
        "error": seen.error,
        **{
            name: told.answer[name]
            for name in ("done", "tokens", "text", "removed", "oversized", "unreadable")
        },
    }


def agree(script: Script, pieces: Iterable[bytes], *, hide: bool, limit: int = LIMIT) -> Told:
    pieces = [piece for piece in pieces if piece]
    body, reader = streamed(pieces, hide=hide, limit=limit)
    told = script.respond(pieces, hide=hide, limit=limit)
    assert told.body == body
    assert_same_facts(told, reader)
    return told


def assert_same_facts(told: Told, reader: Reader) -> None:
    seen, noted = facts_of(reader), facts_told(told)
    # Text that is not walked counts its bytes, escapes and all; no fewer than its characters.
    assert noted.pop("text") >= seen.pop("text")  # type: ignore[operator]
    assert noted == seen


# -- streams, against the stream lane ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", captures.STREAMS)
@pytest.mark.parametrize("hide", [True, False])
def test_a_recorded_stream_cut_anywhere(script: Script, name: str, hide: bool) -> None:
    for pieces in cuttings(captures.body(name)):
        agree(script, pieces, hide=hide)
    agree(script, captures.events(name), hide=hide)


ODD_STREAMS = {
    "crlf": b"".join(token(text).replace(b"\n", b"\r\n") for text in "abc")
    + usage_event().replace(b"\n", b"\r\n")
    + b"data: [DONE]\r\n\r\n",
    "cr": b"".join(token(text).replace(b"\n", b"\r") for text in "abc")
    + usage_event().replace(b"\n", b"\r")
    + b"data: [DONE]\r\r",
    "no space behind the colon": b"data:" + token()[6:] + b"data:" + usage_event()[6:] + DONE,
    "comments and other fields": b": ping\n\n"
    + token()
    + b"event: x\nid: 7\n"
    + token()
    + b":\n\n"
    + usage_event()
    + DONE,
    "data over two lines": b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"x"}}]}\n\n'
    + usage_event()
    + DONE,
    "usage over two lines": token() + b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n' + DONE,
    "usage in every chunk": b"".join(
        token(text, usage={"prompt_tokens": 5, "completion_tokens": place, "total_tokens": 5 + place})
        for place, text in enumerate("abc", 1)
    )
    + usage_event(3)
    + DONE,
    "null usage, last": b"".join(token(text, usage=None) for text in ("a", "bc", "def", "ghij"))
    + usage_event(4)
    + DONE,
    "null usage, first": b"".join(
        event({"usage": None, **CHAT_HEAD, "choices": [{"index": 0, "delta": {"content": text}}]})
        for text in "abcd"
    )
    + usage_event(4)
    + DONE,
    "null usage, spaced": b"".join(
        b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}] , "usage" : null }\n\n' % text
        for text in (b"a", b"bc", b"d")
    )
    + usage_event(3)
    + DONE,
    "null usage in an event of its own": event({"usage": None}) + DONE,
    "two choices": b"".join(token(text, index=place % 2) for place, text in enumerate("abcdef"))
    + usage_event(6)
    + DONE,
    "two choices in one event": event(
        {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "bc"}}]}
    )
    * 3
    + usage_event(6)
    + DONE,
    "reasoning, then content, then a tool call": event(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    )
    + b"".join(event({"choices": [{"delta": {"content": None, "reasoning": text}}]}) for text in "abc")
    + b"".join(event({"choices": [{"delta": {"content": text}}]}) for text in "def")
    + b"".join(
        event({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}}]})
        for text in ('{"a', '":', "1}")
    )
    + event({"choices": [{"delta": {"tool_calls": []}, "finish_reason": "tool_calls"}]})
    + usage_event(9)
    + DONE,
    "function call": event({"choices": [{"delta": {"function_call": {"name": "f"}}}]}) + DONE,
    "refusal": event({"choices": [{"delta": {"refusal": "no"}}]}) + DONE,
    "look-alikes": token('"usage":{"prompt_tokens":99}')
    + event({"choices": [{"delta": {"content": "x"}, "usage": {"prompt_tokens": 99}}]})
    + event({"choices": [], "x": {"usage": {"prompt_tokens": 98}}})
    + token('usage"')
    + token('\\"usage\\":{}')
    + DONE,
    "error event": token() + event({"error": {"message": "boom", "type": "x", "code": 503}}) + DONE,
    "error as a sentence": token() + event({"error": "boom"}) + DONE,
    "error object": token() + event({"object": "error", "message": "boom", "type": "t", "code": 400}) + DONE,
    "usage beside an error": event({"choices": [], "usage": {"prompt_tokens": 1}, "error": {"code": 500}})
    + DONE,
    "usage with choices": token("a", usage={"prompt_tokens": 4, "completion_tokens": 1}) + DONE,
    "usage without choices": event({"usage": {"prompt_tokens": 4}}) + DONE,
    "null choices": event({"choices": None, "usage": {"prompt_tokens": 4}}) + DONE,
    "empty usage": token() + event({"choices": [], "usage": {}}) + DONE,
    "two members of one name": b'data: {"usage":null,"choices":[],"usage":{"prompt_tokens":3}}\n\n' + DONE,
    "no JSON": b"data: hello\n\ndata: {\n\ndata: [1]\n\ndata: {} x\n\n" + DONE,
    "no end": token() + token("b"),
    "unterminated tail": token() + token("b") + b'data: {"choices":[{"delta":{"content":"c"}}]}',
    "unterminated usage": token() + usage_event()[:-2],
    "unterminated nonsense": token() + b'data: {"cho',
    "escapes": b"".join(token(text) for text in ('a"b', "c\\d", "\n", "é", "日本", "\U0001f600"))
    + usage_event()
    + DONE,
    "escaped as ASCII": b'data: {"choices":[{"delta":{"content":"\\u65e5\\ud83d\\ude00\\n"}}]}\n\n' + DONE,
    "a byte order mark": b"\xef\xbb\xbf" + token() + DONE,
    "empty lines": b"\n\n" + token() + b"\n\n\n" + DONE,
}


@pytest.mark.parametrize("name", ODD_STREAMS)
@pytest.mark.parametrize("hide", [True, False])
def test_an_odd_stream_cut_anywhere(script: Script, name: str, hide: bool) -> None:
    text = ODD_STREAMS[name]
    for pieces in cuttings(text):
        agree(script, pieces, hide=hide)
    agree(script, text.splitlines(keepends=True), hide=hide)


def test_choices_of_odd_types_bring_a_token_each(script: Script) -> None:
    text = b'data: {"choices":[1,null,"x"]}\n\ndata: {"choices":[{"delta":"x"}]}\n\n' + DONE
    for pieces in cuttings(text):
        body, reader = streamed(pieces, hide=True)
        told = script.respond(pieces, hide=True)
        assert told.body == body
        assert told.answer is not None
        assert told.answer["tokens"] == reader.seen.token_events == 4


@pytest.mark.parametrize("hide", [True, False])
@pytest.mark.parametrize("limit", [3, 40, 160])
def test_events_beyond_the_limit_pass(script: Script, hide: bool, limit: int) -> None:
    text = token() + token("y" * 300) + usage_event() + token("z") + DONE
    for pieces in cuttings(text):
        agree(script, pieces, hide=hide, limit=limit)


_SHARED = Script()  # hypothesis does not take a fixture for each example

_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\\"), max_size=12)
_EVENTS = st.one_of(
    _TEXTS.map(token),
    _TEXTS.map(lambda text: token(text, usage=None)),
    st.integers(0, 12).map(lambda index: token("x", index=index)),
    st.integers(0, 1000).map(usage_event),
    st.sampled_from(
        [
            DONE,
            b": ping\n\n",
            b"data: x\n\n",
            token("crlf").replace(b"\n", b"\r\n"),
            event({"error": {"code": 500}}),
            event({"choices": [{"delta": {"content": "y"}, "usage": {"prompt_tokens": 9}}]}),
            event({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}),
        ]
    ),
)


@given(
    events=st.lists(_EVENTS, max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    hide=st.booleans(),
    at_events=st.booleans(),
)
def test_any_stream_in_any_pieces(events: list[bytes], cuts: list[int], hide: bool, at_events: bool) -> None:
    text = b"".join(events)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = events if at_events else [text[start:end] for start, end in pairwise(places)]
    pieces = [piece for piece in pieces if piece]
    body, reader = streamed(pieces, hide=hide)
    told = _SHARED.respond(pieces, hide=hide)
    assert told.body == body
    assert_same_facts(told, reader)


# -- every format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.STREAMS)
@pytest.mark.parametrize("hide", [True, False])
def test_a_stream_of_any_format_cut_anywhere(script: Script, name: str, hide: bool) -> None:
    answer = formats.STREAMS[name]
    step = 1 if name.startswith("recorded") else 5
    for pieces in (answer.events, answer.body.splitlines(keepends=True), *cuttings(answer.body, step)):
        agree(script, pieces, hide=hide)


@pytest.mark.parametrize("name", formats.STREAMS)
def test_a_stream_of_any_format_cut_off(script: Script, name: str) -> None:
    """What is noted when a client leaves is what the stream lane has seen, but for tokens behind the last note."""
    events = formats.STREAMS[name].events
    for count in range(1, len(events)):
        body, reader = streamed(events[:count], hide=False)
        told = script.respond(events[:count], hide=False, ended=False)
        assert told.body == body
        if told.answer is None:  # nothing to be told of yet
            assert (reader.seen.token_events, reader.seen.begun, reader.seen.first_token_at) == (
                0,
                None,
                None,
            )
            continue
        noted, seen = facts_told(told), facts_of(reader)
        for name_of_fact in ("usage", "begun", "error", "done"):
            assert noted[name_of_fact] == seen[name_of_fact]
        assert (told.answer["first"] is None) is (reader.seen.first_token_at is None)
        assert told.answer["tokens"] * 2 + 1 >= reader.seen.token_events


FAST = {
    "chat": token("TEXT"),
    "messages": formats.text("TEXT"),
    "responses": formats.word("TEXT", 1000),
    "transcription": formats.heard("TEXT"),
    "speech": formats.event(type="speech.audio.delta", audio="TEXT"),
    "a call": formats.block(type="input_json_delta", partial_json="TEXT"),
    "arguments": formats.word("TEXT", 1000, "function_call_arguments"),
}


@pytest.mark.parametrize("name", FAST)
def test_events_of_a_known_shape_are_not_walked(script: Script, name: str) -> None:
    """JSON that is broken where only a walk would see it goes uncounted as such; so the shape alone was looked at."""
    texts = [b"ab", b"ab", *[b'c"d'] * 10]
    events = [
        FAST[name].replace(b"TEXT", text).replace(b":1000,", b":%d," % number)
        for number, text in enumerate(texts, 98)
    ]
    told = script.respond([*events, DONE])
    assert told.answer is not None
    assert (told.answer["tokens"], told.answer["unreadable"]) == (12, 0)
    whole = script.respond([b"".join(events), DONE])
    assert whole.answer is not None
    assert (whole.answer["tokens"], whole.answer["text"]) == (12, told.answer["text"])


@pytest.mark.parametrize(
    "other",
    [
        formats.word("x", 103, "refusal"),
        formats.word("", 103),
        formats.numbered("output_text.delta", 103, delta="x"),
        formats.word("xyz", 103).replace(b"103", b""),
        formats.word("xyz", 103).replace(b"103", b"null"),
        formats.word("xyz", 103).replace(b"103", b"-1"),
        formats.word("xyz", 103).replace(b"msg_1", b"msg_2"),
        formats.word("xyz", 103)[:-1],
        formats.word("xyz", 103).replace(b"\n", b"\r\n"),
        formats.word("x", 103) + formats.word("y", 104),
        formats.COMPLETED,
        b"data: 7\n\n",
        b"\n\n",
        b"103\n\n",
    ],
)
def test_another_event_among_numbered_ones(script: Script, other: bytes) -> None:
    words = [formats.word("ab", number) for number in range(98, 103)]
    agree(script, [*words, other, *words, other], hide=False)
    agree(script, [*words[:1], words[1] + other, *words], hide=True)


_TYPED = st.one_of(
    st.sampled_from([each for answer in formats.STREAMS.values() for each in answer.events]),
    st.builds(formats.word, _TEXTS, st.integers(0, 1200)),
    st.builds(formats.text, _TEXTS),
    _EVENTS,
)


@given(
    events=st.lists(_TYPED, max_size=12),
    cuts=st.lists(st.integers(0, 9000), max_size=12),
    hide=st.booleans(),
    at_events=st.booleans(),
)
def test_any_stream_of_any_formats_in_any_pieces(
    events: list[bytes], cuts: list[int], hide: bool, at_events: bool
) -> None:
    text = b"".join(events)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = events if at_events else [text[start:end] for start, end in pairwise(places)]
    agree(_SHARED, pieces, hide=hide)


# -- what a stream lane does not have -----------------------------------------------------------------------------------


def test_a_token_of_the_usual_shape_is_passed_on_as_it_came(script: Script) -> None:
    pieces = [token(f"word {place}") for place in range(200)]
    told = script.respond([*pieces, usage_event(200), DONE], hide=True)
    assert told.delivered[:200] == tuple(pieces)
    assert told.answer is not None
    assert (told.answer["tokens"], told.usage["completion_tokens"]) == (200, 200)
    assert (told.answer["first"], told.answer["last"]) == (1_001_000, 1_200_000)
    assert told.sets < 16  # not one for each token


def test_what_was_seen_outlives_a_client_that_leaves(script: Script) -> None:
    pieces = [token("x") for _ in range(100)]
    told = script.respond(pieces, hide=True, ended=False)
    assert told.answer is not None
    assert told.answer["ended"] is False
    assert 50 < told.answer["tokens"] <= 100
    assert told.answer["delivered"] == told.answer["tokens"] * len(pieces[0])
    assert told.answer["first"] == 1_001_000


@pytest.mark.parametrize("end", [DONE, formats.STOP, formats.COMPLETED])
def test_a_client_may_leave_when_it_has_seen_the_end(script: Script, end: bytes) -> None:
    told = script.respond([token("x"), token("x"), end], ended=False)
    assert told.answer is not None
    assert (told.answer["done"], told.answer["ended"], told.answer["tokens"]) == (True, False, 2)


def test_usage_of_every_chunk_outlives_a_client_that_leaves(script: Script) -> None:
    usages = [{"prompt_tokens": 5, "completion_tokens": place} for place in range(1, 8)]
    told = script.respond([token("x", usage=usage) for usage in usages], ended=False)
    assert told.usage == usages[-1]


def test_a_usage_object_too_large_for_metadata_is_left_out(script: Script) -> None:
    told = script.respond([token(), usage_event(x="y"), event({"usage": {"x": "y" * 5000}}), DONE], hide=True)
    assert told.usage["completion_tokens"] == 7
    assert told.body == token() + DONE


def test_nothing_is_kept_between_two_answers(script: Script) -> None:
    first = script.respond([token(), usage_event(), DONE], hide=True)
    second = script.respond([token("b"), DONE], hide=True)
    assert first.usage is not None
    assert second.usage is None
    assert second.answer is not None
    assert second.answer["removed"] == 0


# -- JSON answers -------------------------------------------------------------------------------------------------------

JSON_ANSWERS: dict[str, bytes] = {
    "chat": captures.body("chat"),
    "completions": captures.body("completions"),
    "logprobs": captures.body("chat_logprobs"),
    "two choices": captures.body("chat_n2"),
    "tools": captures.body("tools_named"),
    "embeddings": captures.body("e_embeddings"),
    "usage first": b'{"usage":{"prompt_tokens":3,"completion_tokens":4},"choices":[{"message":{"content":"x"}}]}',
    "spaced": b'{ "choices" : [ ] , "usage" : { "prompt_tokens" : 3 } }\n',
    "look-alike deeper": b'{"choices":[{"usage":{"prompt_tokens":9}}],"usage":{"prompt_tokens":3},"x":{"usage":{"prompt_tokens":8}}}',
    "only deeper": b'{"choices":[{"message":{"content":"hello"},"usage":{"prompt_tokens":9}}]}',
    "in a string": b'{"choices":[{"message":{"content":"\\"usage\\":{\\"prompt_tokens\\":9}"}}]}',
    "a key that ends so": b'{"x\\"usage":{"prompt_tokens":9},"choices":[]}',
    "null": b'{"choices":[{"text":"ab"}],"usage":null}',
    "null after an object": b'{"usage":{"prompt_tokens":9},"usage":null}',
    "none": b'{"choices":[{"text":"abcdefgh"}]}',
    "an error": b'{"error":{"message":"boom","code":500}}',
    "no JSON": b"hello",
    "an array": b"[1]",
    "cut off": b'{"choices":[{"text":"ab"}]',
    "prompt ids behind it": b'{"choices":[],"usage":{"prompt_tokens":3},"prompt_token_ids":['
    + b",".join(b"%d" % number for number in range(500))
    + b"]}",
}


JSON_ANSWERS |= {f"format: {name}": answer.body for name, answer in formats.DOCUMENTS.items()}


def json_lane(text: bytes) -> dict[str, object]:
    reader = JsonReader(max_body_bytes=LIMIT)
    reader.feed(text, 0.0)
    reader.finish(0.0)
    facts = facts_of(reader)
    if facts["usage"] is not None:  # nobody needs what usage was not counted from
        facts["tokens"] = facts["text"] = 0
    return facts


@pytest.mark.parametrize("name", JSON_ANSWERS)
def test_a_json_answer_cut_anywhere(script: Script, name: str) -> None:
    text = JSON_ANSWERS[name]
    expected = json_lane(text)
    step = max(1, len(text) // 400)
    pieces_of = [[text], [text[place : place + 1] for place in range(len(text))]]
    pieces_of += [[text[:place], text[place:]] for place in range(1, len(text), step)]
    for pieces in pieces_of:
        told = script.respond(pieces, headers=JSON)
        assert told.body == text
        assert facts_told(told) == expected


def test_usage_is_found_in_a_long_answer_wherever_it_is(script: Script) -> None:
    long = (
        b'"data":['
        + b",".join(b'{"embedding":[%d,0.25],"usage":{"prompt_tokens":9}}' % n for n in range(4000))
        + b"]"
    )
    usage = b'"usage":{"prompt_tokens":3,"completion_tokens":0}'
    for text in (b"{" + long + b"," + usage + b"}", b"{" + usage + b"," + long + b"}"):
        pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
        told = script.respond(pieces, headers=JSON)
        assert told.usage == {"prompt_tokens": 3, "completion_tokens": 0}
        assert told.body == text


def test_a_long_answer_without_usage_says_nothing_of_it(script: Script) -> None:
    told = script.respond([b'{"data":[', b"1," * 20_000, b"1]}"], headers=JSON)
    assert told.usage is None
    assert told.answer is not None
    assert told.answer["done"]


def test_a_json_answer_beyond_the_limit_is_counted(script: Script) -> None:
    text = b'{"usage":{"prompt_tokens":3},"x":"' + b"y" * 5000 + b'"}'
    told = script.respond([text[:100], text[100:]], headers=JSON, limit=1000)
    assert told.body == text
    assert told.usage is None
    assert told.answer is not None
    assert told.answer["oversized"] == 1


# -- headers ------------------------------------------------------------------------------------------------------------


def test_a_request_announces_the_version(script: Script) -> None:
    assert script.announced() == {b"envoy_extproc_lua": {b"v": 1}}


def test_headers_name_the_pod_that_served(script: Script) -> None:
    served = {**STREAM, "x-envoy-extproc-served": "10.0.0.2:8000", "x-request-id": "of-the-engine"}
    told = script.respond([DONE], headers=served)
    assert told.headers == {
        **STREAM,
        "x-request-id": "id-1",
        "request-id": "id-1",
        "routing-strategy": "random",
        "target-pod": "pod-b",
        "target-pod-ip": "10.0.0.2:8000",
    }


@pytest.mark.parametrize("served", ["10.0.0.1:80", "10.0.0.11:8000", "0.0.0.1:8000", "[fd00::1]:8000"])
def test_a_pod_that_is_not_listed_is_named_by_its_address(script: Script, served: str) -> None:
    told = script.respond([DONE], headers={**STREAM, "x-envoy-extproc-served": served})
    assert told.headers["target-pod"] == told.headers["target-pod-ip"] == served


def test_without_being_asked_it_touches_nothing_but_its_own_header(script: Script) -> None:
    for asked in ({}, {"v": 1}, {"native": 2}):
        told = script.respond(
            [usage_event()], headers={**STREAM, "x-envoy-extproc-served": "a:1"}, asked={"v": 1, **asked}
        )
        assert (told.headers, told.answer, told.body) == (STREAM, None, usage_event())


def test_nobody_served_what_envoy_answered_itself(script: Script) -> None:
    told = script.respond([b"{}"], headers={":status": "503", "content-type": "application/json"})
    assert "target-pod" not in told.headers
    assert told.headers["x-request-id"] == "id-1"
    assert told.answer is None


def test_an_engines_own_report_is_replaced_or_removed(script: Script) -> None:
    engines = {**STREAM, "endpoint-load-metrics": "TEXT a=1", "endpoint-load-metrics-bin": "x"}
    assert "endpoint-load-metrics" not in script.respond([DONE], headers=engines).headers
    told = script.respond([DONE], headers=engines, load="JSON {}")
    assert told.headers["endpoint-load-metrics"] == "JSON {}"
    assert "endpoint-load-metrics-bin" not in told.headers


@pytest.mark.parametrize(
    ("headers", "noted"),
    [
        ({"endpoint-load-metrics": "TEXT eps=1"}, b"TEXT eps=1"),
        ({"endpoint-load-metrics": "TEXT eps=1", "endpoint-load-metrics-bin": "AQ=="}, b"BIN AQ=="),
        ({"endpoint-load-metrics": "TEXT \u00e9"}, b"TEXT ??"),
        ({"endpoint-load-metrics": "x" * 8192}, b"x" * 8192),
        ({"endpoint-load-metrics": "x" * 8193}, None),
        ({}, None),
    ],
)
def test_an_engines_own_report_is_noted(script: Script, headers: dict[str, str], noted: bytes | None) -> None:
    served = {"x-envoy-extproc-served": "10.0.0.2:8000"}
    for more in ({}, {"read": False}, {"load": "JSON {}"}):
        assert script.respond([DONE], headers={**STREAM, **served, **headers}, **more).load == noted
    assert script.respond([DONE], headers={**JSON, ":status": "503", **headers}).load is None


def test_a_length_goes_only_where_something_is_taken_out(script: Script) -> None:
    with_length = {**STREAM, "content-length": "99"}
    assert "content-length" in script.respond([DONE], headers=with_length, hide=False).headers
    assert "content-length" not in script.respond([DONE], headers=with_length, hide=True).headers


@pytest.mark.parametrize(
    ("headers", "unread"),
    [
        ({**STREAM, "content-encoding": "gzip"}, "compressed"),
        ({**JSON, "content-encoding": "br"}, "compressed"),
        ({":status": "200", "content-type": "audio/wav"}, "content-type"),
        ({":status": "200"}, "content-type"),
        ({**STREAM, "content-encoding": "identity"}, ""),
        ({":status": "200", "content-type": "Text/Event-Stream"}, ""),
    ],
)
def test_what_cannot_be_read_passes_and_is_told(script: Script, headers: dict[str, str], unread: str) -> None:
    told = script.respond([usage_event()], headers=headers)
    assert told.body == usage_event()
    assert told.answer is not None
    assert told.answer["unread"] == unread
    assert (told.usage is None) == bool(unread)


@pytest.mark.parametrize("more", [{"read": False}, {"read": None}])
def test_an_answer_that_is_not_to_be_read_is_not(script: Script, more: dict[str, Any]) -> None:
    told = script.respond([usage_event()], **{key: value for key, value in more.items() if value is not None})
    assert told.body == usage_event()


def test_an_error_answer_is_not_read(script: Script) -> None:
    told = script.respond([b'{"usage":{}}'], headers={**JSON, ":status": "404"})
    assert told.answer is None
