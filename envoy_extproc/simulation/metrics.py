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
    from collections.abc import Iterator

    from envoy_extproc.simulation.options import EngineOptions

# The bounds are vLLM's, in seconds.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TTFT_BOUNDS = (*_TTFT, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_ITL_BOUNDS = (*_ITL, 10.0, 20.0, 40.0, 80.0)
_E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_E2E_BOUNDS = (*_E2E, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKEN_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


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
    """Counters of one engine since its start. A request whose client left is in none of the totals of the finished."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    rejections: int = 0
    finished: dict[str, int] = field(default_factory=_finished)
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_TTFT_BOUNDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_ITL_BOUNDS))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    prefill_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    decode_time: Histogram = field(default_factory=lambda: Histogram(_E2E_BOUNDS))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS))

    def request_ended(
        self, *, queue: float, prefill: float, decode: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """Counts a request that has taken its last token; times are seconds."""
        self.queue_time.observe(queue)
        self.prefill_time.observe(prefill)
        self.decode_time.observe(decode)
        self.request_prompt_tokens.observe(prompt_tokens)
        self.request_generation_tokens.observe(generation_tokens)


@dataclass(frozen=True, slots=True)
class Gauges:
    """The engine as it is now; `kv_cache_usage` is a share from 0 to 1."""

    running: int
    waiting: int
    kv_cache_usage: float


class _Families(Collector):
    """One scrape's families, in vLLM's order."""

    def __init__(self, options: EngineOptions, gauges: Gauges, stats: Stats) -> None:
        self._options = options
        self._gauges = gauges
        self._stats = stats
        self._labels = {"engine": "0", "model_name": options.models[0]}

    def collect(self) -> Iterator[Metric]:
        yield from self._gauge_families()
        yield from self._counter_families()
        yield from self._histogram_families()
        yield self._cache_config()

    def _gauge_families(self) -> Iterator[Metric]:
        now = self._gauges
        yield self._gauge("num_requests_running", "Requests in model execution batches.", now.running)
        yield self._gauge("num_requests_waiting", "Requests waiting to be processed.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage, 1 is all of it.", now.kv_cache_usage)

    def _counter_families(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._counter("prefix_cache_queries", "Tokens looked up in the cache.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the cache.", stats.prefix_hits)
        yield self._counter("prompt_tokens", "Prefill tokens processed.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Generation tokens processed.", stats.generation_tokens)
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests finished.", labels=[*self._labels, "finished_reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([*self._labels.values(), reason], count)
        yield finished
        rejected = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused, by reason.", labels=["model_name", "reason"]
        )
        rejected.add_metric([self._labels["model_name"], "max_num_queued_reqs"], stats.rejections)
        yield rejected

    def _histogram_families(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._histogram(
            "time_to_first_token_seconds", "Time to first token.", stats.time_to_first_token
        )
        yield self._histogram("inter_token_latency_seconds", "Between tokens.", stats.inter_token_latency)
        yield self._histogram("e2e_request_latency_seconds", "End to end.", stats.e2e_latency)
        yield self._histogram("request_queue_time_seconds", "Spent in the queue.", stats.queue_time)
        yield self._histogram("request_prefill_time_seconds", "Spent in prefill.", stats.prefill_time)
        yield self._histogram("request_decode_time_seconds", "Spent in decode.", stats.decode_time)
        yield self._histogram("request_prompt_tokens", "Prefill tokens.", stats.request_prompt_tokens)
        yield self._histogram(
            "request_generation_tokens", "Generation tokens.", stats.request_generation_tokens
        )

    def _cache_config(self) -> Metric:
        labels = {
            "block_size": str(self._options.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "gpu_memory_utilization": "0.92",
            "kv_cache_size_tokens": str(self._options.kv_blocks * self._options.block_size),
            "num_gpu_blocks": str(self._options.kv_blocks),
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
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, value: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value.cumulative(), value.total)
        return family


def exposition(options: EngineOptions, gauges: Gauges, stats: Stats) -> bytes:
    """The body of GET /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(options, gauges, stats))
    return generate_latest(registry)
