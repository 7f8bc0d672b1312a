"""One structured line for every exchange, with the endpoint as it was when it was chosen.

Of a client's own words it holds the request id, the path without its query and the model's name, each cut short: no
other header's value, no body.
"""

from __future__ import annotations

from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from envoy_extproc.exchange.report import Report, Routing
from envoy_extproc.scheduling.interfaces import Decision

log = structlog.get_logger()


class RequestLog:
    """Writes the line."""

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`: the decision is part of the exchange's line."""

    def finished(self, report: Report) -> None:
        """See `Hook`."""
        log.info("request", **fields(report))


def fields(report: Report) -> dict[str, Any]:
    """The line's fields; names are OpenTelemetry's where it has one, durations are seconds."""
    served = report.served_by
    line: dict[str, Any] = {
        "request_id": _text(report.request_id),
        "path": _text(report.path),
        "gen_ai.operation.name": report.operation,
        "gen_ai.request.model": None if report.model is None else _text(report.model),
        "status": report.status,
        "outcome": report.outcome,
        "error.type": report.error_type,
        "error": report.error,
        "pod": None if served is None else served.name,
        "address": report.served_address,
        "attempts": report.attempts,
        "stream": report.streamed,
        "gen_ai.usage.input_tokens": report.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": report.usage.completion_tokens,
        "cached_tokens": report.usage.cached_tokens,
        "usage_source": report.usage_source,
        "duration": round(report.duration, 6),
        "ttft": _rounded(report.time_to_first_token),
        "tpot": _rounded(report.time_per_output_token),
    }
    if report.routing is not None:
        line |= _routing(report.routing)
    odd = {
        "unread": report.unread,
        "oversized_events": report.oversized_events,
        "unreadable_events": report.unreadable_events,
        "unexpected_messages": report.unexpected_messages,
    }
    return line | {name: value for name, value in odd.items() if value}


def _routing(routing: Routing) -> dict[str, Any]:
    state: dict[str, Any] = {"in_flight": routing.in_flight}
    engine = ("running", "waiting", "kv_cache_usage", "prefix_match")
    state |= {name: value for name in engine if (value := getattr(routing, name)) is not None}
    return {
        "policy": routing.decided_by,
        "policy_asked": routing.policy,
        "policy_fallback": routing.fallback_reason,
        "chosen": routing.pod,
        "candidates": routing.candidates,
        "endpoint": state,
    }


def _text(value: str) -> str:
    """What a client wrote, cut short; what is no text in it, replaced."""
    return _sanitised(value[:256])


def sanitise(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Makes any line one that can be written: a processor, to stand right before the one that renders.

    Bytes of a header that are not UTF-8 become lone surrogates in a `str`, which neither JSON nor a stream can encode. A
    line that cannot be written would be lost, and with it the defect it tells of.
    """
    for name, value in line.items():
        if isinstance(value, str):
            if not value.isascii():
                line[name] = _sanitised(value)
        elif isinstance(value, _CONTAINERS):
            line[name] = _plain(value)
    return line


_CONTAINERS = (dict, list, tuple, set, frozenset)


def _plain(value: Any) -> Any:
    """`value` with every text in it sanitised, however deep; exceptions are lists of dicts by then."""
    if isinstance(value, str):
        return _sanitised(value)
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value


def _sanitised(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
