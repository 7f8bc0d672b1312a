from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.exchange.report import routing_of
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling.interfaces import Candidate
from envoy_extproc.telemetry.log import RequestLog, fields, sanitise
from tests.support.builders import decision, endpoint
from tests.support.reports import report


def test_the_line_of_a_success() -> None:
    assert fields(report()) == {
        "request_id": "id-1",
        "path": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "llama-3-8b",
        "status": 200,
        "outcome": "success",
        "error.type": None,
        "error": None,
        "pod": "pod-1",
        "address": "10.0.0.1:8000",
        "attempts": 1,
        "stream": True,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "cached_tokens": 2,
        "usage_source": "reported",
        "duration": 2.0,
        "ttft": 0.5,
        "tpot": 0.25,
        "policy": "least-request",
        "policy_asked": "least-request",
        "policy_fallback": None,
        "chosen": "pod-1",
        "candidates": 1,
        "endpoint": {"in_flight": 0},
    }


def test_the_line_of_a_refusal() -> None:
    line = fields(
        report(
            outcome="refused",
            status=404,
            routing=None,
            served_by=None,
            model=None,
            usage=Usage(),
            usage_source="none",
            time_to_first_token=None,
            time_per_output_token=None,
        )
    )
    assert (line["pod"], line["gen_ai.request.model"], line["ttft"], line["tpot"]) == (None, None, None, None)
    assert "policy" not in line


def test_oddities_show_only_where_there_are_any() -> None:
    line = fields(report(unread="compressed", oversized_events=1, unreadable_events=2, unexpected_messages=3))
    assert (line["unread"], line["oversized_events"]) == ("compressed", 1)
    assert (line["unreadable_events"], line["unexpected_messages"]) == (2, 3)


def test_the_state_of_the_endpoint_when_it_was_chosen() -> None:
    chosen = Candidate(endpoint(1), 4, EngineStats(at=0.0, running=3.0, waiting=1.0, kv_cache_usage=0.5))
    made = msgspec.structs.replace(decision(1), chosen=chosen)
    assert fields(report(routing=routing_of(made)))["endpoint"] == {
        "in_flight": 4,
        "running": 3.0,
        "waiting": 1.0,
        "kv_cache_usage": 0.5,
    }


def test_long_names_are_cut_and_durations_rounded() -> None:
    line = fields(report(path="/" * 999, model="m" * 999, duration=1 / 3))
    assert (len(line["path"]), len(line["gen_ai.request.model"]), line["duration"]) == (256, 256, 0.333333)


def test_bytes_that_are_no_text_can_be_written_as_json() -> None:
    line = fields(report(request_id="id\udcff", path="/\udcff", model="\udcff", routing=None))
    assert msgspec.json.decode(msgspec.json.encode(line))["request_id"] == "id?"


def written(event: str, **values: Any) -> Any:
    """What is read of a line written as `serve` writes it."""
    out = io.BytesIO()
    logger = structlog.wrap_logger(
        structlog.BytesLogger(out),
        processors=[
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer()),
            sanitise,
            structlog.processors.JSONRenderer(serializer=lambda line, **_: msgspec.json.encode(line)),
        ],
    )
    logger.error(event, **values)
    return msgspec.json.decode(out.getvalue())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("id\udcff", "id?"),
        ("grün 漢 \U0001f600", "grün 漢 \U0001f600"),
        (["\udcff", {"\udcff": ("\udcff", 1)}], ["?", {"?": ["?", 1]}]),
        ({"\udcff"}, ["?"]),
        (None, None),
        (1.5, 1.5),
    ],
)
def test_every_line_can_be_written(value: object, expected: object) -> None:
    assert written("went\udcffwrong", request_id=value) == {"event": "went?wrong", "request_id": expected}


def test_an_exception_that_quotes_no_text_can_be_written() -> None:
    line = written("exchange_failed", request_id="\udcff", exc_info=ValueError("\udcff"))
    assert (line["request_id"], line["exception"][0]["exc_value"]) == ("?", "?")


def test_one_line_for_each_exchange() -> None:
    hook = RequestLog()
    with capture_logs() as lines:
        hook.decided(decision(1), 0.1)
        hook.finished(report())
    (line,) = lines
    assert (line["event"], line["log_level"], line["request_id"]) == ("request", "info", "id-1")
