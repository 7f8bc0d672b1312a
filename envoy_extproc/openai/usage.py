"""Tokens as engines tell them, in three vocabularies, read into one `Usage`.

- chat, completions, embeddings, rerank, score, pooling: ``prompt_tokens``, ``completion_tokens``, ``total_tokens``,
  ``prompt_tokens_details.cached_tokens``;
- responses, transcriptions, speech, images: ``input_tokens``, ``output_tokens``, ``input_tokens_details.cached_tokens``;
- messages: ``input_tokens``, ``output_tokens``, ``cache_read_input_tokens``, ``cache_creation_input_tokens``. Anthropic's own
  definition counts the cached tokens beside ``input_tokens``, and so does vLLM, which then writes both; SGLang counts
  them inside, and writes the first alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from envoy_extproc.openai import lenient


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one exchange.

    Attributes:
        prompt_tokens: OpenTelemetry's ``gen_ai.usage.input_tokens``, those that a cache held among them.
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


class Details(msgspec.Struct):
    """What kinds of tokens there are among them."""

    cached_tokens: int | None = None


class Told(msgspec.Struct):
    """A ``usage`` object as it was written, in any vocabulary.

    Attributes:
        type: ``tokens`` or ``duration``, of a transcription; an object without it holds tokens.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    type: Any = None


_MOST_TOKENS = 2**63
_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_COUNTS = tuple(name for name in Told.__struct_fields__ if name not in (*_DETAILS, "type"))


def mended(members: Mapping[str, Any]) -> Told:
    """Usage with a member of a type nobody expected, which counts as missing if it is no whole number after all."""
    counts: dict[str, Any] = {name: _number(members.get(name)) for name in _COUNTS}
    details: dict[str, Any] = {name: _mended_details(members.get(name)) for name in _DETAILS}
    return Told(**counts, **details, type=members.get("type"))


def merged(first: Told, later: Told) -> Told:
    """Usage told in two halves: what the later one says counts, what it leaves out stays."""
    later_or_first = {}
    for name in Told.__struct_fields__:
        said = getattr(later, name)
        later_or_first[name] = getattr(first, name) if said is None else said
    return Told(**later_or_first)


def usage_of(told: Told) -> Usage | None:
    """The tokens in it; None where it holds none but seconds."""
    if told.type == "duration":
        return None
    prompt = _count(told.prompt_tokens)
    if prompt is None:
        prompt = _input(told)
    completion = _count(told.completion_tokens)
    if completion is None:
        completion = _count(told.output_tokens)
    if prompt is None and completion is None:
        prompt = _count(told.total_tokens)
    return Usage(prompt_tokens=prompt or 0, completion_tokens=completion or 0, cached_tokens=_cached(told))


def _input(told: Told) -> int | None:
    tokens, created = _count(told.input_tokens), _count(told.cache_creation_input_tokens)
    if tokens is None or created is None:
        return tokens
    return tokens + created + (_count(told.cache_read_input_tokens) or 0)


def _cached(told: Told) -> int | None:
    for details in (told.prompt_tokens_details, told.input_tokens_details):
        cached = None if details is None else _count(details.cached_tokens)
        if cached is not None:
            return cached
    return _count(told.cache_read_input_tokens)


def _count(tokens: int | None) -> int | None:
    """A number of tokens; None for one that cannot be: nobody has fewer than none, or more than 64 bits hold."""
    return tokens if tokens is not None and 0 <= tokens < _MOST_TOKENS else None


def _number(value: object) -> int | None:
    """A whole number, also one written ``7.0`` or ``"7"``."""
    with suppress(lenient.Mismatch):
        return msgspec.convert(value, int, strict=False)
    return None


def _mended_details(value: object) -> Details | None:
    return Details(_number(value.get("cached_tokens"))) if isinstance(value, dict) else None
