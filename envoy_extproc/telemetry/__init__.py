"""What is said of decisions and reports: hooks on two frozen values, one module an exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import structlog

from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Decision

_logger = structlog.get_logger()  # not `log`: that is a module of this package

UNKNOWN_MODEL = "unknown"
"""The label of requests that name no model discovery knows."""


class Hook(Protocol):
    """Told of what happens; must be quick, since it runs between two messages."""

    def decided(self, decision: Decision, seconds: float) -> None:
        """A decision was made, and took so long."""

    def finished(self, report: Report) -> None:
        """An exchange is over."""


class Hooks:
    """Several hooks as one, none of which can harm the others or the exchange.

    Args:
        hooks: are told, in this order.
    """

    def __init__(self, *hooks: Hook) -> None:
        self._hooks = hooks

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`."""
        self._tell(lambda hook: hook.decided(decision, seconds))

    def finished(self, report: Report) -> None:
        """See `Hook`."""
        self._tell(lambda hook: hook.finished(report))

    def _tell(self, say: Callable[[Hook], None]) -> None:
        for hook in self._hooks:
            try:
                say(hook)
            except Exception:
                # The outermost edge of a hook: an exporter that fails must not end the exchange, nor keep the others
                # from hearing.
                _logger.exception("hook_failed", hook=type(hook).__name__)
