"""Circuit breakers: which pods are left alone because of what became of requests to them, in either lane.

Scraping notices a pod that is gone. It does not notice one that answers ``/health`` and ``/metrics`` and fails what it is
asked for: an engine that is shutting down, one whose GPU hangs, one that breaks off. Reports tell of those.

Theory of operation. Each pod has a breaker of three states, and each report is news of the pods that were asked:

    CLOSED --a fault at once, or `consecutive_errors` of them in a row--> OPEN --its time is over--> HALF_OPEN
       ^                                                                    ^                           |
       +------- a good answer -------(from OPEN too)-------------------------+------ a fault -----------+

1. OPEN lasts 1, 2, 4 ... seconds up to a longest one; only a good answer starts that again.
2. HALF_OPEN lets one exchange through, the probe: the next decision that chooses the pod. Its report can go to another
   server or be minutes away, at the end of a long stream. So after some seconds without news one more is let through.
3. A pod with too much to do is no broken pod: it rests for the first, shortest time and is CLOSED again without a probe,
   since a probe that takes minutes would leave it idle.
4. Reports come at the end of an exchange. What began before a breaker opened says nothing of the pod since then, neither
   good nor bad. A pod that was silent for one exchange but answered another one meanwhile was not silent.
5. Where all pods of a request are to be avoided, all are tried (`ReachableFilter`): then the others are no better.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, IntEnum

import msgspec
import structlog

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import Decision

log = structlog.get_logger()

PROBE_SECONDS = 5.0
"""How long a half-open breaker waits for news of its probe. Most answers are over by then; a pod whose answers all take
longer gets one exchange in this time until the first of them ends."""

_LAG_SECONDS = 0.2
"""An access-log entry comes up to 0.1 s after the end of its exchange, and so the beginning that is reckoned from it is late."""

_ENVOY_RESET = "upstream_reset"
"""How Envoy's word for any connection that failed begins."""


class State(IntEnum):
    """A breaker's state; the value is the gauge's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class News(Enum):
    """What an exchange tells of a pod; the value of a fault is the label `reason`."""

    GOOD = "good"
    """Its engine answered."""
    ALIVE = "alive"
    """Something answered, but that says nothing of the engine: 4xx, or a path that is not read."""
    NOTHING = "nothing"
    """Its client left too early to tell."""
    REFUSED = "refused"
    """No connection, or one that broke before an answer."""
    RETRIED = "retried"
    """Asked in vain before another pod was: the report comes when that one is done."""
    ERROR = "error"
    """An engine's own 5xx, as a status or inside a 200."""
    CUT = "cut"
    """An answer that broke off."""
    TRUNCATED = "truncated"
    """An answer that ended as if it were whole."""
    SILENT = "silent"
    """No answer for long, until the client left or Envoy gave up."""
    OVERLOAD = "overload"
    """429 or 503: it has too much to do."""


class BreakerRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says of breakers; durations are seconds, see `settings.Breaker` for the defaults' reasons.

    Attributes:
        enabled: whether reports are listened to.
        consecutive_errors: errors in a row, without a good answer between them, that open a breaker.
        silent_seconds: how long an exchange must have waited in vain to count as an error.
        first_seconds: how long a breaker stays open the first time.
        longest_seconds: and at most, however often.
    """

    enabled: bool = True
    consecutive_errors: int = 3
    silent_seconds: float = 5.0
    first_seconds: float = 1.0
    longest_seconds: float = 30.0


# -- what a report tells of the pods that were asked ---------------------------------------------------------------------


def told(report: Report, silent_seconds: float) -> Iterator[tuple[str, News]]:
    """(address, news) of each pod that a report tells of. Envoy asks the pods of an order one after the other."""
    routing, served = report.routing, report.served_address
    if routing is None:
        return
    # The stream lane does not learn how many were asked of an exchange that nobody answered: at least the first.
    asked = routing.order[: max(1, report.attempts)]
    last = asked[-1] if served is None else served
    for address in dict.fromkeys(asked[:-1]):
        if address != last:
            yield address, News.RETRIED
    yield last, _unanswered(report, silent_seconds) if served is None else _answered(report)


def _answered(report: Report) -> News:
    """Of the pod whose answer came, or began to."""
    if report.error_type == "overload":
        return News.OVERLOAD
    if report.operation is None:
        return News.ALIVE  # an error on a path that is not read may be the path's
    if report.outcome == "success":
        return News.GOOD
    if report.error_type in ("network", "model_server"):
        return News.CUT if report.outcome == "aborted" else News.ERROR
    cut_short = report.error == "no-done" or (report.error == "unreadable" and not report.streamed)
    return News.TRUNCATED if cut_short else News.ALIVE


def _unanswered(report: Report, silent_seconds: float) -> News:
    """Of the pod asked last, when Envoy had to answer itself or nobody did."""
    aborted = report.outcome == "aborted"
    if report.error_type in ("network", "model_server") and (report.error or "").startswith(_ENVOY_RESET):
        return News.REFUSED
    if report.error_type == "model_server" or (aborted and report.error_type == "client"):
        return News.SILENT if report.duration >= silent_seconds else News.NOTHING
    return News.CUT if aborted and report.error_type == "network" else News.NOTHING


# -- one breaker -----------------------------------------------------------------------------------------------------------

Moved = Callable[[State, News, float], None]
"""Told of each move: the new state, the news that led to it, and for how many seconds it is open."""


class Breaker:
    """The breaker of one pod; knows no clock: all times are monotonic seconds handed in.

    Args:
        rules: what the operator says.
        jitter: a factor around 1 for each time it is open, so that servers that opened together do not probe together.
        moved: told of each move, once.

    Attributes:
        state: as of the last call; `look` says what it is now.
    """

    __slots__ = (
        "_errors",
        "_good_at",
        "_jitter",
        "_moved",
        "_opened",
        "_opened_at",
        "_probe_until",
        "_reason",
        "_rules",
        "_until",
        "state",
    )

    def __init__(self, rules: BreakerRules, jitter: Callable[[], float], moved: Moved) -> None:
        self.state = State.CLOSED
        self._rules = rules
        self._jitter = jitter
        self._moved = moved
        self._errors = 0
        self._opened = 0  # times in a row, without a good answer between
        self._opened_at = 0.0
        self._until = 0.0
        self._probe_until = 0.0
        self._good_at = float("-inf")
        self._reason = News.NOTHING

    def look(self, now: float) -> State:
        """The state at `now`: being open ends by itself."""
        if self.state is State.OPEN and now >= self._until:
            self._probe_until = now
            self._move(State.CLOSED if self._reason is News.OVERLOAD else State.HALF_OPEN)
        return self.state

    def avoided(self, now: float) -> bool:
        """Whether other pods should be asked."""
        state = self.look(now)
        return state is State.OPEN or (state is State.HALF_OPEN and now < self._probe_until)

    def chosen(self, now: float) -> None:
        """An exchange goes to the pod: the probe, if there is none under way."""
        if self.look(now) is State.HALF_OPEN and now >= self._probe_until:
            self._probe_until = now + PROBE_SECONDS

    def hear(self, news: News, began: float, now: float) -> None:
        """Moves by news of an exchange that began at `began` and is over."""
        state = self.look(now)
        if state is not State.CLOSED and began < self._opened_at + _LAG_SECONDS:
            return
        if news in _OF_ITS_BEGINNING and began <= self._good_at:
            return
        if news is News.GOOD:
            self._good_at = now
        handler = _TABLE[state].get(news)
        if handler is not None:
            handler(self, news, now)

    # -- what news leads to: `_TABLE` says when -----------------------------------------------------------------------

    def forgive(self, _: News, now: float) -> None:
        """What was before does not count any more."""
        self._errors = self._opened = 0

    def count(self, news: News, now: float) -> None:
        """One error can be the request's own doing."""
        self._errors += 1
        if self._errors >= self._rules.consecutive_errors:
            self.open(news, now)

    def open(self, news: News, now: float) -> None:
        """Each time in a row for twice as long."""
        rules = self._rules
        seconds = min(rules.longest_seconds, rules.first_seconds * 2.0 ** min(self._opened, 32))
        self._opened += 1
        self._opened_for(seconds, news, now)

    def rest(self, news: News, now: float) -> None:
        """A moment in which others are asked."""
        self._opened_for(self._rules.first_seconds, news, now)

    def close(self, news: News, now: float) -> None:
        """Trusted again, and nothing is held against it."""
        self._opened = 0
        self._move(State.CLOSED, news)

    def close_if_unreachable(self, news: News, now: float) -> None:
        """Any answer is good news of a pod that gave none; of one whose engine fails it says nothing."""
        if self._reason in _UNREACHABLE:
            self.close(news, now)
        else:
            self.let_another_through(news, now)

    def let_another_through(self, _: News, now: float) -> None:
        """The probe told nothing."""
        self._probe_until = now

    def _opened_for(self, seconds: float, news: News, now: float) -> None:
        seconds *= self._jitter()
        self._errors = 0
        self._reason = news
        self._opened_at = now
        self._until = now + seconds
        self._move(State.OPEN, news, seconds)

    def _move(self, state: State, news: News = News.NOTHING, seconds: float = 0.0) -> None:
        self.state = state
        self._moved(state, news, seconds)


_OF_ITS_BEGINNING = frozenset({News.RETRIED, News.SILENT})
"""News of how an exchange began, which its report tells late: a good answer heard since then is newer."""
_UNREACHABLE = frozenset({News.REFUSED, News.RETRIED})

_Handler = Callable[[Breaker, News, float], None]

_TABLE: Mapping[State, Mapping[News, _Handler]] = {
    State.CLOSED: {
        News.GOOD: Breaker.forgive,
        News.REFUSED: Breaker.open,
        News.RETRIED: Breaker.open,
        News.ERROR: Breaker.count,
        News.CUT: Breaker.count,
        News.TRUNCATED: Breaker.count,
        News.SILENT: Breaker.count,
        News.OVERLOAD: Breaker.rest,
    },
    State.HALF_OPEN: {
        News.GOOD: Breaker.close,
        News.ALIVE: Breaker.close_if_unreachable,
        News.NOTHING: Breaker.let_another_through,
        News.REFUSED: Breaker.open,
        News.RETRIED: Breaker.open,
        News.ERROR: Breaker.open,
        News.CUT: Breaker.open,
        News.TRUNCATED: Breaker.open,
        News.SILENT: Breaker.open,
        News.OVERLOAD: Breaker.rest,
    },
    # Asked all the same: where all are avoided, or by a pin. Faults are no news then.
    State.OPEN: {News.GOOD: Breaker.close, News.ALIVE: Breaker.close_if_unreachable},
}


# -- all of them -----------------------------------------------------------------------------------------------------------


class Breakers:
    """The breakers of all endpoints; a hook on decisions and reports.

    Only endpoints of the current snapshot have one, so memory is bounded by it.

    Args:
        rules: what the operator says.
        jitter: see `Breaker`.
        clock: monotonic seconds, the same as of `avoided`.

    Attributes:
        doubted: the addresses whose breaker is not closed, or was not when it was looked at last; always the same object.
    """

    def __init__(
        self,
        rules: BreakerRules,
        *,
        jitter: Callable[[], float] = lambda: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.doubted: set[str] = set()
        self._rules = rules
        self._jitter = jitter
        self._clock = clock
        self._endpoints: Mapping[str, Endpoint] = {}
        self._breakers: dict[str, Breaker] = {}
        self._openings: dict[str, Counter[str]] = {}  # by the endpoint's name, then by reason

    def update(self, snapshot: Snapshot) -> None:
        """Forgets endpoints that left; one of another name at the same address is another one."""
        before, self._endpoints = self._endpoints, snapshot.by_address
        for address in list(self._breakers):
            endpoint = self._endpoints.get(address)
            if endpoint is None or endpoint.name != before[address].name:
                del self._breakers[address]
                self.doubted.discard(address)
        for name in self._openings.keys() - {endpoint.name for endpoint in snapshot.endpoints}:
            del self._openings[name]

    def avoided(self, address: str, now: float) -> bool:
        """Whether other pods than the one there should be asked."""
        breaker = self._breakers.get(address)
        return breaker is not None and breaker.state is not State.CLOSED and breaker.avoided(now)

    def describe(self, address: str) -> str | None:
        """`closed`, `half-open` or `open`; None for an address that no endpoint has."""
        if address not in self._endpoints:
            return None
        return self._look(address).name.lower().replace("_", "-")

    def rows(self) -> Iterator[tuple[str, State, Mapping[str, int]]]:
        """(name, state, how often it opened by reason) of every endpoint."""
        for address, endpoint in self._endpoints.items():
            yield endpoint.name, self._look(address), self._openings.get(endpoint.name, {})

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`: a decision for a half-open endpoint is its probe."""
        breaker = self._breakers.get(decision.chosen.endpoint.address)
        if breaker is not None and breaker.state is not State.CLOSED:
            breaker.chosen(self._clock())

    def finished(self, report: Report) -> None:
        """See `Hook`."""
        if not self._rules.enabled:
            return
        now = self._clock()
        for address, news in told(report, self._rules.silent_seconds):
            breaker = self._breaker(address)
            if breaker is not None:
                breaker.hear(news, now - report.duration, now)

    def _look(self, address: str) -> State:
        breaker = self._breakers.get(address)
        return State.CLOSED if breaker is None else breaker.look(self._clock())

    def _breaker(self, address: str) -> Breaker | None:
        known = self._breakers.get(address)
        if known is not None:
            return known
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            return None
        made = self._breakers[address] = Breaker(self._rules, self._jitter, self._teller(endpoint))
        return made

    def _teller(self, endpoint: Endpoint) -> Moved:
        def moved(state: State, news: News, seconds: float) -> None:
            who = {"endpoint": endpoint.name, "address": endpoint.address}
            (self.doubted.discard if state is State.CLOSED else self.doubted.add)(endpoint.address)
            if state is State.OPEN:
                self._openings.setdefault(endpoint.name, Counter())[news.value] += 1
                log.warning("breaker_open", **who, reason=news.value, seconds=round(seconds, 3))
            elif state is State.HALF_OPEN:
                log.info("breaker_half_open", **who)
            else:
                log.info("breaker_closed", **who)

        return moved
