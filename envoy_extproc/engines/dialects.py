"""How each engine says what we want to know: a table from the fields of `EngineStats` to metrics of its page.

The notation is that of `formulas`; where a field has several formulas, the first whose metrics are there counts, so
one table reads the versions of an engine that have renamed a metric. To add an engine is to add a table to
`DIALECTS`, its page to the captures and a row to its test; an operator adds one, or renames a metric, under
`engines.dialects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from envoy_extproc.engines.exposition import SampleReader
from envoy_extproc.engines.formulas import FIELDS, FormulaError, selection, source
from envoy_extproc.engines.sources import Source
from envoy_extproc.openai.tokenize import Form
from envoy_extproc.settings import SettingsError


class DialectError(SettingsError):
    """An entry of `engines.dialects` that cannot be used; the text names its key and says why."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one engine is read.

    Attributes:
        sources: where it tells the fields of `EngineStats`, by field; empty where it has no page.
        path: of its page.
        port: of its page; None where that is the port that serves requests.
        models_path: of its list of models, on the port that serves requests; None where it has none.
        tokenize: how it is asked to count tokens; None where it cannot.
    """

    sources: Mapping[str, Source]
    path: str = "/metrics"
    port: int | None = None
    models_path: str | None = "/v1/models"
    tokenize: Form | None = None

    @cached_property
    def selections(self) -> Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]]:
        """The references that read a metric, each with the label values it asks for, by the metric's name."""
        found: dict[str, dict[str, Mapping[str, str]]] = {}
        for each in self.sources.values():
            for reference in each.references:
                name, labels = selection(reference)
                found.setdefault(name, {})[reference] = labels
        return {name: tuple(references.items()) for name, references in found.items()}

    @cached_property
    def counters(self) -> frozenset[str]:
        """The references whose growth is wanted."""
        return frozenset(reference for each in self.sources.values() for reference in each.counters)

    @cached_property
    def infos(self) -> frozenset[str]:
        """The references of which the newest set's labels are wanted."""
        return frozenset(reference for each in self.sources.values() for reference in each.infos)

    @cached_property
    def tables(self) -> frozenset[str]:
        """The references of which every set's labels are wanted."""
        return frozenset(reference for each in self.sources.values() for reference in each.tables)

    @cached_property
    def described(self) -> frozenset[str]:
        """The names of the metrics whose labels are wanted."""
        return frozenset(selection(reference)[0] for reference in self.infos | self.tables)

    @cached_property
    def anybodys(self) -> frozenset[str]:
        """Metrics that pages of other programs have, too: when a process began says nothing of an engine."""
        own = [each for field, each in self.sources.items() if field != "started"]
        known = {selection(reference)[0] for each in own for reference in each.references}
        return frozenset(self.selections) - known

    @cached_property
    def samples(self) -> SampleReader:
        """Reads the metrics of this dialect."""
        return SampleReader(self.selections)

    @cached_property
    def seldom(self) -> frozenset[str]:
        """The fields that need not be read from every page.

        An engine's room stays as it is, and vLLM tells it in by far the longest line it has.
        """
        source = self.sources.get("kv_cache_tokens")
        return frozenset() if source is None or not source.tables else frozenset({"kv_cache_tokens"})

    @cached_property
    def changing(self) -> SampleReader:
        """Reads the metrics of all other fields."""
        often = [each for field, each in self.sources.items() if field not in self.seldom]
        return SampleReader(selection(reference)[0] for each in often for reference in each.references)


def _dialect(
    formulas: Mapping[str, str | tuple[str, ...]],
    *,
    path: str = "/metrics",
    port: int | None = None,
    models_path: str | None = "/v1/models",
    tokenize: Form | None = None,
) -> Dialect:
    sources = {field: source(field, several) for field, several in formulas.items()}
    return Dialect(
        sources=MappingProxyType(sources), path=path, port=port, models_path=models_path, tokenize=tokenize
    )


# The V1 engine's names as recorded from vLLM 0.32; behind them those of older versions, the V0 engine's as in
# vllm/engine/metrics.py of 2024 (commit 00c33e81). A model with more than one kind of attention shares blocks among them,
# so its cache has room for fewer tokens than blocks * block_size; the label that says how many came in 2026. Python's client
# library tells process_start_time_seconds by itself, but not where several processes share a page, as SGLang's and
# TensorRT-LLM's always do. inter_token_latency counts every token, so it moves while answers are under way;
# request_time_per_output_token counts when a request ends.
_VLLM = _dialect(
    {
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "kv_cache_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "prefix_cache_hit_rate": (
            "vllm:prefix_cache_hits_total / vllm:prefix_cache_queries_total",
            "vllm:gpu_prefix_cache_hits_total / vllm:gpu_prefix_cache_queries_total",
            "vllm:gpu_prefix_cache_hit_rate",
        ),
        "generation_tokens_per_second": "vllm:generation_tokens_total",
        "prompt_tokens_per_second": "vllm:prompt_tokens_total",
        "requests_per_second": "vllm:request_success_total",
        "queue_seconds": "vllm:request_queue_time_seconds",
        "prefill_seconds": "vllm:request_prefill_time_seconds",
        "decode_seconds": "vllm:request_decode_time_seconds",
        "time_to_first_token": "vllm:time_to_first_token_seconds",
        "time_per_output_token": (
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "vllm:request_time_per_output_token_seconds",
        ),
        "prompt_tokens_per_request": "vllm:request_prompt_tokens",
        "generation_tokens_per_request": "vllm:request_generation_tokens",
        "loras": "vllm:lora_requests_info[running_lora_adapters]",
        "waiting_loras": "vllm:lora_requests_info[waiting_lora_adapters]",
        "max_loras": "vllm:lora_requests_info[max_lora]",
        "kv_cache_tokens": (
            "vllm:cache_config_info[kv_cache_size_tokens]",
            "vllm:cache_config_info[num_gpu_blocks] * vllm:cache_config_info[block_size]",
        ),
        "prefix_cache_hits": ("vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total"),
        "started": "process_start_time_seconds",
    },
    tokenize=Form.MESSAGES,
)

# Names as in SGLang's python/sglang/srt/observability/metrics_collector.py, main of 2026 (commit 016d8605), which
# has them since 0.5; `--enable-metrics` turns the page on. With priority scheduling a queue stands there once as a
# whole, under priority="", and once by priority. `utilization` stays 0, or is -1, unless a limit of running
# requests is set. Adapters are not named, only counted.
_SGLANG = _dialect(
    {
        "running": 'sglang:num_running_reqs{priority=""}',
        "waiting": 'sglang:num_queue_reqs{priority=""}',
        "kv_cache_usage": "sglang:token_usage",
        "prefix_cache_hit_rate": "sglang:cache_hit_rate",
        "generation_tokens_per_second": "gauge(sglang:gen_throughput)",
        "prompt_tokens_per_second": "sglang:prompt_tokens_total",
        "requests_per_second": "sglang:num_requests_total",
        "utilization": "sglang:utilization if sglang:max_running_requests_under_SLO",
        "queue_seconds": "sglang:queue_time_seconds",
        "time_to_first_token": "sglang:time_to_first_token_seconds",
        "time_per_output_token": (
            "sglang:inter_token_latency_seconds",
            "sglang:time_per_output_token_seconds",
        ),
        "prompt_tokens_per_request": (
            "sglang:prompt_tokens_histogram",
            "sglang:prompt_tokens_total / sglang:num_requests_total",
        ),
        "generation_tokens_per_request": (
            "sglang:generation_tokens_histogram",
            "sglang:generation_tokens_total / sglang:num_requests_total",
        ),
        "max_loras": "sglang:lora_pool_slots_total",
        "kv_cache_tokens": (
            'sglang:max_total_num_tokens{priority=""}',
            "sglang:cache_config_info[num_pages] * sglang:cache_config_info[page_size]",
        ),
        "prefix_cache_hits": "sglang:cached_tokens_total",
    },
    tokenize=Form.PROMPT,
)

# Names as in TensorRT-LLM's tensorrt_llm/metrics/collector.py, main of 2026 (commit 050f80de). `return_perf_metrics`
# turns the page on; the gauges come with the statistics of iterations, the others with each request's.
_TRTLLM = _dialect(
    {
        "running": "trtllm_num_requests_running",
        "waiting": "trtllm_num_requests_waiting",
        "kv_cache_usage": "trtllm_kv_cache_utilization",
        "prefix_cache_hit_rate": "trtllm_kv_cache_hit_rate",
        "generation_tokens_per_second": "trtllm_generation_tokens_total",
        "prompt_tokens_per_second": "trtllm_prompt_tokens_total",
        "requests_per_second": "trtllm_request_success_total",
        "queue_seconds": "trtllm_request_queue_time_seconds",
        "prefill_seconds": "trtllm_request_prefill_time_seconds",
        "decode_seconds": "trtllm_request_decode_time_seconds",
        "time_to_first_token": "trtllm_time_to_first_token_seconds",
        "time_per_output_token": "trtllm_time_per_output_token_seconds",
        "prompt_tokens_per_request": "trtllm_prompt_tokens_total / trtllm_request_success_total",
        "generation_tokens_per_request": "trtllm_generation_tokens_total / trtllm_request_success_total",
        "kv_cache_tokens": "trtllm_kv_cache_max_blocks * trtllm_kv_cache_tokens_per_block",
        "prefix_cache_hits": "trtllm_kv_cache_reused_blocks_total * trtllm_kv_cache_tokens_per_block",
    },
    path="/prometheus/metrics",
)

# Names as in llama.cpp's tools/server/server.cpp of late 2025; `--metrics` turns the page on. The gauge of the KV
# cache was taken out in 2025. Its counters of tokens grow when a prompt or an answer ends.
_LLAMACPP = _dialect(
    {
        "running": "llamacpp:requests_processing",
        "waiting": "llamacpp:requests_deferred",
        "kv_cache_usage": "llamacpp:kv_cache_usage_ratio",
        "generation_tokens_per_second": "llamacpp:tokens_predicted_total",
        "prompt_tokens_per_second": "llamacpp:prompt_tokens_total",
        "time_per_output_token": "llamacpp:tokens_predicted_seconds_total / llamacpp:tokens_predicted_total",
    },
    tokenize=Form.CONTENT,
)

# Names as in the server's docs/user_guide/metrics.md of 2.73. A batch that runs has no gauge; an ensemble counts a
# request for itself and for each of its models, so pick one: nv_inference_request_success{model="..."}.
_TRITON = _dialect(
    {
        "waiting": "nv_inference_pending_request_count",
        "requests_per_second": "nv_inference_request_success",
        "mem_utilization": "nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes",
        "utilization": "nv_gpu_utilization",
        "queue_seconds": "nv_inference_queue_duration_us / nv_inference_request_success / 1e6",
        "time_to_first_token": "nv_inference_first_response_histogram_ms / 1000",
    },
    port=8002,
    models_path=None,
)

# Triton's own, and those of the batch manager as in the tensorrtllm_backend's README ("Triton Metrics") and its
# custom_metrics_reporter.cc, which has the two histograms since 2024.
_TRITON_TRTLLM = replace(
    _TRITON,
    sources=MappingProxyType(
        {
            **_TRITON.sources,
            **_dialect(
                {
                    "running": 'nv_trt_llm_request_metrics{request_type="scheduled"}',
                    "waiting": 'nv_trt_llm_request_metrics{request_type="waiting"}',
                    "kv_cache_usage": 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',
                    "kv_cache_tokens": (
                        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max"}'
                        ' * nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per"}'
                    ),
                    "prompt_tokens_per_request": "nv_llm_input_token_len",
                    "generation_tokens_per_request": "nv_llm_output_token_len",
                },
            ).sources,
        }
    ),
)

ENGINES: Mapping[str, Dialect] = MappingProxyType(
    {
        "vllm": _VLLM,
        "sglang": _SGLANG,
        "trtllm": _TRTLLM,
        "llamacpp": _LLAMACPP,
        "triton": _TRITON,
        "triton-trtllm": _TRITON_TRTLLM,
        "generic": _dialect({}),  # speaks OpenAI's API and says nothing of itself
    }
)
"""The engines that can be read, by the name that `Endpoint.engine` gives."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "trt-llm": "trtllm",
        "trtllm-serve": "trtllm",
        "tensorrt-llm": "trtllm",
        "llama.cpp": "llamacpp",
        "triton-tensorrt-llm": "triton-trtllm",
    }
)
"""Names that other projects' labels have for them."""

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {**ENGINES, **{alias: ENGINES[name] for alias, name in ALIASES.items()}}
)
"""All of them, by all their names."""

_KEYS = ("base", "path", "port", "models_path")


def dialects(custom: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Dialect]:
    """Ours, and over them the `custom` ones of the setting `engines.dialects`.

    A custom dialect is a mapping of fields of `EngineStats` to formulas; null takes a field away. `base` names a
    dialect it differs from, ours or an earlier one; without one it begins with that of its own name, or nothing.
    `path`, `port` and `models_path` are those of `Dialect`.

    Raises:
        DialectError: one of them cannot be used.
    """
    known = dict(DIALECTS)
    for name, entry in custom.items():
        known[name] = _custom(f"engines.dialects.{name}", name, entry, known)
    return MappingProxyType(known)


def _custom(key: str, name: str, entry: Mapping[str, Any], known: Mapping[str, Dialect]) -> Dialect:
    base = entry.get("base", name if name in known else "generic")
    if base not in known:
        raise DialectError(f"{key}.base: {base!r} is not known; known are {', '.join(known)}")
    sources = dict(known[base].sources)
    for field, formulas in entry.items():
        if field not in _KEYS:
            sources.pop(field, None)
            if formulas is not None or field not in FIELDS:
                sources[field] = _formulas(f"{key}.{field}", field, formulas)
    places = {place: _place(f"{key}.{place}", place, entry[place]) for place in _KEYS[1:] if place in entry}
    return replace(known[base], sources=MappingProxyType(sources), **places)


def _formulas(key: str, field: str, formulas: Any) -> Source:
    if field not in FIELDS:
        raise DialectError(f"{key}: unknown key; known are {', '.join((*_KEYS, *FIELDS))}")
    if not isinstance(formulas, str | list | tuple):
        raise DialectError(f"{key}: must be a metric's name, or a list of them")
    try:
        return source(field, formulas)
    except FormulaError as error:
        raise DialectError(f"{key}: {error}") from None


def _place(key: str, place: str, value: Any) -> Any:
    if place == "port":
        fits = value is None or (type(value) is int and 1 <= value <= 65535)
        kind = "a port from 1 to 65535"
    else:
        fits = (place == "models_path" and value is None) or (
            isinstance(value, str) and value.startswith("/")
        )
        kind = "a path that begins with /"
    if not fits:
        raise DialectError(f"{key}: must be {kind}")
    return value
