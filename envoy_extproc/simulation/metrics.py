"""What a simulated engine counts, and its Prometheus exposition under vLLM's V1 names."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from envoy_extproc.simulation.options import EngineOptions
    from envoy_extproc.simulation.service_time import Sequence

# The bounds are vLLM's, in seconds.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TTFT_BOUNDS = (*_TTFT, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_ITL_BOUNDS = (*_ITL, 10.0, 20.0, 40.0, 80.0)
_E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_E2E_BOUNDS = (*_E2E, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKEN_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
_PREEMPTION_BOUNDS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_STEP_BOUNDS = (1.0, *(float(2**power) for power in range(3, 15)))


class Histogram:
    """Observations in buckets; `observe` is called once a token, so it is a bisection and an addition."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts `value` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of `le` and the number of observations up to it, +Inf last."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


def _finished() -> dict[str, int]:
    return dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)


@dataclass(slots=True)
class Stats:
    """Counters of one engine since its start. A request whose client left is in none of the totals of the finished.

    Attributes:
        prefix_queries: prompt tokens that were looked up in the prefix cache, each request once.
        prefix_hits: those of them that were there.
        preemptions: how often a sequence lost its blocks.
        prompt_tokens: of prompts that have their first token, hits included.
        cached_tokens: those of them that were hits.
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    rejections: int = 0
    finished: dict[str, int] = field(default_factory=_finished)
    iteration_tokens: Histogram = field(default_factory=lambda: Histogram(_STEP_BOUNDS))
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_TTFT_BOUNDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_ITL_BOUNDS))
    time_per_output_token: Histogram = field(default_factory=lambda: Histogram(_ITL_BOUNDS))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    inference_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    prefill_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    decode_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))

    request_preemptions: Histogram = field(default_factory=lambda: Histogram(_PREEMPTION_BOUNDS))
    request_computed_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))

    def first_token(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Counts a prompt that is computed, and how long its first token took."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.time_to_first_token.observe(seconds)

    def request_ended(self, sequence: Sequence, now: float) -> None:
        """Counts a request that has taken its last token."""
        self.finished[sequence.finish_reason] += 1
        decode = now - sequence.first_token_at
        self.e2e_latency.observe(now - sequence.arrived)
        self.queue_time.observe(sequence.admitted_at - sequence.arrived)
        self.inference_time.observe(now - sequence.admitted_at)
        self.prefill_time.observe(sequence.first_token_at - sequence.admitted_at)
        self.decode_time.observe(decode)
        self.time_per_output_token.observe(decode / max(1, sequence.generated - 1))
        self.request_prompt_tokens.observe(sequence.prompt_tokens)
        self.request_generation_tokens.observe(0 if sequence.pooled else sequence.generated)
        self.request_preemptions.observe(sequence.preemptions)
        self.request_computed_tokens.observe(sequence.prompt_tokens - sequence.cached_tokens)


@dataclass(frozen=True, slots=True)
class Gauges:
    """The engine as it is now; `kv_cache_usage` is a share from 0 to 1."""

    running: int
    waiting: int
    kv_cache_usage: float


class _Families(Collector):
    """One scrape's families, in vLLM's order."""

    def __init__(self, options: EngineOptions, gauges: Gauges, stats: Stats, started: float) -> None:
        self._options = options
        self._started = started
        self._gauges = gauges
        self._stats = stats
        self._labels = {"engine": "0", "model_name": options.models[0]}

    def collect(self) -> Iterator[Metric]:
        yield self._process_start()
        yield from self._gauge_families()
        yield from self._counter_families()
        yield from self._histogram_families()
        yield self._cache_config()

    def _gauge_families(self) -> Iterator[Metric]:
        now = self._gauges
        yield self._gauge("num_requests_running", "Requests in model execution batches.", now.running)
        yield self._gauge("num_requests_waiting", "Requests waiting to be processed.", now.waiting)
        reasons = {"capacity": now.waiting, "deferred": 0}
        yield self._labelled("num_requests_waiting_by_reason", "Waiting, by reason.", "reason", reasons)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage, 1 is all of it.", now.kv_cache_usage)

    def _counter_families(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._counter("prefix_cache_queries", "Tokens looked up in the cache.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the cache.", stats.prefix_hits)
        yield self._counter("num_preemptions", "Preemptions.", stats.preemptions)
        yield self._counter("prompt_tokens", "Prefill tokens processed.", stats.prompt_tokens)
        computed = stats.prompt_tokens - stats.cached_tokens
        sources = {
            "local_compute": computed,
            "local_cache_hit": stats.cached_tokens,
            "external_kv_transfer": 0,
        }
        yield self._labelled(
            "prompt_tokens_by_source", "Prompt tokens, by source.", "source", sources, total=True
        )
        yield self._counter("prompt_tokens_cached", "Cached prompt tokens.", stats.cached_tokens)
        yield self._counter("generation_tokens", "Generation tokens processed.", stats.generation_tokens)
        yield self._labelled(
            "request_success", "Requests finished.", "finished_reason", stats.finished, total=True
        )
        rejected = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused, by reason.", labels=["model_name", "reason"]
        )
        rejected.add_metric(
            [self._labels["model_name"], "max_num_queued_reqs"], stats.rejections, self._started
        )
        yield rejected

    def _histogram_families(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._histogram("iteration_tokens_total", "Tokens per engine step.", stats.iteration_tokens)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token.", stats.time_to_first_token),
            ("inter_token_latency_seconds", "Between tokens.", stats.inter_token_latency),
            ("request_time_per_output_token_seconds", "Per token.", stats.time_per_output_token),
            ("e2e_request_latency_seconds", "End to end.", stats.e2e_latency),
            ("request_queue_time_seconds", "Spent in the queue.", stats.queue_time),
            ("request_inference_time_seconds", "Spent in the batch.", stats.inference_time),
            ("request_prefill_time_seconds", "Spent in prefill.", stats.prefill_time),
            ("request_decode_time_seconds", "Spent in decode.", stats.decode_time),
            ("request_prompt_tokens", "Prefill tokens.", stats.request_prompt_tokens),
            ("request_generation_tokens", "Generation tokens.", stats.request_generation_tokens),
            ("request_num_preemptions", "Preemptions of a request.", stats.request_preemptions),
            ("request_prefill_kv_computed_tokens", "Uncached tokens.", stats.request_computed_tokens),
        ):
            yield self._histogram(name, text, histogram)

    def _process_start(self) -> Metric:
        """Of this engine, not of the process it may share with others."""
        text = "Start time of the process since unix epoch in seconds."
        return GaugeMetricFamily("process_start_time_seconds", text, self._started)

    def _cache_config(self) -> Metric:
        labels = {
            "block_size": str(self._options.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": str(self._options.prefix_caching),
            "engine": "0",
            "gpu_memory_utilization": "0.92",
            "kv_cache_size_tokens": str(self._options.kv_blocks * self._options.block_size),
            "num_gpu_blocks": str(self._options.kv_blocks),
            "num_gpu_blocks_override": str(self._options.kv_blocks),
            "prefix_caching_hash_algo": "sha256",
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value, self._started)
        return family

    def _labelled(
        self, name: str, text: str, label: str, values: Mapping[str, float], *, total: bool = False
    ) -> Metric:
        """A family with one sample for each value of a further label, a counter if `total`; labels in vLLM's order."""
        names = sorted([*self._labels, label])
        kind = CounterMetricFamily if total else GaugeMetricFamily
        family = kind(f"vllm:{name}", text, labels=names)
        for each, value in values.items():
            labels = {**self._labels, label: each}
            created = (self._started,) if total else ()
            family.add_metric([labels[known] for known in names], value, *created)
        return family

    def _histogram(self, name: str, text: str, value: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value.cumulative(), value.total)
        return family


def exposition(options: EngineOptions, gauges: Gauges, stats: Stats, started: float) -> bytes:
    """The body of GET /metrics of an engine that was started then, in seconds since the epoch."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(options, gauges, stats, started))
    return generate_latest(registry)
