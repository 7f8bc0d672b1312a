"""Streams and documents of every API through both lanes: the same bytes, the same books."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.test_captures import cut, raw
from tests.support import captures, formats
from tests.support.canned import Answer, document, stream
from tests.support.lanes import LANES, Lanes, Received, lanes

STRIDE = 41  # bytes between two cuts; the shifts from 0 to here together cut at every byte
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"

MEDIA = {
    "media: a transcription": "/v1/audio/transcriptions",
    "media: speech": "/v1/audio/speech",
    "media: sound": RESPONSES,
    "media: a picture": "/v1/images/generations",
    "media: a picture that was edited": "/v1/images/edits",
}


def path_of(name: str) -> str:
    """Where an answer of `formats` is asked for."""
    if name.startswith(("messages", "recorded: messages")):
        return MESSAGES
    if name.startswith(("responses", "recorded: responses")):
        return RESPONSES
    return next(path for prefix, path in reversed(MEDIA.items()) if name.startswith(prefix))


DOCUMENTS = {
    "messages": MESSAGES,
    "cached tokens of a message": MESSAGES,
    "a message without usage": MESSAGES,
    "an error of Anthropic": MESSAGES,
    "responses": RESPONSES,
    "a response without usage": RESPONSES,
    "a response that failed": RESPONSES,
    "rerank": "/v1/rerank",
    "a total alone": "/v2/rerank",
    "an array": "/rerank",
    "score": "/v1/score",
    "pooling": "/pooling",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "input and output tokens": "/v1/audio/transcriptions",
    "a transcription told in seconds": "/v1/audio/transcriptions",
    "a transcription without usage": "/v1/audio/translations",
}
NOT_READ = ("tokenize", "detokenize")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lanes]:
    async with lanes(tmp_path_factory.mktemp("lanes-apis")) as ready:
        yield ready


def pieces(text: bytes, size: int) -> list[bytes]:
    return [text[at : at + size] for at in range(0, len(text), size)]


async def check(both: Lanes, answer: formats.Answer, received: Sequence[Received]) -> None:
    for each in received:
        assert (each.status, each.body) == (200, answer.body)
    for report in await both.reports(received):
        check_report(answer, report)


def check_report(answer: formats.Answer, report: Mapping[str, Any]) -> None:
    whole = answer.done and answer.error is None
    assert report["outcome"] == ("success" if whole else "error")
    wrong = "error-in-answer" if answer.error is not None else "no-done"
    assert report["error"] == (None if whole else wrong)
    if answer.usage is None:
        assert report["usage_source"] == "estimated"
        by_length = answer.text // 4
        shared = by_length > 2 * answer.tokens  # several tokens to an event
        assert report["gen_ai.usage.output_tokens"] == (by_length if shared else answer.tokens)
        return
    assert report["usage_source"] == "reported"
    assert report["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
    assert report["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens


@pytest.mark.parametrize("name", formats.STREAMS)
async def test_stream(both: Lanes, name: str) -> None:
    """An event a write, as engines do; all in one; and in pieces that end anywhere."""
    answer = formats.STREAMS[name]
    ways: list[Answer] = [
        stream(*answer.events),
        stream(answer.body),
        stream(*pieces(answer.body, 13)),
        stream(*pieces(answer.body, 1000)),
    ]
    received = await both.ask_all(ways, path_of(name), at_once=4, stream=True)
    await check(both, answer, received)


@pytest.mark.parametrize("name", ["messages_stream", "responses_stream"])
async def test_stream_cut_at_every_byte(both: Lanes, name: str) -> None:
    answer, size = formats.RECORDED[name], len(raw(name))
    cuts = [range(shift, size, STRIDE) for shift in range(1, STRIDE + 1)]
    assert set(itertools.chain(*cuts)) == set(range(1, size))
    answers = [cut(name), *(cut(name, *positions) for positions in cuts)]
    received = await both.ask_all(answers, path_of(f"recorded: {name}"), at_once=21, stream=True)
    await check(both, answer, received)
    assert {each.body for each in received} == {captures.body(name)}


@pytest.mark.parametrize("kind", ["messages", "responses"])
async def test_many_tokens(both: Lanes, kind: str) -> None:
    """More than the script notes one by one; no usage, so what was counted is told."""
    make = {
        "messages": lambda number: formats.text(f"w{number}"),
        "responses": lambda number: formats.word(f"w{number}", number),
    }[kind]
    end = {"messages": formats.STOP, "responses": formats.whole("completed", usage=None)}[kind]
    answer = formats.Answer((*map(make, range(1, 301)), end), tokens=300, text=300)
    ways = [stream(*answer.events), stream(answer.body), stream(*pieces(answer.body, 777))]
    received = await both.ask_all(
        ways, {"messages": MESSAGES, "responses": RESPONSES}[kind], at_once=3, stream=True
    )
    await check(both, answer, received)


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_document(both: Lanes, name: str) -> None:
    answer = formats.DOCUMENTS[name]
    asked = [both.ask(document(answer.body), DOCUMENTS[name]) for _ in range(2)]
    received = await asyncio.gather(*asked)
    if name in NOT_READ:
        assert [each.body for each in received] == [answer.body] * 2
        assert {report["usage_source"] for report in await both.reports(received)} == {"none"}
    else:
        await check(both, answer, received)


async def test_nothing_is_left_over(both: Lanes) -> None:
    for lane in LANES:
        gateway = both.gateways[lane]
        assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
        assert await gateway.metric("envoy_extproc_unexpected_messages_total") == 0
        assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
    log = both.gateways["native"].config_file().parent / "envoy.log"
    assert "script" not in log.read_text("utf-8")
