"""Lists of models as engines write them."""

from __future__ import annotations

import pytest

from envoy_extproc.endpoints import ServedModel
from envoy_extproc.engines.served import served_models

# As recorded from vLLM 0.32 with a LoRA adapter; permissions left out.
_VLLM = b"""\
{"object":"list","data":[{"id":"tiny","object":"model","created":1795250916,"owned_by":"vllm","root":"model",\
"parent":null,"max_model_len":2048},{"id":"ad-a","object":"model","created":1795250916,"owned_by":"vllm",\
"root":"lora-a","parent":"tiny","max_model_len":null}]}"""


def test_a_base_model_and_its_adapter() -> None:
    base, adapter = served_models(_VLLM) or ()
    assert (base.id, base.parent, adapter.id, adapter.parent) == ("tiny", None, "ad-a", "tiny")
    assert b'{"object":"list","data":[' + base.entry + b"," + adapter.entry + b"]}" == _VLLM


@pytest.mark.parametrize(
    ("entry", "parent"),
    [
        (b'{"id":"m"}', None),
        (b'{ "id" : "m", "x": 1.0e2, "x": [ ] }', None),
        (b'{"id":"m","parent":"base"}', "base"),
        (b'{"id":"m","parent":""}', None),
        (b'{"id":"m","parent":7}', None),
        ('{"id":"m","name":"größe"}'.encode(), None),
    ],
)
def test_an_entry_is_kept_byte_for_byte(entry: bytes, parent: str | None) -> None:
    body = b'{"data": [ ' + entry + b" ], "
    assert served_models(body + b'"models": 7}') == (ServedModel(id="m", parent=parent, entry=entry),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": {}}',
        b'{"data": [{"name": "m"}]}',
        b'{"data": [{"id": 7}]}',
        b'{"data": ["m"]}',
        b'{"data": [{"id": "m"}]',
        b'{"data": [{"id": "\xff"}]}',
        b'{"detail": "Not Found"}',
        b'{"data": ' + b"[" * 100_000,
        b'{"data": [' + b'{"a":' * 100_000,
    ],
)
def test_what_is_no_such_list(body: bytes) -> None:
    assert served_models(body) is None


def test_nothing_is_served_yet() -> None:
    assert served_models(b'{"data": []}') == ()
