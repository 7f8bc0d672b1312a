"""Dialects: what each engine's page says of it, and how an operator changes that."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import pytest

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.dialects import ALIASES, DIALECTS, ENGINES, DialectError, dialects
from envoy_extproc.engines.formulas import FIELDS, source
from envoy_extproc.engines.reading import read
from envoy_extproc.settings import SettingsError

CAPTURES = pathlib.Path(__file__).parent.parent / "captures"

# One page, so no rates: growth needs two. What is told as "lately" is then the mean of the engine's life.
PAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vllm-0.32-metrics.txt": (
        "vllm",
        {
            "running": 0.0,
            "waiting": 0.0,
            "kv_cache_usage": 0.0,
            "prefix_cache_hit_rate": 0.0,
            "queue_seconds": 0.005545224999764287 / 30,
            "prefill_seconds": 17.581662681999887 / 30,
            "decode_seconds": 0.5995105310000781 / 30,
            "time_to_first_token": 17.8626492023468 / 30,
            "time_per_output_token": 0.5995105310000781 / 212,
            "prompt_tokens_per_request": 380 / 30,
            "generation_tokens_per_request": 242 / 30,
            "kv_cache_tokens": 1048576.0,
            "prefix_cache_hits": 0.0,
            "started": 1.79525055257e09,
        },
    ),
    "vllm-0.32-metrics-under-load.txt": (
        "vllm",
        {
            "running": 4.0,
            "waiting": 4.0,
            "kv_cache_usage": 0.7948717948717949,
            "prefix_cache_hit_rate": 384 / 1708,
            "queue_seconds": 0.024779390000503554 / 19,
            "prefill_seconds": 0.19085519700001896 / 19,
            "decode_seconds": 15.966982192999922 / 19,
            "time_to_first_token": 0.42632484436035156 / 23,
            "time_per_output_token": 23.436859024999876 / 11396,
            "prompt_tokens_per_request": 1660 / 19,
            "generation_tokens_per_request": 7941 / 19,
            "loras": frozenset(),  # of three sets of labels the newest names none
            "waiting_loras": frozenset(),
            "max_loras": 1,
            "kv_cache_tokens": 5120.0,
            "prefix_cache_hits": 384.0,
            "started": 1.79525085616e09,
        },
    ),
    "vllm-0.5-metrics.txt": (
        "vllm",
        {
            "running": 5.0,
            "waiting": 1.0,
            "kv_cache_usage": 0.25,
            "time_to_first_token": 0.5,
            "time_per_output_token": 0.03125,
            "prompt_tokens_per_request": 800.0,
            "generation_tokens_per_request": 200.0,
            "kv_cache_tokens": 432000.0,
        },
    ),
    "sglang-metrics.txt": (
        "sglang",
        {
            "running": 12.0,  # not 24: each priority stands there again
            "waiting": 3.0,
            "kv_cache_usage": 0.28,
            "prefix_cache_hit_rate": 0.4,
            "generation_tokens_per_second": 845.25,
            "queue_seconds": 0.25,
            "time_to_first_token": 0.4,
            "time_per_output_token": 0.015625,
            "prompt_tokens_per_request": 800.0,
            "generation_tokens_per_request": 200.0,
            "max_loras": 8,
            "kv_cache_tokens": 442353.0,
            "prefix_cache_hits": 12800.0,
        },
    ),
    "trtllm-metrics.txt": (
        "trtllm",
        {
            "running": 6.0,
            "waiting": 2.0,
            "kv_cache_usage": 0.5,
            "prefix_cache_hit_rate": 0.375,
            "queue_seconds": 0.125,
            "prefill_seconds": 0.125,
            "decode_seconds": 1.75,
            "time_to_first_token": 0.25,
            "time_per_output_token": 0.0625,
            "prompt_tokens_per_request": 500.0,
            "generation_tokens_per_request": 200.0,
            "kv_cache_tokens": 3239360.0,
            "prefix_cache_hits": 9600.0,
        },
    ),
    "llamacpp-metrics.txt": (
        "llamacpp",
        {"running": 4.0, "waiting": 46.0, "time_per_output_token": 0.03125},
    ),
    "triton-metrics.txt": (
        "triton",
        {
            "waiting": 3.0,
            "mem_utilization": 0.5,
            "utilization": 0.5,
            "queue_seconds": 0.25,
            "time_to_first_token": 0.5,
        },
    ),
    "triton-trtllm-metrics.txt": (
        "triton-trtllm",
        {
            "running": 8.0,
            "waiting": 5.0,
            "kv_cache_usage": 0.4875,
            "mem_utilization": 0.5,
            "utilization": 0.5,
            "queue_seconds": 0.25,
            "time_to_first_token": 0.5,
            "prompt_tokens_per_request": 800.0,
            "generation_tokens_per_request": 200.0,
            "kv_cache_tokens": 409600.0,
        },
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_its_dialect(name: str) -> None:
    engine, expected = PAGES[name]
    stats = read(DIALECTS[engine], (CAPTURES / name).read_bytes(), 12.5).stats
    told = {field: getattr(stats, field) for field in FIELDS if getattr(stats, field) is not None}
    assert told.keys() == expected.keys()
    for field, value in expected.items():
        exact = isinstance(value, frozenset | int)
        assert told[field] == (value if exact else pytest.approx(value, rel=1e-12)), field


def test_every_engine_has_a_page_and_every_page_says_whether_it_was_recorded() -> None:
    assert {engine for engine, _ in PAGES.values()} == ENGINES.keys() - {"generic"}
    for name in PAGES:
        first = (CAPTURES / name).read_text("utf-8").partition("\n")[0]
        assert first.startswith("# written from ") == (not name.startswith("vllm-0.32"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dialect_is_in_its_own_notation(engine: str) -> None:
    for field, each in ENGINES[engine].sources.items():
        assert source(field, str(each).split(", else ")) == each


def test_where_a_page_is() -> None:
    places = {name: (each.port, each.path, each.models_path) for name, each in ENGINES.items()}
    assert places == {
        "vllm": (None, "/metrics", "/v1/models"),
        "sglang": (None, "/metrics", "/v1/models"),
        "trtllm": (None, "/prometheus/metrics", "/v1/models"),
        "llamacpp": (None, "/metrics", "/v1/models"),
        "triton": (8002, "/metrics", None),
        "triton-trtllm": (8002, "/metrics", None),
        "generic": (None, "/metrics", "/v1/models"),
    }


def test_other_names() -> None:
    assert {name: DIALECTS[name] for name in ALIASES} == {name: ENGINES[to] for name, to in ALIASES.items()}
    assert {"trt-llm", "tensorrt-llm", "llama.cpp", "triton-tensorrt-llm"} <= ALIASES.keys()


def test_an_operators_dialect_differs_from_its_base() -> None:
    mine = dialects(
        {
            "mine": {
                "base": "vllm",
                "path": "/m",
                "port": 9000,
                "waiting": "my:queue",
                "kv_cache_usage": ['my:cache{type="gpu"} / 100', "my:old_cache"],
                "queue_seconds": None,
            }
        }
    )
    assert mine.keys() == {*DIALECTS, "mine"}
    assert (mine["mine"].path, mine["mine"].port, mine["mine"].models_path) == ("/m", 9000, "/v1/models")
    body = b"""\
vllm:num_requests_running 2
vllm:num_requests_waiting 9
vllm:kv_cache_usage_perc 0.9
vllm:request_queue_time_seconds_sum 3
vllm:request_queue_time_seconds_count 3
my:queue 7
my:cache{type="cpu"} 99
my:cache{type="gpu"} 25
my:old_cache 0.8
"""
    assert read(mine["mine"], body, 1.0).stats == EngineStats(
        at=1.0, running=2.0, waiting=7.0, kv_cache_usage=0.25
    )


def test_a_base_may_be_another_of_the_operators() -> None:
    mine = dialects({"a": {"waiting": "a:queue"}, "b": {"base": "a", "running": "b:running"}})
    assert {field: str(each) for field, each in mine["b"].sources.items()} == {
        "waiting": "a:queue",
        "running": "b:running",
    }


def test_an_engine_of_ours_may_be_changed_under_its_own_name() -> None:
    mine = dialects({"vllm": {"waiting": "my:queue"}})
    assert str(mine["vllm"].sources["waiting"]) == "my:queue"
    assert mine["vllm"].sources["running"] == DIALECTS["vllm"].sources["running"]
    assert str(DIALECTS["vllm"].sources["waiting"]) == "vllm:num_requests_waiting"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"waitng": "x"},
            "engines.dialects.mine.waitng: unknown key; known are base, path, port, models_path,",
        ),
        ({"waitng": None}, "engines.dialects.mine.waitng: unknown key"),
        ({"at": "x"}, "engines.dialects.mine.at: unknown key"),
        ({"base": "vlm"}, "engines.dialects.mine.base: 'vlm' is not known; known are vllm, sglang,"),
        ({"base": "mine"}, "engines.dialects.mine.base: 'mine' is not known"),
        ({"waiting": "two words"}, "engines.dialects.mine.waiting: 'two words' is no metric"),
        ({"waiting": 7}, "engines.dialects.mine.waiting: must be a metric's name, or a list of them"),
        ({"waiting": []}, "engines.dialects.mine.waiting: must be a metric's name, or a list of them"),
        ({"waiting": ["a", 7]}, "engines.dialects.mine.waiting: must be a metric's name, or a list of them"),
        ({"waiting": "a / b"}, "engines.dialects.mine.waiting: 'a / b' is not how waiting can be told"),
        ({"path": "metrics"}, "engines.dialects.mine.path: must be a path that begins with /"),
        ({"path": None}, "engines.dialects.mine.path: must be a path that begins with /"),
        ({"models_path": 7}, "engines.dialects.mine.models_path: must be a path that begins with /"),
        ({"port": 0}, "engines.dialects.mine.port: must be a port from 1 to 65535"),
        ({"port": "8002"}, "engines.dialects.mine.port: must be a port from 1 to 65535"),
        ({"port": True}, "engines.dialects.mine.port: must be a port from 1 to 65535"),
    ],
)
def test_a_mistake_names_its_key(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DialectError) as caught:
        dialects({"mine": entry})
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, SettingsError)
