"""Who is left alone, as reports tell, for how long, and how a pod comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from structlog.testing import capture_logs

from envoy_extproc import settings as configuration
from envoy_extproc.endpoints import Snapshot
from envoy_extproc.exchange.report import routing_of
from envoy_extproc.state.breakers import PROBE_SECONDS, Breaker, BreakerRules, Breakers, News, State, told
from tests.support.builders import decision, endpoint
from tests.support.reports import report

FIRST, SECOND, THIRD = (f"10.0.0.{number}:8000" for number in (1, 2, 3))
ROUTING = routing_of(decision(1, 2, 3))

RESET = {
    "outcome": "error",
    "error_type": "network",
    "error": "upstream_reset_before_response_started",
    "status": 503,
    "served_by": None,
    "served_address": None,
}
LEFT = {
    "outcome": "aborted",
    "error_type": "client",
    "error": "closed-before-answer",
    "status": None,
    "served_by": None,
    "served_address": None,
}
GAVE_UP = {**RESET, "error_type": "model_server", "status": 504, "error": "stream_idle_timeout"}
CUT = {"outcome": "aborted", "error_type": "network", "error": "closed-before-end"}
BROKEN = {"outcome": "error", "error_type": "model_server", "error": "status-500", "status": 500}
BUSY = {"outcome": "error", "error_type": "overload", "error": "status-503", "status": 503}
BAD_REQUEST = {"outcome": "error", "error_type": "client", "error": "status-400", "status": 400}
ENDED_EARLY = {"outcome": "error", "error_type": "content", "error": "no-done"}
UNREADABLE = {"outcome": "error", "error_type": "content", "error": "unreadable"}


# -- from reports to news ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "news"),
    [
        # the pod that answered
        ({}, [(FIRST, "good")]),
        ({"operation": None}, [(FIRST, "alive")]),
        (BROKEN, [(FIRST, "error")]),
        ({**BROKEN, "operation": None}, [(FIRST, "alive")]),
        ({**BROKEN, "status": 200, "error": "error-in-answer"}, [(FIRST, "error")]),
        (BUSY, [(FIRST, "overload")]),
        ({**BUSY, "status": 200, "error": "error-in-answer"}, [(FIRST, "overload")]),
        (BAD_REQUEST, [(FIRST, "alive")]),
        (CUT, [(FIRST, "cut")]),
        ({**CUT, "operation": None}, [(FIRST, "alive")]),
        ({**CUT, "error_type": "model_server"}, [(FIRST, "cut")]),
        ({"outcome": "aborted", "error_type": "client", "error": "closed-before-end"}, [(FIRST, "alive")]),
        (ENDED_EARLY, [(FIRST, "truncated")]),
        ({**UNREADABLE, "streamed": False}, [(FIRST, "truncated")]),
        ({**UNREADABLE, "streamed": True}, [(FIRST, "alive")]),
        ({"outcome": "drained"}, [(FIRST, "alive")]),
        # those asked before it
        ({"served_address": SECOND, "attempts": 2}, [(FIRST, "retried"), (SECOND, "good")]),
        (
            {**BUSY, "served_address": THIRD, "attempts": 3},
            [(FIRST, "retried"), (SECOND, "retried"), (THIRD, "overload")],
        ),
        # nobody answered
        ({**RESET, "attempts": 1}, [(FIRST, "refused")]),
        ({**RESET, "attempts": 3}, [(FIRST, "retried"), (SECOND, "retried"), (THIRD, "refused")]),
        ({**RESET, "attempts": 1, "error_type": "model_server"}, [(FIRST, "refused")]),
        ({**RESET, "attempts": 1, "error_type": "overload"}, [(FIRST, "nothing")]),
        ({**RESET, "attempts": 0, "error": "no_healthy_upstream"}, [(FIRST, "nothing")]),
        ({**RESET, "attempts": 0, "error": "ext_proc_error_gRPC_error_14"}, [(FIRST, "nothing")]),
        ({**LEFT, "attempts": 0, "duration": 5.0}, [(FIRST, "silent")]),
        ({**LEFT, "attempts": 0, "duration": 4.9}, [(FIRST, "nothing")]),
        ({**LEFT, "attempts": 2, "duration": 5.0}, [(FIRST, "retried"), (SECOND, "silent")]),
        ({**LEFT, "error_type": "network", "attempts": 1}, [(FIRST, "cut")]),
        ({**GAVE_UP, "attempts": 1, "duration": 600.0}, [(FIRST, "silent")]),
        ({**GAVE_UP, "attempts": 1, "duration": 1.0}, [(FIRST, "nothing")]),
        ({**LEFT, "outcome": "error", "status": 408, "attempts": 1}, [(FIRST, "nothing")]),
        ({**LEFT, "outcome": "drained", "error_type": None}, [(FIRST, "nothing")]),
        # nobody was asked
        ({**RESET, "routing": None}, []),
        ({"routing": None, "outcome": "refused", "served_address": None, "attempts": 0}, []),
    ],
)
def test_what_a_report_tells(changes: dict[str, Any], news: list[tuple[str, str]]) -> None:
    one = report(**{"routing": ROUTING, **changes})
    assert [(address, each.value) for address, each in told(one, silent_seconds=5.0)] == news


@pytest.mark.parametrize(
    ("changes", "news"),
    [
        ({"served_address": FIRST, "attempts": 2}, [(FIRST, News.GOOD)]),
        ({**RESET, "attempts": 3}, [(FIRST, News.REFUSED)]),
    ],
)
def test_a_pod_alone_is_not_blamed_twice(changes: dict[str, Any], news: list[tuple[str, News]]) -> None:
    one = report(**{"routing": routing_of(decision(1, 1, 1)), **changes})
    assert list(told(one, 5.0)) == news


# -- from news to who is avoided ---------------------------------------------------------------------------------------


class Scene:
    """Three endpoints, and a clock that is set by hand. An exchange takes no time unless it is said."""

    def __init__(self, **rules: Any) -> None:
        self.now = 100.0
        self.breakers = Breakers(BreakerRules(**rules), clock=lambda: self.now)
        self.breakers.update(Snapshot([endpoint(1), endpoint(2), endpoint(3)]))

    def told(self, changes: Any = (), *, attempts: int = 1, duration: float = 0.0) -> None:
        one = {"routing": ROUTING, "attempts": attempts, "duration": duration, **dict(changes)}
        self.breakers.finished(report(**one))

    def avoided(self, after: float = 0.0) -> set[str]:
        return {each for each in (FIRST, SECOND, THIRD) if self.breakers.avoided(each, self.now + after)}

    @property
    def opened(self) -> dict[tuple[str, str], int]:
        """How often each opened, and why."""
        rows = self.breakers.rows()
        return {(name, reason): count for name, _, counts in rows for reason, count in counts.items()}

    def state(self) -> str | None:
        return self.breakers.describe(FIRST)

    def half_open(self) -> None:
        """The first endpoint has refused, and its time is over."""
        self.told(RESET)
        self.now += 1.0
        assert self.state() == "half-open"

    @contextmanager
    def logged(self, *events: str) -> Iterator[None]:
        with capture_logs() as lines:
            yield
        assert [line["event"] for line in lines] == list(events)


@pytest.mark.parametrize(
    ("changes", "times", "reason"),
    [
        (RESET, 1, "refused"),
        (BROKEN, 3, "error"),
        (CUT, 3, "cut"),
        (ENDED_EARLY, 3, "truncated"),
        ({**LEFT, "duration": 6.0}, 3, "silent"),
        ({**GAVE_UP, "duration": 6.0}, 3, "silent"),
        (BUSY, 1, "overload"),
        (BAD_REQUEST, None, ""),
        ({**LEFT, "duration": 0.5}, None, ""),
        ({**BROKEN, "operation": None}, None, ""),
    ],
)
def test_how_many_it_takes(changes: dict[str, Any], times: int | None, reason: str) -> None:
    scene = Scene()
    for number in range(1, 21 if times is None else times + 1):
        assert scene.avoided() == set(), f"before number {number}"
        scene.told(changes)
    assert scene.avoided() == (set() if times is None else {FIRST})
    assert scene.opened == ({} if times is None else {("pod-1", reason): 1})


@pytest.mark.parametrize("between", [BAD_REQUEST, {**LEFT, "duration": 0.5}])
def test_only_a_good_answer_ends_a_row_of_errors(between: dict[str, Any]) -> None:
    scene = Scene()
    for changes in (BROKEN, BROKEN, {}, CUT, between, BROKEN):
        scene.told(changes)
        assert scene.avoided() == set()
    scene.told(BROKEN)
    assert scene.avoided() == {FIRST}


def test_as_many_errors_as_are_asked_for() -> None:
    scene = Scene(consecutive_errors=1)
    scene.told(BROKEN)
    assert scene.avoided() == {FIRST}


def test_off() -> None:
    scene = Scene(enabled=False)
    for _ in range(10):
        scene.told(RESET)
    assert scene.avoided() == set()
    assert scene.state() == "closed"


def test_every_pod_asked_in_vain() -> None:
    scene = Scene()
    scene.told({"served_address": THIRD}, attempts=3)
    assert scene.avoided() == {FIRST, SECOND}
    assert scene.opened == {("pod-1", "retried"): 1, ("pod-2", "retried"): 1}


# -- news that is old --------------------------------------------------------------------------------------------------


def test_a_pod_that_answered_meanwhile_was_not_silent() -> None:
    scene = Scene()
    for _ in range(5):
        scene.now += 10
        scene.told()
        scene.now += 3
        scene.told({**LEFT, "duration": 6.0})
    assert scene.avoided() == set()
    scene.now += 10
    for _ in range(3):
        scene.told({**LEFT, "duration": 6.0})
    assert scene.avoided() == {FIRST}


def test_a_refusal_told_at_the_end_of_a_long_answer_is_old() -> None:
    scene = Scene()
    scene.now += 60
    scene.told()
    scene.told({"served_address": SECOND}, attempts=2, duration=60.0)
    assert scene.avoided() == set()
    scene.now += 1
    scene.told({"served_address": SECOND}, attempts=2, duration=0.5)
    assert scene.avoided() == {FIRST}


def test_answers_that_began_before_it_opened_do_not_close_it() -> None:
    """An engine that shuts down ends what it has, and refuses what is new."""
    scene = Scene()
    scene.half_open()
    scene.told(duration=30.0)
    assert scene.state() == "half-open"
    scene.told(duration=0.5)
    assert scene.state() == "closed"


def test_exchanges_that_failed_together_open_it_once() -> None:
    scene = Scene()
    for _ in range(50):
        scene.told(RESET, duration=20.0)
    assert scene.opened == {("pod-1", "refused"): 1}
    scene.now += 1.0
    scene.told(RESET, duration=20.0)  # one that was still under way
    assert scene.state() == "half-open"
    assert scene.opened == {("pod-1", "refused"): 1}


# -- how it comes back -------------------------------------------------------------------------------------------------


def test_longer_each_time_and_not_for_ever() -> None:
    scene = Scene()
    for seconds in (1, 2, 4, 8, 16, 30, 30):
        scene.told(RESET)
        assert scene.avoided(seconds - 0.01) == {FIRST}
        scene.now += seconds
        assert scene.avoided() == set()


def test_one_probe_and_then_the_news_of_it() -> None:
    scene = Scene()
    scene.half_open()
    assert scene.avoided() == set()
    scene.breakers.decided(decision(2, 1), 0.0)  # not chosen, a fallback alone
    assert scene.avoided() == set()
    scene.breakers.decided(decision(1, 2), 0.0)
    assert scene.avoided() == {FIRST}
    scene.told()
    assert scene.avoided() == set()
    assert scene.state() == "closed"
    scene.told(RESET)  # and it starts from the shortest time again
    assert scene.avoided(0.99) == {FIRST}
    assert scene.avoided(1.0) == set()


@pytest.mark.parametrize("fault", [RESET, BROKEN, CUT, ENDED_EARLY, {**LEFT, "duration": 0.9}])
def test_a_probe_that_fails_opens_it_for_longer(fault: dict[str, Any]) -> None:
    scene = Scene(silent_seconds=0.5)
    scene.half_open()
    scene.breakers.decided(decision(1), 0.0)
    scene.now += 0.9
    scene.told(fault)
    assert scene.state() == "open"
    assert scene.avoided(1.99) == {FIRST}
    assert scene.avoided(2.0) == set()


def test_a_probe_without_news_lets_one_more_through() -> None:
    """Its report went to another server, or it is the beginning of a long stream."""
    scene = Scene()
    scene.half_open()
    for _ in range(4):
        scene.breakers.decided(decision(1), 0.0)
        assert scene.avoided(PROBE_SECONDS - 0.01) == {FIRST}
        scene.now += PROBE_SECONDS
        assert scene.avoided() == set()
    scene.told(duration=4 * PROBE_SECONDS)
    assert scene.state() == "closed"


def test_a_probe_whose_client_leaves_lets_another_through() -> None:
    scene = Scene()
    scene.half_open()
    scene.breakers.decided(decision(1), 0.0)
    scene.told({**LEFT, "duration": 0.2})
    assert scene.state() == "half-open"
    assert scene.avoided() == set()


@pytest.mark.parametrize(("fault", "state"), [(RESET, "closed"), (BROKEN, "half-open")])
def test_an_answer_that_does_not_come_from_the_engine(fault: dict[str, Any], state: str) -> None:
    scene = Scene(consecutive_errors=1)
    scene.told(fault)
    scene.now += 1.0
    scene.breakers.decided(decision(1), 0.0)
    scene.told(BAD_REQUEST)
    assert scene.state() == state
    assert scene.avoided() == set()


def test_all_avoided_and_asked_all_the_same() -> None:
    """The filter keeps all then; faults of an open one do not count, a good answer does at once."""
    scene = Scene()
    scene.told(RESET)
    scene.now += 0.2
    scene.breakers.decided(decision(1), 0.0)
    scene.told(RESET, duration=0.1)
    assert scene.avoided(0.79) == {FIRST}
    assert scene.avoided(0.8) == set()
    scene.told(RESET)
    scene.now += 0.2
    scene.told(duration=0.1)  # it may have begun before, and be told late
    assert scene.avoided() == {FIRST}
    scene.now += 0.2
    scene.told(duration=0.1)
    assert scene.avoided() == set()


def test_overload_rests_for_the_shortest_time_and_needs_no_probe() -> None:
    scene = Scene()
    for _ in range(6):
        scene.told(BUSY)
        assert scene.avoided(0.99) == {FIRST}
        scene.now += 1.0
        assert scene.state() == "closed"


def test_a_good_answer_forgives_what_was_before_a_rest() -> None:
    scene = Scene()
    scene.half_open()
    for changes in (BUSY, {}, RESET):
        scene.told(changes)
        scene.now += 1.0
    assert scene.avoided() == set()


def test_a_pinned_exchange_beside_the_probe_is_no_second_probe() -> None:
    scene = Scene()
    scene.half_open()
    scene.breakers.decided(decision(1), 0.0)
    scene.now += 3.0
    scene.breakers.decided(decision(1), 0.0)
    assert scene.avoided(PROBE_SECONDS - 3.0) == set()


def test_jitter() -> None:
    factors = iter((0.5, 1.5))
    now = 100.0
    breakers = Breakers(BreakerRules(), jitter=lambda: next(factors), clock=lambda: now)
    breakers.update(Snapshot([endpoint(1)]))
    breakers.finished(report(**RESET, duration=0.0))
    assert breakers.avoided(FIRST, 100.49)
    assert not breakers.avoided(FIRST, 100.5)
    now = 100.6
    breakers.finished(report(**RESET, duration=0.0))
    assert breakers.avoided(FIRST, 103.59)
    assert not breakers.avoided(FIRST, 103.6)


# -- what is said and kept ---------------------------------------------------------------------------------------------


def test_each_move_is_logged_once() -> None:
    scene = Scene()
    with scene.logged("breaker_open"):
        for _ in range(5):
            scene.told(RESET)
    scene.now += 1.0
    with scene.logged("breaker_half_open"):
        for _ in range(5):
            scene.avoided()
    with scene.logged("breaker_open"):
        scene.told(RESET)
    scene.now += 2.0
    with scene.logged("breaker_half_open", "breaker_closed"):
        for _ in range(5):
            scene.told()


def test_what_the_lines_say() -> None:
    scene = Scene()
    with capture_logs() as lines:
        scene.told(RESET)
    who = {"endpoint": "pod-1", "address": FIRST}
    assert lines == [
        {"event": "breaker_open", "log_level": "warning", **who, "reason": "refused", "seconds": 1.0}
    ]


def test_states_of_all() -> None:
    scene = Scene()
    scene.told({"served_address": THIRD}, attempts=3)
    scene.now += 1.0
    scene.told({"served_address": THIRD}, attempts=2)
    assert {name: int(state) for name, state, _ in scene.breakers.rows()} == {
        "pod-1": 2,
        "pod-2": 1,
        "pod-3": 0,
    }
    described = [scene.breakers.describe(each) for each in (FIRST, SECOND, THIRD, "10.9.9.9:1")]
    assert described == ["open", "half-open", "closed", None]


@pytest.mark.parametrize(
    ("now", "state", "opened"),
    [
        ([endpoint(1)], "open", True),
        ([endpoint(1, models=("another",))], "open", True),
        ([endpoint(1, name="another")], "closed", False),
        ([endpoint(2)], None, False),
        ([endpoint(2, name="pod-1")], None, True),  # it moved
    ],
)
def test_an_endpoint_that_left_is_forgotten(now: list[Any], state: str | None, opened: bool) -> None:
    scene = Scene()
    scene.told(RESET)
    scene.breakers.update(Snapshot(now))
    assert scene.state() == state
    assert bool(scene.opened) == opened


def test_addresses_do_not_pile_up() -> None:
    scene = Scene()
    for number in range(4, 200):
        scene.breakers.finished(report(routing=routing_of(decision(number)), **RESET))
        assert not scene.breakers.avoided(f"10.0.0.{number}:8000", scene.now)
    scene.told({"served_address": "10.7.7.7:1"})
    assert len(scene.breakers._breakers) == 0


def test_the_settings_are_the_rules() -> None:
    assert BreakerRules(**configuration.Breaker().model_dump()) == BreakerRules()
    with pytest.raises(ValueError, match="longest_seconds must not be less"):
        configuration.Breaker(first_seconds=2, longest_seconds=1)


# -- any news at any time ----------------------------------------------------------------------------------------------

LEGAL = {
    (State.CLOSED, State.OPEN),
    (State.OPEN, State.CLOSED),
    (State.OPEN, State.HALF_OPEN),
    (State.HALF_OPEN, State.OPEN),
    (State.HALF_OPEN, State.CLOSED),
}
COUNTED = (News.ERROR, News.CUT, News.TRUNCATED, News.SILENT)
FAULTS = (*COUNTED, News.REFUSED, News.RETRIED)
RULES = BreakerRules()
LAG_SECONDS = 0.2


class AnyNews(RuleBasedStateMachine):
    """News and decisions as they come, beside a second account of what matters."""

    @initialize(jitter=st.sampled_from([0.9, 1.0, 1.1]))
    def made(self, jitter: float) -> None:
        self.now = 1000.0
        self.jitter = jitter
        self.state = State.CLOSED
        self.moves = 0
        self.opened_at = self.good_at = float("-inf")
        self.ends_at = 0.0  # of being open
        self.errors = 0  # in a row, while closed
        self.probe_until = 0.0
        self.breaker = Breaker(RULES, lambda: jitter, self.moved)

    def moved(self, state: State, news: News, seconds: float) -> None:
        assert (self.state, state) in LEGAL
        assert (state is State.OPEN) == (seconds > 0)
        assert seconds <= RULES.longest_seconds * self.jitter
        self.state = state
        self.moves += 1
        self.errors = 0
        self.probe_until = 0.0
        if state is State.OPEN:
            self.opened_at, self.ends_at = self.now, self.now + seconds

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 2.5, 6.0, 33.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def decide(self) -> None:
        if not self.breaker.avoided(self.now):
            self.breaker.chosen(self.now)
            if self.state is State.HALF_OPEN:
                self.probe_until = self.now + PROBE_SECONDS

    @rule(news=st.sampled_from(News), took=st.sampled_from([0.0, 0.0, 0.1, 3.0, 60.0]))
    def hear(self, news: News, took: float) -> None:
        before = self.breaker.look(self.now)
        began, moves = self.now - took, self.moves
        old = before is not State.CLOSED and began < self.opened_at + LAG_SECONDS
        old = old or (news in (News.RETRIED, News.SILENT) and began <= self.good_at)
        if not old and before is State.CLOSED and news in COUNTED:
            self.errors += 1
        full = self.errors == RULES.consecutive_errors
        self.breaker.hear(news, began, self.now)
        if news is News.GOOD and not old:
            self.good_at, self.errors = self.now, 0
            assert self.state is State.CLOSED
        elif news in FAULTS and not old:
            closed = before is State.CLOSED and news in COUNTED and not full
            assert self.state is (State.CLOSED if closed else State.OPEN)
        elif old or news is News.NOTHING or before is State.CLOSED:
            assert self.moves == moves + (news is News.OVERLOAD and not old)
        if self.state is State.HALF_OPEN and not old:
            self.probe_until = 0.0

    @invariant()
    def what_each_state_means(self) -> None:
        avoided = self.breaker.avoided(self.now)
        assert self.breaker.state is self.state
        if self.state is State.OPEN:
            assert avoided
            assert self.now < self.ends_at
        else:
            assert avoided == (self.state is State.HALF_OPEN and self.now < self.probe_until)


AnyNews.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestAnyNews = AnyNews.TestCase
