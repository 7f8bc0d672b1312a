"""Dialects: what a page says of an engine, and what the next page adds."""

from __future__ import annotations

import pathlib

import pytest

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.dialects import (
    DIALECTS,
    Dialect,
    Mean,
    PageError,
    Rate,
    Ratio,
    Reading,
    Total,
    read,
)

CAPTURES = pathlib.Path(__file__).parent.parent / "captures"
VLLM = DIALECTS["vllm"]


def page(**metrics: float | str) -> bytes:
    return "".join(f"vllm:{name} {value}\n" for name, value in metrics.items()).encode()


def test_a_recorded_page_of_an_idle_engine() -> None:
    reading = read(VLLM, (CAPTURES / "vllm-0.32-metrics.txt").read_bytes(), 12.5)
    assert reading == Reading(
        stats=EngineStats(at=12.5, running=0.0, waiting=0.0, kv_cache_usage=0.0, prefix_cache_hit_rate=0.0),
        counters={"vllm:generation_tokens_total": 242.0, "vllm:request_success_total": 30.0},
    )


def test_a_recorded_page_under_load() -> None:
    reading = read(VLLM, (CAPTURES / "vllm-0.32-metrics-under-load.txt").read_bytes(), 1.0)
    assert reading.stats == EngineStats(
        at=1.0,
        running=4.0,
        waiting=4.0,
        kv_cache_usage=0.7948717948717949,
        prefix_cache_hit_rate=384 / 1708,
    )
    assert reading.counters == {"vllm:generation_tokens_total": 11419.0, "vllm:request_success_total": 19.0}


def test_data_parallel_engines_are_one_endpoint() -> None:
    body = b"""\
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 5
vllm:num_requests_waiting{engine="0"} 1
vllm:num_requests_waiting{engine="1"} 0
vllm:kv_cache_usage_perc{engine="0"} 0.2
vllm:kv_cache_usage_perc{engine="1"} 0.6
vllm:prefix_cache_hits_total{engine="0"} 90
vllm:prefix_cache_hits_total{engine="1"} 0
vllm:prefix_cache_queries_total{engine="0"} 100
vllm:prefix_cache_queries_total{engine="1"} 200
"""
    stats = read(VLLM, body, 0.0).stats
    assert (stats.running, stats.waiting) == (8.0, 1.0)
    assert stats.kv_cache_usage == pytest.approx(0.4)
    assert stats.prefix_cache_hit_rate == pytest.approx(0.3)  # of all queries, not the mean of two rates


def test_rates_are_growth_over_the_time_between_two_pages() -> None:
    first = read(VLLM, page(generation_tokens_total=100, request_success_total=7), 10.0)
    second = read(VLLM, page(generation_tokens_total=150, request_success_total=8), 10.25, first)
    assert (first.stats.generation_tokens_per_second, first.stats.requests_per_second) == (None, None)
    assert (second.stats.generation_tokens_per_second, second.stats.requests_per_second) == (200.0, 4.0)


def test_after_a_restart_there_is_no_rate_and_then_there_is_one_again() -> None:
    before = read(VLLM, page(generation_tokens_total=100, request_success_total=7), 10.0)
    # The tokens have already overtaken the old count; the requests tell that this is another engine.
    after = read(VLLM, page(generation_tokens_total=150, request_success_total=1), 11.0, before)
    later = read(VLLM, page(generation_tokens_total=160, request_success_total=1), 12.0, after)
    assert (after.stats.generation_tokens_per_second, after.stats.requests_per_second) == (None, None)
    assert (later.stats.generation_tokens_per_second, later.stats.requests_per_second) == (10.0, 0.0)


@pytest.mark.parametrize("at", [10.0, 9.0])
def test_no_time_has_passed(at: float) -> None:
    first = read(VLLM, page(generation_tokens_total=100), 10.0)
    assert read(VLLM, page(generation_tokens_total=150), at, first).stats.generation_tokens_per_second is None


def test_a_counter_that_appears_has_no_rate_yet() -> None:
    first = read(VLLM, page(num_requests_running=1), 10.0)
    second = read(VLLM, page(generation_tokens_total=100), 11.0, first)
    assert second.stats.generation_tokens_per_second is None
    assert second.counters == {"vllm:generation_tokens_total": 100.0}


def test_what_the_engine_does_not_tell_is_none() -> None:
    assert read(VLLM, page(num_requests_waiting=2), 1.0).stats == EngineStats(at=1.0, waiting=2.0)


def test_no_prefix_was_looked_up_yet() -> None:
    body = page(prefix_cache_hits_total=0, prefix_cache_queries_total=0)
    assert read(VLLM, body, 1.0).stats.prefix_cache_hit_rate is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_as_if_absent(value: str) -> None:
    stats = read(VLLM, page(num_requests_running=value, num_requests_waiting=1), 1.0).stats
    assert (stats.running, stats.waiting) == (None, 1.0)


@pytest.mark.parametrize(
    "body", [b"", b"<html>not here</html>", b"python_info 1.0\n", b"vllm:num_requests_running NaN\n"]
)
def test_a_page_of_something_else(body: bytes) -> None:
    with pytest.raises(PageError, match="no metric"):
        read(VLLM, body, 1.0)


def test_another_engine_is_one_row() -> None:
    dialect = Dialect(
        running=Total("e:running"),
        kv_cache_usage=Ratio("e:blocks_used", "e:blocks"),
        prefix_cache_hit_rate=Mean("e:hit_share"),
        generation_tokens_per_second=Total("e:throughput"),
        requests_per_second=Rate("e:done"),
        mem_utilization=Mean("e:memory"),
    )
    body = b"e:running 2\ne:blocks_used 1\ne:blocks 4\ne:hit_share 0.5\ne:throughput 99\ne:done 3\ne:memory 0.9\n"
    first = read(dialect, body, 1.0)
    assert read(dialect, body, 2.0, first).stats == EngineStats(
        at=2.0,
        running=2.0,
        kv_cache_usage=0.25,
        prefix_cache_hit_rate=0.5,
        generation_tokens_per_second=99.0,
        requests_per_second=0.0,
        mem_utilization=0.9,
    )
