"""Fairness between users: their counters, what routing makes of them, and the bound the paper proves."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import combinations, cycle
from statistics import mean
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envoy_extproc.endpoints import Snapshot
from envoy_extproc.exchange.events import RequestBody, RequestHeaders, StreamClosed
from envoy_extproc.exchange.exchange import Exchange, ExchangeSettings
from envoy_extproc.exchange.report import Report, Routing, routing_of
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.fairness import FairnessRules, VtcScorer
from envoy_extproc.scheduling.interfaces import MissingDataError, SchedulingRequest, Standing
from envoy_extproc.server.catalogue import Catalogue
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.server.native_lane import NativeLane
from envoy_extproc.server.servicer import Call, Parts
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.memory import InFlight
from envoy_extproc.telemetry import Hooks
from tests.support.builders import MODEL, candidate, decision, endpoint, headers
from tests.support.reports import report

pytestmark = pytest.mark.unmeasured


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(**rules: Any) -> tuple[Fairness, Clock]:
    clock = Clock()
    return Fairness(FairnessRules(**rules), name="here", clock=clock), clock


def over(ticket: str, prompt: int, completion: int) -> Report:
    """The report of a request that used so many tokens."""
    routing = routing_of(msgspec.structs.replace(decision(1), ticket=ticket))
    return report(routing=routing, usage=Usage(prompt_tokens=prompt, completion_tokens=completion))


def own(fairness: Fairness, user: str, clock: Clock) -> float:
    return fairness.standing(user, clock.now).own


# -- counters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "most", "charged"),
    [(100, None, 100 + 2 * 150), (100, 20, 100 + 2 * 20), (100, 1000, 100 + 2 * 150), (0, None, 0)],
)
def test_a_request_is_charged_with_what_is_expected(prompt: int, most: int | None, charged: float) -> None:
    fairness, clock = made()
    fairness.charge("ann", prompt, most, clock.now)
    assert own(fairness, "ann", clock) == charged


def test_what_it_used_takes_the_place_of_the_estimate() -> None:
    fairness, clock = made(input_weight=1, output_weight=3)
    one, two = (fairness.charge("ann", 100, None, clock.now) for _ in range(2))
    fairness.finished(over(one, 10, 20))
    assert own(fairness, "ann", clock) == 10 + 3 * 20 + 100 + 3 * 150
    fairness.finished(over(two, 0, 0))
    fairness.finished(over(two, 0, 9))  # told twice, counted once
    assert own(fairness, "ann", clock) == 70


@pytest.mark.parametrize("ticket", [None, "there-1", "here-2", ""])
def test_other_reports_change_nothing(ticket: str | None) -> None:
    fairness, clock = made()
    fairness.charge("ann", 100, None, clock.now)
    before = own(fairness, "ann", clock)
    fairness.finished(over(ticket or "", 9, 9))
    fairness.finished(report(routing=None))
    fairness.finished(report())
    assert own(fairness, "ann", clock) == before


def test_service_is_forgotten_after_the_window() -> None:
    fairness, clock = made(window_seconds=300)
    fairness.finished(over(fairness.charge("ann", 1, None, clock.now), 100, 0))
    clock.now += 150
    fairness.finished(over(fairness.charge("ann", 1, None, clock.now), 10, 0))
    for seconds, left in ((139, 110), (11, 10), (139, 10), (11, 0)):
        clock.now += seconds
        assert own(fairness, "ann", clock) == left
    assert fairness._totals == {}


def test_an_estimate_that_has_left_the_window_is_not_taken_back_twice() -> None:
    fairness, clock = made(window_seconds=30)
    ticket = fairness.charge("ann", 100, None, clock.now)
    clock.now += 60
    assert own(fairness, "ann", clock) == 0
    fairness.finished(over(ticket, 5, 0))
    assert own(fairness, "ann", clock) == 5


def test_a_request_that_is_never_told_of_does_not_count_as_under_way_for_ever() -> None:
    fairness, clock = made()
    fairness.charge("ann", 100, None, clock.now)
    clock.now += 3599
    fairness.standing("bob", clock.now)
    assert fairness._under_way == {"ann": 1}
    clock.now += 40
    fairness.standing("bob", clock.now)
    assert (fairness._under_way, fairness._active, fairness._charges) == ({}, {}, {})
    clock.now += 400
    fairness.standing("bob", clock.now)
    assert fairness._totals == {}


def test_who_left_is_not_under_way_though_the_report_goes_to_another_server() -> None:
    fairness, clock = made(window_seconds=300)
    tickets = [fairness.charge("ann", 100, 0, clock.now) for _ in range(2)]
    fairness.left(tickets[0])
    fairness.left(tickets[0])  # told twice
    fairness.left("there-1")
    assert fairness._under_way == {"ann": 1}
    fairness.left(tickets[1])
    assert (fairness._under_way, fairness._active) == ({}, {})
    assert own(fairness, "ann", clock) == 200  # the estimates stand
    clock.now += 330
    assert fairness.standing("bob", clock.now) == Standing(own=0, least=0, most=0, below=0)
    assert fairness._totals == {}
    clock.now += 3600
    fairness.standing("bob", clock.now)
    assert fairness._charges == {}


@pytest.mark.parametrize("first", ["left", "finished"])
def test_who_left_is_charged_with_what_the_report_tells(first: str) -> None:
    fairness, clock = made()
    ticket = fairness.charge("ann", 100, 0, clock.now)
    for step in sorted(["left", "finished"], key=lambda step: step != first):
        if step == "left":
            fairness.left(ticket)
        else:
            fairness.finished(over(ticket, 7, 0))
    assert own(fairness, "ann", clock) == 7
    assert (fairness._under_way, fairness._active, fairness._charges) == ({}, {}, {})


def test_a_late_report_does_not_bring_back_whom_a_newcomer_took_the_place_of() -> None:
    fairness, clock = made(max_users=1)
    ticket = fairness.charge("ann", 100, 0, clock.now)
    fairness.left(ticket)
    fairness.charge("bob", 1, 0, clock.now)
    fairness.finished(over(ticket, 7, 0))
    assert fairness._totals == {"bob": 1}


def test_a_late_report_takes_no_more_back_than_there_is() -> None:
    fairness, clock = made(max_users=1, window_seconds=300)
    late = fairness.charge("ann", 1000, 0, clock.now)
    fairness.left(late)
    fairness.left(fairness.charge("bob", 1, 0, clock.now))
    fairness.charge("ann", 100, 0, clock.now)  # was forgotten in between
    fairness.finished(over(late, 50, 0))
    clock.now += 290
    fairness.charge("ann", 10, 0, clock.now)
    clock.now += 20
    assert own(fairness, "ann", clock) == 10


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"usage_source": "none", "usage": Usage()}, 100),
        ({"usage_source": "none", "usage": Usage(), "outcome": "aborted", "status": None}, 100),
        ({"usage_source": "none", "usage": Usage(), "outcome": "error", "status": 500}, 0),
    ],
)
def test_where_answers_are_not_read_estimates_stand(changes: dict[str, Any], left: float) -> None:
    clock = Clock()
    fairness = Fairness(FairnessRules(), clock=clock, accounting=False)
    ticket = fairness.charge("ann", 100, 0, clock.now)
    fairness.finished(msgspec.structs.replace(over(ticket, 0, 0), **changes))
    assert own(fairness, "ann", clock) == left
    fairness, _ = made()
    ticket = fairness.charge("ann", 100, 0, clock.now)
    fairness.finished(msgspec.structs.replace(over(ticket, 0, 0), **changes))
    assert own(fairness, "ann", clock) == 0  # read, and nothing was generated


def test_who_comes_back_is_lifted_to_the_least_of_those_under_way() -> None:
    fairness, clock = made()
    fairness.charge("cid", 100, 0, clock.now)
    for user, tokens in (("ann", 5000), ("bob", 3000)):
        fairness.finished(over(fairness.charge(user, 0, 0, clock.now), tokens, 0))
        fairness.charge(user, 0, 0, clock.now)
    assert own(fairness, "bob", clock) == 3000 + 100  # with which bob began
    fairness.finished(over("here-1", 10, 0))
    assert fairness.standing("cid", clock.now) == Standing(
        own=10, least=10, most=5100, below=0
    )  # was here just now
    assert fairness.standing("dan", clock.now) == Standing(own=3100, least=3100, most=5100, below=0.25)
    fairness.charge("dan", 0, 0, clock.now)
    assert fairness.standing("dan", clock.now) == Standing(own=3100, least=3100, most=5100, below=0.25)
    clock.now += 290
    fairness.charge("bob", 20, 0, clock.now)
    fairness.charge("ann", 30, 0, clock.now)
    fairness.finished(over("here-6", 0, 0))  # dan's only one
    clock.now += 10
    assert fairness.standing("cid", clock.now) == Standing(own=20, least=20, most=30, below=0.25)


def test_where_nobody_is_there_is_nobody_to_be_lifted_to() -> None:
    fairness, clock = made()
    fairness.finished(over(fairness.charge("ann", 0, 0, clock.now), 5000, 0))
    assert fairness.standing("bob", clock.now) == Standing(own=0, least=0, most=0, below=0)


def test_a_user_stands_above_those_who_had_less() -> None:
    fairness, clock = made(max_users=9)
    for user, tokens in (("ann", 100), ("bob", 100), ("cid", 300), ("dan", 9_000)):
        fairness.finished(over(fairness.charge(user, 0, 0, clock.now), tokens, 0))
    for user in ("ann", "bob", "cid", "dan"):
        fairness.charge(user, 0, 0, clock.now)
    below = [fairness.standing(user, clock.now).below for user in ("ann", "bob", "cid", "dan")]
    assert below == pytest.approx([1 / 6, 1 / 6, 2 / 3, 1])  # of the other three; who is alike counts half


def test_a_lift_is_forgotten_with_what_it_was_measured_by() -> None:
    fairness, clock = made(window_seconds=300)
    for _ in range(10):
        fairness.charge("ann", 100, 0, clock.now)
        clock.now += 30
    fairness.charge("bob", 0, 0, clock.now)
    for _ in range(9):
        standing = fairness.standing("bob", clock.now)
        assert standing.least == standing.own == standing.most > 0
        clock.now += 30
    assert own(fairness, "bob", clock) == own(fairness, "ann", clock) == 0


def test_a_lift_is_not_taken_back_with_an_estimate() -> None:
    fairness, clock = made()
    fairness.charge("ann", 1000, 0, clock.now)
    fairness.finished(over(fairness.charge("bob", 500, 0, clock.now), 7, 0))
    assert fairness._totals["bob"] == 1007


def test_memory_is_bounded() -> None:
    fairness, clock = made(max_users=3)
    for number in range(50):
        fairness.finished(over(fairness.charge(f"user-{number}", 9, 9, clock.now), 9, 9))
    assert len(fairness._totals) == 3
    assert all(len(slot) <= 3 for _, slot in fairness._slots)
    tickets = [fairness.charge(f"busy-{number}", 9, 9, clock.now) for number in range(50)]
    assert len(fairness._totals) == 4  # 47 share one
    assert fairness._under_way == {"busy-0": 1, "busy-1": 1, "busy-2": 1, "": 47}
    for ticket in tickets:
        fairness.finished(over(ticket, 1, 1))
    assert (fairness._under_way, fairness._active, fairness._charges) == ({}, {}, {})


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from(["charge", "leave", "finish", "look", "wait"])),
        max_size=60,
    ),
    st.integers(0, 99),
)
def test_counters_never_lie(steps: list[tuple[str, str]], seed: int) -> None:
    """Whatever happens: no counter is negative, the least and most are of those there are, and all is forgotten in the end."""
    fairness, clock = made(window_seconds=60, max_users=3)
    rng, open_, gone = random.Random(seed), list[str](), set[str]()
    for user, step in steps:
        if step == "charge":
            open_.append(fairness.charge(user, rng.randrange(1000), rng.choice([None, 5]), clock.now))
        elif step == "leave" and open_:
            ticket = rng.choice(open_)
            gone.add(ticket)
            fairness.left(ticket)
        elif step == "finish" and open_:
            ticket = open_.pop(rng.randrange(len(open_)))
            gone.discard(ticket)
            fairness.finished(over(ticket, rng.randrange(999), rng.randrange(999)))
        elif step == "wait":
            clock.now += rng.choice([0.5, 3.0, 70.0])
        standing = fairness.standing(user, clock.now)
        assert 0 <= standing.least <= standing.own <= standing.most
        assert 0 <= standing.below <= 1
        assert standing.below > 0 or standing.own == standing.least or not fairness._active
        assert fairness._active.keys() == fairness._under_way.keys()
        for name, total in fairness._totals.items():
            assert total == pytest.approx(sum(slot.get(name, 0.0) for _, slot in fairness._slots))
        assert all(fairness._totals[name] == total for name, total in fairness._active.items())
        assert len(fairness._charges) == len(open_)
        assert sum(fairness._under_way.values()) == len(set(open_) - gone)
        assert len(fairness._totals) <= 4
        assert all(tokens >= -1e-6 for _, slot in fairness._slots for tokens in slot.values())
    for ticket in open_:
        fairness.finished(over(ticket, 1, 1))
    clock.now += 100
    fairness.standing("x", clock.now)
    assert fairness._totals == {}


# -- the bound -----------------------------------------------------------------------------------------------------

MOST_IN, MOST_OUT, STEPS, WINDOW = 400, 60, 900, 300
"""Tokens of a prompt and of an answer; steps of the engine, each 10 ms, in a run and in a short window of the counters."""


class Work(msgspec.Struct):
    """A request that runs: so many tokens of answer are left."""

    user: str
    prompt: int
    output: int
    ticket: str
    left: int


class Backlog:
    """An engine with so many places, and users who always have requests waiting from the step on at which they come.

    What they ask for is drawn from extremes and changes in the middle. `choose` says whose request is next.
    """

    def __init__(self, seed: int, *, window: float, limited: bool) -> None:
        self.rng = random.Random(seed)
        self.places = self.rng.choice([1, 2, 4, 8, 16])
        self.limited = limited
        self.fairness, self.clock = made(window_seconds=window)
        self.comes = {user: self.rng.choice([0, 200, 400]) for user in "abc"[: self.rng.choice([2, 3])]}
        self.comes["a"] = 0
        self.kinds = {
            user: [(self.draw(MOST_IN), self.draw(MOST_OUT)) for _ in range(3)] for user in self.comes
        }
        self.served = Counter[str]()
        self.running: list[Work] = []

    @property
    def bound(self) -> float:
        """2 U of the paper's theorem 4.4: a request that runs counts with what it was expected to have, if that is more."""
        expected = MOST_OUT if self.limited else max(MOST_OUT, 1.5 * MOST_IN)
        return 2 * (MOST_IN + 2 * expected * self.places)

    def draw(self, most: int) -> list[int]:
        return self.rng.choice([[1], [most], [1, most], [most // 2], list(range(1, most + 1))])

    def step(self, number: int, choose: Choice) -> list[str]:
        """Fills the places, and gives every request there one token; returns the users who are there."""
        here = [user for user, comes in self.comes.items() if comes <= number]
        for user in here:
            if self.comes[user] == number:
                self.fairness.charge(user, 0, 0, self.clock.now)  # one that waits all the time
        while len(self.running) < self.places:
            self.begin(choose(self.fairness, self.clock, here), number * 3 // STEPS)
        for work in self.running:
            work.left -= 1
            self.served[work.user] += 2
            if not work.left:
                self.fairness.finished(over(work.ticket, work.prompt, work.output))
        self.running = [work for work in self.running if work.left]
        self.clock.now += 0.01
        return here

    def begin(self, user: str, part: int) -> None:
        prompt, output = (self.rng.choice(each) for each in self.kinds[user][part])
        ticket = self.fairness.charge(user, prompt, output if self.limited else None, self.clock.now)
        self.running.append(Work(user, prompt, output, ticket, output))
        self.served[user] += prompt


Choice = Callable[[Fairness, Clock, list[str]], str]


def widest_gap(backlog: Backlog, choose: Choice, within: int = STEPS) -> float:
    """How much more than another a user was served while both were there, in any so many steps."""
    gaps: dict[tuple[str, str], deque[float]] = {}
    widest = 0.0
    for number in range(STEPS):
        for one, other in combinations(backlog.step(number, choose), 2):
            recent = gaps.setdefault((one, other), deque(maxlen=within))
            recent.append(backlog.served[one] - backlog.served[other])
            widest = max(widest, max(recent) - min(recent))
    return widest


def least_served(fairness: Fairness, clock: Clock, here: list[str]) -> str:
    return min(here, key=lambda user: own(fairness, user, clock))


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_served_by_the_counters_users_stay_within_the_bound(seed: int, limited: bool) -> None:
    backlog = Backlog(seed, window=86_400, limited=limited)
    assert widest_gap(backlog, least_served) <= backlog.bound


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_forgotten_is_forgotten_of_all_alike(seed: int, limited: bool) -> None:
    """Each window the gap can grow again, but nobody who comes waits until the others' past is forgotten."""
    backlog = Backlog(seed, window=WINDOW / 100, limited=limited)
    assert widest_gap(backlog, least_served, WINDOW) <= 3 * backlog.bound


def test_served_in_turn_they_do_not() -> None:
    in_turn = cycle("ab")
    backlog = Backlog(0, window=86_400, limited=True)
    backlog.comes = {"a": 0, "b": 0}
    backlog.kinds = {"a": [([MOST_IN], [1])] * 3, "b": [([1], [1])] * 3}
    assert widest_gap(backlog, lambda _, __, ___: next(in_turn)) > 10 * backlog.bound


# -- routing -------------------------------------------------------------------------------------------------------


def scored(standing: Standing | None, *in_flight: int, **rules: Any) -> list[float]:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight, 1)]
    request = SchedulingRequest(model=MODEL, user="ann", standing=standing)
    return list(VtcScorer(FairnessRules(**rules)).score(request, candidates))


def stands(below: float, most: float = 8000) -> Standing:
    return Standing(own=most * below, least=0, most=most, below=below)


@pytest.mark.parametrize(
    ("standing", "in_flight", "scores"),
    [
        (stands(0), (0, 0, 0), [1.0, 0.75, 0.5]),
        (stands(1), (0, 0, 0), [0.5, 0.75, 1.0]),
        (stands(0.5), (0, 0, 0), [0.75, 1.0, 0.75]),
        (stands(0, 4000), (0, 0, 0), [1.0, 0.875, 0.75]),  # half apart
        (stands(1, 16000), (0, 0, 0), [0.5, 0.75, 1.0]),
        (stands(0.5, 0), (4, 2, 0), [0.5, 0.75, 1.0]),  # alike, or alone: load alone
        (stands(0), (4, 2, 0), [0.5, 0.5, 0.5]),
        (stands(0), (9,), [0.5]),
    ],
)
def test_who_is_fit_for_whom(standing: Standing, in_flight: tuple[int, ...], scores: list[float]) -> None:
    assert scored(standing, *in_flight) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("rules", "scores"),
    [({"fairness_weight": 0}, [0.0, 1.0]), ({"fairness_weight": 3}, [0.75, 0.25]), ({}, [0.5, 0.5])],
)
def test_weights(rules: dict[str, float], scores: list[float]) -> None:
    assert scored(stands(0), 5, 0, **rules) == pytest.approx(scores)


def test_the_order_of_endpoints_is_that_of_addresses() -> None:
    candidates = [candidate(number) for number in (3, 1, 2)]
    request = SchedulingRequest(standing=stands(0))
    assert VtcScorer().score(request, candidates) == [0.5, 1.0, 0.75]


def test_without_a_user_it_says_so() -> None:
    with pytest.raises(MissingDataError) as missing:
        scored(None, 1)
    assert missing.value.reason == "no-user"


def director(
    policy: str, loads: Callable[[str], int], count: int = 2, **rules: Any
) -> tuple[Director, Fairness, Clock]:
    fairness, clock = made(**rules)
    director = Director(
        profiles=registry.build(registry.Tuning(fairness=FairnessRules(**rules))),
        rules=RoutingRules(policy=policy),
        in_flight=loads,
        states={},
        rng=random.Random(1),
        fairness=fairness,
    )
    director.update(Snapshot([endpoint(number) for number in range(1, count + 1)]))
    return director, fairness, clock


@pytest.mark.parametrize(
    ("policy", "user", "charged"),
    [
        ("vtc-basic", "ann", True),
        ("vtc-basic:2,least-request:1", "ann", True),
        ("vtc-basic", None, False),
        ("vtc-basic,least-request", None, False),
        ("least-request", "ann", False),
    ],
)
def test_what_is_charged(policy: str, user: str | None, charged: bool) -> None:
    by, fairness, clock = director(policy, lambda _: 0)
    request = SchedulingRequest(model=MODEL, user=user, prompt_tokens=100)
    by.explain(request, clock.now)
    assert fairness._charges == {}
    decided = by.schedule(request, clock.now)
    assert (decided.ticket is not None) is charged
    assert len(fairness._charges) == charged
    travelled = msgspec.json.decode(msgspec.json.encode(routing_of(decided)), type=Routing)
    assert travelled.ticket == decided.ticket
    if decided.ticket is not None:
        fairness.finished(over(decided.ticket, 7, 0))
        assert own(fairness, "ann", clock) == 7


@pytest.mark.parametrize(("native", "hold"), [(False, True), (True, True), (True, False)])
def test_whose_stream_ends_is_not_under_way_any_more(native: bool, hold: bool) -> None:
    """A stream that is not held ends with the decision: there the report, or time, tells that it is over."""
    by, fairness, clock = director("vtc-basic", lambda _: 0)
    parts = Parts(
        settings=ExchangeSettings(trust_user=True),
        director=by,
        in_flight=InFlight(),
        hook=Hooks(fairness),
        lane=NativeLane("auto"),
        catalogue=Catalogue({}),
        hold=hold,
        left=fairness.left,
    )
    call = Call(Exchange(parts.settings, by.lookup, lambda: "id", native=native), parts)
    sent = headers(method="POST", path="/v1/chat/completions", user="ann")
    call.receive(RequestHeaders(clock.now, sent, False, None, int(native)))
    call.receive(RequestBody(clock.now, b'{"model":"llama-3-8b"}', True))
    assert fairness._under_way == {"ann": 1}
    call.receive(StreamClosed(clock.now))
    assert fairness._under_way == ({} if hold else {"ann": 1})
    assert len(fairness._charges) == native


def test_without_a_user_least_request_decides() -> None:
    by, _, clock = director("vtc-basic", {"10.0.0.1:8000": 3, "10.0.0.2:8000": 1}.__getitem__)
    decided = by.schedule(SchedulingRequest(model=MODEL), clock.now)
    assert (decided.decided_by, decided.fallback_reason) == ("least-request", "no-user")
    assert decided.chosen.endpoint.name == "pod-2"


NO_USERS: Mapping[str, tuple[int, int]] = {}


def waits(policy: str, pods: int = 4, users: Mapping[str, tuple[int, int]] = NO_USERS) -> dict[str, float]:
    """Mean steps to an answer, by user, on pods that take turns; of each user its requests at a time, and their tokens."""
    queues: dict[str, deque[tuple[str, int, str | None]]] = {
        f"10.0.0.{number}:8000": deque() for number in range(1, pods + 1)
    }
    by, fairness, clock = director(policy, lambda address: len(queues[address]), pods)
    took: dict[str, list[int]] = {user: [] for user in users}
    under_way = Counter[str]()
    for step in range(1500):
        for user, (most, tokens) in users.items():
            while under_way[user] < most:
                request = SchedulingRequest(model=MODEL, user=user, prompt_tokens=tokens)
                decided = by.schedule(request, clock.now)
                queues[decided.chosen.endpoint.address].append((user, step, decided.ticket))
                under_way[user] += 1
        for queue in queues.values():
            if queue:
                user, begun, ticket = queue.popleft()
                under_way[user] -= 1
                took[user].append(step - begun + 1)
                if ticket is not None:
                    tokens = users[user][1]
                    fairness.finished(over(ticket, tokens, tokens))
        clock.now += 0.1
    return {user: mean(steps[len(steps) // 2 :]) for user, steps in took.items()}


def test_a_light_user_does_not_wait_behind_a_heavy_one() -> None:
    users = {"heavy": (40, 300), "light": (1, 300)}
    alike, fair = waits("least-request", users=users), waits("vtc-basic", users=users)
    assert alike["light"] > 10
    assert fair["light"] < alike["light"] / 2
    assert fair["heavy"] < alike["heavy"] * 1.1


@pytest.mark.parametrize("at_a_time", [1, 8])
def test_who_has_most_of_all_gains_nothing_by_it(at_a_time: int) -> None:
    """One of many: were all others at the first endpoints, far below, the last ones would be idle but for that one."""
    light = {f"light-{number}": (4, 300) for number in range(10)}
    users = {**light, "heavy": (at_a_time, 5000)}
    alike, fair = waits("least-request", 8, users), waits("vtc-basic", 8, users)
    assert fair["heavy"] > 0.8 * alike["heavy"]
    assert mean([fair[user] for user in light]) < 1.05 * mean([alike[user] for user in light])
