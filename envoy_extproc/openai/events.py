"""What one event of a stream, or one JSON answer, says of itself: pieces of text, usage, an error, the end.

Nothing here asks which path was called. An event with ``choices`` is chat's or completions', also a transcription's of
vLLM; every other format names its events in a ``type`` at their top, and `_TYPES` is the table of those that count. Of
an event whose type is not there only usage and an error at its top count. A look-alike deeper inside is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Annotated, Any

import msgspec

from envoy_extproc.openai import lenient
from envoy_extproc.openai.request import BYTES_PER_TOKEN
from envoy_extproc.openai.seen import Seen, engine_error
from envoy_extproc.openai.usage import Told, mended


class Delta(msgspec.Struct):
    """What a choice brings, in a stream or as a whole message."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = msgspec.Raw(b"null")  # Raw makes no union


class Choice(msgspec.Struct):
    """One of an answer's choices."""

    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None


class Body(msgspec.Struct):
    """An event or a JSON answer: the members that count, at the top level and nowhere else."""

    choices: list[Choice] | None = None
    usage: Told | msgspec.UnsetType | None = msgspec.UNSET
    error: Any = None
    object: Any = None
    message: Any = None
    type: Any = None
    code: Any = None
    delta: Any = None
    audio: Any = None
    response: Any = None
    text: Any = None
    content: Any = None
    output: Any = None


_ANY = (
    "error",
    "object",
    "message",
    "type",
    "code",
    "delta",
    "audio",
    "response",
    "text",
    "content",
    "output",
)
_BODY = msgspec.json.Decoder(Body)
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_VALUE = msgspec.json.Decoder(msgspec.Raw)
_USAGE = msgspec.json.Decoder(Told)
_HALVES = msgspec.json.Decoder(Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1)])


def decode(text: bytes) -> Body:
    """The members that count.

    Raises:
        Malformed: it is no JSON object.
    """
    try:
        return lenient.decode(_BODY, text)
    except lenient.Mismatch:
        return _mended(lenient.decode(_OBJECT, text))


def is_bare(text: bytes) -> bool:
    """Whether it is JSON, but no object: the array of a tokenizer or of SGLang's rerank, a bare number."""
    if text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return False
    try:
        lenient.decode(_VALUE, text)
    except lenient.Malformed:
        return False
    return True


def is_typed(body: Body) -> bool:
    """Whether it is an event of a format that names its events: no chat's, which asking for usage would change."""
    return body.type is not None and _read_as(body.type) is not None


def note(seen: Seen, body: Body, now: float) -> None:
    """Writes what an event says, which came at `now`, into the books."""
    for choice in body.choices or ():
        length = _length_of_choice(choice)
        if length is not None:
            seen.piece(length, now)
    if isinstance(body.usage, Told):
        seen.told(body.usage)
    if body.error is not None:
        seen.error = engine_error(body.error)
    elif body.object == "error" or body.type == "error":
        seen.error = engine_error({"message": body.message, "type": body.type, "code": body.code})
    if body.type is not None:
        _note_typed(seen, body, now)


def note_document(seen: Seen, body: Body, now: float) -> None:
    """Likewise a JSON answer. Its text is measured where the engine reports no tokens."""
    note(seen, body, now)
    if seen.usage is None:
        for length in _lengths(body):
            seen.piece(length, now)


def note_told(seen: Seen, text: bytes, now: float) -> None:
    """Notes the error in `text`, an event that somebody else has read for its tokens already."""
    try:
        body = decode(text)
    except lenient.Malformed:
        seen.unreadable += 1
        return
    body.choices = None
    note(seen, body, now)


def note_usage(seen: Seen, text: bytes) -> None:
    """Notes usage that somebody else has found: an object, or an array of a message's first half and the second."""
    try:
        if text.startswith(b"["):
            first, *second = lenient.decode(_HALVES, text)
            seen.told_first_half(_told(bytes(first)))
        else:
            second = [msgspec.Raw(text)]
        for each in second:
            seen.told(_told(bytes(each)))
    except lenient.Malformed:
        seen.unreadable += 1


def _told(text: bytes) -> Told:
    try:
        return lenient.decode(_USAGE, text)
    except lenient.Mismatch:
        members = lenient.decode(_OBJECT, text)
    return mended(members)


# -- odd types ---------------------------------------------------------------------------------------------------------


def _mended(members: dict[str, Any]) -> Body:
    """An object with a member of a type nobody expected: that one counts for what can be made of it, the others stay."""
    body = Body(**{name: members.get(name) for name in _ANY})
    usage = members.get("usage", msgspec.UNSET)
    if usage is None or isinstance(usage, dict):
        body.usage = None if usage is None else mended(usage)
    body.choices = [_mended_choice(each) for each in msgspec.convert(members.get("choices") or [], list)]
    return body


def _mended_choice(value: object) -> Choice:
    try:
        return msgspec.convert(value, Choice)
    except lenient.Mismatch:
        return Choice(text=str(value))  # it brings something, about so long


# -- how long a text is ------------------------------------------------------------------------------------------------


def _length_of_choice(choice: Choice) -> int | None:
    """Characters of what a choice brings; None where it brings nothing, as an event with the role alone."""
    if choice.text:
        return len(choice.text)
    delta = choice.delta or choice.message
    if delta is None:
        return None
    text = delta.content or delta.reasoning or delta.reasoning_content or delta.refusal
    if text:
        return len(text)
    if delta.tool_calls or bytes(delta.function_call) != b"null":
        return BYTES_PER_TOKEN  # a piece of a call is a token; how long its JSON is says nothing
    return None


_TEXTS = ("text", "thinking", "refusal")
_CALLS = ("partial_json", "arguments", "input")


def _length_of_part(part: object) -> int | None:
    """Likewise of a part of a message or a response, or of what a message's block grows by."""
    if not isinstance(part, dict):
        return None
    for name in _TEXTS:
        text = part.get(name)
        if isinstance(text, str) and text:
            return len(text)
    if any(part.get(name) not in (None, "") for name in _CALLS):
        return BYTES_PER_TOKEN
    return None


def _lengths(body: Body) -> Iterator[int]:
    """Of each part of a JSON answer without choices: a transcription, a message, a response."""
    if isinstance(body.text, str) and body.text:
        yield len(body.text)
    items = body.output if isinstance(body.output, list) else []
    nested = [
        item["content"] for item in items if isinstance(item, dict) and isinstance(item.get("content"), list)
    ]
    content = body.content if isinstance(body.content, list) else []
    for part in (*content, *items, *(part for parts in nested for part in parts)):
        length = _length_of_part(part)
        if length is not None:
            yield length


# -- events that are named by their type -------------------------------------------------------------------------------


class _As(Enum):
    """What an event is read as."""

    DELTA = auto()  # a piece of text under `delta`, or of sound under `audio`
    BLOCK = auto()  # a piece of a message's block, under `delta`
    START = auto()  # a message's start, with the first half of its usage
    USAGE = auto()  # a message's usage, at the top, which has been read there
    PICTURE = auto()  # a picture that is to become better: no token, but what a user was waiting for
    END = auto()
    RESPONSE = auto()  # the end of a response, which it holds as a whole
    FAILURE = auto()  # likewise


_TYPES = {
    "message_start": _As.START,
    "content_block_delta": _As.BLOCK,
    "message_delta": _As.USAGE,
    "message_stop": _As.END,
    "response.completed": _As.RESPONSE,
    "response.incomplete": _As.RESPONSE,
    "response.failed": _As.FAILURE,
    "transcript.text.done": _As.END,
    "speech.audio.done": _As.END,
    "image_generation.partial_image": _As.PICTURE,
    "image_generation.completed": _As.END,
    "image_edit.partial_image": _As.PICTURE,
    "image_edit.completed": _As.END,
}


def _read_as(kind: object) -> _As | None:
    """By the table, or as a delta, of which the responses API has many."""
    if not isinstance(kind, str):
        return None
    return _TYPES.get(kind) or (_As.DELTA if kind.endswith(".delta") else None)


def _note_typed(seen: Seen, body: Body, now: float) -> None:
    match _read_as(body.type):
        case _As.DELTA:
            _note_length(seen, _length_of_delta(body), now)
        case _As.BLOCK:
            _note_length(seen, _length_of_part(body.delta), now)
        case _As.START:
            seen.told_first_half(_usage_in(body.message))
        case _As.PICTURE:
            seen.came(now)
        case _As.END:
            seen.done = True
        case _As.RESPONSE | _As.FAILURE as ending:
            _note_response(seen, body.response, failed=ending is _As.FAILURE)
        case _As.USAGE | None:
            pass


def _note_length(seen: Seen, length: int | None, now: float) -> None:
    if length is not None:
        seen.piece(length, now)


def _length_of_delta(body: Body) -> int | None:
    """Sound and the pieces of a call count as one token, however long they are."""
    piece = body.audio if body.type == "speech.audio.delta" else body.delta
    if not isinstance(piece, str) or not piece:
        return None
    one = "_call" in body.type or body.type.endswith("audio.delta")
    return BYTES_PER_TOKEN if one else len(piece)


def _note_response(seen: Seen, response: object, *, failed: bool) -> None:
    seen.done = True
    usage = _usage_in(response)
    if usage is not None:
        seen.told(usage)
    if failed:
        error = response.get("error") if isinstance(response, dict) else None
        seen.error = engine_error({} if error is None else error)


def _usage_in(value: object) -> Told | None:
    usage = value.get("usage") if isinstance(value, dict) else None
    return mended(usage) if isinstance(usage, dict) else None
