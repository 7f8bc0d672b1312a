"""The bytes of answers, in vLLM 0.32's shape: the same keys in the same order at each level."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from envoy_extproc.simulation.metrics import Gauges
    from envoy_extproc.simulation.requests import Embedding, Generation, Kind, Tokenizing

encode = msgspec.json.encode
"""Compact JSON in UTF-8, keys in the order given, as vLLM's answers are."""

DONE = b"data: [DONE]\n\n"
EMBEDDING_DIMENSIONS = 128
VOCABULARY = 128_256  # Llama 3's
LOOKALIKE_TEXT = '{"usage":{"prompt_tokens":999,"total_tokens":1998,"completion_tokens":999}}'
_LOOKALIKE_MEMBER = {"usage": {"prompt_tokens": 999, "total_tokens": 1998, "completion_tokens": 999}}

# The empty one is what a character that is split over two tokens looks like; the one after it is such a character.
_WORDS = (
    *(" the", " model", " reads", " each", " prompt", " in", " one", " pass", ",", " then", " writes"),
    *(" a", " token", " per", " step", ".", " Blocks", " of", " keys", " and", " values", " stay"),
    *(" near", " it", ";", "", " 雪", " café", ' "quoted"', "\n", " who", " asks", " again", " waits"),
    *(" less", " than", " before"),
)  # fmt: skip
_ENCODED_WORDS = tuple(encode(word) for word in _WORDS)


@dataclass(frozen=True, slots=True)
class Words:
    """The text of one answer: word after word of a small list, from a place that the seed says.

    Attributes:
        seed: any integer.
        big: when not 0, the first token is so many characters long.
        lookalike: the first two tokens carry what a careless reader takes for usage: as text, then in arguments of
            a tool call (chat only), and both times in a nested object.
    """

    seed: int
    chat: bool
    big: int = 0
    lookalike: bool = False

    def text(self, index: int) -> str:
        """The token's text."""
        if self.lookalike and index < 2:
            return LOOKALIKE_TEXT
        if self.big and index == 0:
            return "x" * self.big
        return _WORDS[(self.seed + index) % len(_WORDS)]

    def member(self, index: int) -> bytes:
        """The token as the JSON value behind `"content":` or `"text":`, further members after it."""
        if self.lookalike and index < 2:
            content = encode(None if self.chat and index else LOOKALIKE_TEXT)
            calls = b',"tool_calls":' + encode([_TOOL_CALL]) if self.chat and index else b""
            return content + calls + b',"extra":' + encode(_LOOKALIKE_MEMBER)
        if self.big and index == 0:
            return encode(self.text(0))
        return _ENCODED_WORDS[(self.seed + index) % len(_WORDS)]

    def whole(self, tokens: int) -> str:
        """The text of all tokens; a tool call's arguments are no text."""
        calls = self.lookalike and self.chat
        return "".join(self.text(index) for index in range(tokens) if not (calls and index == 1))


_FUNCTION = {"name": "lookup", "arguments": LOOKALIKE_TEXT}
_TOOL_CALL: dict[str, Any] = {"index": 0, "id": "chatcmpl-tool-0", "type": "function", "function": _FUNCTION}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request."""

    prompt: int
    completion: int
    cached: int = 0
    created: int = 0

    def counts(self) -> dict[str, Any]:
        """The three counts in vLLM's order."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "total_tokens": total, "completion_tokens": self.completion}


@dataclass(frozen=True, slots=True)
class Head:
    """What every event of an answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """The parts of an event between what varies."""

    object: str
    text: bytes
    token: bytes
    last: bytes


_CHAT = _Shape(
    "chat.completion.chunk",
    b'"delta":{"content":',
    b'},"logprobs":null,"finish_reason":null,"token_ids":null}]',
    b'},"logprobs":null,"finish_reason":"%b","stop_reason":null,"token_ids":null}]',
)
_COMPLETIONS = _Shape(
    "text_completion",
    b'"text":',
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]',
    b',"logprobs":null,"finish_reason":"%b","stop_reason":null,"prompt_token_ids":null,"token_ids":null}]',
)
_OPENING = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'


class EventWriter:
    """Writes the SSE events of one answer; everything but a token's text is prepared once.

    Args:
        head: what every event repeats.
        asked: the request.
        usage: whether usage is reported at all when it is asked for.
        usage_null: whether events without usage say `"usage":null` then.
    """

    def __init__(
        self, head: Head, asked: Generation, *, usage: bool = True, usage_null: bool = False
    ) -> None:
        self.reports = usage and asked.include_usage
        self._continuous = self.reports and asked.continuous_usage
        self.has_opening = asked.kind == "chat"
        self._shape = _CHAT if asked.kind == "chat" else _COMPLETIONS
        fields = {"id": head.id, "object": self._shape.object, "created": head.created, "model": head.model}
        self._front = b"data: " + encode(fields)[:-1] + b',"choices":['
        self._tokens = [
            b'%b{"index":%d,%b' % (self._front, index, self._shape.text) for index in range(answers(asked))
        ]
        self._null = b',"usage":null' if self.reports and usage_null else b""
        self._token_end = self._shape.token + self._null + b"}\n\n"
        self._fingerprint = b',"system_fingerprint":' + encode(head.fingerprint)
        self._reason = asked.finish_reason.encode()

    def opening(self, index: int, prompt_tokens: int) -> bytes:
        """The role event that a chat choice begins with."""
        usage = self._running_usage(Usage(prompt_tokens, 0))
        end = b',"prompt_token_ids":null,"prompt_text":null}\n\n'
        return b'%b{"index":%d,%b%b%b' % (self._front, index, _OPENING, usage, end)

    def token(self, index: int, text: bytes, prompt_tokens: int, generated: int) -> bytes:
        """A token that is not the last."""
        if not self._continuous:
            return self._tokens[index] + text + self._token_end
        usage = self._running_usage(Usage(prompt_tokens, generated))
        return self._tokens[index] + text + self._shape.token + usage + b"}\n\n"

    def last(self, index: int, text: bytes, prompt_tokens: int, generated: int) -> bytes:
        """The last token of a choice; it carries the fingerprint unless a usage event will."""
        usage = self._running_usage(Usage(prompt_tokens, generated))
        end = b"}\n\n" if self.reports else self._fingerprint + b"}\n\n"
        return self._tokens[index] + text + self._shape.last % self._reason + usage + end

    def usage(self, usage: Usage) -> bytes:
        """The extra event with no choices."""
        details = {"cached_tokens": usage.cached}
        if self._shape is _CHAT:
            details["created_cache_tokens"] = usage.created
        counts = encode({**usage.counts(), "prompt_tokens_details": details})
        return self._front + b'],"usage":' + counts + self._fingerprint + b"}\n\n"

    def _running_usage(self, usage: Usage) -> bytes:
        if not self._continuous:
            return self._null
        return b',"usage":' + encode({**usage.counts(), "completion_tokens_details": None})


def answers(asked: Generation) -> int:
    """How many choices the request is answered with."""
    return asked.n * len(asked.prompts)


def error_event(error: Mapping[str, Any]) -> bytes:
    """An error within a stream; vLLM writes it with spaces."""
    return b"data: " + json.dumps(error).encode() + b"\n\n"


def whole_answer(head: Head, asked: Generation, texts: Sequence[Words], usage: Usage | None) -> bytes:
    """The JSON answer to a request that does not stream; without `usage` the key is left out."""
    choice = _chat_choice if asked.kind == "chat" else _completions_choice
    chat = asked.kind == "chat"
    body: dict[str, Any] = {
        "id": head.id,
        "object": "chat.completion" if chat else "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": [choice(index, words, asked) for index, words in enumerate(texts)],
        "service_tier": None,
        "system_fingerprint": head.fingerprint,
    }
    if usage is not None:
        created = usage.created if chat else None
        cache = {"cached_tokens": usage.cached, "created_cache_tokens": created, "multimodal_tokens": None}
        details = {"prompt_tokens_details": cache, "completion_tokens_details": None}
        body["usage"] = {**usage.counts(), **details}
    prompt = ("prompt_logprobs", "prompt_token_ids", "prompt_text") if chat else ()
    return encode({**body, **dict.fromkeys((*prompt, "kv_transfer_params", "ec_transfer_params", "metrics"))})


def _chat_choice(index: int, words: Words, asked: Generation) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": words.whole(asked.tokens)}
    message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    if words.lookalike:
        message |= {"tool_calls": [_TOOL_CALL], "extra": _LOOKALIKE_MEMBER}
    finish = {"logprobs": None, "finish_reason": asked.finish_reason, "stop_reason": None, "token_ids": None}
    return {"index": index, "message": message, **finish, "routed_experts": None}


def _completions_choice(index: int, words: Words, asked: Generation) -> dict[str, Any]:
    finish = {"logprobs": None, "finish_reason": asked.finish_reason, "stop_reason": None, "token_ids": None}
    prompt = {"prompt_logprobs": None, "prompt_token_ids": None}
    choice = {"index": index, "text": words.whole(asked.tokens), **finish, **prompt, "routed_experts": None}
    return choice | ({"extra": _LOOKALIKE_MEMBER} if words.lookalike else {})


def embeddings_answer(head: Head, asked: Embedding) -> bytes:
    """The JSON answer of /v1/embeddings: unit vectors that only depend on the prompt."""
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": _vector(repr(prompt.units), base64_form=asked.base64),
        }
        for index, prompt in enumerate(asked.prompts)
    ]
    counts = Usage(sum(prompt.tokens for prompt in asked.prompts), 0).counts()
    usage = {**counts, "prompt_tokens_details": None, "completion_tokens_details": None}
    fields = {"id": head.id, "object": "list", "created": head.created, "model": head.model}
    return encode({**fields, "data": data, "usage": usage})


def _vector(text: str, *, base64_form: bool) -> str | list[float]:
    drawn = struct.unpack(
        f"<{EMBEDDING_DIMENSIONS}i", hashlib.shake_128(text.encode()).digest(EMBEDDING_DIMENSIONS * 4)
    )
    length = sqrt(sum(value * value for value in drawn))
    packed = struct.pack(f"<{EMBEDDING_DIMENSIONS}f", *(value / length for value in drawn))
    if base64_form:
        return base64.b64encode(packed).decode()
    return list(
        struct.unpack(f"<{EMBEDDING_DIMENSIONS}f", packed)
    )  # what a 32-bit float keeps, as an engine's


def tokens_answer(asked: Tokenizing, max_model_len: int) -> bytes:
    """The body of /tokenize: as many ids as a request with this prompt is counted, each made from its token's text."""
    ids = [zlib.crc32(piece.encode("utf-8", "surrogatepass")) % VOCABULARY for piece in asked.pieces]
    strings = asked.pieces if asked.strings else None
    return encode({"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": strings})


def models_answer(models: Sequence[str], max_model_len: int, now: int, permission: str) -> bytes:
    """The body of /v1/models; `permission` is a random id."""
    allowed = {
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
    }
    owner = {"organization": "*", "group": None, "is_blocking": False}
    head = {"id": f"modelperm-{permission}", "object": "model_permission", "created": now}
    data = [
        {
            "id": model,
            "object": "model",
            "created": now,
            "owned_by": "vllm",
            "root": model,
            "parent": None,
            "max_model_len": max_model_len,
            "permission": [{**head, **allowed, **owner}],
        }
        for model in models
    ]
    return encode({"object": "list", "data": data})


def load_report(form: str, gauges: Gauges) -> str | None:
    """The ORCA header `endpoint-load-metrics` in the form asked for; None for a form vLLM does not write."""
    named = {
        "num_requests_waiting": float(gauges.waiting),
        "kv_cache_usage_perc": float(gauges.kv_cache_usage),
    }
    if form.upper() == "JSON":
        return "JSON " + json.dumps({"named_metrics": named})
    if form.upper() == "TEXT":
        return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())
    return None


def answer_id(kind: Kind, request_id: str) -> str:
    """The `id` of an answer."""
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request_id}"
