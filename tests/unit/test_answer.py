"""What is read of an answer, and what a client sees of it: all of it but what only our asking added."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import events
from envoy_extproc.openai.answer import (
    EngineError,
    JsonReader,
    Reader,
    Seen,
    StreamReader,
    Usage,
    engine_error,
)
from envoy_extproc.openai.sse import data_of
from tests.support import captures, formats

pytestmark = pytest.mark.unmeasured

BIG = 1_000_000
DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def token(text: str = "x", **more: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], **more})


def usage_event(prompt: int = 5, completion: int = 7) -> bytes:
    return event(
        {
            "choices": [],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0},
        }
    )


def replayed(pieces: Iterable[bytes], *, hide: bool, limit: int = BIG) -> tuple[bytes, Seen]:
    """What the client got of a stream, and what was seen; time is the number of the piece."""
    reader = StreamReader(hide_usage=hide, max_event_bytes=limit)
    delivered = []
    for now, piece in enumerate(pieces):
        shown = reader.feed(piece, float(now))
        delivered.append(piece if shown is None else shown)
    delivered.append(reader.finish(1e6))
    return b"".join(delivered), reader.seen


def cuttings(text: bytes) -> Iterable[list[bytes]]:
    """The text whole, byte by byte, and cut once at every place."""
    yield [text]
    yield [text[place : place + 1] for place in range(len(text))]
    for place in range(1, len(text)):
        yield [text[:place], text[place:]]


def facts(seen: Seen) -> dict[str, object]:
    """Everything but times."""
    return {
        name: getattr(seen, name)
        for name in Seen.__slots__
        if name not in ("first_token_at", "last_token_at")
    }


# -- recorded streams ----------------------------------------------------------------------------------------------

# The recorded 8 tokens; characters that span tokens make events without text, so there are fewer with text.
REPORTED = {
    "chat_stream": None,
    "chat_stream_usage": Usage(prompt_tokens=18, completion_tokens=8, cached_tokens=0),
    "chat_stream_usage_continuous": Usage(prompt_tokens=18, completion_tokens=8, cached_tokens=0),
    "completions_stream": None,
    "completions_stream_usage": Usage(prompt_tokens=2, completion_tokens=8, cached_tokens=0),
}


@pytest.mark.parametrize("name", captures.STREAMS)
def test_without_hiding_a_recorded_stream_is_delivered_as_it_came(name: str) -> None:
    text = captures.body(name)
    for pieces in cuttings(text):
        delivered, seen = replayed(pieces, hide=False)
        assert delivered == text
        assert seen.usage == REPORTED[name]
        assert seen.done
        assert (seen.error, seen.unreadable, seen.oversized, seen.removed_events) == (None, 0, 0, 0)


@pytest.mark.parametrize("name", captures.STREAMS)
def test_hiding_takes_out_the_usage_event_and_nothing_else(name: str) -> None:
    events = captures.events(name)
    hidden = [each for each in events if b'"choices":[],' in each]
    expected = b"".join(each for each in events if each not in hidden)
    for pieces in cuttings(b"".join(events)):
        delivered, seen = replayed(pieces, hide=True)
        assert delivered == expected
        assert seen.removed_events == len(hidden) == (0 if REPORTED[name] is None else 1)
        assert seen.usage == REPORTED[name]
        assert seen.done


@pytest.mark.parametrize("name", captures.STREAMS)
@pytest.mark.parametrize("hide", [True, False])
def test_what_is_seen_does_not_depend_on_the_cutting(name: str, hide: bool) -> None:
    text = captures.body(name)
    _, whole = replayed([text], hide=hide)
    for pieces in cuttings(text):
        _, seen = replayed(pieces, hide=hide)
        assert facts(seen) == facts(whole)


@given(
    name=st.sampled_from(captures.STREAMS),
    cuts=st.lists(st.integers(0, 5000), max_size=30),
    hide=st.booleans(),
)
def test_any_cutting_of_a_recorded_stream(name: str, cuts: list[int], hide: bool) -> None:
    text = captures.body(name)
    places = [0, *sorted(place % len(text) for place in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert replayed(pieces, hide=hide)[0] == replayed([text], hide=hide)[0]


@pytest.mark.parametrize("name", captures.STREAMS)
def test_nothing_of_a_recorded_event_is_held_longer_than_needed(name: str) -> None:
    reader = StreamReader(hide_usage=True, max_event_bytes=BIG)
    for each in captures.events(name):
        shown = reader.feed(each, 0.0)
        assert (each if shown is None else shown) in (each, b"")
    assert reader.finish(0.0) == b""


def test_tokens_and_their_times_in_a_recorded_stream() -> None:
    _, seen = replayed(captures.events("chat_stream_usage"), hide=True)
    texts = [
        b'"content":""' not in each and b'"content":' in each for each in captures.events("chat_stream_usage")
    ]
    places = [place for place, has_text in enumerate(texts) if has_text]
    assert seen.token_events == len(places)
    assert (seen.first_token_at, seen.last_token_at) == (float(places[0]), float(places[-1]))
    assert places[0] > 0  # the role comes first


# -- recorded JSON -------------------------------------------------------------------------------------------------


def read_json(pieces: Iterable[bytes], limit: int = BIG) -> Seen:
    reader = JsonReader(max_body_bytes=limit)
    for now, piece in enumerate(pieces):
        reader.feed(piece, float(now))
    assert reader.finish(9.0) == b""
    return reader.seen


@pytest.mark.parametrize(
    ("name", "usage", "choices"),
    [
        ("chat", Usage(prompt_tokens=18, completion_tokens=8, cached_tokens=0), 1),
        ("chat_logprobs", Usage(prompt_tokens=18, completion_tokens=8, cached_tokens=0), 1),
        ("completions", Usage(prompt_tokens=2, completion_tokens=8, cached_tokens=0), 1),
        ("completions_batch", Usage(prompt_tokens=4, completion_tokens=8, cached_tokens=0), 2),
        ("e_embeddings", Usage(prompt_tokens=4, completion_tokens=0), 0),
        ("e_embeddings_base64", Usage(prompt_tokens=4, completion_tokens=0), 0),
    ],
)
def test_usage_of_recorded_json(name: str, usage: Usage, choices: int) -> None:
    text = captures.body(name)
    for pieces in [[text], [text[:10], text[10:]], [bytes([byte]) for byte in text]]:
        seen = read_json(pieces)
        assert seen.usage == usage
        assert seen.token_events == choices
        assert seen.done
        assert (seen.error, seen.unreadable, seen.oversized) == (None, 0, 0)


def test_a_json_answer_has_no_first_token() -> None:
    seen = read_json([captures.body("chat")])
    assert seen.first_token_at is None
    assert seen.last_token_at is None


def test_an_error_in_a_json_body() -> None:
    seen = read_json([captures.body("chat_n2")])
    assert seen.error == EngineError(
        message="n must be 1 when using greedy sampling, got 2.", type="BadRequestError", code=400
    )


def test_a_json_body_beyond_the_limit_is_not_read_nor_kept() -> None:
    seen = read_json([b'{"usage":', b'{"prompt_tokens":1}', b"}"], limit=10)
    assert (seen.oversized, seen.usage, seen.done, seen.unreadable) == (1, None, False, 0)


def test_a_json_body_of_exactly_the_limit_is_read() -> None:
    text = b'{"usage":{"prompt_tokens":1}}'
    assert read_json([text], limit=len(text)).usage == Usage(prompt_tokens=1)
    assert read_json([text], limit=len(text) - 1).usage is None


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b'{"a":',
        b"[1",
        b"[1,,2]",
        b"[1] x",
        b"7 7",
        b"'x'",
        b'{"choices":"x"}',
        b'{"a":"\xff"',
        b"\xff",
    ],
)
def test_a_json_body_that_makes_no_sense_is_counted(text: bytes) -> None:
    seen = read_json([text])
    assert (seen.unreadable, seen.done) == (1, False)


def test_no_body_at_all_is_not_counted() -> None:
    seen = read_json([])
    assert (seen.unreadable, seen.done) == (0, False)


# -- every format --------------------------------------------------------------------------------------------------


def read_of(seen: Seen) -> dict[str, object]:
    """What `formats.Answer` says of an answer."""
    return {
        "usage": seen.usage,
        "begun": None if seen.begun is None else seen.begun.prompt_tokens,
        "tokens": seen.token_events,
        "text": seen.text_length,
        "done": seen.done,
        "error": None if seen.error is None else seen.error.code,
        "rest": (seen.unreadable, seen.oversized, seen.removed_events),
    }


def expected_of(answer: formats.Answer) -> dict[str, object]:
    names = ("usage", "begun", "tokens", "text", "done", "error")
    return {**{name: getattr(answer, name) for name in names}, "rest": (0, 0, 0)}


@pytest.mark.parametrize("name", formats.STREAMS)
@pytest.mark.parametrize("hide", [True, False])
def test_a_stream_of_any_format(name: str, hide: bool) -> None:
    """Nothing is ever taken out of one that is not chat's or completions'."""
    answer = formats.STREAMS[name]
    usage_is_hidden = hide and "transcription of vLLM" in name
    for pieces in (answer.events, *cuttings(answer.body)):
        delivered, seen = replayed(pieces, hide=hide)
        wanted = expected_of(answer)
        if usage_is_hidden:  # whose events are chat's
            wanted["rest"] = (0, 0, 1)
            assert delivered == b"".join(each for each in answer.events if b'"usage"' not in each)
        else:
            assert delivered == answer.body
        assert read_of(seen) == wanted


@pytest.mark.parametrize("name", formats.DOCUMENTS)
def test_a_document_of_any_format(name: str) -> None:
    answer = formats.DOCUMENTS[name]
    for pieces in ([answer.body], [answer.body[:9], answer.body[9:]]):
        assert read_of(read_json(pieces)) == expected_of(answer)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (b"event: x\ndata: y\n\n", b"y"),
        (b"event: x\ndata:y\n\n", b"y"),
        (b"event:x\ndata: y\n\n", b"y"),
        (b"event: x\ndata: y\ndata: z\n\n", b"y\nz"),
        (b"event: x\ndata: y\nid: 1\n\n", b"y"),
        (b"event: x\nid: 1\ndata: y\n\n", b"y"),
        (b"event: x\r\ndata: y\r\n\r\n", b"y"),
        (b"event: x\ndata: y\rdata: z\n\n", b"y\nz"),
        (b"event: x\ndata: \n\n", b""),
        (b"event: x\n\n", b""),
        (b"event: data: y", b""),
        (b"event: x\ndata: y", b"y"),
        (b"event: x\ndata: y\n", b"y"),
    ],
)
def test_data_behind_the_name_of_an_event(text: bytes, data: bytes) -> None:
    assert data_of(text) == data


def test_a_picture_comes_without_a_token() -> None:
    _, seen = replayed(formats.STREAMS["media: a picture"].events, hide=False)
    assert (seen.token_events, seen.first_token_at, seen.last_token_at) == (0, 0.0, 1.0)


def test_the_times_of_a_message() -> None:
    name = "messages: Anthropic: the start tells the prompt, the end the rest"
    _, seen = replayed(formats.STREAMS[name].events, hide=False)
    assert (seen.first_token_at, seen.last_token_at) == (2.0, 4.0)


def test_half_of_usage_is_not_all_of_it() -> None:
    """A message that is cut off: what its start said of the output was not the last word."""
    name = "messages: Anthropic: the start tells the prompt, the end the rest"
    _, seen = replayed(formats.STREAMS[name].events[:4], hide=False)
    assert (seen.usage, seen.begun, seen.token_events) == (
        None,
        Usage(prompt_tokens=15, completion_tokens=1, cached_tokens=3),
        2,
    )


@pytest.mark.parametrize(
    ("text", "usage", "begun", "unreadable"),
    [
        (b'{"prompt_tokens":3}', Usage(prompt_tokens=3), None, 0),
        (b'[{"input_tokens":3}]', None, Usage(prompt_tokens=3), 0),
        (
            b'[{"input_tokens":3,"x":NaN},{"output_tokens":"4"}]',
            Usage(prompt_tokens=3, completion_tokens=4),
            Usage(prompt_tokens=3),
            0,
        ),
        (b'{"type":"duration","seconds":3}', None, None, 0),
        (b'{"prompt_tokens":}', None, None, 1),
        (b"[", None, None, 1),
        (b"[]", None, None, 1),
        (b"[7]", None, None, 1),
        (b"7", None, None, 1),
    ],
)
def test_usage_that_somebody_else_found(
    text: bytes, usage: Usage | None, begun: Usage | None, unreadable: int
) -> None:
    seen = Seen()
    events.note_usage(seen, text)
    assert (seen.usage, seen.begun, seen.unreadable) == (usage, begun, unreadable)


@pytest.mark.parametrize(
    ("text", "error", "unreadable"),
    [(b'{"error":{"code":400}}', EngineError(code=400), 0), (b'{"error":', None, 1), (b"[1]", None, 1)],
)
def test_an_error_that_somebody_else_found(text: bytes, error: EngineError | None, unreadable: int) -> None:
    seen = Seen()
    events.note_told(seen, text, 0.0)
    assert (seen.error, seen.unreadable) == (error, unreadable)


# -- usage ---------------------------------------------------------------------------------------------------------

LOOK_ALIKES = [
    {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"usage":{"prompt_tokens":9}}'}}]}}]},
    {"choices": [{"delta": {"content": "x", "usage": {"prompt_tokens": 9}}}]},
    {"choices": [{"delta": {"content": 'x","usage":null,"y":"'}}]},
    {"choices": [{"usage": {"prompt_tokens": 9}, "delta": {"content": "x"}}]},
    {"choices": [{"usage": None, "delta": {"content": "x"}}]},
    {"choices": [], "metadata": {"usage": {"prompt_tokens": 9}}},
    {"choices": [], "metadata": {"usage": None}},
    {"choices": [], "x_usage": {"prompt_tokens": 9}, "usages": None, "Usage": None},
    {"choices": [], "a": [{"usage": None}, {"usage": {"prompt_tokens": 9}}]},
]


@pytest.mark.parametrize("value", LOOK_ALIKES)
def test_what_only_looks_like_usage_is_left_alone(value: object) -> None:
    delivered, seen = replayed([event(value), DONE], hide=True)
    assert delivered == event(value) + DONE
    assert (seen.usage, seen.removed_events, seen.unreadable) == (None, 0, 0)


@pytest.mark.parametrize("value", LOOK_ALIKES)
def test_what_only_looks_like_usage_in_json_is_not_taken(value: object) -> None:
    assert read_json([msgspec.json.encode(value)]).usage is None


NULLS = [
    # as vLLM writes it, last
    (b'{"id":"a","choices":[],"usage":null}', b'{"id":"a","choices":[]}'),
    (b'{"usage":null,"id":"a"}', b'{"id":"a"}'),
    (b'{"id":"a","usage":null,"choices":[]}', b'{"id":"a","choices":[]}'),
    (b'{"usage":null}', b"{}"),
    # escaped key
    (b'{"id":"a","us\\u0061ge":null}', b'{"id":"a"}'),
    (b'{"us\\u0061ge":null,"id":"a"}', b'{"id":"a"}'),
    # the member's own look-alikes stay
    (b'{"a":{"usage":null},"usage":null}', b'{"a":{"usage":null}}'),
    (b'{"usage":null,"a":{"usage":null}}', b'{"a":{"usage":null}}'),
    (b'{"a":"\\",\\"usage\\":null}","usage":null}', b'{"a":"\\",\\"usage\\":null}"}'),
    (b'{"a":[",\\"usage\\":null"],"usage":null,"b":1}', b'{"a":[",\\"usage\\":null"],"b":1}'),
    # bytes that are no UTF-8 and controls, in keys and out of them
    (b'{"usage":null,"\\n\xff":1}', b'{"\\n\xff":1}'),
    (b'{"usage":null,"\xff":1}', b'{"\xff":1}'),
]


@pytest.mark.parametrize(("text", "shown"), NULLS)
def test_a_null_usage_at_the_top_goes(text: bytes, shown: bytes) -> None:
    for pieces in cuttings(b"data: " + text + b"\n\n" + DONE):
        delivered, seen = replayed(pieces, hide=True)
        assert delivered == b"data: " + shown + b"\n\n" + DONE
        assert (seen.usage, seen.removed_events) == (None, 0)


@pytest.mark.parametrize("text", [text for text, _ in NULLS])
def test_a_null_usage_the_client_asked_for_stays(text: bytes) -> None:
    assert replayed([b"data: " + text + b"\n\n"], hide=False)[0] == b"data: " + text + b"\n\n"


@pytest.mark.parametrize(
    "text",
    [
        b'{ "id" : "a" , "usage" : null , "choices" : [ ] }',
        b'{"id": "a", "choices": [], "usage": null}',
        b'{\t"usage"\t:\tnull\t,\t"id"\t:\t1}',
        b'{ "usage":null }',
        b'{"id":1,"usage":null }',
        b'{"id":1,"usage" :null}',
        b' {"id":1,"usage":null} ',
    ],
)
@pytest.mark.parametrize(
    "frame", [b"data: %s\n\n", b"data:%s\n\n", b"data: %s\r\n\r\n", b": c\ndata: %s\nid: 1\n\n"]
)
def test_a_null_usage_goes_whatever_the_whitespace(text: bytes, frame: bytes) -> None:
    delivered, seen = replayed([frame % text, DONE], hide=True)
    start, _, end = frame.partition(b"%s")
    assert delivered.startswith(start)
    assert delivered.endswith(end + DONE)
    shown = delivered.removesuffix(end + DONE).removeprefix(start)
    wanted = msgspec.json.decode(text)
    del wanted["usage"]
    assert msgspec.json.decode(shown) == wanted
    assert seen.unreadable == 0


def test_a_null_usage_in_data_over_several_lines_is_left_alone() -> None:
    text = b'data: {"id":1,\r\ndata: "usage":null}\r\n\r\n'
    assert replayed([text, DONE], hide=True)[0] == text + DONE


def test_a_usage_event_goes_however_it_is_framed() -> None:
    text = usage_event()[6:-2]
    for frame in (
        b"data:%s\n\n",
        b"data: %s\r\n\r\n",
        b": c\ndata: %s\n\n",
        b"event: x\ndata: %s\nid: 1\n\n",
    ):
        delivered, seen = replayed([token(), frame % text, DONE], hide=True)
        assert delivered == token() + DONE
        assert seen.usage == Usage(prompt_tokens=5, completion_tokens=7)


def test_usage_beside_choices_stays_since_the_event_brings_more() -> None:
    last = token("end", usage={"prompt_tokens": 1, "completion_tokens": 2})
    delivered, seen = replayed([token(), last, DONE], hide=True)
    assert delivered == token() + last + DONE
    assert seen.usage == Usage(prompt_tokens=1, completion_tokens=2)
    assert seen.removed_events == 0


def test_usage_beside_an_error_stays_since_the_event_brings_more() -> None:
    last = event({"error": {"message": "no"}, "usage": {"prompt_tokens": 1}})
    assert replayed([last, DONE], hide=True)[0] == last + DONE


def test_continuous_usage_is_read_at_once() -> None:
    first = token(usage={"prompt_tokens": 3, "completion_tokens": 1})
    second = token(usage={"prompt_tokens": 3, "completion_tokens": 2})
    assert replayed([first], hide=False)[1].usage == Usage(prompt_tokens=3, completion_tokens=1)
    assert replayed([first, second], hide=False)[1].usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({}, Usage()),
        ({"prompt_tokens": None, "completion_tokens": None}, Usage()),
        ({"prompt_tokens": 3}, Usage(prompt_tokens=3)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, Usage(prompt_tokens=3)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {}}, Usage(prompt_tokens=3)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": None}}, Usage(prompt_tokens=3)),
        (
            {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
            Usage(prompt_tokens=3, cached_tokens=2),
        ),
        ({"prompt_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}}, Usage(prompt_tokens=3)),
        ({"input_tokens": 3, "output_tokens": 4}, Usage(prompt_tokens=3, completion_tokens=4)),
        (
            {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 2}},
            Usage(prompt_tokens=3, cached_tokens=2),
        ),
        (
            {"prompt_tokens": 3, "input_tokens": 9, "output_tokens": 4},
            Usage(prompt_tokens=3, completion_tokens=4),
        ),
        ({"prompt_tokens": 3, "cache_read_input_tokens": 2}, Usage(prompt_tokens=3, cached_tokens=2)),
        (
            {"prompt_tokens": 3, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 1},
            Usage(prompt_tokens=3, cached_tokens=2),
        ),
        ({"input_tokens": 3, "cache_read_input_tokens": 2}, Usage(prompt_tokens=3, cached_tokens=2)),
        (
            {"input_tokens": 3, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0},
            Usage(prompt_tokens=5, cached_tokens=2),
        ),
        ({"input_tokens": 3, "cache_creation_input_tokens": 1}, Usage(prompt_tokens=4)),
        ({"total_tokens": 9}, Usage(prompt_tokens=9)),
        ({"total_tokens": 9, "completion_tokens": 4}, Usage(completion_tokens=4)),
    ],
)
def test_usage_of_any_shape_known(usage: object, read: Usage) -> None:
    assert replayed([event({"choices": [], "usage": usage})], hide=False)[1].usage == read
    assert read_json([msgspec.json.encode({"usage": usage})]).usage == read


def test_total_tokens() -> None:
    assert Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2).total_tokens == 7


# -- tokens --------------------------------------------------------------------------------------------------------

TOKENS = [
    {"delta": {"content": "x"}},
    {"delta": {"content": "", "reasoning": "x"}},
    {"delta": {"reasoning": "x"}},
    {"delta": {"reasoning_content": "x"}},
    {"delta": {"refusal": "x"}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}},
    {"delta": {"function_call": {"name": "f"}}},
    {"text": "x"},
    {"message": {"content": "x"}},
]
NO_TOKENS = [
    {"delta": {"role": "assistant"}},
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {"content": None, "reasoning": None, "tool_calls": None, "function_call": None}},
    {"delta": {"content": "", "tool_calls": []}},
    {"delta": {}, "finish_reason": "stop"},
    {"delta": None},
    {"text": ""},
    {"text": None, "finish_reason": "stop"},
    {},
]


@pytest.mark.parametrize("choice", TOKENS)
def test_a_token(choice: object) -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    _, seen = replayed([role, event({"choices": [choice]}), DONE], hide=True)
    assert (seen.token_events, seen.first_token_at, seen.last_token_at) == (1, 1.0, 1.0)
    assert seen.text_length > 0


@pytest.mark.parametrize("choice", NO_TOKENS)
def test_not_a_token(choice: object) -> None:
    _, seen = replayed([event({"choices": [choice]}), DONE], hide=True)
    assert (seen.token_events, seen.first_token_at, seen.text_length, seen.unreadable) == (0, None, 0, 0)


def test_each_of_several_choices_is_a_token() -> None:
    both = event(
        {"choices": [{"index": 0, "delta": {"content": "ab"}}, {"index": 1, "delta": {"content": "c"}}]}
    )
    _, seen = replayed([token(), both, DONE], hide=True)
    assert (seen.token_events, seen.text_length) == (3, 4)
    assert (seen.first_token_at, seen.last_token_at) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("texts", "estimate"),
    [
        ([], 0),
        (["a"] * 10, 10),
        (["abcdefgh"] * 10, 10),  # 80 characters are 20 tokens by length: not more than twice
        (["abcdefghijkl"] * 10, 30),  # 120 characters: several tokens share an event
        (["x" * 4000], 1000),
    ],
)
def test_the_estimate_of_tokens(texts: list[str], estimate: int) -> None:
    _, seen = replayed([token(text) for text in texts], hide=False)
    assert seen.completion_tokens_estimate == estimate


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            {"error": {"message": "busy", "type": "Service Unavailable", "param": None, "code": 503}},
            EngineError(message="busy", type="Service Unavailable", code=503),
        ),
        ({"error": {"message": "busy", "code": "503"}}, EngineError(message="busy", code=503)),
        ({"error": {"message": "busy"}}, EngineError(message="busy", code=500)),
        ({"error": {"message": "busy", "code": None}}, EngineError(message="busy", code=500)),
        ({"error": {"message": "busy", "code": True}}, EngineError(message="busy", code=500)),
        ({"error": {"message": "busy", "code": "overloaded"}}, EngineError(message="busy", code=500)),
        ({"error": {"message": None, "type": None}}, EngineError()),
        ({"error": {}}, EngineError()),
        ({"error": "out of memory"}, EngineError(message="out of memory")),
        (
            {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400},
            EngineError(message="bad", type="BadRequestError", code=400),
        ),
        ({"object": "error", "message": "bad"}, EngineError(message="bad", code=500)),
    ],
)
def test_an_error_in_the_body(body: dict[str, object], error: EngineError) -> None:
    delivered, seen = replayed([token(), event(body), DONE], hide=True)
    assert seen.error == error
    assert (seen.done, seen.unreadable) == (True, 0)
    assert delivered == token() + event(body) + DONE
    assert read_json([msgspec.json.encode(body)]).error == error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"type": "overloaded_error"}, 500),
        ({"code": "rate_limit_exceeded"}, 429),
        ({"code": "invalid_prompt"}, 400),
        ({"code": "server_error"}, 500),
        ({"code": 418, "type": "overloaded_error"}, 418),
        ({"code": ["x"], "type": {"x": 1}}, 500),
    ],
)
def test_the_status_of_an_error_that_gives_a_word(error: object, code: int) -> None:
    assert engine_error(error).code == code


@pytest.mark.parametrize(
    "body",
    [
        {"error": None},
        {"object": "chat.completion", "message": "x", "code": 7},
        {"detail": "x"},
        {"type": ["error"], "message": "x"},
        {},
    ],
)
def test_no_error_in_the_body(body: object) -> None:
    assert replayed([event(body)], hide=True)[1].error is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.dictionaries(st.sampled_from(["message", "type", "code", "x"]), inner),
    )
)
def test_an_error_of_any_shape_is_read(error: object) -> None:
    read = engine_error(error)
    assert isinstance(read.code, int)
    assert isinstance(read.message, str)


# -- oddities ------------------------------------------------------------------------------------------------------


def test_a_missing_done_shows() -> None:
    assert not replayed([token()], hide=True)[1].done
    assert replayed([token(), DONE], hide=True)[1].done


@pytest.mark.parametrize(
    "end", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n\r", b"data: [DONE]\r\r"]
)
def test_done_counts_without_its_empty_line(end: bytes) -> None:
    for pieces in cuttings(token() + end):
        delivered, seen = replayed(pieces, hide=True)
        assert delivered == token() + end
        assert seen.done


@pytest.mark.parametrize("hide", [True, False])
def test_an_unterminated_tail_is_delivered_and_read(hide: bool) -> None:
    tail = token("tail")[:-2]
    for pieces in cuttings(token() + tail):
        delivered, seen = replayed(pieces, hide=hide)
        assert delivered == token() + tail
        assert seen.token_events == 2


@pytest.mark.parametrize("hide", [True, False])
def test_an_event_beyond_the_limit_passes_and_the_usage_behind_it_is_found(hide: bool) -> None:
    large = token("x" * 300)
    text = token() + large + usage_event() + DONE
    for pieces in cuttings(text):
        delivered, seen = replayed(pieces, hide=hide, limit=200)
        assert delivered == token() + large + (b"" if hide else usage_event()) + DONE
        assert seen.usage == Usage(prompt_tokens=5, completion_tokens=7)
        assert (seen.oversized, seen.token_events, seen.done) == (1, 1, True)


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b'data: {"choices": 7}\n\n',
        b"data: hello\n\n",
        b"data: [1,2]\n\n",
        b"data: null\n\n",
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b'data: {"usage":null,"a":"\x01"}\n\n',
        b"data: \xff\xfe\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"usage":null,"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n",
        b'data: {"usage":null,"code":' + b"7" * 5000 + b"}\n\n",
    ],
)
def test_an_event_that_makes_no_sense_passes_and_is_counted(bad: bytes) -> None:
    delivered, seen = replayed([token(), bad, usage_event(), DONE], hide=True)
    assert delivered == token() + bad + DONE
    assert (seen.unreadable, seen.done, seen.oversized) == (1, True, 0)
    assert seen.usage == Usage(prompt_tokens=5, completion_tokens=7)


def test_what_python_engines_write_is_read() -> None:
    text = b'data: {"choices":[{"delta":{"content":"\\ud83d"},"logprob":NaN}],"usage":null}\n\n'
    delivered, seen = replayed([text], hide=True)
    assert delivered == text.replace(b',"usage":null', b"")
    assert (seen.token_events, seen.unreadable) == (1, 0)


@pytest.mark.parametrize("comment", [b": keep-alive\n\n", b"\n\n", b"event: ping\n\n", b"data:\n\n"])
def test_events_without_data_pass_uncounted(comment: bytes) -> None:
    delivered, seen = replayed([comment, token(), comment, DONE], hide=True)
    assert delivered == comment + token() + comment + DONE
    assert (seen.unreadable, seen.token_events) == (0, 1)


@pytest.mark.parametrize("member", [b'"choices":[]', b'"choices":null', b'"id":"x"'])
def test_a_usage_event_is_one_that_brings_nothing_else(member: bytes) -> None:
    text = b"data: {" + member + b',"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    assert replayed([text, DONE], hide=True)[0] == DONE


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["usage", "choices", "delta", "content", "error", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(values=st.lists(JSON_VALUE, max_size=6), cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_without_hiding_any_stream_passes_as_it_is(values: list[object], cuts: list[int]) -> None:
    text = b"".join(event(value) for value in values) + DONE
    places = [0, *sorted(place % len(text) for place in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert replayed(pieces, hide=False)[0] == text


@given(values=st.lists(JSON_VALUE, max_size=6), junk=st.binary(max_size=30), cut=st.integers(0, 500))
def test_hiding_never_touches_an_event_without_usage(values: list[object], junk: bytes, cut: int) -> None:
    def has_usage(value: object) -> bool:
        return isinstance(value, dict) and "usage" in value

    text = b"".join(event(value) for value in values if not has_usage(value)) + junk
    place = cut % (len(text) + 1)
    assert replayed([text[:place], text[place:]], hide=True)[0] == text


@pytest.mark.parametrize(
    "reader", [StreamReader(hide_usage=True, max_event_bytes=9), JsonReader(max_body_bytes=9)]
)
def test_both_are_readers(reader: Reader) -> None:
    assert reader.finish(0.0) == b""
    assert reader.seen.usage is None


ODD = {
    # an event with a member of a type nobody expects: what is hidden, usage, pieces of text
    "content in parts": (
        b'{"choices":[{"delta":{"content":[{"type":"text","text":"hi"}]}}]}',
        False,
        None,
        1,
    ),
    "counts as floats": (
        b'{"choices":[],"usage":{"prompt_tokens":12.0,"completion_tokens":3}}',
        True,
        (12, 3),
        0,
    ),
    "counts as text": (
        b'{"choices":[],"usage":{"prompt_tokens":"12","completion_tokens":"3"}}',
        True,
        (12, 3),
        0,
    ),
    "usage is a number": (b'{"choices":[],"usage":5}', False, None, 0),
    "one count is a list": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":[3]}}',
        True,
        (12, 0),
        0,
    ),
    "one count is a word": (
        b'{"choices":[],"usage":{"prompt_tokens":"many","completion_tokens":3}}',
        True,
        (0, 3),
        0,
    ),
    "one count is half a token": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3.5}}',
        True,
        (12, 0),
        0,
    ),
    "one count is infinite": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":1e400}}',
        True,
        (12, 0),
        0,
    ),
    "one count is no number": (
        b'{"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":3}}',
        True,
        (0, 3),
        0,
    ),
    "one count is a truth": (
        b'{"choices":[],"usage":{"prompt_tokens":true,"completion_tokens":3}}',
        True,
        (0, 3),
        0,
    ),
    "one count is negative": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":-3}}',
        True,
        (12, 0),
        0,
    ),
    "one count is beyond all bounds": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":' + b"9" * 400 + b"}}",
        True,
        (12, 0),
        0,
    ),
    "details are a number": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":7}}',
        True,
        (12, 3),
        0,
    ),
    "total is an object": (
        b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":{"n":1}}}',
        True,
        (12, 3),
        0,
    ),
    "all of usage is odd": (
        b'{"choices":[],"usage":{"prompt_tokens":{},"completion_tokens":[],"prompt_tokens_details":[1]}}',
        True,
        (0, 0),
        0,
    ),
    "usage is odd beside choices": (
        b'{"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":12,"completion_tokens":[]}}',
        False,
        (12, 0),
        1,
    ),
    "tool calls are text": (
        b'{"choices":[{"delta":{"tool_calls":"f()"}}],"usage":{"prompt_tokens":1}}',
        False,
        (1, 0),
        1,
    ),
}


@pytest.mark.parametrize(
    ("cached", "read"), [(2, 2), (0, 0), (-2, None), ("2", 2), (2.5, None), ([2], None), (2**64, None)]
)
def test_cached_tokens_of_any_type(cached: object, read: int | None) -> None:
    usage = {"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": cached}}
    _, seen = replayed([event({"choices": [], "usage": usage})], hide=True)
    assert seen.usage == Usage(prompt_tokens=12, cached_tokens=read)
    assert seen.removed_events == 1


@pytest.mark.parametrize("name", ODD)
def test_a_member_of_an_odd_type_spoils_no_event(name: str) -> None:
    data, hidden, usage, pieces = ODD[name]
    reader = StreamReader(hide_usage=True, max_event_bytes=10_000)
    event = b"data: " + data + b"\n\n"
    shown = reader.feed(event, 1.0)
    assert shown == (b"" if hidden else None)
    seen = reader.seen
    assert seen.unreadable == 0
    assert seen.token_events == pieces
    assert (seen.usage and (seen.usage.prompt_tokens, seen.usage.completion_tokens)) == usage
