"""Metrics read off reports and decisions; label sets stay bounded whatever clients send."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import generate_latest

from envoy_extproc.endpoints import Snapshot
from envoy_extproc.openai.answer import Usage
from envoy_extproc.telemetry.prometheus import PrometheusMetrics
from tests.support.builders import MODEL, decision, endpoint
from tests.support.reports import report


def metrics(*rows: tuple[str, str, int]) -> PrometheusMetrics:
    return PrometheusMetrics(lambda: rows, known=lambda model: model in {MODEL, "leaves", "stays"})


def value(made: PrometheusMetrics, name: str, **labels: str) -> float | None:
    return made.registry.get_sample_value(name, labels)


CHAT = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "llama-3-8b"}


def test_a_success() -> None:
    made = metrics()
    made.finished(report())
    assert value(made, "envoy_extproc_requests_total", model="llama-3-8b", outcome="success") == 1
    assert value(made, "envoy_extproc_usage_total", usage_source="reported") == 1
    assert value(made, "gen_ai_server_request_duration_seconds_sum", **CHAT) == 2.0
    assert value(made, "gen_ai_server_time_to_first_token_seconds_sum", **CHAT) == 0.5
    assert value(made, "gen_ai_server_time_per_output_token_seconds_sum", **CHAT) == 0.25
    assert value(made, "gen_ai_client_token_usage_sum", **CHAT, gen_ai_token_type="input") == 5
    assert value(made, "gen_ai_client_token_usage_sum", **CHAT, gen_ai_token_type="output") == 7
    assert value(made, "envoy_extproc_oversized_events_total") == 0


def test_what_was_not_measured_is_not_observed() -> None:
    made = metrics()
    made.finished(
        report(time_to_first_token=None, time_per_output_token=None, usage_source="none", usage=Usage())
    )
    assert value(made, "gen_ai_server_time_to_first_token_seconds_count", **CHAT) is None
    assert value(made, "gen_ai_server_time_per_output_token_seconds_count", **CHAT) is None
    assert value(made, "gen_ai_client_token_usage_count", **CHAT, gen_ai_token_type="input") is None
    assert value(made, "gen_ai_server_request_duration_seconds_count", **CHAT) == 1


def test_a_failure_with_everything_odd() -> None:
    made = metrics()
    made.finished(
        report(
            outcome="error",
            error_type="overload",
            attempts=3,
            unread="compressed",
            oversized_events=2,
            unreadable_events=3,
            unexpected_messages=4,
        )
    )
    assert value(made, "envoy_extproc_errors_total", model="llama-3-8b", error_type="overload") == 1
    assert value(made, "envoy_extproc_retries_total", model="llama-3-8b") == 2
    assert value(made, "envoy_extproc_unread_responses_total", reason="compressed") == 1
    assert value(made, "envoy_extproc_oversized_events_total") == 2
    assert value(made, "envoy_extproc_unreadable_events_total") == 3
    assert value(made, "envoy_extproc_unexpected_messages_total") == 4


def test_decisions() -> None:
    made = metrics()
    made.decided(decision(1), 0.001)
    fallen = msgspec.structs.replace(decision(1), policy="least-kv-cache", fallback_reason="no-stats")
    made.decided(fallen, 0.002)
    assert value(made, "envoy_extproc_decision_seconds_sum", policy="least-request") == 0.001
    assert value(made, "envoy_extproc_decision_seconds_sum", policy="least-kv-cache") == 0.002
    assert (
        value(made, "envoy_extproc_policy_fallbacks_total", policy="least-kv-cache", reason="no-stats") == 1
    )


def test_a_mixture_that_a_client_made_up_is_no_label_of_its_own() -> None:
    made = metrics()
    for text in ("least-request:1,throughput:2", "least-request:1,throughput:3"):
        mixed = msgspec.structs.replace(decision(1), policy=text, fallback_reason="no-stats")
        made.decided(msgspec.structs.replace(mixed, improvised=True), 0.5)
    assert value(made, "envoy_extproc_decision_seconds_sum", policy="mix") == 1.0
    assert value(made, "envoy_extproc_policy_fallbacks_total", policy="mix", reason="no-stats") == 2


def test_in_flight_is_read_when_it_is_asked_for() -> None:
    made = metrics(("m", "pod-1", 3))
    assert value(made, "envoy_extproc_in_flight_requests", model="m", endpoint="pod-1") == 3


def test_other_counters() -> None:
    made = metrics()
    made.message_unknown()
    made.bypassed(2)
    made.bypassed(0)
    made.scrape_failed("pod-1")
    assert value(made, "envoy_extproc_unknown_messages_total") == 1
    assert value(made, "envoy_extproc_bypassed_requests_total") == 2
    assert value(made, "envoy_extproc_scrape_failures_total", endpoint="pod-1") == 1


def test_endpoints_are_forgotten_by_name() -> None:
    made = metrics()
    for name in ("stays", "moves", "leaves"):
        made.scrape_failed(name)
    before = [endpoint(1, name="stays"), endpoint(2, name="moves"), endpoint(3, name="leaves")]
    now = [endpoint(1, name="stays"), endpoint(3, name="moves"), endpoint(4, name="new")]
    made.snapshot_changed(Snapshot([*before, endpoint(9, name="never failed")]), Snapshot(now))
    counts = {
        name: value(made, "envoy_extproc_scrape_failures_total", endpoint=name)
        for name in ("stays", "moves", "leaves")
    }
    assert counts == {"stays": 1, "moves": 1, "leaves": None}


def test_models_that_are_gone_leave_no_series() -> None:
    made = metrics()
    made.finished(report(model="stays", attempts=2, error_type="network"))
    size = len(generate_latest(made.registry).splitlines())
    made.finished(report(model="leaves", attempts=2, error_type="network"))
    made.finished(report(model="leaves", operation=None))
    assert len(generate_latest(made.registry).splitlines()) > size
    before = Snapshot([endpoint(1, models=("stays", "leaves", "never asked for"))])
    made.snapshot_changed(before, Snapshot([endpoint(2, models=("stays", "new"))]))
    text = generate_latest(made.registry)
    assert b"leaves" not in text
    assert len(text.splitlines()) == size
    assert value(made, "envoy_extproc_requests_total", model="stays", outcome="success") == 1


def test_a_refusal_counts_under_a_model_that_is_known() -> None:
    made = metrics()
    made.finished(report(routing=None, served_by=None, outcome="refused", error_type="overload"))
    assert value(made, "envoy_extproc_requests_total", model=MODEL, outcome="refused") == 1
    assert value(made, "envoy_extproc_errors_total", model=MODEL, error_type="overload") == 1


def test_models_that_nobody_serves_are_no_labels() -> None:
    made = metrics()
    before = None
    for number in range(50):
        made.finished(report(model=f"made-up-{number}", routing=None, outcome="refused", error_type="client"))
        size = len(generate_latest(made.registry).splitlines())
        before = before or size
        assert size == before
    assert value(made, "envoy_extproc_requests_total", model="unknown", outcome="refused") == 50


@pytest.mark.parametrize("changes", [{"model": None}, {"operation": None}, {"model": None, "routing": None}])
def test_a_request_that_tells_nothing(changes: dict[str, None]) -> None:
    made = metrics()
    made.finished(report(**changes))
    assert b"gen_ai_server_request_duration_seconds_count" in generate_latest(made.registry)


def test_histograms_are_true_ones() -> None:
    made = metrics()
    made.finished(report())
    text = generate_latest(made.registry).decode()
    assert "gen_ai_server_time_to_first_token_seconds_bucket{" in text
    assert 'le="+Inf"' in text


def test_breakers() -> None:
    rows: list[tuple[str, int, dict[str, int]]] = [("pod-1", 2, {"refused": 2, "error": 1}), ("pod-2", 0, {})]
    made = PrometheusMetrics(lambda: (), known=lambda _: True, breakers=lambda: rows)
    opened = "envoy_extproc_breaker_opened_total"
    assert value(made, opened, endpoint="pod-1", reason="refused") == 2
    assert value(made, opened, endpoint="pod-1", reason="error") == 1
    assert value(made, "envoy_extproc_endpoint_breaker_state", endpoint="pod-1") == 2
    del rows[0]
    assert 'endpoint="pod-1"' not in generate_latest(made.registry).decode()
    assert value(made, "envoy_extproc_endpoint_breaker_state", endpoint="pod-2") == 0


def test_prompts_that_were_matched() -> None:
    made = metrics()
    routing = report().routing
    assert routing is not None
    for share, tokens in ((0.75, 400), (0.0, 100), (None, 1000)):
        told = msgspec.structs.replace(routing, prefix_match=share)
        made.finished(report(routing=told, usage=Usage(prompt_tokens=tokens)))
    made.finished(report(routing=None))
    name = "envoy_extproc_prefix_prompt_tokens_total"
    assert value(made, name, model=MODEL, part="all") == 500
    assert value(made, name, model=MODEL, part="matched") == 300
    made.snapshot_changed(Snapshot([endpoint(1)]), Snapshot())
    assert value(made, name, model=MODEL, part="all") is None


def test_what_is_remembered_of_prompts() -> None:
    made = metrics()
    rows = [("pod-1", 30, 100)]
    made.follow_prefixes(lambda: rows, lambda: {"restarted": 2})
    assert value(made, "envoy_extproc_prefix_blocks", endpoint="pod-1") == 30
    assert value(made, "envoy_extproc_prefix_blocks_limit", endpoint="pod-1") == 100
    assert value(made, "envoy_extproc_prefix_forgotten_total", reason="restarted") == 2
    rows.clear()
    assert 'endpoint="pod-1"' not in generate_latest(made.registry).decode()


def test_endpoints_by_model() -> None:
    rows = {"a": {"ready": 2, "failing": 0}, "b": {"ready": 0, "failing": 1}}
    made = PrometheusMetrics(lambda: (), known=lambda _: True, endpoints=rows.items)
    gauge = "envoy_extproc_endpoints"
    assert value(made, gauge, model="a", state="ready") == 2
    assert value(made, gauge, model="b", state="ready") == 0  # not nothing: an alert looks for it
    assert value(made, gauge, model="b", state="failing") == 1
    del rows["b"]
    assert value(made, gauge, model="b", state="ready") is None


def test_nobody_is_asked_before_the_server_is_made() -> None:
    made: list[dict[str, int]] = []
    exposed = PrometheusMetrics(lambda: (), known=lambda _: True, endpoints=lambda: [("a", made[0])])
    made.append({"ready": 1})
    assert value(exposed, "envoy_extproc_endpoints", model="a", state="ready") == 1
