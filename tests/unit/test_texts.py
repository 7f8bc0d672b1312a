"""What of a prompt is counted, and how another one is asked to count it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes, texts, tokenize
from envoy_extproc.openai.prompt import BlockRule, Prompt
from envoy_extproc.openai.texts import Texts
from envoy_extproc.openai.tokenize import Form, Unusable

CHAT = "/v1/chat/completions"
MODEL = "llama-3-8b"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}
MOST = 100_000


def prompt_of(path: str, **body: Any) -> Prompt:
    route = routes.find(path)
    assert route is not None
    _, prompt = openai_request.read(json.dumps({"model": MODEL, **body}).encode(), route)
    assert prompt is not None
    return prompt


def read(path: str, **body: Any) -> Texts:
    found = texts.read(prompt_of(path, **body), MOST)
    assert found is not None
    return found


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("path", "body", "pieces", "known", "others"),
    [
        (CHAT, {"messages": [said("hello")]}, ("hello",), 7, 0),
        (CHAT, {"messages": [said("be brief", "system"), said("hello")]}, ("be brief", "hello"), 11, 0),
        (CHAT, {"messages": [said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}, ("a", "b"), 7, 0),
        (CHAT, {"messages": [said([{"type": "text", "text": "look"}, IMAGE, IMAGE])]}, ("look",), 7, 2),
        (CHAT, {"messages": [said("\u4e2d\u6587")]}, ("\u4e2d\u6587",), 7, 0),
        (CHAT, {"messages": [said("hi")], "tools": [{"type": "function"}]}, ('[{"type":"function"}]', "hi"), 11, 0),
        (CHAT, {"messages": [said(None, "assistant", tool_calls=[{"x": 1}])]}, ('{"tool_calls":[{"x":1}]}',), 7, 0),
        (CHAT, {"messages": []}, (), 0, 0),
        (CHAT, {"messages": "hello"}, ("hello",), 7, 0),
        ("/v1/completions", {"prompt": "hello"}, ("hello",), 0, 0),
        ("/v1/completions", {"prompt": ["one", "two"]}, ("one", "two"), 0, 0),
        ("/v1/completions", {"prompt": [1, 2, 3]}, (), 3, 0),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, (), 3, 0),
        ("/v1/embeddings", {"input": ["one", "two"]}, ("one", "two"), 0, 0),
        ("/v1/responses", {"instructions": "be brief", "input": "hello"}, ("be brief", "hello"), 11, 0),
        ("/v1/messages", {"system": "be brief", "messages": [said("hello")]}, ("be brief", "hello"), 11, 0),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}, ("q", "a", "b"), 0, 0),
    ],
)  # fmt: skip
def test_what_is_counted(
    path: str, body: dict[str, Any], pieces: tuple[str, ...], known: int, others: int
) -> None:
    found = read(path, **body)
    assert (found.pieces, found.known, found.others) == (pieces, known, others)


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 5000])
def test_a_long_prompt_is_not_read(length: int) -> None:
    found = texts.read(prompt_of("/v1/completions", prompt="x" * length), 100)
    assert (found is None) is (length > 100)


def test_marks_between_texts_count_for_its_length_so_that_many_short_ones_are_bounded_too() -> None:
    assert texts.read(prompt_of("/v1/completions", prompt=[""] * 1000), 100) is None


def test_of_more_ids_than_are_read_the_estimate_is_exact() -> None:
    assert texts.read(prompt_of("/v1/completions", prompt=[1] * 300_000), 10**8) is None
    found = texts.read(prompt_of("/v1/completions", prompt=[1] * 100_000), 10**8)
    assert found is not None
    assert found.known == 100_000


def test_images_take_no_room() -> None:
    found = texts.read(prompt_of(CHAT, messages=[said([IMAGE] * 50)]), 100)
    assert found is not None
    assert found.others == 50


def test_a_conversation_that_an_engine_keeps_is_no_text() -> None:
    kept = read("/v1/responses", previous_response_id="resp_123", input="hello")
    assert (kept.pieces, kept.known) == (("hello",), 7)


def test_a_lone_surrogate_is_a_text_all_the_same() -> None:
    assert read("/v1/completions", prompt="a\ud800b").pieces == ("a?b",)


@pytest.mark.parametrize("raw", [b"[[[[" * 2000 + b"]]]]" * 2000, b'[{"role":'])
def test_what_cannot_be_read_has_no_texts(raw: bytes) -> None:
    assert texts.read(Prompt({"messages": msgspec.Raw(raw)}), MOST) == Texts()


def test_a_prompt_that_was_hashed_has_let_go_of_its_texts() -> None:
    prompt = prompt_of(CHAT, messages=[said("hello")])
    prompt.hashes(BlockRule(), MODEL)
    assert texts.read(prompt, MOST) == Texts()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(messages=JSON, most=st.integers(0, 300))
def test_any_messages_are_read_or_are_not(messages: Any, most: int) -> None:
    prompt = Prompt({"messages": msgspec.Raw(json.dumps(messages).encode())}, turns=routes.Turns.CHAT)
    found = texts.read(prompt, most)
    assert found is None or sum(len(piece.encode()) for piece in found.pieces) <= max(3 * most, 0)
    assert texts.read(prompt, 10**6) is not None


# -- what is asked -------------------------------------------------------------------------------------------------


def asked(form: Form, path: str, **body: Any) -> tuple[Any, int]:
    prompt = prompt_of(path, **body)
    found = texts.read(prompt, MOST)
    assert found is not None
    question = tokenize.question(form, MODEL, prompt, found)
    return (None, 0) if question is None else (json.loads(question.body), question.known)


@pytest.mark.parametrize(
    ("form", "path", "body", "sent", "known"),
    [
        (Form.MESSAGES, CHAT, {"messages": [said("hi")]}, {"model": MODEL, "messages": [said("hi")]}, 0),
        (
            Form.MESSAGES,
            CHAT,
            {"tools": [{"a": 1}], "messages": [said("hi")], "temperature": 1},
            {"model": MODEL, "messages": [said("hi")], "tools": [{"a": 1}]},
            0,
        ),
        (Form.MESSAGES, CHAT, {"messages": [said("hi")], "tools": None}, {"model": MODEL, "messages": [said("hi")]}, 0),
        (Form.MESSAGES, CHAT, {"messages": [said("hi")], "tools": []}, {"model": MODEL, "messages": [said("hi")]}, 0),
        (Form.MESSAGES, CHAT, {"messages": [said([{"type": "text", "text": "see"}, IMAGE])]}, {"model": MODEL, "prompt": "see"}, 7),
        (Form.MESSAGES, CHAT, {"tools": [{"a": 1}]}, {"model": MODEL, "prompt": '[{"a":1}]'}, 7),
        (Form.MESSAGES, "/v1/completions", {"prompt": "hi"}, {"model": MODEL, "prompt": "hi"}, 0),
        (Form.MESSAGES, "/v1/completions", {"prompt": [1, 2]}, None, 0),
        (Form.MESSAGES, "/v1/embeddings", {"input": ["a", "b"]}, {"model": MODEL, "prompt": "a\nb"}, 0),
        (Form.MESSAGES, "/v1/messages", {"system": "s", "messages": [said("hi")]}, {"model": MODEL, "prompt": "s\nhi"}, 11),
        (Form.PROMPT, CHAT, {"messages": [said("hi")]}, {"model": MODEL, "prompt": "hi"}, 7),
        (Form.CONTENT, CHAT, {"messages": [said("hi")]}, {"content": "hi", "add_special": True}, 7),
    ],
)  # fmt: skip
def test_what_is_asked(form: Form, path: str, body: dict[str, Any], sent: object, known: int) -> None:
    assert asked(form, path, **body) == (sent, known)


def test_messages_go_as_they_were_written() -> None:
    raw = b'[ {"role":"user","content":"\\u00e4 \\"",  "x":1e400} ]'
    prompt = Prompt({"messages": msgspec.Raw(raw)}, turns=routes.Turns.CHAT)
    question = tokenize.question(Form.MESSAGES, MODEL, prompt, Texts(pieces=("",)))
    assert question is not None
    assert raw in question.body


@pytest.mark.parametrize(
    ("form", "answer", "count"),
    [
        (
            Form.MESSAGES,
            b'{"count":5,"max_model_len":2048,"tokens":[320,668,12,281,307],"token_strs":null}',
            5,
        ),
        (Form.MESSAGES, b'{"count":2,"tokens":[320,668],"token_strs":["def","\xc4\xa0read"]}', 2),
        (Form.PROMPT, b'{"tokens":[1,2],"count":2,"max_model_len":-1}', 2),
        (Form.MESSAGES, b'{"count":0}', 0),
        (Form.CONTENT, b'{"tokens":[1, 15043,3186]}', 3),
        (Form.CONTENT, b'{"tokens":[]}', 0),
        (Form.CONTENT, b'{"tokens":[ ]}', 0),
    ],
)
def test_the_count_in_an_answer(form: Form, answer: bytes, count: int) -> None:
    assert tokenize.count(form, answer, 100) == count


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b"{}",
        b"<html>",
        b'{"count":null,"tokens":null}',
        b'{"count":"5","tokens":"[5]"}',
        b'{"count":5.0,"tokens":{"a":[1]}}',
        b'{"count":true,"tokens":true}',
        b'{"count":-1,"tokens":-1}',
        b'{"count":101,"tokens":[' + b"1," * 100 + b"1]}",
        b'{"count":100000000000000000000000000000000,"tokens":5}',
        b'{"count":[2,3],"tokens":[{"id":1,"piece":"a"}]}',
        b'{"count":5',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"count":' + b"[" * 100_000,
    ],
)
def test_an_answer_without_a_count_that_can_be(form: Form, answer: bytes) -> None:
    with pytest.raises(Unusable):
        tokenize.count(form, answer, 100)


@given(answer=st.binary(max_size=80), form=st.sampled_from(Form))
def test_any_answer_is_a_count_or_is_not(answer: bytes, form: Form) -> None:
    with contextlib.suppress(Unusable):
        assert 0 <= tokenize.count(form, answer, 100) <= 100
