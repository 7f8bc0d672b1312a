"""What is known of every endpoint at one moment, joined; and whose policy decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from envoy_extproc.endpoints import EngineState, EngineStats, ServedModel, Snapshot
from envoy_extproc.errors import BadPin, BadSelector, ModelNotFound, NoReadyEndpoint, UnknownStrategy
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.explain import Asked
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
    chosen: Callable[[str], None] = lambda _: None,
    fresher: Callable[[str, EngineStats | None], EngineStats | None] = lambda _, scraped: scraped,
) -> Director:
    counts = in_flight or {}
    made = Director(
        profiles=registry.build(),
        rules=rules or RoutingRules(),
        in_flight=lambda address: counts.get(address, 0),
        states={} if states is None else states,
        rng=random.Random(1),
        chosen=chosen,
        fresher=fresher,
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


@pytest.mark.parametrize(
    ("interval", "age", "believed"),
    [(0.2, 2.0, True), (0.2, 2.01, False), (1.0, 2.5, True), (1.0, 2.51, False), (60.0, 150.0, True)],
)
def test_numbers_are_believed_for_longer_where_they_come_more_seldom(
    interval: float, age: float, believed: bool
) -> None:
    states = {"10.0.0.1:8000": EngineState(stats=STATS, interval=interval)}
    (one,) = director(states=states).candidates([endpoint(1)], 100.0 + age)
    assert (one.stats is STATS) is believed


@pytest.mark.parametrize(("now", "scrape_known"), [(102.0, True), (102.5, False)])
def test_what_an_engine_said_in_an_answer_counts(now: float, scrape_known: bool) -> None:
    """It is asked for with the scrape as far as that is believed, and is believed no longer itself."""
    asked: list[EngineStats | None] = []

    def fresher(_: str, scraped: EngineStats | None) -> EngineStats:
        asked.append(scraped)
        return EngineStats(at=101.0, kv_cache_usage=0.75)

    made = director(states={"10.0.0.1:8000": EngineState(stats=STATS)}, fresher=fresher)
    (one,) = made.candidates([endpoint(1)], now)
    assert one.stats == EngineStats(at=101.0, kv_cache_usage=0.75)
    (one,) = made.candidates([endpoint(1)], 103.5)
    assert one.stats is None
    assert asked == [STATS if scrape_known else None, None]


def test_old_numbers_lead_to_the_fallback() -> None:
    states = {"10.0.0.1:8000": EngineState(stats=STATS, interval=1.0)}
    made = director(RoutingRules(policy="least-kv-cache"), states=states)
    assert made.schedule(REQUEST, 102.5).fallback_reason is None
    old = made.schedule(REQUEST, 102.6)
    assert (old.decided_by, old.fallback_reason) == ("least-request", "no-stats")


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


MIX = "least-kv-cache:2,least-request:1"


@pytest.mark.parametrize(
    ("rules", "asked", "policy", "source", "overruled"),
    [
        ({}, None, "least-request", "routing", None),
        ({"policy": "random"}, None, "random", "routing", None),
        ({}, "random", "random", "header", None),
        ({"model_policies": {MODEL: "random"}}, None, "random", "model", None),
        ({"model_policies": {MODEL: "random"}}, "round-robin", "round-robin", "header", None),
        (
            {"model_policies": {MODEL: "random"}, "locked": {MODEL}},
            "round-robin",
            "random",
            "locked",
            "round-robin",
        ),
        ({"model_policies": {MODEL: "random"}, "locked": {MODEL}}, "no-such", "random", "locked", "no-such"),
        (
            {"model_policies": {"other": "random"}, "locked": {"other"}},
            None,
            "least-request",
            "routing",
            None,
        ),
        ({"allow_strategy_header": False}, "random", "least-request", "routing", "random"),
        (
            {"allow_strategy_header": False, "model_policies": {MODEL: "random"}},
            "no-such",
            "random",
            "model",
            "no-such",
        ),
        ({"policy": MIX}, None, MIX, "routing", None),
        ({}, MIX, MIX, "header", None),
        ({"model_policies": {MODEL: MIX}}, None, MIX, "model", None),
    ],
)
def test_whose_word_on_the_policy_counts(
    rules: dict[str, Any], asked: str | None, policy: str, source: str, overruled: str | None
) -> None:
    made = director(RoutingRules(**rules))
    request = SchedulingRequest(model=MODEL, policy=asked)
    assert made.asked(request) == Asked(policy, source, overruled)  # type: ignore[arg-type]  # of a table
    assert made.schedule(request, 0.0).policy == policy
    assert made.explain(request, 0.0).source == source


@pytest.mark.parametrize(
    ("rules", "asked", "label"),
    [
        ({}, MIX, "mix"),
        ({}, " least-kv-cache , least-request ", "mix"),
        ({}, "random", "random"),
        ({}, "least-kv-cache:0,least-request", "least-request"),
        ({"policy": MIX}, None, MIX),
        ({"policy": MIX, "allow_strategy_header": False}, "least-kv-cache:9,least-request", MIX),
        ({"policy": MIX}, MIX, MIX),
    ],
)
def test_what_clients_mix_is_one_label(rules: dict[str, Any], asked: str | None, label: str) -> None:
    decision = director(RoutingRules(**rules)).schedule(SchedulingRequest(model=MODEL, policy=asked), 0.0)
    assert decision.label == label


def test_an_unknown_strategy_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownStrategy) as refused:
        director().schedule(SchedulingRequest(model=MODEL, policy="best"), 0.0)
    assert all(name in refused.value.message for name in registry.POLICIES)


def test_the_scraper_is_told_who_is_chosen() -> None:
    addresses: list[str] = []
    made = director(in_flight={"10.0.0.1:8000": 1}, chosen=addresses.append)
    made.schedule(REQUEST, 0.0)
    made.explain(REQUEST, 0.0)
    assert addresses == ["10.0.0.2:8000"]


SERVED = (ServedModel(id="base"), ServedModel(id="other", parent="base"))


def test_a_request_for_an_adapter_is_known_as_one() -> None:
    states: dict[str, EngineState] = {}
    made = director(states=states)

    def adapter(now: float) -> bool:
        made.schedule(SchedulingRequest(model="other"), now)
        return made.decisions[-1][1].adapter

    assert not adapter(0.0)
    states["10.0.0.3:8000"] = EngineState(served=SERVED)
    assert not adapter(1.9)  # not looked up for every request
    assert adapter(2.0)
    made.schedule(REQUEST, 2.0)
    assert not made.decisions[-1][1].adapter


def test_explaining_takes_nobodys_turn() -> None:
    made = director(RoutingRules(policy="round-robin"))
    assert made.explain(REQUEST, 0.0).chosen == "pod-1"
    assert made.explain(REQUEST, 0.0).chosen == "pod-1"
    assert made.schedule(REQUEST, 0.0).chosen.endpoint.name == "pod-1"
    assert made.explain(REQUEST, 0.0).chosen == "pod-2"
    assert len(made.decisions) == 1


@pytest.mark.parametrize("policy", ["random", "least-request", "power-of-two"])
def test_what_is_explained_is_what_would_be(policy: str) -> None:
    made = director(RoutingRules(policy=policy))
    for _ in range(50):
        explained = made.explain(REQUEST, 0.0)
        assert list(explained.order) == [each.name for each in made.schedule(REQUEST, 0.0).order]


def test_explaining_tells_of_endpoints_that_could_not_be_chosen() -> None:
    made = director(RULES)
    explained = made.explain(SchedulingRequest(model=MODEL, pin="10.0.0.2"), 0.0)
    assert [(row.name, row.place, row.left_out) for row in explained.endpoints] == [
        ("pod-2", 1, None),
        ("pod-1", None, "pin"),
    ]


def test_every_endpoint_is_observed() -> None:
    states = {"10.0.0.1:8000": EngineState(stats=STATS, failures=2, error="no answer")}
    made = Director(
        profiles=registry.build(),
        rules=RoutingRules(),
        in_flight=lambda _: 0,
        states=states,
        rng=random.Random(1),
        avoided=lambda address, _: address == "10.0.0.2:8000",
    )
    made.update(Snapshot([endpoint(1), endpoint(2)]))
    (one, state, avoided), (two, unknown, failed) = made.observed(101.0)
    assert (one.stats, state.failures, avoided) == (STATS, 2, False)
    assert (two.reachable, unknown, failed) == (False, EngineState(), True)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (SchedulingRequest(model=MODEL, policy="best"), UnknownStrategy),
        (SchedulingRequest(model="none", policy="best\udcff" * 100), UnknownStrategy),
        (SchedulingRequest(model="none"), ModelNotFound),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1"), BadPin),
        (SchedulingRequest(model=MODEL, policy="random:1,least-request"), UnknownStrategy),
        (SchedulingRequest(model=MODEL, selector="gpu in"), BadSelector),
        (SchedulingRequest(model=MODEL, selector="gpu"), NoReadyEndpoint),
        (SchedulingRequest(selector="gpu"), NoReadyEndpoint),
    ],
)
def test_refusals(request_: SchedulingRequest, error: type[Exception]) -> None:
    made = director()
    with pytest.raises(error):
        made.schedule(request_, 0.0)
    with pytest.raises(error):
        made.explain(request_, 0.0)
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
