"""The notation of dialects: what each formula means for which field."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from envoy_extproc.engines.formulas import FIELDS, FormulaError, selection, source
from envoy_extproc.engines.sources import (
    Factor,
    First,
    Gauge,
    Given,
    Lately,
    Limit,
    Mean,
    Names,
    Product,
    Rate,
    Ratio,
    Source,
    Total,
)


@pytest.mark.parametrize(
    ("field", "formula", "expected"),
    [
        ("running", "a", Total("a")),
        ("running", " a:b_c ", Total("a:b_c")),
        ("waiting", 'a{b="c d",e="}/"}', Total('a{b="c d",e="}/"}')),
        ("kv_cache_usage", "a", Mean("a")),
        ("kv_cache_usage", "a / 100", Mean("a", 100)),
        ("kv_cache_usage", "a/b", Ratio("a", "b")),
        ("requests_per_second", "a", Rate("a")),
        ("requests_per_second", "gauge(a)", Gauge("a")),
        ("queue_seconds", "a", Lately("a_sum", "a_count")),
        ("queue_seconds", 'a{b="c"} / 1000', Lately('a_sum{b="c"}', 'a_count{b="c"}', 1000)),
        ("queue_seconds", "a / b", Lately("a", "b")),
        ("queue_seconds", "a / b / 1e6", Lately("a", "b", 1e6)),
        ("queue_seconds", "gauge(a) / 1000", Mean("a", 1000)),
        ("loras", "a[b]", Names("a", "b")),
        ("max_loras", "a[b]", Limit("a", "b")),
        ("max_loras", "a", Limit("a")),
        ("kv_cache_tokens", "a", Product((Factor("a"),))),
        ("kv_cache_tokens", "a[b]", Product((Factor("a", "b"),))),
        ("kv_cache_tokens", "a * b", Product((Factor("a"), Factor("b")))),
        ("kv_cache_tokens", "a[b]*a[c]", Product((Factor("a", "b"), Factor("a", "c")))),
        (
            "kv_cache_tokens",
            'a{x="1"} * a{x="2"} if c',
            Given(Product((Factor('a{x="1"}'), Factor('a{x="2"}'))), "c"),
        ),
        ("prefix_cache_hits", "a", Product((Factor("a"),))),
        ("started", "a", Mean("a")),
        ("utilization", "a if b", Given(Mean("a"), "b")),
        ("running", ["a", "b"], First((Total("a"), Total("b")))),
        ("running", ["a"], Total("a")),
    ],
)
def test_what_a_formula_means(field: str, formula: str | Sequence[str], expected: Source) -> None:
    assert source(field, formula) == expected


@pytest.mark.parametrize(
    ("field", "formula"),
    [
        ("running", "a / 100"),
        ("running", "a[b]"),
        ("running", "gauge(a)"),
        ("kv_cache_usage", "gauge(a)"),
        ("kv_cache_usage", "a / b / 100"),
        ("requests_per_second", "a / b"),
        ("requests_per_second", "gauge(a) / 2"),
        ("queue_seconds", "a[b]"),
        ("queue_seconds", "gauge(a) / b"),
        ("loras", "a"),
        ("loras", "gauge(a)"),
        ("max_loras", "a / 2"),
        ("max_loras", "a * b"),
        ("running", "a * b"),
        ("kv_cache_usage", "a * b"),
        ("kv_cache_tokens", "a / b"),
        ("kv_cache_tokens", "a / 2"),
        ("kv_cache_tokens", "gauge(a)"),
        ("kv_cache_tokens", "a[b] * c"),
        ("kv_cache_tokens", "a * b[c]"),
        ("kv_cache_tokens", "a[b] * c[d]"),
        ("started", "a[b]"),
        ("started", "a / 1000"),
    ],
)
def test_a_formula_that_does_not_fit_its_field(field: str, formula: str) -> None:
    with pytest.raises(FormulaError, match=f"is not how {field} can be told"):
        source(field, formula)


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "7a",
        "a b",
        "a{b}",
        "a{b=}",
        'a{b="c}',
        "a{",
        "a /",
        "a / / b",
        "a[b",
        "gauge(a",
        "rate(a)",
        "a if",
        "a-b",
        "a *",
        "a * b * c",
        "a * 16",
    ],
)
def test_what_is_no_formula(formula: str) -> None:
    with pytest.raises(FormulaError, match="is no metric"):
        source("queue_seconds", formula)


@pytest.mark.parametrize("number", ["0", "0.0", "1.2.3", "."])
def test_what_cannot_be_divided_by(number: str) -> None:
    with pytest.raises(FormulaError, match="is no number to divide by"):
        source("kv_cache_usage", f"a / {number}")


@pytest.mark.parametrize("field", ["at", "life", "waitng", ""])
def test_a_field_that_there_is_not(field: str) -> None:
    with pytest.raises(FormulaError, match="unknown field; known are running, waiting,"):
        source(field, "a")


@pytest.mark.parametrize(
    ("reference", "name", "labels"),
    [
        ("a:b", "a:b", {}),
        ("a{}", "a", {}),
        ('a{b="c",d=e}', "a", {"b": "c", "d": "e"}),
        (r'a{b="x\"y\\z"}', "a", {"b": r"x\"y\z".replace(r"\"", '"')}),
        ('a{b=""}', "a", {"b": ""}),
    ],
)
def test_what_a_reference_asks_for(reference: str, name: str, labels: dict[str, str]) -> None:
    assert selection(reference) == (name, labels)


def test_every_field_of_the_stats_can_be_told() -> None:
    for field in FIELDS:
        assert source(field, "a[b]" if field.endswith("loras") else "a").references
