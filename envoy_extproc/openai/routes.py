"""Which paths an OpenAI-style engine serves, and how a request to each is read and its answer accounted: one row a path.

A path without a row passes to a ready pod untouched, routed by what the headers tell. `docs/apis.md` is written from the
rows; which engine serves what is from the engines' own routers (vLLM 0.32, SGLang 0.5, TensorRT-LLM 1.3, llama.cpp of 2026,
Triton's OpenAI front end of 2026).
"""

from __future__ import annotations

from enum import Enum, auto
from urllib.parse import unquote

import msgspec


class Body(Enum):
    """How a request body is read."""

    JSON = auto()
    FORM = auto()  # multipart/form-data; JSON all the same where its content type says so


class Accounting(Enum):
    """Where the usage of an answer comes from."""

    ASKED = auto()  # in a JSON answer by itself, in a stream once `stream_options.include_usage` is on
    ITSELF = auto()  # by itself, in JSON and in streams
    NOTHING = auto()  # nothing is generated or charged: the answer is not read


class Turns(Enum):
    """What a prompt is made of."""

    NONE = auto()  # texts, by themselves
    CHAT = auto()  # turns as chat completions have them, which /tokenize takes as they are
    OTHER = auto()  # turns of another shape


VLLM, SGLANG, TRTLLM, LLAMACPP, TRITON = "vllm", "sglang", "trtllm", "llamacpp", "triton"
ENGINES = (VLLM, SGLANG, TRTLLM, LLAMACPP, TRITON)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One path of the API.

    Attributes:
        path: as in the API's reference, without a prefix.
        operation: OpenTelemetry's ``gen_ai.operation.name``; its well-known values where there is one.
        prompt: the members of the request body that carry the prompt.
        turns: what it is made of: a template is written around turns, which costs tokens.
        kept: those that name turns which the engine alone has.
        body: how the request is read.
        accounting: where usage comes from.
        needs_model: whether a request without ``model`` is refused; engines that serve one model do without it where the
            API lets them.
        streams: whether the answer can be an event stream.
        opaque: whether the answer may well be of a type nobody can read tokens from: audio, subtitles.
        engines: who serves it.
        aliases: other paths for the same.
    """

    path: str
    operation: str
    prompt: tuple[str, ...]
    turns: Turns = Turns.NONE
    kept: tuple[str, ...] = ()
    body: Body = Body.JSON
    accounting: Accounting = Accounting.ITSELF
    needs_model: bool = True
    streams: bool = False
    opaque: bool = False
    engines: tuple[str, ...] = (VLLM,)
    aliases: tuple[str, ...] = ()


ROUTES: tuple[Route, ...] = (
    Route(
        path="/v1/chat/completions",
        operation="chat",
        prompt=("messages", "tools"),
        turns=Turns.CHAT,
        accounting=Accounting.ASKED,
        streams=True,
        engines=ENGINES,
    ),
    Route(
        path="/v1/completions",
        operation="text_completion",
        prompt=("prompt",),
        accounting=Accounting.ASKED,
        streams=True,
        engines=ENGINES,
    ),
    Route(
        path="/v1/embeddings",
        operation="embeddings",
        prompt=("input", "messages"),
        engines=ENGINES,
    ),
    Route(
        path="/v1/responses",
        operation="chat",
        prompt=("instructions", "input", "tools"),
        turns=Turns.OTHER,
        kept=("previous_response_id", "conversation"),
        streams=True,
        engines=(VLLM, SGLANG, TRTLLM, LLAMACPP),
    ),
    Route(
        path="/v1/messages",
        operation="chat",
        prompt=("system", "messages", "tools"),
        turns=Turns.OTHER,
        streams=True,
        engines=(VLLM, SGLANG, LLAMACPP),
    ),
    Route(
        path="/v1/messages/count_tokens",
        operation="count_tokens",
        prompt=("system", "messages", "tools"),
        turns=Turns.OTHER,
        accounting=Accounting.NOTHING,
        engines=(VLLM, SGLANG, LLAMACPP),
    ),
    Route(
        path="/v1/rerank",
        operation="rerank",
        prompt=("query", "documents"),
        needs_model=False,
        engines=(VLLM, SGLANG, LLAMACPP),
        aliases=("/rerank", "/v2/rerank", "/v1/reranking", "/reranking"),
    ),
    Route(
        path="/v1/score",
        operation="score",
        prompt=("text_1", "text_2", "query", "items", "queries", "documents"),
        needs_model=False,
        engines=(VLLM, SGLANG),
        aliases=("/score",),
    ),
    Route(
        path="/classify",
        operation="classify",
        prompt=("input", "messages", "text"),
        needs_model=False,
        engines=(VLLM, SGLANG),
        aliases=("/v1/classify",),
    ),
    Route(
        path="/pooling",
        operation="pooling",
        prompt=("input", "messages"),
        needs_model=False,
        aliases=("/v1/pooling",),
    ),
    Route(
        path="/tokenize",
        operation="tokenize",
        prompt=("prompt", "messages", "content"),
        accounting=Accounting.NOTHING,
        needs_model=False,
        engines=(VLLM, SGLANG, LLAMACPP),
        aliases=("/v1/tokenize",),
    ),
    Route(
        path="/detokenize",
        operation="detokenize",
        prompt=("tokens",),
        accounting=Accounting.NOTHING,
        needs_model=False,
        engines=(VLLM, SGLANG, LLAMACPP),
        aliases=("/v1/detokenize",),
    ),
    Route(
        path="/v1/audio/transcriptions",
        operation="transcription",
        prompt=("prompt",),
        body=Body.FORM,
        streams=True,
        opaque=True,
        engines=(VLLM, SGLANG, LLAMACPP),
    ),
    Route(
        path="/v1/audio/translations",
        operation="translation",
        prompt=("prompt",),
        body=Body.FORM,
        streams=True,
        opaque=True,
    ),
    Route(
        path="/v1/audio/speech",
        operation="speech",
        prompt=("input",),
        streams=True,
        opaque=True,
    ),
    Route(
        path="/v1/images/generations",
        operation="image_generation",
        prompt=("prompt",),
        needs_model=False,
        streams=True,
        engines=(VLLM, SGLANG),
    ),
    Route(
        path="/v1/images/edits",
        operation="image_edit",
        prompt=("prompt",),
        body=Body.FORM,
        needs_model=False,
        streams=True,
        engines=(VLLM, SGLANG),
    ),
    Route(
        path="/v1/images/variations",
        operation="image_variation",
        prompt=(),
        body=Body.FORM,
        needs_model=False,
        engines=(),  # OpenAI's own; none of the engines was seen to have it
    ),
)

MODELS = "/v1/models"

_BY_PATH = {path: route for route in ROUTES for path in (route.path, *route.aliases)}
_MOST_PARTS = max(path.count("/") for path in _BY_PATH)


def find(path: str) -> Route | None:
    """The route of a request path, query string, trailing slash and any prefix set aside; of several the longest."""
    known = _BY_PATH.get(path)
    if known is not None:
        return known
    parts = path.partition("?")[0].rstrip("/").rsplit("/", _MOST_PARTS)
    for start in range(1, len(parts)):
        known = _BY_PATH.get("/" + "/".join(parts[start:]))
        if known is not None:
            return known
    return None


def listed_model(path: str) -> str | None:
    """What `path` asks for of the list of models: ``""`` for all of it, else a model's name; None for another path."""
    bare = path.partition("?")[0].rstrip("/")
    if bare.endswith(MODELS):
        return ""
    _, found, name = bare.partition(MODELS + "/")
    return unquote(name) if found else None
