"""What counts, made from the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from envoy_extproc.settings import Settings
from envoy_extproc.settings.tokens import TokensMode
from envoy_extproc.tokens.counting import Missing, PromptCounter, Tokenizer, Told
from envoy_extproc.tokens.encodings import Encode, EncodingError, Shelf
from envoy_extproc.tokens.local import LocalRules, LocalTokenizer, Workers
from envoy_extproc.tokens.remote import OneTarget, RemoteRules, RemoteTokenizer, Targets


class Loaded(msgspec.Struct, frozen=True):
    """The encodings that the settings name.

    Attributes:
        encodings: those that could be loaded, by name.
        flaws: why others could not, by name.
    """

    encodings: Mapping[str, Encode]
    flaws: Mapping[str, str]


def load_encodings(settings: Settings) -> Loaded:
    """Loads every encoding that counts for some model; takes a second, and no network."""
    shelf = Shelf(settings.tokens.cache_dir, settings.tokens.patterns)
    encodings, flaws = dict[str, Encode](), dict[str, str]()
    for name in sorted({encoding for mode, encoding in _choices(settings) if mode == "tiktoken"}):
        try:
            encodings[name] = shelf.load(name)
        except EncodingError as error:
            flaws[name] = str(error)
    return Loaded(encodings, flaws)


def prompt_counter(
    settings: Settings,
    loaded: Loaded,
    *,
    pods: Targets,
    known: Callable[[str], bool],
    told: Told,
) -> PromptCounter | None:
    """What counts prompts; None where the estimate from their bytes will do for all.

    Args:
        settings: the whole configuration.
        loaded: its encodings.
        pods: who is asked where no tokenizer of its own is.
        known: whether a model is served.
        told: hears of each prompt.
    """
    if all(mode == "bytes" for mode, _ in _choices(settings)):
        return None
    tokenizers = _Tokenizers(settings, loaded, pods)
    return PromptCounter(
        tokenizers.of(settings.tokens.mode, settings.tokens.encoding),
        {
            name: tokenizers.of(
                model.tokens or settings.tokens.mode, model.encoding or settings.tokens.encoding
            )
            for name, model in settings.models.items()
        },
        known=known,
        told=told,
    )


class _Tokenizers:
    """One of each kind and encoding."""

    def __init__(self, settings: Settings, loaded: Loaded, pods: Targets) -> None:
        tokens = settings.tokens
        workers = Workers(
            LocalRules(
                timeout=tokens.timeout_ms / 1000,
                max_prompt_bytes=tokens.max_prompt_bytes,
                max_waiting_bytes=tokens.max_waiting_bytes,
                threads=tokens.threads,
            )
        )
        self._local: dict[str, Tokenizer] = {
            name: LocalTokenizer(encode, workers) for name, encode in loaded.encodings.items()
        }
        self._missing = Missing(LocalTokenizer.name)
        self._remote = RemoteTokenizer(
            RemoteRules(
                timeout=tokens.timeout_ms / 1000,
                max_prompt_bytes=tokens.max_prompt_bytes,
                max_requests=tokens.max_requests,
                bearer_token=tokens.bearer_token,
            ),
            pods if tokens.url is None else OneTarget(tokens.url),
        )

    def of(self, mode: TokensMode, encoding: str) -> Tokenizer | None:
        if mode == "remote":
            return self._remote
        return None if mode == "bytes" else self._local.get(encoding, self._missing)


def _choices(settings: Settings) -> list[tuple[TokensMode, str]]:
    """Mode and encoding of everybody, and of each model that says so itself."""
    tokens = settings.tokens
    own = [
        (model.tokens or tokens.mode, model.encoding or tokens.encoding) for model in settings.models.values()
    ]
    return [(tokens.mode, tokens.encoding), *own]
