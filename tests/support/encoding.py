"""A small encoding, made here: a token for each byte, and for some words with every beginning of theirs."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

PATTERN = r"\s?\w+|\s+|[^\s\w]+"
WORDS = ("hello", " hello", " world", " the", "llama")


def ranks(words: Iterable[str] = WORDS) -> dict[bytes, int]:
    """Token by bytes: merges are found from left to right."""
    tokens = {bytes([each]): each for each in range(256)}
    for word in words:
        text = word.encode()
        for end in range(2, len(text) + 1):
            tokens.setdefault(text[:end], len(tokens))
    return tokens


def written(tokens: dict[bytes, int]) -> bytes:
    """As tiktoken's files have it: a token in base64 and its rank, a line each."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tokens.items())


def write(directory: Path, name: str = "small", tokens: dict[bytes, int] | None = None) -> Path:
    """A file of an encoding of that name."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.tiktoken"
    path.write_bytes(written(ranks() if tokens is None else tokens))
    return path
