"""What is known of every endpoint at one moment, joined; and whose policy decides."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from envoy_extproc.endpoints import EngineState, EngineStats, Snapshot
from envoy_extproc.errors import BadPin, ModelNotFound, UnknownStrategy
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server.director import Director, RoutingRules
from tests.support.builders import MODEL, endpoint

REQUEST = SchedulingRequest(model=MODEL)
STATS = EngineStats(at=100.0, kv_cache_usage=0.5)


def director(
    rules: RoutingRules | None = None,
    *,
    in_flight: Mapping[str, int] | None = None,
    states: Mapping[str, EngineState] | None = None,
    remember: int = 100,
) -> Director:
    counts = in_flight or {}
    made = Director(
        profiles=registry.build(),
        rules=rules or RoutingRules(),
        in_flight=lambda address: counts.get(address, 0),
        states=states or {},
        rng=random.Random(1),
        remember=remember,
    )
    made.update(Snapshot([endpoint(1), endpoint(2), endpoint(3, models=("other",))]))
    return made


def test_candidates_carry_what_is_known() -> None:
    states = {
        "10.0.0.1:8000": EngineState(stats=STATS),
        "10.0.0.2:8000": EngineState(reachable=False, failures=3),
    }
    one, two, three = director(in_flight={"10.0.0.1:8000": 4}, states=states).candidates(
        [endpoint(1), endpoint(2), endpoint(3)], 101.0
    )
    assert (one.in_flight, one.stats, one.reachable) == (4, STATS, True)
    assert (two.in_flight, two.stats, two.reachable) == (0, None, False)
    assert (three.in_flight, three.stats, three.reachable) == (0, None, True)


@pytest.mark.parametrize(("now", "believed"), [(100.0, True), (102.0, True), (102.01, False), (1e6, False)])
def test_old_numbers_are_not_believed(now: float, believed: bool) -> None:
    states = {"10.0.0.1:8000": EngineState(stats=STATS)}
    (one,) = director(states=states).candidates([endpoint(1)], now)
    assert (one.stats is STATS) is believed


RULES = RoutingRules(policy="round-robin", model_policies={"other": "random"}, tries=1, allow_pinning=True)


@pytest.mark.parametrize(
    ("request_", "policy"),
    [
        (SchedulingRequest(model=MODEL), "round-robin"),
        (SchedulingRequest(model="other"), "random"),
        (SchedulingRequest(), "round-robin"),
        (SchedulingRequest(model="other", policy="power-of-two"), "power-of-two"),
    ],
)
def test_whose_policy_decides(request_: SchedulingRequest, policy: str) -> None:
    decision = director(RULES).schedule(request_, 0.0)
    assert decision.policy == policy
    assert len(decision.order) == 1


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (SchedulingRequest(model=MODEL, policy="best"), UnknownStrategy),
        (SchedulingRequest(model="none", policy="best\udcff" * 100), UnknownStrategy),
        (SchedulingRequest(model="none"), ModelNotFound),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1"), BadPin),
    ],
)
def test_refusals(request_: SchedulingRequest, error: type[Exception]) -> None:
    made = director()
    with pytest.raises(error):
        made.schedule(request_, 0.0)
    assert not made.decisions


def test_pinning_where_it_is_wanted() -> None:
    decision = director(RULES).schedule(SchedulingRequest(model=MODEL, pin="10.0.0.2:8000"), 0.0)
    assert decision.order == (endpoint(2),)


def test_the_load_of_the_moment_decides() -> None:
    decision = director(in_flight={"10.0.0.1:8000": 1}).schedule(REQUEST, 0.0)
    assert decision.chosen.endpoint == endpoint(2)


def test_the_last_decisions_are_remembered() -> None:
    made = director(remember=2)
    for now in (1.0, 2.0, 3.0):
        made.schedule(REQUEST, now)
    assert [at for at, _, _ in made.decisions] == [2.0, 3.0]


def test_policies_forget_models_that_are_gone() -> None:
    made = director()
    other = SchedulingRequest(model="other", policy="round-robin")
    both = (endpoint(3, models=("other",)), endpoint(4, models=("other",)))

    def turn() -> str:
        return made.schedule(other, 0.0).chosen.endpoint.name

    made.update(Snapshot(both))
    assert turn() == "pod-3"
    made.update(Snapshot([*both, endpoint(1)]))
    assert turn() == "pod-4"
    assert turn() == "pod-3"
    made.update(Snapshot([endpoint(1)]))
    made.update(Snapshot(both))
    assert turn() == "pod-3"


def test_a_pin_is_all_there_is_to_try() -> None:
    rules = RoutingRules(allow_pinning=True, tries=3)
    decision = director(rules).schedule(SchedulingRequest(model=MODEL, pin="10.0.0.2:8000"), 0.0)
    assert decision.order == (endpoint(2),) * 3


def test_endpoints_are_looked_up_by_address() -> None:
    made = director()
    assert made.lookup("10.0.0.1:8000") == endpoint(1)
    assert made.lookup("10.9.9.9:8000") is None
    made.update(Snapshot())
    assert made.lookup("10.0.0.1:8000") is None
