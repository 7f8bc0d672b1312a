"""``GET /v1/models``: the list of models, in the words of the engines that serve them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec


def entry(model: str, created: int) -> bytes:
    """An element of the list for a model whose engine has none of its own."""
    shown = {"id": model, "object": "model", "created": created, "owned_by": "envoy-extproc"}
    return msgspec.json.encode(shown)


def listing(entries: Iterable[bytes]) -> bytes:
    """The whole list; each entry stands in it byte for byte."""
    return b'{"object":"list","data":[' + b",".join(entries) + b"]}"


def answer(entries: Mapping[str, bytes], name: str) -> bytes | None:
    """The answer to a request for the model called `name`, or for the whole list where that is empty.

    None where nobody serves it.
    """
    return entries.get(name) if name else listing(entries.values())
