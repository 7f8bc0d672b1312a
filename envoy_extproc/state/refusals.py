"""Pods that lately refused or failed, learnt from what became of exchanges, in either lane.

Scraping notices a pod that is gone within an interval or two. Requests notice it at once: each that is sent there in the
meantime costs a retry. So a pod that just failed is avoided for a moment, longer each time it fails again, and is trusted
again with the first answer it gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Decision

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 30.0
_MOST = 10_000  # addresses remembered; beyond it all are forgotten, which costs some retries


class Refusals:
    """Who is to be avoided; a hook on reports.

    Args:
        clock: monotonic seconds, the same as of `avoided`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: dict[str, tuple[int, float]] = {}

    def avoided(self, address: str, now: float) -> bool:
        """Whether the pod there failed so lately that another one should be asked."""
        known = self._failed.get(address)
        return known is not None and now < known[1]

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`: a decision says nothing of the pod."""

    def finished(self, report: Report) -> None:
        """See `Hook`. Envoy asks the pods of an order one after the other; all but the last one asked had failed."""
        if report.routing is None or not report.attempts:
            return
        asked = report.routing.order[: report.attempts]
        if report.served_address is not None:
            if report.error_type == "overload" and report.outcome == "error":
                self._note(report.served_address)
            else:
                self._failed.pop(report.served_address, None)
            asked = asked[: report.attempts - 1]
        elif report.error_type != "network":
            return
        for address in asked:
            if address != report.served_address:
                self._note(address)

    def _note(self, address: str) -> None:
        if len(self._failed) >= _MOST:
            self._failed.clear()
        times, _ = self._failed.get(address, (0, 0.0))
        seconds = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2**times)
        self._failed[address] = (min(times + 1, 10), self._clock() + seconds)
