"""Reads an engine's list of models, the answer of ``GET /v1/models``."""

from __future__ import annotations

from typing import Any

import msgspec

from envoy_extproc.endpoints import ServedModel


class _Models(msgspec.Struct):
    data: list[msgspec.Raw]


class _Entry(msgspec.Struct):
    id: str
    parent: Any = None  # vLLM's and SGLang's word for an adapter's base model


_models = msgspec.json.Decoder(_Models)
_entry = msgspec.json.Decoder(_Entry)


def served_models(body: bytes) -> tuple[ServedModel, ...] | None:
    """The models in the engine's order, each with its entry byte for byte; None if `body` is no such list."""
    try:
        body.decode()  # msgspec steps over strings without looking at their bytes; clients would get them in our list
        return tuple(_served(bytes(raw)) for raw in _models.decode(body).data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _served(raw: bytes) -> ServedModel:
    entry = _entry.decode(raw)
    parent = entry.parent if isinstance(entry.parent, str) and entry.parent else None
    return ServedModel(id=entry.id, parent=parent, entry=raw)
