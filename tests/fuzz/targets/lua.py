"""`native.lua` against the Python readers.

Any bytes, as a stream or as a JSON answer: the script does not fail, the cuts do not show in what is delivered, and without
hiding nothing changes. And answers as engines write them, made from the input: there both lanes must deliver and see the
same. The line between the two is the one `native.lua` itself draws: it finds places in JSON and does not judge it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from envoy_extproc.openai.answer import JsonReader, Reader, StreamReader, engine_error
from tests.fuzz.draw import Draw, bounded, cut, seed
from tests.fuzz.targets import reading
from tests.support import captures
from tests.support.lua import JSON, STREAM, Script, Told

CHOICES = 4
LIMITS = (1_048_576, 1_048_576, 300, 40)
WORDS = reading.WORDS
_FACTS = {
    "done": "done",
    "tokens": "token_events",
    "removed": "removed_events",
    "oversized": "oversized",
    "unreadable": "unreadable",
}
_script = Script()

Says = tuple[Callable[[], dict[str, Any]], ...]


def check(data: bytes) -> None:
    """Raw or made, a stream or a document."""
    draw = Draw(data)
    form, limit, hide, number = draw.byte() % 4, draw.choose(LIMITS), draw.flag(), draw.byte()
    (_raw_stream, _raw_document, _made_stream, _made_document)[form](draw, limit, hide, number)


def _raw_stream(draw: Draw, limit: int, hide: bool, number: int) -> None:
    text = draw.text()
    told = _told(cut(text, number), STREAM, limit, hide)
    assert told.body == _told([text], STREAM, limit, hide).body, "the cuts show in what is delivered"
    assert hide or told.body == text


def _raw_document(draw: Draw, limit: int, hide: bool, number: int) -> None:
    text = draw.text()
    assert _told(cut(text, number), JSON, limit, hide).body == text


def _made_stream(draw: Draw, limit: int, hide: bool, number: int) -> None:
    end = draw.choose((b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r"))
    say = draw.choose((_chat_event, _chat_event, _message_event, _response_event))
    events = [_written(say(draw, place), draw) + end for place in range(draw.byte() % 12)]
    text = b"".join(events) + draw.choose((b"data: [DONE]" + end, b"", b": ping\n\n", b"data: {"))
    pieces = [piece for piece in events if piece] if number == 0 else cut(text, number)
    text = b"".join(pieces)
    reader = StreamReader(hide_usage=hide, max_event_bytes=limit)
    delivered = reading.played(reader, pieces, limit)
    told = _told(pieces, STREAM, limit, hide)
    assert told.body == delivered, f"Lua {told.body!r}, Python {delivered!r}, of {pieces!r}"
    _check_facts(told, reader, pieces)


def _made_document(draw: Draw, _: int, hide: bool, number: int) -> None:
    members = {**_chat_event(draw, 0)}
    text = json.dumps(members, ensure_ascii=draw.flag()).encode()
    reader = JsonReader(max_body_bytes=1_048_576)
    reading.played(reader, [text], 1_048_576)
    told = _told(cut(text, number), JSON, 1_048_576, hide)
    assert told.body == text
    if reader.seen.usage is None:
        _check_facts(told, reader, [text])
    else:
        assert _usage(told) == (reader.seen.usage.prompt_tokens, reader.seen.usage.completion_tokens)


def _told(pieces: list[bytes], headers: Mapping[str, str], limit: int, hide: bool) -> Told:
    with bounded():
        told = _script.respond(pieces, headers=headers, limit=limit, hide=hide)
    assert told.answer is not None
    assert not told.answer["failure"], f"the script failed on {pieces!r}"
    return told


def _check_facts(told: Told, reader: Reader, pieces: list[bytes]) -> None:
    seen = reader.seen
    assert told.answer is not None
    theirs = {name: told.answer[name] for name in _FACTS}
    ours = {name: getattr(seen, attribute) for name, attribute in _FACTS.items()}
    assert theirs == ours, f"Lua {theirs}, Python {ours}, of {pieces!r}"
    usage = None if seen.usage is None else (seen.usage.prompt_tokens, seen.usage.completion_tokens)
    assert _usage(told) == usage, f"Lua {told.usage}, Python {usage}, of {pieces!r}"
    assert (told.error is None) == (seen.error is None)
    if seen.error is not None and json.dumps(told.error).isascii():
        assert engine_error(told.error.get("error", told.error)).code == seen.error.code


def _usage(told: Told) -> tuple[int, int] | None:
    if told.usage is None:
        return None
    halves = told.usage if isinstance(told.usage, list) else [told.usage]
    if len(halves) == 1 and isinstance(told.usage, list):
        return None
    both: dict[str, int] = {}
    for half in halves:
        both |= half
    return (
        both.get("prompt_tokens", both.get("input_tokens", 0)),
        both.get("completion_tokens", both.get("output_tokens", 0)),
    )


# -- answers as engines write them -------------------------------------------------------------------------------------

_TEXTS = (
    "x",
    "",
    " word",
    '"',
    "\\",
    "\n",
    "é",
    "日本",
    "\U0001f600",
    '"usage":null}',
    "}]}",
    "data: ",
    "\r",
)
_ERRORS: tuple[Any, ...] = ({"message": "boom", "type": "t", "code": 503}, "boom", {"code": "400"}, {})


def _usage_of(draw: Draw, first: str = "prompt_tokens", second: str = "completion_tokens") -> dict[str, int]:
    return {first: draw.byte(), second: draw.byte()}


def _written(event: object, draw: Draw) -> bytes:
    name = draw.choose((b"", b"", b"", b"event: x\n", b": c\nid: 1\n"))
    separators = draw.choose(((",", ":"), (",", ":"), (", ", ": ")))
    data = json.dumps(event, ensure_ascii=draw.flag(), separators=separators)
    return name + b"data: " + data.encode()


def _chat_event(draw: Draw, _: int) -> dict[str, Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    choices: list[Any] = [{"index": 0, **_brought(draw), "finish_reason": None}]
    says: Says = (
        lambda: {**head, "choices": choices},
        lambda: {**head, "choices": choices},
        lambda: {**head, "choices": choices, "usage": None},
        lambda: {"usage": None, **head, "choices": choices},
        lambda: {**head, "choices": choices, "usage": _usage_of(draw)},
        lambda: {**head, "choices": [], "usage": _usage_of(draw)},
        lambda: {**head, "choices": [], "usage": None},
        lambda: {"error": draw.choose(_ERRORS)},
        lambda: {"object": "error", "message": draw.choose(_TEXTS), "code": 400},
        lambda: {**head, "choices": None},
    )
    return draw.choose(says)()


def _brought(draw: Draw) -> dict[str, Any]:
    text = draw.choose(_TEXTS)
    says: Says = (
        lambda: {"delta": {"content": text}},
        lambda: {"delta": {"content": text}},
        lambda: {"delta": {"role": "assistant", "content": text}},
        lambda: {"delta": {"content": None, "reasoning": text}},
        lambda: {"delta": {"reasoning_content": text}},
        lambda: {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}},
        lambda: {"text": text, "logprobs": None},
        lambda: {"message": {"role": "assistant", "content": text}},
        lambda: {"delta": {}},
    )
    return draw.choose(says)()


def _message_event(draw: Draw, number: int) -> dict[str, Any]:
    text = draw.choose(_TEXTS)
    usage = partial(_usage_of, draw, "input_tokens", "output_tokens")
    if number == 0:
        return {"type": "message_start", "message": {"id": "m", "content": [], "usage": usage()}}
    says: Says = (
        lambda: {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": text},
        },
        lambda: {"type": "content_block_delta", "index": 0, "delta": {"type": "x", "thinking": text}},
        lambda: {"type": "content_block_delta", "index": 0, "delta": {"type": "x", "partial_json": text}},
        lambda: {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage()},
        lambda: {"type": "message_stop"},
        lambda: {"type": "ping"},
        lambda: {"type": "error", "error": draw.choose(_ERRORS)},
    )
    return draw.choose(says)()


def _response_event(draw: Draw, number: int) -> dict[str, Any]:
    text = draw.choose(_TEXTS)
    usage = partial(_usage_of, draw, "input_tokens", "output_tokens")
    more = {"sequence_number": number + draw.choose((0, 95)), "item_id": "i"}
    says: Says = (
        lambda: {"type": "response.output_text.delta", "delta": text, **more},
        lambda: {"delta": text, "type": "response.output_text.delta", **more},
        lambda: {"type": "response.function_call_arguments.delta", "delta": text, **more},
        lambda: {"type": "response.created", "response": {"usage": None}, **more},
        lambda: {"type": "response.completed", "response": {"usage": usage()}, **more},
        lambda: {"type": "response.failed", "response": {"error": draw.choose(_ERRORS)}, **more},
    )
    return draw.choose(says)()


def seeds() -> Iterator[bytes]:
    """Recorded answers, and choices at random."""
    for name in (*captures.STREAMS, "messages_stream", "responses_stream"):
        yield seed(0, 0, 1, 3, text=captures.body(name))
    for name in ("chat", "completions", "responses", "messages", "e_embeddings"):
        yield seed(1, 0, 0, 3, text=captures.body(name))
    for form in (2, 3):
        for number in range(8):
            yield bytes((form, 0, number & 1, number, 0, number)) + bytes(
                (37 * place + number * 11) % 256 for place in range(60)
            )
