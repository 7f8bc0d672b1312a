r"""Reads the notation in which dialects, ours and an operator's, say where a field stands on the page.

    formula  := sum [ '*' factor ] [ '/' metric ] [ '/' number ] [ 'if' metric ]
    sum      := factor | 'gauge(' metric ')'
    factor   := metric | metric '[' label ']'
    metric   := name | name '{' label '=' '"' value '"' ',' ... '}'

What a metric means follows from the field it is for:

    counts (running, waiting)        a gauge, summed over its sets of labels
    shares (0 to 1)                  a gauge; 'a / b': a part and its whole; 'a / 100': a percentage
    rates (..._per_second)           a counter; 'gauge(a)': the engine works the rate out itself
    means (seconds, per request)     a histogram or summary; 'a / b': counters of the sum and of the count;
                                     'a / 1000': its unit is milliseconds; 'gauge(a)': the engine works the mean out
    adapters (loras, waiting_loras)  'a[label]': names in a label, newest set first
    max_loras                        a gauge, or 'a[label]'
    tokens (kv_cache_tokens, ...)    a gauge or counter, or 'a[label]'; 'a * b': blocks, and the tokens of a block;
                                     'a[label] * a[other]': the same in labels, set by set
    started                          a gauge: seconds since 1970

Several formulas are tried in turn: the first whose metrics are all on the page is the one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from envoy_extproc.endpoints import EngineStats
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

FIELDS = tuple(field for field in EngineStats.__struct_fields__ if field not in {"at", "life"})
"""What an engine can tell, in the order of `EngineStats`."""

COUNTS = frozenset({"running", "waiting"})
SHARES = frozenset({"kv_cache_usage", "prefix_cache_hit_rate", "mem_utilization", "utilization"})
RATES = frozenset(field for field in FIELDS if field.endswith("_per_second"))
ADAPTERS = frozenset({"loras", "waiting_loras"})
TOKENS = frozenset({"kv_cache_tokens", "prefix_cache_hits"})

_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"
_PAIR = rf'{_NAME}\s*=\s*(?:"(?:[^"\\\n]|\\.)*"|[^\s",{{}}]+)'
_METRIC = rf"[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{{\s*(?:{_PAIR}\s*(?:,\s*{_PAIR}\s*)*)?\}})?"
_formula = re.compile(
    rf"(?:gauge\(\s*(?P<gauge>{_METRIC})\s*\)|(?P<metric>{_METRIC})(?:\[(?P<label>{_NAME})\])?)"
    rf"(?:\s*\*\s*(?P<times>{_METRIC})(?:\[(?P<times_label>{_NAME})\])?)?"
    rf"(?:\s*/\s*(?P<whole>{_METRIC}))?(?:\s*/\s*(?P<per>[0-9.]+(?:[eE][-+]?[0-9]+)?))?"
    rf"(?:\s+if\s+(?P<given>{_METRIC}))?"
)
_reference = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?", re.DOTALL)
_pair = re.compile(rf'({_NAME})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",{{}}]+))')
_escaped = re.compile(r"\\(.)")

_Parts = Mapping[str, str | None]


class FormulaError(ValueError):
    """A formula that says nothing for its field; the text says why."""


def source(field: str, formulas: str | Sequence[str]) -> Source:
    """Where `field` of `EngineStats` stands: one formula, or several of which the first that is there counts.

    Raises:
        FormulaError: there is no such field, or a formula does not fit it.
    """
    if field not in FIELDS:
        raise FormulaError(f"unknown field; known are {', '.join(FIELDS)}")
    several = [formulas] if isinstance(formulas, str) else list(formulas)
    if not several or not all(isinstance(each, str) for each in several):
        raise FormulaError("must be a metric's name, or a list of them")
    sources = tuple(_source(field, each) for each in several)
    return sources[0] if len(sources) == 1 else First(sources)


def selection(reference: str) -> tuple[str, Mapping[str, str]]:
    """The name and the label values that a metric's reference asks for."""
    match = _reference.fullmatch(reference)
    assert match is not None  # a formula let it through
    pairs = _pair.findall(match[2] or "")
    return match[1], {label: _escaped.sub(r"\1", quoted) or bare for label, quoted, bare in pairs}


def _source(field: str, text: str) -> Source:
    match = _formula.fullmatch(text.strip())
    if match is None:
        raise FormulaError(f"{text!r} is no metric")
    parts = match.groupdict()
    made = _maker(field)(parts)
    if made is None:
        raise FormulaError(f"{text!r} is not how {field} can be told")
    return made if parts["given"] is None else Given(made, parts["given"])


def _maker(field: str) -> Callable[[_Parts], Source | None]:
    if field in RATES:
        return _rate
    return _MAKERS.get(field, _mean)


def _count(parts: _Parts) -> Source | None:
    metric = _only(parts, "metric")
    return None if metric is None else Total(metric)


def _share(parts: _Parts) -> Source | None:
    if parts["whole"] is not None:
        part = _only(parts, "metric", "whole")
        return None if part is None else Ratio(part, parts["whole"])
    metric = _only(parts, "metric", "per")
    return None if metric is None else Mean(metric, _per(parts))


def _rate(parts: _Parts) -> Source | None:
    if parts["gauge"] is not None:
        gauge = _only(parts, "gauge")
        return None if gauge is None else Gauge(gauge)
    metric = _only(parts, "metric")
    return None if metric is None else Rate(metric)


def _mean(parts: _Parts) -> Source | None:
    if parts["gauge"] is not None:
        gauge = _only(parts, "gauge", "per")
        return None if gauge is None else Mean(gauge, _per(parts))
    metric = _only(parts, "metric", "whole", "per")
    if metric is None:
        return None
    if parts["whole"] is not None:
        return Lately(metric, parts["whole"], _per(parts))
    name, brace, labels = metric.partition("{")
    return Lately(f"{name}_sum{brace}{labels}", f"{name}_count{brace}{labels}", _per(parts))


def _names(parts: _Parts) -> Source | None:
    metric, label = _only(parts, "metric", "label"), parts["label"]
    return None if metric is None or label is None else Names(metric, label)


def _limit(parts: _Parts) -> Source | None:
    metric = _only(parts, "metric", "label")
    return None if metric is None else Limit(metric, parts["label"])


def _tokens(parts: _Parts) -> Source | None:
    metric = _only(parts, "metric", "label", "times", "times_label")
    if metric is None:
        return None
    first = Factor(metric, parts["label"])
    if parts["times"] is None:
        return Product((first,))
    second = Factor(parts["times"], parts["times_label"])
    both_in_labels = bool(first.label and second.label)
    if both_in_labels != bool(first.label or second.label) or (both_in_labels and second.metric != metric):
        return None  # the sets of one metric have nothing to do with those of another
    return Product((first, second))


def _moment(parts: _Parts) -> Source | None:
    metric = _only(parts, "metric")
    return None if metric is None else Mean(metric)


def _only(parts: _Parts, wanted: str, *allowed: str) -> str | None:
    """The part `wanted`; None if the formula has parts that are neither it nor `allowed`."""
    fitting = {wanted, *allowed, "given"}
    return parts[wanted] if all(each in fitting for each, text in parts.items() if text is not None) else None


def _per(parts: _Parts) -> float:
    try:
        per = float(parts["per"] or 1)
    except ValueError:
        per = 0.0
    if per <= 0:
        raise FormulaError(f"{parts['per']!r} is no number to divide by")
    return per


_MAKERS: Mapping[str, Callable[[_Parts], Source | None]] = {
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys(SHARES, _share),
    **dict.fromkeys(ADAPTERS, _names),
    **dict.fromkeys(TOKENS, _tokens),
    "max_loras": _limit,
    "started": _moment,
}
