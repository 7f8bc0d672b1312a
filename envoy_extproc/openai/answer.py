"""Reading what an engine answers: usage, first and last token, errors. And hiding what only our asking added.

One reader an exchange, either for an event stream or for a JSON body; both write what they see into a `Seen`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import msgspec

from envoy_extproc.openai import lenient, splice
from envoy_extproc.openai.request import BYTES_PER_TOKEN
from envoy_extproc.openai.sse import Decoder, Unparsed, data_of


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one exchange.

    Attributes:
        prompt_tokens: OpenTelemetry's ``gen_ai.usage.input_tokens``.
        completion_tokens: ``gen_ai.usage.output_tokens``, over all choices.
        cached_tokens: prompt tokens that the engine's prefix cache held; None where it does not say.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


class EngineError(msgspec.Struct, frozen=True, kw_only=True):
    """An error the engine told of in a body, perhaps in the middle of a 200.

    Attributes:
        message: the engine's sentence.
        type: the engine's error type.
        code: an HTTP-like status, 500 where the engine gave none that is a number.
    """

    message: str = ""
    type: str = ""
    code: int = 500


class Seen:
    """What has been seen of an answer so far.

    Attributes:
        usage: as the engine last reported it; None until then.
        first_token_at: when the first content, reasoning or tool call came, in the clock of `feed`; None until then.
        last_token_at: when the last such one came.
        token_events: how many pieces of text, reasoning or tool call came, each choice for itself.
        text_length: characters of text in them.
        error: the last error told of in the body.
        done: whether ``[DONE]``, or the end of a JSON body that could be read, came.
        oversized: events or bodies beyond the limit, passed unparsed.
        unreadable: events or bodies that are not JSON of a shape known.
        removed_events: usage events taken out.
    """

    __slots__ = (
        "done",
        "error",
        "first_token_at",
        "last_token_at",
        "oversized",
        "removed_events",
        "text_length",
        "token_events",
        "unreadable",
        "usage",
    )

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.token_events = 0
        self.text_length = 0
        self.error: EngineError | None = None
        self.done = False
        self.oversized = 0
        self.unreadable = 0
        self.removed_events = 0

    @property
    def completion_tokens_estimate(self) -> int:
        """Tokens guessed from what came.

        Engines write an event a token as long as they are not hurried. Where the text is twice as long as that allows,
        several tokens share an event, and the length of the text is the better guess.
        """
        by_length = self.text_length // BYTES_PER_TOKEN
        return by_length if by_length > 2 * self.token_events else self.token_events


class Reader(Protocol):
    """Reads one body as it comes."""

    seen: Seen

    def feed(self, data: bytes, now: float) -> bytes | None:
        """Takes what came at `now`; returns what to pass on instead, None to pass it on as it is."""

    def finish(self, now: float) -> bytes:
        """Takes the end of the body; returns what is still to be passed on."""

    @property
    def holds_back(self) -> bool:
        """Whether bytes wait here for more: they can only go out with what `feed` returns next."""

    def let_go(self) -> None:
        """From the next `feed` on nothing is held back."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = msgspec.Raw(b"null")  # Raw makes no union


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None


class _Body(msgspec.Struct):
    """An event or a JSON answer: the members that count, at the top level and nowhere else."""

    choices: list[_Choice] | None = None
    usage: _Usage | msgspec.UnsetType | None = msgspec.UNSET
    error: Any = None
    object: Any = None
    message: Any = None
    type: Any = None
    code: Any = None


_MOST_TOKENS = 2**63
_BODY = msgspec.json.Decoder(_Body)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class StreamReader:
    """Reads a stream of server-sent events.

    Args:
        hide_usage: whether usage is in the stream only because this server asked for it.
        max_event_bytes: an event beyond this passes unparsed.
    """

    __slots__ = ("_decoder", "_hide_usage", "_letting_go", "seen")

    def __init__(self, *, hide_usage: bool, max_event_bytes: int) -> None:
        self._decoder = Decoder(max_event_bytes)
        self._hide_usage = hide_usage
        self._letting_go = False
        self.seen = Seen()

    @property
    def holds_back(self) -> bool:
        """See `Reader`."""
        return self._hide_usage and bool(self._decoder.pending)

    def let_go(self) -> None:
        """See `Reader`. What is cut off from its event this way is not read."""
        self._letting_go = True

    def feed(self, data: bytes, now: float) -> bytes | None:
        """See `Reader`. Bytes of an event that may have to go are held back until it is whole."""
        decoder = self._decoder
        held = decoder.pending
        events = decoder.feed(data)
        if len(events) == 1 and events[0] is data:  # one event a read, as engines write them
            shown = self._read(data, now)
            return None if shown is data else shown
        changed = False
        kept: list[bytes] = []
        for event in events:
            shown = event if type(event) is Unparsed else self._read(event, now)
            changed = changed or shown is not event
            kept.append(shown)
        self.seen.oversized = decoder.oversized
        if not self._hide_usage or not (changed or held or decoder.pending):
            return None
        if self._letting_go:
            kept.append(decoder.finish())
        return b"".join(kept)

    def finish(self, now: float) -> bytes:
        """See `Reader`. A tail without its empty line is read like an event, and delivered like one."""
        rest = self._decoder.finish()
        shown = self._read(rest, now) if rest else b""
        return shown if self._hide_usage else b""

    def _read(self, event: bytes, now: float) -> bytes:
        data = data_of(event)
        body = self._note(data, now)
        if body is None or body.usage is msgspec.UNSET or not self._hide_usage:
            return event
        if body.usage is None:
            return _without_null_usage(event, data)
        if not body.choices and body.error is None:
            self.seen.removed_events += 1
            return b""
        return event

    def _note(self, data: bytes, now: float) -> _Body | None:
        if not data:
            return None
        if data == b"[DONE]":
            self.seen.done = True
            return None
        try:
            body = _body(data)
        except lenient.Malformed:
            self.seen.unreadable += 1
            return None
        _note_body(self.seen, body, now)
        return body


class JsonReader:
    """Reads a JSON answer; passes everything on as it is.

    Args:
        max_body_bytes: a body beyond this passes unparsed.
    """

    __slots__ = ("_max_body_bytes", "_parts", "_size", "seen")

    def __init__(self, *, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self.seen = Seen()

    @property
    def holds_back(self) -> bool:
        """See `Reader`: it only looks on."""
        return False

    def let_go(self) -> None:
        """See `Reader`."""

    def feed(self, data: bytes, now: float) -> None:
        """See `Reader`."""
        self._size += len(data)
        if self._size <= self._max_body_bytes:
            self._parts.append(data)
        elif not self.seen.oversized:
            self.seen.oversized = 1
            self._parts.clear()

    def finish(self, now: float) -> bytes:
        """See `Reader`."""
        text = b"".join(self._parts)
        self._parts.clear()
        if self.seen.oversized or not text:
            return b""
        try:
            body = _body(text)
        except lenient.Malformed:
            self.seen.unreadable += 1
            return b""
        _note_body(self.seen, body, now)
        self.seen.first_token_at = self.seen.last_token_at = None  # a JSON answer comes at once
        self.seen.done = True
        return b""


def _body(text: bytes) -> _Body:
    """The members that count.

    Raises:
        Malformed: it is no JSON object.
    """
    try:
        return lenient.decode(_BODY, text)
    except lenient.Mismatch:
        return _mended(lenient.decode(_OBJECT, text))


def _mended(members: dict[str, Any]) -> _Body:
    """An object with a member of a type nobody expected: that one counts for what can be made of it, the others stay."""
    body = _Body(**{name: members.get(name) for name in ("error", "object", "message", "type", "code")})
    usage = members.get("usage", msgspec.UNSET)
    if usage is None or isinstance(usage, dict):
        body.usage = None if usage is None else _mended_usage(usage)
    body.choices = [_choice(each) for each in msgspec.convert(members.get("choices") or [], list)]
    return body


def _mended_usage(members: dict[str, Any]) -> _Usage:
    """Usage with a member of a type nobody expected, which counts as missing if it is no whole number after all."""
    details = members.get("prompt_tokens_details")
    cached = _number(details.get("cached_tokens")) if isinstance(details, dict) else None
    return _Usage(
        prompt_tokens=_number(members.get("prompt_tokens")),
        completion_tokens=_number(members.get("completion_tokens")),
        prompt_tokens_details=_Details(cached),
    )


def _number(value: object) -> int | None:
    """A whole number, also one written ``7.0`` or ``"7"``."""
    with suppress(lenient.Mismatch):
        return msgspec.convert(value, int, strict=False)
    return None


def _choice(value: object) -> _Choice:
    try:
        return msgspec.convert(value, _Choice)
    except lenient.Mismatch:
        return _Choice(text=str(value))  # it brings something, about so long


def _note_body(seen: Seen, body: _Body, now: float) -> None:
    for choice in body.choices or ():
        length = _text_length(choice)
        if length is not None:
            seen.token_events += 1
            seen.text_length += length
            seen.last_token_at = now
            if seen.first_token_at is None:
                seen.first_token_at = now
    usage = body.usage
    if isinstance(usage, _Usage):
        details = usage.prompt_tokens_details
        seen.usage = Usage(
            prompt_tokens=_count(usage.prompt_tokens) or 0,
            completion_tokens=_count(usage.completion_tokens) or 0,
            cached_tokens=None if details is None else _count(details.cached_tokens),
        )
    if body.error is not None:
        seen.error = engine_error(body.error)
    elif body.object == "error":
        seen.error = engine_error({"message": body.message, "type": body.type, "code": body.code})


def note_told(seen: Seen, text: bytes, now: float) -> None:
    """Notes the usage or the error in `text`, an event that somebody else has read for its tokens already."""
    try:
        body = _body(text)
    except lenient.Malformed:
        seen.unreadable += 1
        return
    body.choices = None
    _note_body(seen, body, now)


def _count(tokens: int | None) -> int | None:
    """A number of tokens; None for one that cannot be: nobody has fewer than none, or more than 64 bits hold."""
    return tokens if tokens is not None and 0 <= tokens < _MOST_TOKENS else None


def _text_length(choice: _Choice) -> int | None:
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


def engine_error(error: object) -> EngineError:
    """An ``error`` member of any shape seen in the wild: an object, or a sentence."""
    if not isinstance(error, dict):
        return EngineError(message=str(error))
    code: object = error.get("code")
    if isinstance(code, str) and code.isdecimal():
        code = int(code[:6])
    status = 500 if isinstance(code, bool) or not isinstance(code, int) else code
    return EngineError(
        message=str(error.get("message") or ""), type=str(error.get("type") or ""), code=status
    )


def _without_null_usage(event: bytes, data: bytes) -> bytes:
    start = event.find(data)
    if start < 0:  # data over several lines: left as it is
        return event
    if data.endswith(b',"usage":null}'):
        return b"".join((event[:start], data[:-14], b"}", event[start + len(data) :]))
    member = splice.find(data, "usage")
    if member is None:
        return event
    return event[:start] + splice.remove(data, member) + event[start + len(data) :]
