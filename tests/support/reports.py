"""A report to start from."""

from __future__ import annotations

from typing import Any

import msgspec

from envoy_extproc.exchange.report import Report, routing_of
from envoy_extproc.openai.answer import Usage
from tests.support.builders import MODEL, decision, endpoint

SUCCESS = Report(
    request_id="id-1",
    path="/v1/chat/completions",
    operation="chat",
    model=MODEL,
    status=200,
    outcome="success",
    error_type=None,
    error=None,
    routing=routing_of(decision(1)),
    served_by=endpoint(1),
    served_address="10.0.0.1:8000",
    attempts=1,
    streamed=True,
    usage=Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=2),
    usage_source="reported",
    duration=2.0,
    time_to_first_token=0.5,
    time_per_output_token=0.25,
)


def report(**changes: Any) -> Report:
    """A success, with changes."""
    return msgspec.structs.replace(SUCCESS, **changes)
