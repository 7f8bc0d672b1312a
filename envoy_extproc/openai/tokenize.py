"""Asking for a count over HTTP: what is sent to ``/tokenize``, in the form of each engine, and what its answer says."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import msgspec

from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.routes import Turns
from envoy_extproc.openai.texts import Texts

PATH = "/tokenize"

_NOT_SENT = (b"null", b"[]", b"")


class Form(Enum):
    """How an engine wants to be asked. In each a text can be sent; a conversation as it is, template and all, in the first alone."""

    MESSAGES = auto()  # vLLM: {model, prompt} or {model, messages, tools}; {count}
    PROMPT = auto()  # SGLang, whose older versions know no messages: {model, prompt}; {count}
    CONTENT = auto()  # llama.cpp: {content}; {tokens}


class Unusable(Exception):
    """An answer that tells no count."""


class _Answer(msgspec.Struct):
    count: Any = None
    tokens: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(_Answer)


class Question(msgspec.Struct, frozen=True):
    """What is asked.

    Attributes:
        body: JSON to post.
        known: tokens to add to what is answered.
    """

    body: bytes
    known: int


def question(form: Form, model: str, prompt: Prompt, texts: Texts) -> Question | None:
    """What to ask of `prompt`, whose texts are `texts`; None where there is no text in it to ask about.

    A conversation with images is sent as text: an engine would fetch them, only to count what stands for them.
    """
    if form is Form.MESSAGES and prompt.turns is Turns.CHAT and not texts.others:
        raw = {name: bytes(member).strip() for name, member in prompt.members.items()}
        if raw.get("messages", b"") not in _NOT_SENT:
            members = [b',"%s":%s' % (name.encode(), raw[name]) for name in raw if raw[name] not in _NOT_SENT]
            return Question(b'{"model":%s%s}' % (msgspec.json.encode(model), b"".join(members)), 0)
    if not texts.pieces:
        return None
    text = "\n".join(texts.pieces)
    if form is Form.CONTENT:
        return Question(msgspec.json.encode({"content": text, "add_special": True}), texts.known)
    return Question(msgspec.json.encode({"model": model, "prompt": text}), texts.known)


def count(form: Form, answer: bytes, most: int) -> int:
    """The count that `answer` tells.

    Raises:
        Unusable: it tells none, or one that cannot be: more than `most`.
    """
    try:
        told = _DECODER.decode(answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Unusable from None
    value = _length(bytes(told.tokens)) if form is Form.CONTENT else told.count
    if type(value) is not int or not 0 <= value <= most:
        raise Unusable
    return value


def _length(tokens: bytes) -> int | None:
    """Of a list of numbers."""
    if tokens[:1] != b"[" or b"{" in tokens:
        return None
    return tokens.count(b",") + (1 if tokens.strip(b"[] \t\r\n") else 0)
