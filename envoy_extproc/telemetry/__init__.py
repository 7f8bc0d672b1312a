"""What is said of decisions and reports: hooks on two frozen values, one module an exporter."""

from __future__ import annotations

from typing import Protocol

from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Decision

UNKNOWN_MODEL = "unknown"
"""The label of requests that name no model discovery knows."""


class Hook(Protocol):
    """Told of what happens; must be quick, since it runs between two messages."""

    def decided(self, decision: Decision, seconds: float) -> None:
        """A decision was made, and took so long."""

    def finished(self, report: Report) -> None:
        """An exchange is over."""
