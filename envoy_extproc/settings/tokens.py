"""The settings of how the tokens of a prompt are counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from envoy_extproc.settings.base import Section

TokensMode = Literal["bytes", "tiktoken", "remote"]


def _checked_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not value.isascii() or any(each.isspace() for each in value):
        raise ValueError("must be a URL that begins with http:// or https://")
    return value


def _checked_name(value: str) -> str:
    if not value or "/" in value or "\\" in value or "\0" in value or value.startswith("."):
        raise ValueError("must be the name of an encoding, no path")
    return value


Url = Annotated[str, AfterValidator(_checked_url)]
EncodingName = Annotated[str, AfterValidator(_checked_name)]


class Tokens(Section):
    """How the tokens of a prompt are counted, for profiles, `least-latency`, `vtc-basic`, and where no engine tells."""

    mode: TokensMode = "bytes"
    """bytes: a quarter of the prompt's bytes, which costs nothing and needs no tokenizer. tiktoken: counted here, by an `encoding`; needs
    the extra `tiktoken`. remote: `/tokenize` is asked. Where it cannot be counted, the bytes are used, and the metric
    `envoy_extproc_token_estimates_total` says why."""
    encoding: EncodingName = "cl100k_base"
    """For tiktoken: the name of an encoding of an installed package, or of a file `<name>.tiktoken` in `cache_dir`. It is loaded at the
    start and never fetched. Tokenizers of today's models are within a tenth of each other on English text."""
    cache_dir: Path | None = None
    """A directory with files of encodings, under tiktoken's own names for downloads or as `<name>.tiktoken`. null: only what
    packages bring."""
    patterns: Mapping[str, str] = Field(default_factory=dict)
    """For files of other names than tiktoken knows: the regular expression that cuts text into words, or the name of an encoding that
    has it. Without: that of cl100k_base, which Llama 3 has too."""
    url: Url | None = None
    """For remote: a tokenizer of its own, in vLLM's form: `http://tokenizer:8000/tokenize`. null: the model's own ready pods, each in
    its turn, in the form of its engine."""
    bearer_token: str | None = Field(default=None, min_length=1, repr=False)
    """For remote: sent as `authorization`, where engines were started with a key. Best as `ENVOY_EXTPROC_TOKENS__BEARER_TOKEN`,
    from a Secret."""
    timeout_ms: int = Field(default=100, ge=1, le=5000)
    """The longest a decision waits for a count. A prompt of 8,000 tokens takes 3 ms here, and an engine some 20."""
    max_prompt_bytes: int = Field(default=524_288, ge=1, le=67_108_864)
    """Longer prompts are not counted: this is 131,000 tokens of English, and takes 40 ms of a core."""
    threads: int = Field(default=2, ge=1, le=64)
    """For tiktoken: what counts prompts beyond 2 KB, beside the event loop. Each can use a core of its own."""
    max_waiting_bytes: int = Field(default=4_194_304, ge=1, le=1_073_741_824)
    """For tiktoken: prompts that wait for a thread, all together. What is beyond would wait longer than `timeout_ms` allows."""
    max_requests: int = Field(default=64, ge=1, le=10_000)
    """For remote: requests under way at once. One that answers in 10 ms then does 6,000 a second."""
