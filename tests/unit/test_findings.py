"""Inputs that broke something once, found by fuzzing or by thinking like an enemy: a case each, so that they stay mended."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from contextlib import suppress

import msgspec
import pytest

from envoy_extproc.engines import reading
from envoy_extproc.engines.dialects import DIALECTS
from envoy_extproc.engines.served import served_models
from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import request, routes
from envoy_extproc.openai.answer import StreamReader
from tests.support.playbook import Playbook

CHAT = routes.find("/v1/chat/completions")
assert CHAT is not None


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before", [b'"":1,', b'"a":[[],[],[]],', b'"":"",'], ids=["numbers", "lists", "strings"]
)
def test_asking_for_usage_in_a_body_of_a_million_members(before: bytes) -> None:
    """Each member cost 3 microseconds, 18 s in a body of 32 MiB, with all other exchanges waiting."""
    assert CHAT is not None
    body = b"{" + before * 1_000_000 + b'"model":"m","stream":true,"stream_options":null}'
    decoded = request.decode(body, CHAT)
    began = time.process_time()
    asked = request.ask_for_usage(body, decoded)
    assert time.process_time() - began < 0.5
    assert asked.startswith(body[:-1])
    assert json.loads(asked)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("body", [b'{"model":' + b" " * 1000, b'{"model":""}', b"\xff" * 1000, b"[" * 1000])
def test_a_refused_body_is_let_go_of_at_once(body: bytes) -> None:
    """The exception's traceback held it until a garbage collection: ten bodies of 32 MiB were 600 MiB."""
    gc.collect()
    gc.disable()
    try:
        before = sys.getrefcount(body)
        book = Playbook()
        book.request()
        book.body(body)
        book.closed()
        del book
        assert sys.getrefcount(body) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [b"NaN]}", b"1]"], ids=["not-a-number", "cut-off"])
def test_a_second_opinion_is_not_much_dearer_than_the_first(end: bytes) -> None:
    """A body of 32 MiB took 3.6 s and 820 MiB, where a whole one takes 0.1 s and nothing."""
    assert CHAT is not None
    many = b'{"model":"m","x":[' + b"[]," * 1_000_000
    began = time.process_time()
    request.decode(many + b"1]}", CHAT)
    first = time.process_time() - began
    began = time.process_time()
    with suppress(BadRequest):
        request.decode(many + end, CHAT)
    assert time.process_time() - began < 5 * max(first, 0.01)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b": ", b"event: ", b"xdata: ", b":data: "])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_null_usage_goes_from_the_data_and_from_nowhere_else(before: bytes, end: bytes) -> None:
    """The first text of the same letters was taken for the data."""
    data = b'{"usage":null,"choices":[]}'
    reader = StreamReader(hide_usage=True, max_event_bytes=1000)
    shown = reader.feed(before + data + end + b"data: " + data + end + end, 0.0) or b""
    shown += reader.finish(0.0)
    assert shown == before + data + end + b'data: {"choices":[]}' + end + end


# -- engines -----------------------------------------------------------------------------------------------------------


PAGES = {
    "a count beyond all floats": ("sglang", "sglang:lora_pool_slots_total", 'a="1"', "1e308"),
    "a sum beyond all floats": ("vllm", "vllm:num_requests_running", 'engine="1"', "1e308"),
    "a number of 5,000 digits": ("vllm", "vllm:lora_requests_info", 'max_lora="' + "9" * 5000 + '"', "1"),
}


@pytest.mark.parametrize("name", PAGES)
def test_absurd_numbers_are_read_as_absent(name: str) -> None:
    """Some raised where the page was read; an infinite load went on to whoever chooses."""
    engine, metric, labels, value = PAGES[name]
    page = f'{metric}{{{labels}}} {value}\n{metric}{{{labels},b="2"}} {value}\n'.encode()
    stats = reading.read(DIALECTS[engine], page, 1.0).stats
    told = msgspec.structs.asdict(stats).values()
    assert all(math.isfinite(each) for each in told if isinstance(each, float))
    assert stats.max_loras is None


def test_rates_and_means_of_absurd_counters_are_absent() -> None:
    names = ("vllm:generation_tokens_total", "vllm:request_queue_time_seconds_sum")
    page = "{0} {2}\n{1} {2}\nvllm:request_queue_time_seconds_count {3}\n"
    first = reading.read(DIALECTS["vllm"], page.format(*names, 0, 0).encode(), 1.0)
    second = reading.read(DIALECTS["vllm"], page.format(*names, 1e308, 1e-300).encode(), 1.01, first)
    assert second.stats.generation_tokens_per_second is None
    assert second.stats.queue_seconds is None


@pytest.mark.parametrize("inside", ['{"data":[%s]}', '{"data":[{"id":"m","parent":%s}]}', "%s"])
def test_a_list_of_models_nested_deeply_is_none(inside: str) -> None:
    """It raised `RecursionError`, which ended the task of the engine, and with it the server."""
    assert served_models((inside % ("[" * 100_000 + "]" * 100_000)).encode()) is None


def test_a_list_of_models_that_is_no_utf_8_is_none() -> None:
    """Its entries went into our own list, which no client could read then: one engine broke it for all."""
    assert served_models(b'{"data":[{"id":"m","owned_by":"\xff"}]}') is None
