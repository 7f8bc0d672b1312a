"""Candidates that are kept between decisions are those that would be made anew; and what is known of all of them at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from envoy_extproc.endpoints import EngineState, EngineStats, Snapshot
from envoy_extproc.orca import LoadReport
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.filters import ReachableFilter
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest, Scores
from envoy_extproc.scheduling.profile import totals
from envoy_extproc.scheduling.roster import Roster, column, in_flight, names_of_others, without
from envoy_extproc.server.candidates import Candidates, Sources
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.state.breakers import BreakerRules, Breakers
from envoy_extproc.state.load_reports import LoadReports
from envoy_extproc.state.memory import InFlight, Lease
from tests.support.builders import MODEL, candidate, endpoint
from tests.support.reports import report

ENDPOINTS = tuple(endpoint(number) for number in range(1, 4))
PLACES = st.integers(0, len(ENDPOINTS) - 1)


class Keeping(RuleBasedStateMachine):
    """Everything that candidates are joined from moves; whatever is known of it beforehand, they are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.in_flight = InFlight()
        self.leases: list[Lease] = []
        self.states: dict[str, EngineState] = {}
        self.reports = LoadReports()
        self.breakers = Breakers(
            BreakerRules(consecutive_errors=1, first_seconds=2.0), clock=lambda: self.now
        )
        for each in (self.reports, self.breakers):
            each.update(Snapshot(ENDPOINTS))
        count, avoided, fresher = self.in_flight.count, self.breakers.avoided, self.reports.fresher
        plain = Sources(in_flight=count, states=self.states, max_age=1.0, avoided=avoided, fresher=fresher)
        knowing = Sources(
            in_flight=count,
            counts=self.in_flight.counts,
            states=self.states,
            max_age=1.0,
            avoided=avoided,
            doubted=self.breakers.doubted,
            fresher=fresher,
            reports=self.reports.latest,
        )
        self.plain = Candidates(plain)
        self.kept = [Candidates(plain), Candidates(knowing)]

    @rule(place=PLACES)
    def goes(self, place: int) -> None:
        self.leases.append(self.in_flight.acquire(ENDPOINTS[place], MODEL))

    @rule(place=PLACES)
    def ends(self, place: int) -> None:
        if self.leases:
            self.leases.pop(place % len(self.leases)).release()

    @rule(place=PLACES, reachable=st.booleans(), interval=st.sampled_from([0.2, 1.0]), told=st.booleans())
    def is_scraped(self, place: int, reachable: bool, interval: float, told: bool) -> None:
        stats = EngineStats(at=self.now, running=1.0) if told else None
        self.states[ENDPOINTS[place].address] = EngineState(
            stats=stats, reachable=reachable, interval=interval
        )

    @rule(place=PLACES)
    def says(self, place: int) -> None:
        self.reports.note(
            ENDPOINTS[place].address, LoadReport(named_metrics={"kv_cache_usage_perc": 0.5}), self.now
        )

    @rule(place=PLACES, good=st.booleans())
    def answers(self, place: int, good: bool) -> None:
        each = ENDPOINTS[place]
        changes = {} if good else {"outcome": "error", "error_type": "model_server", "status": 500}
        self.breakers.finished(report(served_by=each, served_address=each.address, duration=0.0, **changes))

    @rule(seconds=st.sampled_from([0.0, 0.3, 0.7, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_snapshot_comes(self) -> None:
        self.reports.update(Snapshot(ENDPOINTS[:2]))
        self.reports.update(Snapshot(ENDPOINTS))
        for each in self.kept:
            each.forget()

    @invariant()
    def they_are_the_same(self) -> None:
        expected = self.plain.of(ENDPOINTS, self.now)
        for each in self.kept:
            roster = each.roster(ENDPOINTS, self.now)
            assert list(roster) == expected
            assert list(roster.in_flight) == [one.in_flight for one in expected]
            assert roster.all_reachable == all(one.reachable for one in expected)
            assert [roster.places[one.endpoint.address] for one in expected] == list(roster.kept)


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_candidate_of_which_nothing_changed_is_the_same_object() -> None:
    busy = {ENDPOINTS[0].address: 1}
    made = Candidates(Sources(in_flight=lambda address: busy.get(address, 0), states={}, max_age=1.0))
    first = made.roster(ENDPOINTS, 0.0)
    assert made.roster(ENDPOINTS, 1.0) is first
    busy[ENDPOINTS[2].address] = 5
    second = made.roster(ENDPOINTS, 2.0)
    assert [one is other for one, other in zip(first, second, strict=True)] == [
        True,
        True,
        False,
    ]
    assert first[2].in_flight == 0  # who holds the old one sees what was


def test_what_was_scraped_gets_old_before_what_was_said_in_an_answer() -> None:
    one, reports = ENDPOINTS[0], LoadReports()
    reports.update(Snapshot([one]))
    made = Candidates(
        Sources(
            in_flight=lambda _: 0,
            states={one.address: EngineState(stats=EngineStats(at=0.0, running=1.0))},
            max_age=1.0,
            fresher=reports.fresher,
            reports=reports.latest,
        )
    )
    reports.note(one.address, LoadReport(named_metrics={"kv_cache_usage_perc": 0.5}), 0.5)
    whole = (one,)
    known = [made.roster(whole, now)[0].stats for now in (0.9, 1.1, 1.6)]
    assert known == [
        EngineStats(at=0.5, running=1.0, kv_cache_usage=0.5),
        EngineStats(at=0.5, kv_cache_usage=0.5),
        None,
    ]


# -- what is known of all of them ------------------------------------------------------------------------------------


def roster(rows: Sequence[tuple[int, bool]]) -> Roster:
    """Of (in flight, reachable) rows."""
    candidates = [candidate(number, count, reachable=up) for number, (count, up) in enumerate(rows)]
    return Roster.of(
        candidates,
        in_flight=[count for count, _ in rows],
        places={each.endpoint.address: place for place, each in enumerate(candidates)},
        all_reachable=all(up for _, up in rows),
    )


ROWS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12)


@given(ROWS, st.data())
def test_a_roster_answers_as_a_list_does(rows: list[tuple[int, bool]], data: st.DataObject) -> None:
    known: Roster | Sequence[Candidate] = roster(rows)
    plain: Sequence[Candidate] = list(known)
    values = {endpoint(number).address: number / 8 for number in data.draw(st.sets(st.integers(0, 15)))}
    for _ in range(3):
        assert list(known) == plain
        assert list(in_flight(known)) == list(in_flight(plain))
        assert list(column(known, values)) == list(column(plain, values))
        assert list(ReachableFilter().filter(SchedulingRequest(), known)) == list(
            ReachableFilter().filter(SchedulingRequest(), plain)
        )
        gone = data.draw(st.lists(st.integers(0, len(plain) - 1), unique=True, max_size=len(plain) - 1))
        left, others = without(known, sorted(gone)), without(plain, sorted(gone))
        assert names_of_others(known, left) == names_of_others(plain, others)
        assert isinstance(left, Roster)
        known, plain = left, others


@given(ROWS, st.data())
def test_a_roster_of_some_addresses(rows: list[tuple[int, bool]], data: st.DataObject) -> None:
    whole = roster(rows)
    numbers = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    some = whole.only(endpoint(number).address for number in numbers)
    assert [each.endpoint for each in some] == [endpoint(number) for number in sorted(numbers)]
    assert list(some.in_flight) == [rows[number][0] for number in sorted(numbers)]


@pytest.mark.parametrize("subset", [1, 2, 5])
@pytest.mark.parametrize("policy", ["least-request", "prefix-cache", "prefix-cache,least-request"])
def test_a_gateway_may_allow_some(policy: str, subset: int) -> None:
    loads = {endpoint(number).address: number for number in range(1, 9)}
    made = Director(
        profiles=registry.build(),
        rules=RoutingRules(policy=policy),
        in_flight=lambda address: loads.get(address, 0),
        states={},
        rng=random.Random(1),
    )
    made.update(Snapshot([endpoint(number) for number in range(1, 9)]))
    allowed = tuple(endpoint(number).address for number in range(8, 8 - subset, -1))
    decision = made.schedule(SchedulingRequest(model=MODEL, subset=allowed), 0.0)
    assert {each.endpoint.address for each in decision.candidates} == set(allowed)
    assert decision.chosen.in_flight == 9 - subset


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_a_total_is_the_weighted_mean(columns: list[list[float]], weights: list[int]) -> None:
    scores = [
        Scores("s", float(weight), tuple(values)) for values, weight in zip(columns, weights, strict=False)
    ]
    whole = sum(each.weight for each in scores)
    expected = [sum(each.weight * each.values[place] for each in scores) / whole for place in range(3)]
    assert totals(scores, 3) == pytest.approx(expected)
