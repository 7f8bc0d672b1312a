"""What a body asks of a simulated engine, and vLLM's refusals of bodies that ask wrongly.

Prompt tokens are counted, not tokenized: ceil(characters / 4) of all the text, plus 4 for each chat message. A prompt of
token ids has as many tokens as ids. A content part that is no text counts as its type in brackets.
"""

from __future__ import annotations

import json
import secrets
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import pydantic

if TYPE_CHECKING:
    from envoy_extproc.simulation.options import EngineOptions

Kind = Literal["chat", "completions"]
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
COMPLETION_TOKENS = 16
"""The OpenAI default of `max_tokens` on /v1/completions, which vLLM keeps."""

BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Refusal(Exception):
    """An error answer in vLLM's shape.

    Attributes:
        status: HTTP status, which is also the body's `code`.
        type: the body's `type`; the status's phrase where vLLM has no better one.
        param: the field at fault.
    """

    def __init__(
        self, message: str, *, status: int = 400, kind: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = kind or HTTPStatus(status).phrase
        self.param = param

    @property
    def error(self) -> dict[str, Any]:
        """The body, key order as vLLM's."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return {"error": fields}

    @classmethod
    def of_status(cls, status: int) -> Refusal:
        """The error an engine would answer with this status."""
        messages = {500: DEAD, 503: BUSY}
        kind = "InternalServerError" if status == 500 else None
        return cls(messages.get(status, f"Simulated {HTTPStatus(status).phrase}."), status=status, kind=kind)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model sees it: `units` are characters of the rendered text, or token ids."""

    units: str | tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length in tokens, at least 1."""
        return max(1, ceil(len(self.units) / self._units_per_token))

    @property
    def seed(self) -> int:
        """The same number for the same prompt, in every process."""
        return zlib.crc32(repr(self.units).encode())

    @property
    def _units_per_token(self) -> int:
        return CHARACTERS_PER_TOKEN if isinstance(self.units, str) else 1

    def block_hashes(self, block_size: int, answer: str = "", salt: str = "") -> tuple[int, ...]:
        """One hash for each full block of tokens; each covers the whole prompt up to the end of its block.

        Args:
            block_size: tokens of a block.
            answer: what a later prompt will have behind this one; nothing behind token ids.
            salt: prompts with another one share nothing with this.
        """
        units = self.units + answer if isinstance(self.units, str) else self.units
        size = block_size * self._units_per_token
        hashes: list[int] = []
        chained = hash(salt) if salt else 0
        for end in range(size, len(units) + 1, size):
            chained = hash((chained, units[end - size : end]))
            hashes.append(chained)
        return tuple(hashes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A chat or completions request. `tokens` is the length of each of its `n * len(prompts)` answers.

    Attributes:
        salt: its `cache_salt`; empty without one.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...]
    n: int
    tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    seed: int
    salt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """An embeddings request: one vector for each prompt."""

    model: str
    prompts: tuple[Prompt, ...]
    base64: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizing:
    """A request for the tokens of a prompt; `strings` asks for their texts too."""

    text: str
    strings: bool

    @property
    def pieces(self) -> list[str]:
        """The text of each token."""
        size = CHARACTERS_PER_TOKEN
        return [self.text[start : start + size] for start in range(0, len(self.text), size)]


class StreamOptions(pydantic.BaseModel):
    """vLLM's: given without ``include_usage``, it means usage."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


def read_generation(kind: Kind, body: bytes, options: EngineOptions, tokens: int | None = None) -> Generation:
    """Reads a body of /v1/chat/completions or /v1/completions; `tokens` overrides the answer's length.

    Raises:
        Refusal: with vLLM's message, in the order of its checks: the body's form, the model, the sampling.
    """
    fields = _object(body)
    prompts = (Prompt(_chat_text(fields)),) if kind == "chat" else _prompts(fields, "prompt")
    stream, include, continuous = _streaming(fields)
    model = _model(fields, options)
    length, reason = _length(kind, fields, max(prompt.tokens for prompt in prompts), options)
    greedy = fields.get("temperature") == 0
    n = max(1, _integer(fields, "n") or 1)
    if greedy and n > 1:
        raise Refusal(f"n must be 1 when using greedy sampling, got {n}.", kind="BadRequestError")
    salt = fields.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise Refusal(
            "Parameter 'cache_salt' must be a non-empty string if provided.", kind="BadRequestError"
        )
    if tokens is not None:
        length, reason = tokens, "stop" if tokens < length else reason
    return Generation(
        kind=kind,
        model=model,
        prompts=prompts,
        n=n,
        tokens=length,
        finish_reason=reason,
        stream=stream,
        include_usage=include,
        continuous_usage=continuous,
        seed=prompts[0].seed if greedy else _integer(fields, "seed") or secrets.randbits(32),
        salt=salt or "",
    )


def read_embedding(body: bytes, options: EngineOptions) -> Embedding:
    """Reads a body of /v1/embeddings.

    Raises:
        Refusal: with vLLM's message.
    """
    fields = _object(body)
    prompts = _prompts(fields, "input")
    return Embedding(
        model=_model(fields, options), prompts=prompts, base64=fields.get("encoding_format") == "base64"
    )


def read_tokenizing(body: bytes, options: EngineOptions) -> Tokenizing:
    """Reads a body of /tokenize: a `prompt`, or the `messages` of a chat.

    Raises:
        Refusal: with vLLM's message.
    """
    fields = _object(body)
    if "messages" not in fields and "prompt" not in fields:
        raise _missing(fields, "prompt")
    text = _chat_text(fields) if "messages" in fields else fields["prompt"]
    if not isinstance(text, str):
        raise _no_string(text, "prompt")
    _model(fields, options)
    return Tokenizing(text=text, strings=fields.get("return_token_strs") is True)


def _object(body: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(body)
    except json.JSONDecodeError as error:
        where, context = f"body.{error.pos}", {"error": error.msg}
        detail = {"loc": where, "msg": "JSON decode error", "input": "<dict of 0 items>", "ctx": context}
        raise _invalid({"type": "json_invalid", **detail}) from None
    except (UnicodeDecodeError, RecursionError):
        raise Refusal("There was an error parsing the body") from None
    if not isinstance(decoded, dict):
        message = "Input should be a valid dictionary"
        raise _invalid({"type": "dict_type", "loc": "body", "msg": message, "input": decoded})
    return decoded


def _invalid(detail: dict[str, Any]) -> Refusal:
    return Refusal(f"1 validation error:\n  {detail}", param=detail["loc"])


def _missing(fields: dict[str, Any], name: str) -> Refusal:
    size = f"<dict of {len(fields)} items>"
    return _invalid({"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": size})


def _streaming(fields: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether to stream, with usage in the end, with usage in every event."""
    stream = fields.get("stream") is True
    asked = fields.get("stream_options")
    if asked and not stream:
        message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refusal(message, kind="BadRequestError", param="stream_options")
    if asked is None:
        return stream, False, False
    try:
        chosen = StreamOptions.model_validate(asked)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, ("body", "stream_options", *first["loc"])))
        raise _invalid({**first, "loc": where}) from None
    include = bool(chosen.include_usage)
    return stream, include, include and bool(chosen.continuous_usage_stats)


def _model(fields: dict[str, Any], options: EngineOptions) -> str:
    model = fields.get("model") or options.models[0]
    if model in options.models:
        return str(model)
    known = ", ".join(options.models)
    message = f"The model `{model}` does not exist. Valid aliases: {known}."
    raise Refusal(message, status=404, kind="NotFoundError", param="model")


def _length(kind: Kind, fields: dict[str, Any], prompt: int, options: EngineOptions) -> tuple[int, str]:
    """Length of the answer and its finish_reason: a limit is always reached, without one the answer stops."""
    names = ("max_completion_tokens", "max_tokens") if kind == "chat" else ("max_tokens",)
    limit = next((value for name in names if (value := _integer(fields, name)) is not None), None)
    room = options.model_len - prompt
    if limit is not None and limit < 1:
        raise _bad_limit(limit, "must be at least 1.")
    if limit is not None and limit > options.model_len:
        over = (
            f"cannot be greater than max_model_len={options.model_len}. Please request fewer output tokens."
        )
        raise _bad_limit(limit, over)
    if room < (limit or 1):
        length = f"This model's maximum context length is {options.model_len} tokens."
        message = f"{length} However, your prompt has {prompt} tokens and asks for {limit or 1} more."
        raise Refusal(message, kind="BadRequestError", param="input_tokens")
    if limit is not None:
        return limit, "length"
    if kind == "completions":
        return min(room, COMPLETION_TOKENS), "length"
    return min(room, options.answer_tokens), "stop"


def _bad_limit(limit: int, fault: str) -> Refusal:
    message = f"max_tokens={limit} {fault} (parameter=max_tokens, value={limit})"
    return Refusal(message, kind="BadRequestError", param="max_tokens")


def _integer(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    message = "Input should be a valid integer"
    raise _invalid({"type": "int_type", "loc": f"body.{name}", "msg": message, "input": value})


def _chat_text(fields: dict[str, Any]) -> str:
    if "messages" not in fields:
        raise _missing(fields, "messages")
    messages = fields["messages"]
    if not isinstance(messages, list):
        message = "Input should be a valid list"
        raise _invalid({"type": "list_type", "loc": "body.messages", "msg": message, "input": messages})
    return "".join(_message(message) for message in messages)


def _message(message: Any) -> str:
    if not isinstance(message, dict):
        fault = "Input should be a valid dictionary"
        raise _invalid({"type": "dict_type", "loc": "body.messages", "msg": fault, "input": message})
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    return rendered(str(message.get("role", "")), "".join(map(_part, parts)))


def rendered(role: str, text: str) -> str:
    """A message as the model sees it: its text behind its role, which is padded to the four tokens a message costs."""
    width = TOKENS_PER_MESSAGE * CHARACTERS_PER_TOKEN
    return f"{role:<{width}.{width}}{text}"


def _part(part: Any) -> str:
    if isinstance(part, dict):
        return str(part["text"]) if "text" in part else f"[{part.get('type')}]"
    return str(part)


def _prompts(fields: dict[str, Any], name: str) -> tuple[Prompt, ...]:
    """One prompt, or several: strings or lists of token ids."""
    value = fields.get(name)
    if not value:
        if name == "input":
            raise _missing(fields, name)
        message = "Either prompt or prompt_embeds must be provided and non-empty."
        raise Refusal(message, kind="BadRequestError", param=name)
    if isinstance(value, list) and not all(isinstance(item, int) for item in value):
        return tuple(_prompt(item, name) for item in value)
    return (_prompt(value, name),)


def _prompt(value: Any, name: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return Prompt(tuple(value))
    raise _no_string(value, name)


def _no_string(value: Any, name: str) -> Refusal:
    message = "Input should be a valid string"
    return _invalid({"type": "string_type", "loc": f"body.{name}", "msg": message, "input": value})
