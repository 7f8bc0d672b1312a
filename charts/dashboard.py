"""The Grafana dashboard: rows of panels, each a title, a unit and queries over the server's metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

_WIDTH, _HEIGHT, _ACROSS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WHERE = 'namespace=~"$namespace",job=~"$job"'
_MODEL = f'{_WHERE},model=~"$model"'
_GEN_AI = f'{_WHERE},gen_ai_request_model=~"$model"'


class Query(msgspec.Struct, frozen=True):
    """One line of a panel, or several by their labels.

    Attributes:
        expression: PromQL.
        legend: Grafana's template of a line's name.
    """

    expression: str
    legend: str


class Panel(msgspec.Struct, frozen=True):
    """Lines over time.

    Attributes:
        title: what is seen.
        unit: Grafana's name of it.
        text: what it says, and what to do about it.
    """

    title: str
    unit: str
    text: str
    queries: tuple[Query, ...]


def _rate(metric: str, where: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}{{{where}}}[$__rate_interval]))"


def _quantiles(metric: str, where: str, *by: str) -> tuple[Query, ...]:
    """The median and the two tails."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    rate = _rate(f"{metric}_bucket", where, "le", *by)
    return tuple(
        Query(f"histogram_quantile({quantile}, {rate})", f"p{round(quantile * 100)} {legend}".rstrip())
        for quantile in (0.5, 0.95, 0.99)
    )


def _tokens(kind: str) -> Query:
    where = f'{_GEN_AI},gen_ai_token_type="{kind}"'
    return Query(
        _rate("gen_ai_client_token_usage_sum", where, "gen_ai_request_model"),
        f"{{{{gen_ai_request_model}}}} {kind}",
    )


def _by(metric: str, where: str, label: str) -> tuple[Query, ...]:
    return (Query(_rate(metric, where, label), f"{{{{{label}}}}}"),)


PANELS = (
    Panel(
        "Requests by outcome",
        "reqps",
        "docs/accounting.md says what each outcome is.",
        _by("envoy_extproc_requests_total", _MODEL, "outcome"),
    ),
    Panel(
        "Errors by whose fault",
        "reqps",
        "docs/errors.md has every case. `internal` should be nothing.",
        _by("envoy_extproc_errors_total", _MODEL, "error_type"),
    ),
    Panel(
        "Requests past this server",
        "reqps",
        "Neither routed nor accounted: should be nothing.",
        (
            Query(
                f"sum(rate(envoy_extproc_bypassed_requests_total{{{_WHERE}}}[$__rate_interval]))", "bypassed"
            ),
        ),
    ),
    Panel(
        "Time to first token",
        "s",
        "Streams, from the request's headers.",
        _quantiles("gen_ai_server_time_to_first_token_seconds", _GEN_AI),
    ),
    Panel(
        "Time per output token",
        "s",
        "Streams, the first token apart.",
        _quantiles("gen_ai_server_time_per_output_token_seconds", _GEN_AI),
    ),
    Panel(
        "Duration",
        "s",
        "From the request's headers to the end of the answer.",
        _quantiles("gen_ai_server_request_duration_seconds", _GEN_AI),
    ),
    Panel("Tokens a second", "short", "Prompts in, answers out.", (_tokens("input"), _tokens("output"))),
    Panel(
        "Where token counts come from",
        "reqps",
        "`estimated` where an engine did not report.",
        _by("envoy_extproc_usage_total", _WHERE, "usage_source"),
    ),
    Panel(
        "In flight by endpoint",
        "short",
        "As the servers count them, summed.",
        (
            Query(
                f"sum by (endpoint) (envoy_extproc_in_flight_requests{{{_MODEL}}})",
                "{{endpoint}}",
            ),
        ),
    ),
    Panel(
        "Choosing an endpoint",
        "s",
        "What a decision took.",
        _quantiles("envoy_extproc_decision_seconds", _WHERE, "policy"),
    ),
    Panel(
        "Decisions another policy made",
        "reqps",
        "A policy had no data: see the scrape failures.",
        (
            Query(
                _rate("envoy_extproc_policy_fallbacks_total", _WHERE, "policy", "reason"),
                "{{policy}} {{reason}}",
            ),
        ),
    ),
    Panel(
        "Scrape failures",
        "short",
        "An engine that did not answer on /metrics.",
        _by("envoy_extproc_scrape_failures_total", _WHERE, "endpoint"),
    ),
    Panel(
        "Endpoints by model",
        "short",
        "Known to discovery, and ready, as the server counts them that sees the fewest.",
        (
            Query(
                f"max by (model) (sum by (model, pod) (envoy_extproc_endpoints{{{_MODEL}}}))",
                "{{model}} known",
            ),
            Query(
                f'min by (model) (envoy_extproc_endpoints{{{_MODEL},state="ready"}})',
                "{{model}} ready",
            ),
        ),
    ),
    Panel(
        "Breakers",
        "short",
        "0 closed, 1 half-open, 2 open; the worst of all servers.",
        (
            Query(
                f"max by (endpoint) (envoy_extproc_endpoint_breaker_state{{{_WHERE}}})",
                "{{endpoint}}",
            ),
        ),
    ),
    Panel(
        "Breakers opened, by reason",
        "short",
        "Docs: operations, pods that fail.",
        (
            Query(
                _rate("envoy_extproc_breaker_opened_total", _WHERE, "endpoint", "reason"),
                "{{endpoint}} {{reason}}",
            ),
        ),
    ),
    Panel(
        "Retries, by model",
        "reqps",
        "Pods asked in vain before another one answered.",
        _by("envoy_extproc_retries_total", _MODEL, "model"),
    ),
    Panel(
        "Native lane: reports missing",
        "short",
        "Over all servers: should stay near nothing.",
        (Query(f"sum(envoy_extproc_native_unreported_exchanges{{{_WHERE}}})", "unreported"),),
    ),
    Panel(
        "Answers not read",
        "reqps",
        "Compressed, of another content type, or the script failed.",
        _by("envoy_extproc_unread_responses_total", _WHERE, "reason"),
    ),
    Panel(
        "Discovery: seconds since Kubernetes spoke",
        "s",
        "It does so once a minute though nothing changes.",
        (
            Query(
                f"max by (watched) (envoy_extproc_discovery_silent_seconds{{{_WHERE}}})",
                "{{watched}}",
            ),
        ),
    ),
    Panel(
        "Pods not understood",
        "short",
        "Ready, but with labels or annotations that make no sense.",
        (
            Query(
                f"max by (reason) (envoy_extproc_discovery_unusable_pods{{{_WHERE}}})",
                "{{reason}}",
            ),
        ),
    ),
    Panel(
        "CPU of the servers",
        "percentunit",
        "One process, one core.",
        (Query(f"rate(process_cpu_seconds_total{{{_WHERE}}}[$__rate_interval])", "{{pod}}"),),
    ),
)


def text() -> str:
    """The dashboard as Grafana imports it."""
    made = {
        "uid": "envoy-extproc",
        "title": "envoy-extproc",
        "tags": ["llm", "envoy"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }
    return json.dumps(made, indent=2) + "\n"


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    always = "envoy_extproc_bypassed_requests_total"  # there from the start, with no labels of its own
    yield _variable("namespace", f"label_values({always}, namespace)")
    yield _variable("job", f'label_values({always}{{namespace=~"$namespace"}}, job)')
    yield _variable("model", f"label_values(envoy_extproc_requests_total{{{_WHERE}}}, model)")


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _ACROSS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": each.expression,
                "legendFormat": each.legend,
            }
            for index, each in enumerate(panel.queries)
        ],
    }
