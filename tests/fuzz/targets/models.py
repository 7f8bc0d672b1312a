"""An engine's list of models: the models, or None."""

from __future__ import annotations

import json
from collections.abc import Iterator

from envoy_extproc.engines.served import served_models
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 0
WORDS = [
    b'"data"',
    b'"id"',
    b'"parent"',
    b"null",
    b"[",
    b"{",
    b"{}",
    b"[]",
    b'"m"',
    b",",
    b"1",
    b'"\\ud800"',
    b"\xff",
    b"NaN",
]


def check(data: bytes) -> None:
    """Each model's entry is a part of the text."""
    text = Draw(data).text()
    with bounded():
        served = served_models(text)
    for model in served or ():
        assert model.entry in text
        assert json.loads(model.entry)["id"] == model.id, (
            "the entry stands in our own list: all of that must be JSON"
        )
        model.id.encode()  # no lone surrogate: it goes into headers and labels


def seeds() -> Iterator[bytes]:
    """As vLLM and SGLang write it."""
    yield seed(
        text=b'{"object":"list","data":[{"id":"m","object":"model","created":1,"parent":null,"permission":[{}]}]}'
    )
    yield seed(text=b'{"data":[{"id":"m"},{"id":"lora","parent":"m"}]}')
    yield seed(text=b'{"data":[{"id":"m","x":[[[[1]]]]}]}')
