"""The prompt of a request as a chain of hashes, one a block: prompts that begin alike have hashes that begin alike.

What is hashed is the prompt as a model would read it, not the JSON around it: the tools, then what the system says, then
each turn with its role and its text. So the order of keys, white space and escapes make no difference, and neither does
whether a text stands by itself or as the only part of a list. Images, audio and files stand in it by a digest of what the
request says of them, data or address, as long as 256 tokens: as many as Gemma 3 makes of an image, and others make more. A list of
token ids is hashed as it is. What a client moves about from turn to turn and no model sees (``cache_control``, ids) is not
in it. Of turns that only the engine has (``previous_response_id``) the name is.

    h[0] = H(model, salt)        h[i] = H(h[i - 1], block i)

A hash so stands for all of the prompt up to the end of its block. The rest behind the last whole block is left out: the next
turn would not have it as a block of its own.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from envoy_extproc.openai import lenient
from envoy_extproc.openai.routes import Turns

TOKEN_BYTES = 4
"""Bytes of a token: of English text in the tokenizers of today's models, and of a token id here."""


class Mark(bytes):
    """A piece of a rendered prompt that stands between its texts."""

    __slots__ = ()


class Name(bytes):
    """What a model reads no text of: whose turn it is, which conversation an engine is to go on with."""

    __slots__ = ()


class Digest(bytes):
    """What stands for an image, a sound or a file."""

    __slots__ = ()


class Ids(bytes):
    """Token ids, `TOKEN_BYTES` each."""

    __slots__ = ()


TURN, _PART, _REST = Mark(b"\xff"), Mark(b"\xfe"), Mark(b"\xfd")  # which are in no text, since that is UTF-8
_WHOLE_BYTES = 1_048_576
"""Longer members are read turn by turn, and only as far as they are hashed."""

MOST_VALUES = 200_000
"""Commas and opening brackets of a member outside its texts: with more it is not read. Each makes one value, of a microsecond
and a hundred bytes, while all else waits; a prompt of a million tokens has some thousands."""

_MOST_SEARCHED = 8 * _WHOLE_BYTES
"""Bytes of a member that are searched for texts to tell these from."""

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NUMBERS = b"0123456789[], \t\r\n"

_TEXTS = (None, "text", "input_text", "output_text")  # no set: a client may write anything there
_SAID = ("tool_use", "thinking", "redacted_thinking", "reasoning_text", "summary_text", "refusal")
"""Parts that are text as well, though not under `text` alone; all others are something to look at or to listen to."""

_UNSEEN = frozenset({"annotations", "cache_control", "content", "id", "logprobs", "role", "status"})
"""Members of a message that are rendered by themselves, or that no model sees."""

_FIRST = {"tools": 0, "system": 1, "instructions": 2, "previous_response_id": 3, "conversation": 3}
"""What comes before the turns, and in which order."""

_DIGESTS = 64  # of 16 bytes each, for 256 tokens

_HEAD_BLOCKS = 4
"""256 tokens, by which conversations differ; their later turns have the same."""

_HASH_BITS = 4
"""Taken off each hash: Python keeps an integer of 60 bits in 32 bytes, one of 64 in 48."""

_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])


class BlockRule(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts are cut and hashed; hashes of unlike rules have nothing to do with each other.

    Attributes:
        tokens: of a block. vLLM's has 16; four of them cost a quarter and lose 24 tokens of a match on average.
        most: blocks of one prompt; what is behind them is not looked at.
        seed: of every chain, so that nobody can make up prompts that collide.
    """

    tokens: int = 64
    most: int = 2048
    seed: int = 0


class Prompt:
    """The prompt of one request, not read until somebody asks for its hashes; then its text is let go.

    Args:
        members: the members of the request body that carry the prompt, raw.
        salt: the request's ``cache_salt``: prompts under unlike salts have nothing in common.
        turns: what it is made of.

    Attributes:
        turns: likewise.
    """

    __slots__ = ("_hashes", "_head", "_members", "_salt", "turns")

    def __init__(
        self, members: Mapping[str, msgspec.Raw], salt: object = None, turns: Turns = Turns.NONE
    ) -> None:
        self.turns = turns
        self._members: Mapping[str, msgspec.Raw] | None = members
        self._salt = salt
        self._hashes: Sequence[int] = ()
        self._head = b""

    def hashes(self, rule: BlockRule, model: str | None) -> Sequence[int]:
        """The hash of each whole block, the same sequence for every call: the first one's rule and model count.

        A prompt that cannot be read has none; it is the engine's to refuse.
        """
        members, self._members = self._members, None
        if members is not None:
            start = f"{model or ''}\0{self._salt or ''}".encode("utf-8", "surrogatepass")
            rendered = render(members, rule.most * rule.tokens * TOKEN_BYTES)
            self._hashes = chain(rendered, rule, start)
            whole = min(len(self._hashes), _HEAD_BLOCKS) * rule.tokens * TOKEN_BYTES
            self._head = start + rendered[:whole] if whole else b""
        return self._hashes

    def head(self, rule: BlockRule, model: str | None) -> bytes:
        """What the prompt begins with, up to four whole blocks, and the model and salt; empty where it has no block.

        No seed is in it, so servers agree on what is made of it.
        """
        self.hashes(rule, model)
        return self._head

    @property
    def members(self) -> Mapping[str, msgspec.Raw]:
        """The members it is made of, raw; none any more once somebody asked for its hashes."""
        return self._members or {}

    @property
    def was_read(self) -> bool:
        """Whether anybody asked for its hashes, so that it holds no text any more but its head."""
        return self._members is None


def chain(rendered: bytes, rule: BlockRule, start: bytes = b"") -> Sequence[int]:
    """The hashes of the whole blocks of `rendered`; `start` is what all of them depend on."""
    size, digest = rule.tokens * TOKEN_BYTES, xxhash.xxh64_intdigest
    last = digest(start, rule.seed)
    hashes = []
    for begin in range(0, min(len(rendered), size * rule.most) - size + 1, size):
        last = digest(rendered[begin : begin + size], last)
        hashes.append(last >> _HASH_BITS)
    return hashes


def render(members: Mapping[str, msgspec.Raw], most: int) -> bytes:
    """The prompt in `members`, its first `most` bytes and perhaps some more; empty where it cannot be read."""
    return b"".join(pieces(members, most))


def pieces(
    members: Mapping[str, msgspec.Raw], most: int, weigh: Callable[[bytes], int] = len
) -> Sequence[bytes]:
    """The same, not joined: text is plain bytes, all else a kind of its own; `weigh` says how long each piece is."""
    found: list[bytes] = []
    length = 0
    try:
        for piece in _members(members):
            found.append(piece)
            length += weigh(piece)
            if length >= most:
                break
    except (msgspec.MsgspecError, OverflowError, RecursionError, ValueError):
        return ()  # it passed as JSON and still has numbers or nesting nobody can read
    return found


def _members(members: Mapping[str, msgspec.Raw]) -> Iterator[bytes]:
    for name in sorted(members, key=lambda name: _FIRST.get(name, len(_FIRST))):
        raw = members[name]
        if name == "tools":
            tools = _value(raw)
            if tools:
                yield TURN
                yield _canonical(_unmarked(tools))
        elif name in ("system", "instructions"):
            yield from _turn("system", {"content": _value(raw)})
        elif name in _FIRST:
            kept = _value(raw)
            if kept:
                yield Name(TURN + _REST + _canonical(kept))
        else:
            yield from _turns(raw, bare=name == "prompt")


def _turns(raw: msgspec.Raw, *, bare: bool) -> Iterator[bytes]:
    """The turns of a conversation, or of texts and token ids the ones that are embedded or completed; `bare`: without roles."""
    value = _elements(raw) if len(raw) > _WHOLE_BYTES else _value(raw)
    if not isinstance(value, list | Iterator):
        value = (value,)
    elif isinstance(value, list) and (tokens := _tokens(value)) is not None:
        yield tokens
        return
    for place, each in enumerate(value):
        if isinstance(each, dict):
            yield from _turn(each.get("role"), each)
        elif bare or not isinstance(each, str):
            if place:
                yield TURN
            yield from _text(each)
        else:
            yield from _turn("user", {"content": each})


def _elements(raw: msgspec.Raw) -> Any:
    """The elements of a long list one by one; the value itself where it is no list."""
    text = _bounded(raw)
    try:
        elements = _ELEMENTS.decode(text)
    except lenient.Malformed:
        return lenient.decode(_ANY, text)
    if (
        len(elements) * 2 * TOKEN_BYTES > len(raw) // 4
    ):  # token ids, or nearly: each by itself would take a microsecond
        return _value(raw)
    return (_value(each) for each in elements)


def _value(raw: msgspec.Raw) -> Any:
    return lenient.decode(_ANY, _bounded(raw))


def _bounded(raw: msgspec.Raw) -> bytes:
    """`raw`, which has no more values than are built here; of token ids, which are quick to read, as many as that.

    Raises:
        ValueError: it may have more.
    """
    text = bytes(raw)
    if len(text) <= MOST_VALUES or _marks(text) <= MOST_VALUES:
        return text
    if not text.translate(None, _NUMBERS):
        head = b",".join(text.split(b",", MOST_VALUES)[:-1])
        return head + b"]" * (head.count(b"[") - head.count(b"]"))
    searched = len(text) <= _MOST_SEARCHED and text.count(b'"') <= MOST_VALUES
    if searched and _marks(_STRINGS.sub(b"", text)) <= MOST_VALUES:
        return text
    raise ValueError("more values than a prompt has")


def _marks(text: bytes) -> int:
    """At least as many as there are values in it, but for one."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _turn(role: object, message: Mapping[str, Any]) -> Iterator[bytes]:
    yield TURN
    for piece in _text(role):
        yield Name(piece)
    yield _PART
    yield from _content(message.get("content"))
    rest = {name: value for name, value in message.items() if value and name not in _UNSEEN}
    if rest.get("type") == "message":  # as they all are where that is not said
        del rest["type"]
    elif rest.get("type") == "item_reference":
        rest["id"] = message.get("id")
    if rest:
        yield _REST
        yield _canonical(rest)


def _content(content: object) -> Iterator[bytes]:
    for part in content if isinstance(content, list) else (content,):
        if not isinstance(part, dict):
            yield from _text(part)
        elif part.get("type") in _TEXTS and isinstance(part.get("text"), str):
            yield from _text(part["text"])
        elif part.get("type") == "tool_result":
            yield _PART
            yield from _content(part.get("content"))
        elif part.get("type") in _SAID:
            yield _PART
            yield _canonical(_unmarked(part))
        else:
            yield _PART
            yield Digest(xxhash.xxh3_128_digest(_canonical(_unmarked(part))) * _DIGESTS)


def _unmarked(value: object) -> object:
    """An object, or each of a list, without what a client says to the cache."""
    if isinstance(value, list):
        return [_unmarked(each) for each in value]
    if isinstance(value, dict) and "cache_control" in value:
        return {name: each for name, each in value.items() if name != "cache_control"}
    return value


def _text(value: object) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif value is not None:
        yield (_tokens(value) if isinstance(value, list) else None) or _canonical(value)


def _tokens(values: Sequence[Any]) -> bytes | None:
    """Token ids, four bytes each; None where they are none."""
    try:
        return Ids(array("I", values).tobytes())
    except (TypeError, OverflowError):
        return None


def _canonical(value: object) -> bytes:
    return msgspec.json.encode(value, order="sorted")
