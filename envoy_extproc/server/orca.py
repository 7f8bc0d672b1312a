"""Our ORCA report: the chosen endpoint as it was when the request was scheduled, in the forms Envoy's parser takes.

Field names are those of ``xds.data.orca.v3.OrcaLoadReport``; the header is ``endpoint-load-metrics`` with the form's
name in front. ``TEXT`` separates with a comma and joins with ``=``. An engine's own report is read by
`envoy_extproc.orca`.

An Envoy that weighs by such reports (``client_side_weighted_round_robin``) takes ``rps_fractional`` by
``application_utilization`` for what an endpoint could do, and refuses a report in which either is not above 0.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.scheduling.interfaces import Candidate

_MOST_PER_SECOND = 1000.0
"""Requests per second that no endpoint answers. Each request is at least so small a share of it, so an idle endpoint
is not weighed as one without limit, and two idle ones weigh the same whatever they are sent."""


def fields(candidate: Candidate, requests_per_second: float | None = None) -> Mapping[str, float]:
    """What is known of the endpoint, by field; what is not known is left out.

    Args:
        candidate: the endpoint, as it was when the request was scheduled.
        requests_per_second: how many requests this server sends there; None where that is not counted, and then no
            weight is meant to be taken from the report.
    """
    stats = candidate.stats
    known = {} if stats is None else _of_engine(stats)
    if requests_per_second is not None:
        # An engine counts requests that end, all gateways' together, and may have seen none end lately.
        rate = max(requests_per_second, known.get("rps_fractional") or 0.0)
        busy = None if stats is None else _busy(stats)
        known |= {
            "rps_fractional": rate or None,
            "application_utilization": None if busy is None else max(busy, rate / _MOST_PER_SECOND) or None,
        }
    report = {
        name: float(value) for name, value in known.items() if value is not None and math.isfinite(value)
    }
    if candidate.prefix_match is not None:
        report["named_metrics.prefix_match_ratio"] = candidate.prefix_match
    return report | {"named_metrics.in_flight_requests": float(candidate.in_flight)}


def _of_engine(stats: EngineStats) -> dict[str, float | None]:
    return {
        "named_metrics.kv_cache_usage_perc": stats.kv_cache_usage,
        "named_metrics.num_requests_running": stats.running,
        "named_metrics.num_requests_waiting": stats.waiting,
        "named_metrics.prefix_cache_hit_rate": stats.prefix_cache_hit_rate,
        "named_metrics.tokens_per_second": stats.generation_tokens_per_second,
        "rps_fractional": stats.requests_per_second,
        "mem_utilization": stats.mem_utilization,
    }


def _busy(stats: EngineStats) -> float | None:
    """The engine's own word, else what is scarcer: KV cache, or a place in the batch. None where it tells neither."""
    if stats.utilization is not None:
        return stats.utilization
    known = []
    if stats.kv_cache_usage is not None:
        known.append(stats.kv_cache_usage)
    if stats.waiting is not None and stats.running is not None:
        known.append(stats.waiting / max(1.0, stats.waiting + stats.running))
    return max(known, default=None)


def text(report: Mapping[str, float]) -> str:
    """``TEXT name=value, name=value``."""
    return "TEXT " + ", ".join(f"{name}={value:.10g}" for name, value in report.items())


def json(report: Mapping[str, float]) -> str:
    """``JSON {"named_metrics": {...}, ...}``: protobuf's own JSON form."""
    named = {name.removeprefix("named_metrics."): value for name, value in report.items() if "." in name}
    plain = {name: value for name, value in report.items() if "." not in name}
    return "JSON " + msgspec.json.encode(plain | {"named_metrics": named}).decode()


def binary(message: bytes) -> str:
    """``BIN`` and the serialized message in base64."""
    return "BIN " + base64.b64encode(message).decode()
