"""Reading a request body as far as routing and accounting need it, and asking for usage in it.

The decode is partial and typed: messages and prompts are stepped over, not built. What the client wrote is passed on
byte for byte; the one edit there is, asking the engine for usage, is spliced in.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import lenient, splice
from envoy_extproc.openai.routes import Body, Route

BYTES_PER_TOKEN = 4
"""English text in the tokenizers of today's models: the usual rule of thumb, AIBrix's too."""

_FALSE_WORDS = frozenset({"0", "off", "f", "false", "n", "no"})
"""What pydantic, and so the engines, take for false in a string, in any case."""

_BASE64 = re.compile(rb";base64,[A-Za-z0-9+/=]+")


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for.

    Attributes:
        model: the model's name.
        stream: whether ``stream`` is literally true; an engine that takes more for true is followed by its answer.
        add_usage: whether the engine, left alone, would write no usage into a stream, so that it is to be asked for it.
        stream_options: whether the body has a member of that name.
        prompt_tokens_estimate: prompt tokens guessed from the bytes, for requests no engine ever reports on.
    """

    model: str
    stream: bool = False
    add_usage: bool = True
    stream_options: bool = False
    prompt_tokens_estimate: int = 0


class _Fields(msgspec.Struct):
    """The members read, whatever their type: what is odd in them is the engine's to judge. Prompts stay raw."""

    model: Any = None
    stream: Any = False
    stream_options: Any = msgspec.UNSET
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(_Fields)


def decode(body: bytes, route: Route) -> InferenceRequest:
    """What the body of a request to `route` asks for.

    Raises:
        BadRequest: the body is not UTF-8, not JSON, not an object, or names no model.
    """
    fields = _fields(body)
    if fields.model is None:
        raise BadRequest("You must provide a model parameter.", param="model")
    if not isinstance(fields.model, str) or not fields.model:
        raise BadRequest("The model parameter must be a non-empty string.", param="model")
    stream = fields.stream is True and route.body is Body.GENERATE
    options = fields.stream_options
    return InferenceRequest(
        model=fields.model,
        stream=stream,
        add_usage=_declines_usage(options),
        stream_options=options is not msgspec.UNSET,
        prompt_tokens_estimate=estimate_tokens(bytes(getattr(fields, route.prompt))),
    )


def ask_for_usage(body: bytes, request: InferenceRequest) -> bytes:
    """`body` of a stream `request` with ``stream_options.include_usage`` on, every other byte as it was.

    Only for a request with `add_usage`. vLLM's ``continuous_usage_stats`` means nothing to an engine until usage is included; where a client set it
    without asking for usage it is turned off, or the engine would write what the client would not have seen.
    """
    options = splice.find(body, "stream_options") if request.stream_options else None
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
    if options is None or options is msgspec.UNSET:
        return True
    if not isinstance(options, dict) or "include_usage" not in options:
        return False
    value = options["include_usage"]
    if isinstance(value, str):
        return value.lower() in _FALSE_WORDS
    return value is None or (isinstance(value, int | float) and value == 0)


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
