"""Reading a request body as far as routing and accounting need it, and asking for usage in it.

The decode is partial and typed: messages and prompts are stepped over, not built. What the client wrote is passed on
byte for byte; the one edit there is, asking the engine for usage, is spliced in.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import lenient, multipart, splice
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.routes import Accounting, Body, Route

BYTES_PER_TOKEN = 4
"""English text in the tokenizers of today's models: the usual rule of thumb, AIBrix's too."""

_MOST_MARKS = 200_000
"""Quotes, commas and opening brackets of a body that is searched for its options: 0.2 s at the worst, with all else waiting."""

_MOST_OPTION = 4096
"""Bytes of an option that is a list or an object; one of millions of values would take a hundred times as many to build."""

_FALSE_WORDS = frozenset({"0", "off", "f", "false", "n", "no"})
"""What pydantic, and so the engines, take for false in a string, in any case."""

_TRUE_WORDS = frozenset({"1", "on", "t", "true", "y", "yes"})
"""Likewise for true; a form has no other booleans."""

_BASE64 = re.compile(rb";base64,[A-Za-z0-9+/=]+")


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for.

    Attributes:
        model: the model's name; None where it names none and need not.
        stream: whether ``stream`` is literally true; an engine that takes more for true is followed by its answer.
        add_usage: whether the engine, left alone, would write no usage into a stream, so that it is to be asked for it.
        stream_options: whether the body has a member of that name.
        prompt_tokens_estimate: prompt tokens guessed from the bytes, for requests no engine ever reports on.
        max_output_tokens: how long the answer may become; None where it does not say.
    """

    model: str | None = None
    stream: bool = False
    add_usage: bool = False
    stream_options: bool = False
    prompt_tokens_estimate: int = 0
    max_output_tokens: int | None = None


_NO_BYTES = msgspec.Raw(b"")


class _Fields(msgspec.Struct):
    """The members read, raw, whatever their type: what is odd in them is the engine's to judge."""

    model: msgspec.Raw = _NO_BYTES
    stream: msgspec.Raw = _NO_BYTES
    stream_options: msgspec.Raw = _NO_BYTES
    max_tokens: msgspec.Raw = _NO_BYTES
    max_completion_tokens: msgspec.Raw = _NO_BYTES
    max_output_tokens: msgspec.Raw = _NO_BYTES
    messages: msgspec.Raw = _NO_BYTES
    prompt: msgspec.Raw = _NO_BYTES
    input: msgspec.Raw = _NO_BYTES
    tools: msgspec.Raw = _NO_BYTES
    system: msgspec.Raw = _NO_BYTES
    instructions: msgspec.Raw = _NO_BYTES
    query: msgspec.Raw = _NO_BYTES
    queries: msgspec.Raw = _NO_BYTES
    documents: msgspec.Raw = _NO_BYTES
    items: msgspec.Raw = _NO_BYTES
    text: msgspec.Raw = _NO_BYTES
    text_1: msgspec.Raw = _NO_BYTES
    text_2: msgspec.Raw = _NO_BYTES
    tokens: msgspec.Raw = _NO_BYTES
    content: msgspec.Raw = _NO_BYTES
    previous_response_id: msgspec.Raw = _NO_BYTES
    conversation: msgspec.Raw = _NO_BYTES
    cache_salt: msgspec.Raw = _NO_BYTES


_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_DECODER = msgspec.json.Decoder(_Fields)
_FORM_FIELDS = ("model", "stream", "prompt")


def decode(body: bytes, route: Route, content_type: str = "") -> InferenceRequest:
    """What the body of a request to `route` asks for; see `read`."""
    return read(body, route, content_type)[0]


def read(body: bytes, route: Route, content_type: str = "") -> tuple[InferenceRequest, Prompt | None]:
    """What the body of a request to `route` asks for, and its prompt, which holds on to `body` until it is read.

    A form has no prompt to tell requests by: what counts in it is a file. Nor has a request for which no model runs, since
    nothing of it stays in a cache.

    Args:
        body: as the client sent it.
        route: of the request's path.
        content_type: the header's value; only forms need it, engines take JSON under any other name.

    Raises:
        BadRequest: the body is not UTF-8, not JSON, not an object, no form where it says it is one, or names no model.
    """
    boundary = multipart.boundary(content_type) if route.body is Body.FORM else None
    if boundary is not None:
        return _decode_form(body, route, boundary), None
    fields = _fields(body)
    asked = route.accounting is Accounting.ASKED
    options = _option(fields.stream_options)
    members = _members(fields, route.prompt)
    inference = InferenceRequest(
        model=_model(_option(fields.model), route),
        stream=_option(fields.stream) is True and route.streams,
        add_usage=asked and _declines_usage(options),
        stream_options=fields.stream_options is not _NO_BYTES,
        prompt_tokens_estimate=sum([estimate_tokens(bytes(raw)) for raw in members.values()]),
        max_output_tokens=_limit(fields),
    )
    if not members or route.accounting is Accounting.NOTHING:
        return inference, None
    members |= _members(fields, route.kept)
    return inference, Prompt(members, _option(fields.cache_salt), route.turns)


def _members(fields: _Fields, names: tuple[str, ...]) -> dict[str, msgspec.Raw]:
    return {name: raw for name in names if (raw := getattr(fields, name)) is not _NO_BYTES}


def _option(raw: msgspec.Raw) -> Any:
    """The value of a member; None where there is none, ``{}`` for a list or an object longer than options are."""
    if raw is _NO_BYTES:
        return None
    text = bytes(raw)
    if len(text) > _MOST_OPTION and text[:1] in (b"[", b"{"):
        return {}
    try:
        return lenient.decode(_ANY, text)
    except lenient.Malformed as error:
        raise BadRequest(f"The request body could not be parsed as JSON: {error}.") from None


def _model(model: object, route: Route) -> str | None:
    if model is None:
        if route.needs_model:
            raise BadRequest("You must provide a model parameter.", param="model")
        return None
    if not isinstance(model, str) or not model:
        raise BadRequest("The model parameter must be a non-empty string.", param="model")
    return model


def _limit(fields: _Fields) -> int | None:
    for raw in (fields.max_completion_tokens, fields.max_output_tokens, fields.max_tokens):
        value = _option(raw)
        if type(value) is int and value > 0:
            return value
    return None


def _decode_form(body: bytes, route: Route, boundary: bytes) -> InferenceRequest:
    try:
        fields = multipart.fields(body, boundary, _FORM_FIELDS)
    except multipart.Malformed as error:
        raise BadRequest(f"The request body could not be parsed as multipart/form-data: {error}.") from None
    return InferenceRequest(
        model=_model(fields.get("model"), route),
        stream=fields.get("stream", "").strip().lower() in _TRUE_WORDS,
        prompt_tokens_estimate=-(-len(fields.get("prompt", "")) // BYTES_PER_TOKEN),
    )


def ask_for_usage(body: bytes, request: InferenceRequest) -> bytes:
    """`body` of a stream `request` with ``stream_options.include_usage`` on, every other byte as it was.

    Only for a request with `add_usage`. vLLM's ``continuous_usage_stats`` means nothing to an engine until usage is included; where a client set it
    without asking for usage it is turned off, or the engine would write what the client would not have seen. A body of
    too many members is not searched: of two members of one name the last counts, with every engine.
    """
    options = splice.find(body, "stream_options") if request.stream_options and _is_searchable(body) else None
    if options is None:
        return splice.append(body, b'"stream_options":{"include_usage":true}')
    value = body[options.value : options.end]
    return splice.replace(body, options.value, options.end, _with_usage(value))


def estimate_tokens(prompt: bytes) -> int:
    """Tokens of a prompt in JSON: its bytes by four, images in it not counted; lists of token ids by their length."""
    start = prompt[:64].lstrip(b"[ \t\r\n")[:1]
    if start.isdigit():
        return prompt.count(b",") + 1
    text = len(prompt)
    if b";base64," in prompt:
        text -= sum(len(image[0]) for image in _BASE64.finditer(prompt))
    return -(-text // BYTES_PER_TOKEN)


def _declines_usage(options: object) -> bool:
    """Whether every engine would take `options` for no usage.

    An object without ``include_usage`` is not among them: to vLLM that means yes, to SGLang no. What pydantic would not
    read as a boolean is the engine's to refuse.
    """
    if options is None:
        return True
    if not isinstance(options, dict) or "include_usage" not in options:
        return False
    value = options["include_usage"]
    if isinstance(value, str):
        return value.lower() in _FALSE_WORDS
    return value is None or (isinstance(value, int | float) and value == 0)


def _is_searchable(body: bytes) -> bool:
    return sum(map(body.count, (b'"', b",", b"[", b"{"))) <= _MOST_MARKS


def _with_usage(options: bytes) -> bytes:
    if options == b"null":
        return b'{"include_usage":true}'
    for key, value in (("continuous_usage_stats", b"false"), ("include_usage", b"true")):
        member = splice.find(options, key)
        if member is not None:
            options = splice.replace(options, member.value, member.end, value)
    return options


def _fields(body: bytes) -> _Fields:
    try:
        body.decode()  # msgspec steps over strings without looking at their bytes
        return lenient.decode(_DECODER, body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request body is not valid UTF-8: byte {error.start}.") from None
    except lenient.Mismatch:
        raise BadRequest("The request body must be a JSON object.") from None
    except lenient.Malformed as error:
        raise BadRequest(f"The request body could not be parsed as JSON: {error}.") from None
