"""Our ORCA report: the chosen endpoint as it was when the request was scheduled, in the forms Envoy's parser takes.

Field names are those of ``xds.data.orca.v3.OrcaLoadReport``; the header is ``endpoint-load-metrics`` with the form's
name in front. ``TEXT`` separates with a comma and joins with ``=``.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import msgspec

from envoy_extproc.scheduling.interfaces import Candidate


def fields(candidate: Candidate) -> Mapping[str, float]:
    """What is known of the endpoint, by field; what its engine does not tell is left out."""
    stats = candidate.stats
    known = (
        {}
        if stats is None
        else {
            "named_metrics.kv_cache_usage_perc": stats.kv_cache_usage,
            "named_metrics.num_requests_running": stats.running,
            "named_metrics.num_requests_waiting": stats.waiting,
            "named_metrics.prefix_cache_hit_rate": stats.prefix_cache_hit_rate,
            "named_metrics.tokens_per_second": stats.generation_tokens_per_second,
            "rps_fractional": stats.requests_per_second,
            "mem_utilization": stats.mem_utilization,
        }
    )
    report = {name: float(value) for name, value in known.items() if value is not None}
    return report | {"named_metrics.in_flight_requests": float(candidate.in_flight)}


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
