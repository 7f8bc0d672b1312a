"""A prompt's blocks: what makes two prompts alike, and what does not."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes
from envoy_extproc.openai.prompt import BlockRule, Prompt, chain, render

RULE = BlockRule(tokens=4, most=1000)
MODEL = "llama-3-8b"
LONG = "All happy families are alike; each unhappy family is unhappy in its own way. "


def hashes(
    body: bytes | dict[str, Any],
    path: str = "/v1/chat/completions",
    *,
    rule: BlockRule = RULE,
    model: str = MODEL,
) -> Sequence[int]:
    """Of a request body that names the model."""
    raw = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    route = routes.find(path)
    assert route is not None
    _, prompt = openai_request.read(raw, route)
    return () if prompt is None else prompt.hashes(rule, model)


def text_of(**members: Any) -> bytes:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()}
    return render(raw, 10**6)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many blocks, from the first one on."""
    count = 0
    for mine, yours in zip(one, other, strict=False):
        if mine != yours:
            break
        count += 1
    return count


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"for":"it"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "a": 1}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [user(LONG)]}, {"messages": [{"content": LONG, "role": "user"}]}),
        ({"messages": [user(LONG)]}, {"temperature": 1, "messages": [user(LONG)], "stream": True}),
        ({"messages": [user(LONG)]}, {"messages": [user([{"type": "text", "text": LONG}])]}),
        (
            {"messages": [user(LONG)]},
            {"messages": [user([{"text": LONG[:20], "type": "text"}, {"type": "text", "text": LONG[20:]}])]},
        ),
        ({"messages": [user(LONG)]}, {"messages": [user(LONG, name=None, tool_calls=[])]}),
        (
            {"messages": [user([{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}])]},
            {"messages": [user([{"type": "text", "text": LONG}])]},
        ),
        (
            {"messages": [user(LONG)], "tools": [TOOL]},
            {
                "tools": [
                    {
                        "function": {"parameters": {"a": 1, "type": "object"}, "name": "look"},
                        "type": "function",
                    }
                ],
                "messages": [user(LONG)],
            },
        ),
        ({"messages": [user(LONG)], "tools": []}, {"messages": [user(LONG)], "tools": None}),
        (
            {"messages": [user(LONG)], "tools": [TOOL]},
            {"messages": [user(LONG)], "tools": [TOOL | {"cache_control": {"type": "ephemeral"}}]},
        ),
        (
            {"messages": [user(LONG)]},
            {"messages": [user([{"type": "text", "text": LONG, "annotations": []}], id="msg_1")]},
        ),
    ],
)
def test_prompts_that_are_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert hashes(one) == hashes(other) != ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([user(LONG)], [{"role": "system", "content": LONG}]),
        ([user(LONG)], [user("x" + LONG)]),
        ([user(LONG[:40]), user(LONG[40:])], [user(LONG)]),
        ([user([image("http://a/1.png"), LONG])], [user([image("http://a/2.png"), LONG])]),
        (
            [user([image("data:image/png;base64,AAAA")] * 9)],
            [user([image("data:image/png;base64,AAAB")] * 9)],
        ),
        (
            [{"role": "assistant", "tool_calls": [CALL]}],
            [{"role": "assistant", "tool_calls": [CALL | {"type": "x"}]}],
        ),
        (
            [user([{"type": "tool_result", "content": LONG}])],
            [user([{"type": "tool_result", "content": "?" + LONG}])],
        ),
        ([user(LONG), user("b")], [user("b"), user(LONG)]),
        ([user(LONG, name="ann")], [user(LONG, name="bob")]),
        ([{"role": "system", "content": LONG}], [{"role": "developer", "content": LONG}]),
        (
            [user([{"type": "file", "file": {"file_id": "file-1"}}, LONG])],
            [user([{"type": "file", "file": {"file_id": "file-2"}}, LONG])],
        ),
        (
            [user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}])],
            [user([{"type": "input_audio", "input_audio": {"data": "AAAB", "format": "wav"}}])],
        ),
        (
            [{"role": "assistant", "audio": {"id": "audio_1"}}, user(LONG)],
            [{"role": "assistant", "audio": {"id": "audio_2"}}, user(LONG)],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {"for": LONG}}],
                }
            ],
            [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "1", "name": "look", "input": {"for": LONG[::-1]}}
                    ],
                }
            ],
        ),
        # what a client writes is no mark of ours
        ([user("a"), {"role": "assistant", "content": LONG}], [user(f"a\x1eassistant\x1f{LONG}")]),
    ],
)
def test_prompts_that_are_not_alike(one: list[Any], other: list[Any]) -> None:
    mine, yours = hashes({"messages": one}), hashes({"messages": other})
    assert mine
    assert yours
    assert mine != yours


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_an_image_counts_as_many_tokens_as_it_is_worth(size: int) -> None:
    asked = hashes({"messages": [user([image("x" * size), {"type": "text", "text": "What is it?"}])]})
    assert len(asked) == (1024 + len("-user--What is it?")) // 16  # 256 tokens, and the text around
    other = hashes({"messages": [user([image("y" * size), {"type": "text", "text": "What is it?"}])]})
    assert alike(asked, other) == 0


def test_what_an_assistant_said_with_a_tool_is_as_long_as_it_is() -> None:
    def turns(text: str) -> list[Any]:
        part = {"type": "tool_use", "id": "1", "name": "write", "input": {"text": text}}
        return [{"role": "assistant", "content": [part]}]

    one, other = hashes({"messages": turns(LONG * 9)}), hashes({"messages": turns(LONG * 9 + "x")})
    assert len(one) > len(LONG * 9) // 16
    assert alike(one, other) >= len(LONG * 9) // 16


KEPT = "previous_response_id"


@pytest.mark.parametrize(
    ("one", "other", "begin"),
    [
        ({KEPT: "resp_1"}, {KEPT: "resp_2"}, True),
        ({KEPT: "resp_1"}, {}, True),
        ({"conversation": "conv_1"}, {"conversation": {"id": "conv_2"}}, True),
        ({KEPT: "resp_1", "instructions": "x" + LONG}, {KEPT: "resp_1"}, False),
    ],
)
def test_what_an_engine_keeps_of_a_conversation_is_part_of_it(
    one: dict[str, Any], other: dict[str, Any], begin: bool
) -> None:
    said = {"instructions": LONG * 2, "input": "go on " * 20}
    mine, yours = (hashes(said | each, "/v1/responses") for each in (one, other))
    assert mine[-1] != yours[-1]
    assert (alike(mine, yours) > 0) is begin
    again = hashes(said | one, "/v1/responses")
    assert again == mine


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"type": "message", "role": "user", "content": LONG}, {"role": "user", "content": LONG}, True),
        ({"type": "item_reference", "id": "msg_1"}, {"type": "item_reference", "id": "msg_2"}, False),
        (
            {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call", "id": "fc_2", "call_id": "1", "name": "look", "arguments": "{}"},
            True,
        ),
        (
            {"type": "function_call_output", "call_id": "1", "output": LONG},
            {"type": "function_call_output", "call_id": "1", "output": LONG[::-1]},
            False,
        ),
    ],
)
def test_items_of_the_responses_api(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    mine, yours = (hashes({"input": [each, user(LONG)]}, "/v1/responses") for each in (one, other))
    assert (mine == yours != ()) is same


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/tokenize", {"prompt": LONG}),
        ("/v1/messages/count_tokens", {"messages": [user(LONG)]}),
        ("/detokenize", {"tokens": list(range(100))}),
    ],
)
def test_what_is_only_counted_leaves_nothing_in_a_cache(path: str, members: dict[str, Any]) -> None:
    assert hashes(members, path) == ()


@pytest.mark.parametrize(
    ("path", "members", "same"),
    [
        (
            "/v1/messages",
            {"system": LONG, "messages": [user(LONG)]},
            [{"role": "system", "content": LONG}, user(LONG)],
        ),
        (
            "/v1/messages",
            {"system": [{"type": "text", "text": LONG}], "messages": [user(LONG)]},
            [{"role": "system", "content": LONG}, user(LONG)],
        ),
        (
            "/v1/responses",
            {"instructions": LONG, "input": LONG},
            [{"role": "system", "content": LONG}, user(LONG)],
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}], "id": "msg_1"}]},
            [user(LONG)],
        ),
        ("/v1/embeddings", {"input": [LONG, LONG]}, [user(LONG), user(LONG)]),
    ],
)
def test_every_api_says_it_in_its_own_words(path: str, members: dict[str, Any], same: list[Any]) -> None:
    assert hashes(members, path) == hashes({"messages": same}) != ()


@pytest.mark.parametrize(
    ("prompt", "rendered"),
    [
        ("abc", b"abc"),
        (["abc"], b"abc"),
        (["abc", "d"], b"abc\xffd"),
        ([1, 258], b"\x01\0\0\0\x02\x01\0\0"),
        ([[1], [2]], b"\x01\0\0\0\xff\x02\0\0\0"),
        ([], b""),
        (None, b""),
        (7, b"7"),
        ([-1], b"-1"),
        ([2**32], b"4294967296"),
    ],
)
def test_completions(prompt: Any, rendered: bytes) -> None:
    assert text_of(prompt=prompt) == rendered


def test_what_comes_first() -> None:
    rendered = text_of(messages=[user("u")], system="s", tools=["t"])
    assert rendered == b'\xff["t"]\xffsystem\xfes\xffuser\xfeu'


@pytest.mark.parametrize("change", ["model", "salt", "seed"])
def test_models_salts_and_seeds_keep_prompts_apart(change: str) -> None:
    members: dict[str, Any] = {"messages": [user(LONG)]}
    known = hashes(members)
    if change == "model":
        other = hashes(members, model="lora-1")
    elif change == "salt":
        other = hashes(members | {"cache_salt": "a"})
    else:
        other = hashes(members, rule=BlockRule(tokens=4, most=1000, seed=1))
    assert len(other) == len(known) > 0
    assert not set(other) & set(known)


@pytest.mark.parametrize(
    ("length", "blocks"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (48, 3), (160, 3)]
)
def test_whole_blocks_count_up_to_a_bound(length: int, blocks: int) -> None:
    assert len(chain(b"x" * length, BlockRule(tokens=4, most=3))) == blocks


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model":"m","messages":[{"role":"user","content":NaN}]}',
        b'{"model":"m","messages":[{"role":"user","content":1e999}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m","messages":{"role":["user"],"content":{"a":1}}}',
        b'{"model":"m","messages":[1,null,"x",true,[],{}],"tools":7}',
        b'{"model":"m","messages":null}',
    ],
)
def test_odd_bodies_harm_nobody(body: bytes) -> None:
    hashes(body)


def test_a_request_without_a_prompt_has_none() -> None:
    assert hashes({}) == ()


def test_the_text_is_let_go_once_it_is_read() -> None:
    raw = msgspec.Raw(json.dumps(LONG).encode())
    prompt = Prompt({"prompt": raw})
    before = prompt.was_read
    first = prompt.hashes(RULE, MODEL)
    assert (before, prompt.was_read) == (False, True)
    assert prompt.hashes(RULE, MODEL) is first


@pytest.mark.parametrize("turns", [3, 30_000])
def test_long_conversations_are_read_as_far_as_they_are_hashed(turns: int) -> None:
    said = [user(f"{number}: {LONG}") for number in range(turns)]
    rule = BlockRule(tokens=4, most=14)
    assert hashes({"messages": said}, rule=rule) == hashes({"messages": said[:3]}, rule=rule)


@pytest.mark.parametrize(
    "prompt",
    [
        [7] * 600_000,
        "x" * 2_000_000,
        "a,[{" * 500_000,
        [[7, 8] * 300_000],
        [[7]] * 600_000,
        ["ab" * 10] * 90_000,
    ],
)
def test_long_prompts_are_read_like_short_ones(prompt: Any) -> None:
    short = prompt[:1000] if len(prompt) > 1 else [prompt[0][:1000]]
    rule = BlockRule(tokens=4, most=10)
    long = hashes({"prompt": prompt}, "/v1/completions", rule=rule)
    assert len(long) == 10
    assert long == hashes({"prompt": short}, "/v1/completions", rule=rule)


MANY = 5_000_000  # bytes


@pytest.mark.parametrize("name", ["messages", "tools"])
@pytest.mark.parametrize(
    ("before", "value", "behind"),
    [
        (b"[", b"{}", b"]"),
        (b"[", b'""', b"]"),
        (b'[{"role":"user","content":[', b"{}", b"]}]"),
        (b'[{"role":"user","content":{"a":[', b'{"b":[]}', b"]}}]"),
        (b'{"a":[', b"[null]", b"]}"),
    ],
)
def test_what_would_take_many_times_its_size_is_not_built(
    name: str, before: bytes, value: bytes, behind: bytes
) -> None:
    raw = msgspec.Raw(before + b",".join([value] * (MANY // len(value))) + behind)
    tracemalloc.start()
    try:
        assert not Prompt({name: raw}).hashes(RULE, MODEL)
        assert tracemalloc.get_traced_memory()[1] < 6 * MANY  # copies of the text
    finally:
        tracemalloc.stop()


def test_images_are_long_and_few() -> None:
    said = [user([image("x,[{" * 500_000)])]
    assert len(hashes({"messages": said})) > 0


TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=40)},
        optional={
            "tool_calls": st.just([CALL]),
            "name": st.text(max_size=5),
        },
    ),
    max_size=8,
)


WRITTEN = st.text(
    st.sampled_from("a\0\x1d\x1e\x1f\x7f\xfd\xfe\xff") | st.characters(exclude_categories=["Cs"])
)


@given(st.lists(st.tuples(WRITTEN, WRITTEN), max_size=4))
def test_nothing_that_is_written_is_taken_for_a_mark(said: list[tuple[str, str]]) -> None:
    """Each turn begins with a byte, and so does its text, that no text has; so conversations that differ look unlike."""
    rendered = text_of(messages=[{"role": role, "content": text} for role, text in said])
    turns = [tuple(turn.split(b"\xfe")) for turn in rendered.split(b"\xff")[1:]]
    assert turns == [(role.encode(), text.encode()) for role, text in said]


@given(st.lists(WRITTEN, min_size=1, max_size=4))
def test_texts_that_are_completed_together_are_kept_apart(texts: list[str]) -> None:
    assert text_of(prompt=texts).split(b"\xff") == [text.encode() for text in texts]


@given(TURNS, st.integers(0, 8))
def test_a_conversation_begins_as_it_did_a_turn_ago(turns: list[Any], before: int) -> None:
    whole, part = hashes({"messages": turns}), hashes({"messages": turns[:before]})
    assert alike(whole, part) == len(part)


@given(TURNS, st.randoms(use_true_random=False))
def test_spelling_makes_no_difference(turns: list[Any], rng: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in rng.sample(list(value), len(value))}
        return [shuffled(each) for each in value] if isinstance(value, list) else value

    spelled = {"messages": shuffled(turns), "model": MODEL}
    other = json.dumps(spelled, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode(
        "utf-8", "replace"
    )
    assert hashes(other) == hashes({"messages": turns})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=4)
        ),
        max_leaves=20,
    ),
    st.sampled_from(["messages", "tools", "system", "input", "prompt"]),
)
def test_anything_can_be_rendered(value: Any, name: str) -> None:
    assert text_of(**{name: value}) == text_of(**{name: value})
