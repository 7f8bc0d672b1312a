"""Alerts and the dashboard: they ask for what the server has."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import Metric

from envoy_extproc.telemetry.prometheus import PrometheusMetrics
from tests.chart.values import SWITCHES
from tests.support.helm import CHART, FULL, NAMESPACE, Json, found, template

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text("utf-8")

ENVOYS_OWN = {"envoy_http_ext_proc_envoy_extproc_failure_mode_allowed"}
SCRAPED = {"up", "namespace", "job", "pod"}
"""What Prometheus itself puts on every target."""

WORDS = {
    "sum",
    "min",
    "max",
    "by",
    "on",
    "rate",
    "increase",
    "absent",
    "histogram_quantile",
    "label_values",
    "and",
}


def _metrics() -> PrometheusMetrics:
    metrics = PrometheusMetrics(
        lambda: [("m", "e", 1)],
        known=lambda _: True,
        breakers=lambda: [("e", 0, {"error": 1})],
        endpoints=lambda: [("m", {"ready": 1})],
    )
    metrics.follow_discovery(
        lambda: [("pods", 0.0, {"gone": 1})], lambda: [("engine", 1)], lambda: [("m", True)]
    )
    metrics.follow_prefixes(lambda: [("e", 1, 2)], lambda: {"restarted": 1})
    return metrics


def _families() -> list[Metric]:
    return list(_metrics().registry.collect())


@functools.cache
def _exposed() -> set[str]:
    """Every name of a sample and of a label."""
    names = {"le"}
    for family in _families():
        names |= {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
        if family.type == "histogram":
            names |= {f"{family.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
        names |= {label for sample in family.samples for label in sample.labels}
    for collector in _metrics().registry._collector_to_names:
        names |= set(getattr(collector, "_labelnames", ()))
    return names


OURS = f'job="{FULL}",namespace="{NAMESPACE}"'


def _rules() -> list[Json]:
    """As the chart fills them in; helm itself is not asked before tests run."""
    text = (CHART / "files" / "alerts.yaml").read_text("utf-8")
    text = text.replace("__SELECTOR__", OURS)
    (group,) = yaml.safe_load(text.replace("__RUNBOOK__", "docs/operations.md"))["groups"]
    return list(group["rules"])


def test_the_rules_are_filled_in_for_the_release() -> None:
    (group,) = found(template(SWITCHES["rules"]), "PrometheusRule")["spec"]["groups"]
    assert group["rules"] == _rules()


def _queries() -> Iterator[tuple[str, str]]:
    for rule in _rules():
        yield rule["alert"], rule["expr"]
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def _names(query: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", query)
    return set(re.findall(r"[a-z_][a-zA-Z_0-9]*", bare)) - WORDS


@pytest.mark.parametrize(("title", "query"), list(_queries()))
def test_what_is_asked_for_is_there(title: str, query: str) -> None:
    assert _names(query) - _exposed() - ENVOYS_OWN - SCRAPED == set(), title


def test_a_name_that_nobody_exposes_is_found() -> None:
    assert "envoy_extproc_gone_total" not in _exposed()
    assert _names('sum by (endpoint) (rate(envoy_extproc_gone_total{model="a"}[5m])) > 0.1') == {
        "endpoint",
        "envoy_extproc_gone_total",
        "model",
    }


def test_every_metric_is_in_the_docs() -> None:
    pages = "".join(page.read_text("utf-8") for page in sorted(DOCS.glob("*.md")))
    families = {family.name: family.type for family in _families()}
    ours = {name: kind for name, kind in families.items() if name.startswith(("envoy_extproc", "gen_ai"))}
    assert len(ours) > 25
    names = {f"{name}_total" if kind == "counter" else name for name, kind in ours.items()}
    assert {name for name in names if name not in pages} == set()


def test_the_counter_of_envoy_is_the_one_in_the_docs() -> None:
    assert all(name in OPERATIONS for name in ENVOYS_OWN)


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: Json) -> None:
    assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
    assert rule["labels"]["severity"] in ("warning", "critical")
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == "docs/operations.md"
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in OPERATIONS.splitlines()
        if line.startswith("#")
    }
    assert anchor in headings
    assert "__" not in json.dumps(rule).replace("__name__", "")


def test_alerts_look_at_this_release_alone() -> None:
    for rule in (each for each in _rules() if not _names(each["expr"]) <= ENVOYS_OWN):
        selectors = re.findall(r"\{([^}]*)\}", rule["expr"])
        assert selectors
        assert all(OURS in each for each in selectors)


def test_requests_without_a_session_or_a_prompt_are_no_alarm() -> None:
    """Every session begins without one; only figures of engines that are missing are somebody's to mend."""
    (rule,) = [each for each in _rules() if each["alert"] == "EnvoyExtprocPolicyFallbacks"]
    (counted,) = re.findall(r"policy_fallbacks_total\{([^}]*)\}", rule["expr"])
    assert counted == f'{OURS},reason="no-stats"'


def test_the_labels_of_the_server_win_over_those_of_the_scrape() -> None:
    monitor = found(template(SWITCHES["monitor"]), "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["honorLabels"] is True  # `endpoint` would be the port's name
    service = found(template(), "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in [each["name"] for each in service["spec"]["ports"]]


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    config_map = found(template(SWITCHES["dashboard"]), "ConfigMap", f"{FULL}-dashboard")
    dashboard = json.loads(config_map["data"]["envoy-extproc.json"])
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
