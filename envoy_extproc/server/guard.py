"""Keeps the scorers of other packages from breaking a request: whatever they do, there is a decision, and a line in the log.

Only they are looked after so; the built-in ones are held to what a `Scorer` promises by their tests.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import structlog

from envoy_extproc.scheduling.interfaces import (
    Candidate,
    MissingDataError,
    Remembering,
    SchedulingRequest,
    Scorer,
)

log = structlog.get_logger()

FAILED = "scorer-failed"
"""The reason of `MissingDataError` for a scorer that did not do what it should have."""

_NO_DATA = "no-data"
"""Stands for reasons of a scorer's own that cannot be labels of a metric, or are too many."""

_MOST_REASONS = 8
_LOG_SECONDS = 60.0
"""Between two lines about one scorer: it may fail a thousand times a second."""

_ROUNDING = 1e-6  # what a sum of shares may be beyond 0 or 1 without being a mistake
_reason = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


class _BadScores(Exception):
    """What a scorer returned is not what it should have; the message says what it is."""


class GuardedScorer:
    """A scorer under the name of its policy.

    Args:
        name: the policy's, which is the entry point's.
        scorer: of another package.
        failed: is told the name each time the scorer fails.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        *,
        failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._scorer = scorer
        self._failed = failed
        self._clock = clock
        self._reasons: set[str] = set()
        self._failures = 0
        self._quiet_until = float("-inf")

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`.

        Raises:
            MissingDataError: the scorer said so, with its own reason; or it failed, which is `scorer-failed`.
        """
        try:
            return _checked(self._scorer.score(request, tuple(candidates)), candidates)
        except MissingDataError as nothing:
            raise MissingDataError(self._bounded(getattr(nothing, "reason", None))) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001  no request is lost by what others wrote
            self._tell("score", error)
            raise MissingDataError(FAILED) from None

    def _bounded(self, reason: object) -> str:
        """Reasons are values of a metric's label, so they are few."""
        if not isinstance(reason, str) or _reason.fullmatch(reason) is None:
            return _NO_DATA
        if len(self._reasons) < _MOST_REASONS:
            self._reasons.add(reason)
        return reason if reason in self._reasons else _NO_DATA

    def _tell(self, method: str, error: BaseException) -> None:
        self._failed(self.name)
        self._failures += 1
        now = self._clock()
        if now >= self._quiet_until:
            log.warning(
                "scorer_failed", scorer=self.name, method=method, failures=self._failures, exc_info=error
            )
            self._quiet_until, self._failures = now + _LOG_SECONDS, 0


class RememberingGuardedScorer(GuardedScorer):
    """The same of a scorer that remembers."""

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        memory: Remembering,
        *,
        failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, scorer, failed=failed, clock=clock)
        self._memory = memory

    def remember(self, request: SchedulingRequest, chosen: Candidate) -> None:
        """See `Remembering`."""
        try:
            self._memory.remember(request, chosen)
        except (Exception, SystemExit) as error:  # noqa: BLE001  likewise
            self._tell("remember", error)

    def keep_models(self, models: Collection[str]) -> None:
        """See `Remembering`."""
        try:
            self._memory.keep_models(frozenset(models))
        except (Exception, SystemExit) as error:  # noqa: BLE001  likewise
            self._tell("keep_models", error)


def guarded(
    name: str, scorer: Scorer, failed: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> GuardedScorer:
    """`scorer` under the name of its policy; one that remembers still does. See `GuardedScorer`."""
    if isinstance(scorer, Remembering):
        return RememberingGuardedScorer(name, scorer, scorer, failed=failed, clock=clock)
    return GuardedScorer(name, scorer, failed=failed, clock=clock)


def _checked(scores: Iterable[float], candidates: Sequence[Candidate]) -> list[float]:
    values = list(itertools.islice(scores, len(candidates) + 1))
    if len(values) != len(candidates):
        count = "too many" if len(values) > len(candidates) else str(len(values))
        raise _BadScores(f"{count} scores for {len(candidates)} candidates")
    if len([value for value in values if 0 <= value <= 1]) == len(values):  # as a rule, so it is to be quick
        return list(map(float, values))
    for value, candidate in zip(values, candidates, strict=True):
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            raise _BadScores(f"{float(value):g} for {candidate.endpoint.name}: a score is from 0 to 1")
    return [min(1.0, max(0.0, float(value))) for value in values]
