"""Prometheus metrics, read off `Report` and `Decision`.

Label sets are bounded: a model is a label only while discovery knows it, and so is an endpoint; the in-flight gauge shows
what exchanges are on.
Buckets of the gen_ai histograms are OpenTelemetry's advice (semantic conventions for generative AI metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from envoy_extproc.endpoints import Snapshot
from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Decision
from envoy_extproc.telemetry import UNKNOWN_MODEL
from envoy_extproc.telemetry.gauges import (
    BreakerCollector,
    BreakerRows,
    DiscoveryCollector,
    EndpointCollector,
    EndpointRows,
    ForgottenRows,
    InFlightCollector,
    InFlightRows,
    NativeCollector,
    NativeCounts,
    PrefixCollector,
    PrefixRows,
    RouteRows,
    UnusableRows,
    WatchRows,
)

_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300, 900)
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_DECISION = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1)

_COUNTING = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SHARE = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

_BY_MODEL = ("gen_ai_operation_name", "gen_ai_request_model")


class PrometheusMetrics:
    """The metrics of one server.

    Args:
        in_flight: what the in-flight gauge shows.
        known: whether discovery knows a model of that name now; others share one label.
        native: the native lane's counts.
        breakers: what the breakers' gauge and counter show.
        endpoints: what the gauge of endpoints shows.

    Attributes:
        registry: all of them, for the exposition.
    """

    def __init__(
        self,
        in_flight: InFlightRows,
        *,
        known: Callable[[str], bool],
        native: NativeCounts = lambda: (0, 0),
        breakers: BreakerRows = lambda: (),
        endpoints: EndpointRows = lambda: (),
    ) -> None:
        self._known = known
        self.registry = registry = CollectorRegistry(auto_describe=True)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(InFlightCollector(in_flight))
        registry.register(NativeCollector(native))
        registry.register(BreakerCollector(breakers))
        registry.register(EndpointCollector(endpoints))
        self._measures()
        self._make_counters_of_requests()
        self._make_counters_of_oddities()

    def _make_counters_of_requests(self) -> None:
        self._requests = self._counter("requests", "Exchanges, by how they ended.", "model", "outcome")
        self._errors = self._counter(
            "errors", "Exchanges that failed, by whose fault.", "model", "error_type"
        )
        self._fallbacks = self._counter(
            "policy_fallbacks", "Decisions another policy had to make.", "policy", "reason"
        )
        self._scorers = self._counter("scorer_failures", "Failures of scorers from other packages.", "scorer")
        self._usage = self._counter("usage", "Exchanges, by how their tokens are known.", "usage_source")
        self._prefix_tokens = self._counter(
            "prefix_prompt_tokens", "Prompt tokens that went by prefixes: all, and matched.", "model", "part"
        )
        self._bypassed = self._counter("bypassed_requests", "Requests Envoy served without this server.")
        self._retries = self._counter("retries", "Pods asked in vain before another one answered.", "model")

    def _make_counters_of_oddities(self) -> None:
        self._unread = self._counter("unread_responses", "Answers that could not be read.", "reason")
        self._load_reports_unread = self._counter(
            "unread_load_reports", "ORCA reports of engines that could not be read.", "reason"
        )
        self._oversized = self._counter("oversized_events", "Events or bodies too large to be parsed.")
        self._unreadable = self._counter("unreadable_events", "Events or bodies of no known shape.")
        self._unexpected = self._counter(
            "unexpected_messages", "Messages of Envoy's that should not have come."
        )
        self._unknown = self._counter("unknown_messages", "Messages of Envoy's of a kind not known.")
        self._scrapes = self._counter("scrape_failures", "Scrapes of an engine that failed.", "endpoint")

    def follow_discovery(self, watches: WatchRows, unusable: UnusableRows, routes: RouteRows) -> None:
        """Tells of discovery, too; once."""
        self.registry.register(DiscoveryCollector(watches, unusable, routes))

    def follow_prefixes(self, rows: PrefixRows, forgotten: ForgottenRows) -> None:
        """Tells of what is remembered of prompts, too; once."""
        self.registry.register(PrefixCollector(rows, forgotten))

    def _measures(self) -> None:
        self._duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request's headers to the end of the answer.",
            _DURATION,
            *_BY_MODEL,
        )
        self._ttft = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request's headers to the first content, reasoning or tool call of a stream.",
            _TTFT,
            *_BY_MODEL,
        )
        self._tpot = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Between two tokens of a stream, the first one apart.",
            _TPOT,
            *_BY_MODEL,
        )
        self._tokens = self._histogram(
            "gen_ai_client_token_usage", "Tokens of a request.", _TOKENS, *_BY_MODEL, "gen_ai_token_type"
        )
        self._decision = self._histogram(
            "envoy_extproc_decision_seconds", "What choosing an endpoint took.", _DECISION, "policy"
        )
        self._prefix_match = self._histogram(
            "envoy_extproc_prefix_match_ratio",
            "Share of the prompt that the chosen endpoint was thought to hold in its KV cache.",
            _SHARE,
            "policy",
        )
        self._counts()

    def _counts(self) -> None:
        self._counting = self._histogram(
            "envoy_extproc_token_count_seconds",
            "What a decision waited until its prompt was counted.",
            _COUNTING,
            "tokenizer",
        )
        self._token_estimates = self._counter(
            "token_estimates", "Prompts that were to be counted and are estimated.", "tokenizer", "reason"
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"envoy_extproc_{name}", text, labels, registry=self.registry)

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`."""
        self._decision.labels(decision.label).observe(seconds)
        if decision.chosen.prefix_match is not None:
            self._prefix_match.labels(decision.label).observe(decision.chosen.prefix_match)
        if decision.fallback_reason is not None:
            self._fallbacks.labels(decision.label, decision.fallback_reason).inc()

    def finished(self, report: Report) -> None:
        """See `Hook`."""
        model = report.model if report.model is not None and self._known(report.model) else UNKNOWN_MODEL
        self._requests.labels(model, report.outcome).inc()
        if report.error_type is not None:
            self._errors.labels(model, report.error_type).inc()
        if report.attempts > 1:
            self._retries.labels(model).inc(report.attempts - 1)
        self._usage.labels(report.usage_source).inc()
        self._measure(report, model)
        self._count_oddities(report)

    def load_report_unread(self, reason: str) -> None:
        """An engine's ORCA report could not be read, for a reason of `orca.Flaw`."""
        self._load_reports_unread.labels(reason).inc()

    def prompt_counted(self, tokenizer: str, seconds: float, reason: str | None) -> None:
        """A prompt was counted, or was not, for a reason of `counting.Reason`."""
        if reason is None:
            self._counting.labels(tokenizer).observe(seconds)
        else:
            self._token_estimates.labels(tokenizer, reason).inc()

    def message_unknown(self) -> None:
        """A message of a kind not known came."""
        self._unknown.inc()

    def scorer_failed(self, scorer: str) -> None:
        """The scorer of that name, another package's, failed."""
        self._scorers.labels(scorer).inc()

    def scrape_failed(self, endpoint: str) -> None:
        """A scrape of the endpoint of that name failed."""
        self._scrapes.labels(endpoint).inc()

    def bypassed(self, requests: int) -> None:
        """So many requests were served by Envoy alone."""
        self._bypassed.inc(requests)

    def snapshot_changed(self, before: Snapshot, now: Snapshot) -> None:
        """Names of endpoints, and models, that are in `before` alone are labels no more.

        Names and not addresses: an endpoint that moved to another address is counted on where it was.
        """
        for name in {each.name for each in before.endpoints} - {each.name for each in now.endpoints}:
            self._scrapes.remove_by_labels({"endpoint": name})
        for model in before.by_model.keys() - now.by_model.keys():
            for counter in (self._requests, self._errors, self._retries, self._prefix_tokens):
                counter.remove_by_labels({"model": model})
            for histogram in (self._duration, self._ttft, self._tpot, self._tokens):
                histogram.remove_by_labels({"gen_ai_request_model": model})

    def _measure(self, report: Report, model: str) -> None:
        labels = (report.operation or "other", model)
        self._duration.labels(*labels).observe(report.duration)
        if report.time_to_first_token is not None:
            self._ttft.labels(*labels).observe(report.time_to_first_token)
        if report.time_per_output_token is not None:
            self._tpot.labels(*labels).observe(report.time_per_output_token)
        if report.usage_source != "none":
            self._tokens.labels(*labels, "input").observe(report.usage.prompt_tokens)
            self._tokens.labels(*labels, "output").observe(report.usage.completion_tokens)
            self._measure_match(report, model)

    def _measure_match(self, report: Report, model: str) -> None:
        share = None if report.routing is None else report.routing.prefix_match
        if share is not None:
            self._prefix_tokens.labels(model, "all").inc(report.usage.prompt_tokens)
            self._prefix_tokens.labels(model, "matched").inc(share * report.usage.prompt_tokens)

    def _count_oddities(self, report: Report) -> None:
        if report.unread is not None:
            self._unread.labels(report.unread).inc()
        if report.oversized_events:
            self._oversized.inc(report.oversized_events)
        if report.unreadable_events:
            self._unreadable.inc(report.unreadable_events)
        if report.unexpected_messages:
            self._unexpected.inc(report.unexpected_messages)
