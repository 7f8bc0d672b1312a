"""Choosing: each filter, scorer and picker as a table; what must hold of every decision as properties."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc import mixes
from envoy_extproc.endpoints import Endpoint, EngineStats, Snapshot
from envoy_extproc.errors import BadPin, BadSelector, ModelNotFound, NoReadyEndpoint
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.filters import ReachableFilter
from envoy_extproc.scheduling.interfaces import (
    Candidate,
    MissingDataError,
    Picker,
    Remembering,
    SchedulingRequest,
    Scorer,
    Standing,
)
from envoy_extproc.scheduling.pickers import MaxScorePicker, PowerOfTwoPicker, RandomPicker, RoundRobinPicker
from envoy_extproc.scheduling.pool import left_out, pool
from envoy_extproc.scheduling.profile import Profile, totals
from envoy_extproc.scheduling.scorers import LeastKvCacheScorer, LeastRequestScorer
from tests.support.builders import MODEL, candidate, endpoint

REQUEST = SchedulingRequest(model=MODEL)


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [each.endpoint.name for each in candidates]


# -- scorers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "scores"),
    [
        ([0], [1.0]),
        ([5, 5], [1.0, 1.0]),
        ([0, 10], [1.0, 0.0]),
        ([10, 0, 5], [0.0, 1.0, 0.5]),
        ([1, 2, 3, 5], [1.0, 0.75, 0.5, 0.0]),
    ],
)
def test_least_request(in_flight: list[int], scores: list[float]) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight)]
    assert LeastRequestScorer().score(REQUEST, candidates) == scores


@pytest.mark.parametrize(
    ("usages", "scores"),
    [
        ([0.0], [1.0]),
        ([0.25, 1.0], [0.75, 0.0]),
        ([None, 0.5], [0.0, 0.5]),
        ([1.5, -0.5], [0.0, 1.0]),
        ([math.nan, math.inf, -math.inf], [0.0, 0.0, 1.0]),
    ],
)
def test_least_kv_cache(usages: list[float | None], scores: list[float]) -> None:
    candidates = [candidate(number, kv=usage) for number, usage in enumerate(usages)]
    assert LeastKvCacheScorer().score(REQUEST, candidates) == scores


@pytest.mark.parametrize(
    "candidates",
    [[candidate(1), candidate(2)], [Candidate(endpoint(1), 0, EngineStats(at=0.0, running=3.0))]],
)
def test_least_kv_cache_says_what_it_lacks(candidates: list[Candidate]) -> None:
    with pytest.raises(MissingDataError) as missing:
        LeastKvCacheScorer().score(REQUEST, candidates)
    assert missing.value.reason == "no-stats"


# -- filters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reachable", "stay"),
    [
        ([True, True], ["pod-0", "pod-1"]),
        ([False, True, False], ["pod-1"]),
        ([False, False], ["pod-0", "pod-1"]),
        ([False], ["pod-0"]),
    ],
)
def test_reachable(reachable: list[bool], stay: list[str]) -> None:
    candidates = [candidate(number, reachable=yes) for number, yes in enumerate(reachable)]
    assert names(ReachableFilter().filter(REQUEST, candidates)) == stay


# -- pickers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "in_flight", "order"),
    [
        ([0.1, 0.9, 0.5], [0, 0, 0], ["pod-1", "pod-2", "pod-0"]),
        ([0.5, 0.5], [3, 2], ["pod-1", "pod-0"]),
        ([0.9, 0.5], [9, 0], ["pod-0", "pod-1"]),
        ([0.0], [0], ["pod-0"]),
    ],
)
def test_max_score(scores: list[float], in_flight: list[int], order: list[str]) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight)]
    assert names(MaxScorePicker().pick(REQUEST, candidates, scores, random.Random(1))) == order


def test_power_of_two_never_picks_the_most_loaded() -> None:
    candidates = [candidate(1, 1), candidate(2, 5), candidate(3, 9)]
    rng = random.Random(1)
    picks = [names(PowerOfTwoPicker().pick(REQUEST, candidates, [], rng)) for _ in range(300)]
    assert {each[0] for each in picks} == {"pod-1", "pod-2"}
    assert all(each[1:] == sorted(each[1:]) for each in picks)  # the others by their load


def first_picks(picker: Picker, candidates: Sequence[Candidate], times: int) -> Counter[str]:
    rng = random.Random(7)
    scores = [1.0] * len(candidates)
    picks: Counter[str] = Counter()
    for _ in range(times):
        chosen = picker.pick(REQUEST, candidates, scores, rng)[0]
        if isinstance(picker, Remembering):
            picker.remember(REQUEST, chosen)
        picks[chosen.endpoint.name] += 1
    return picks


@pytest.mark.parametrize("picker", [MaxScorePicker(), RandomPicker(), PowerOfTwoPicker(), RoundRobinPicker()])
def test_equals_are_picked_equally_often(picker: Picker) -> None:
    candidates = [candidate(number) for number in range(1, 6)]
    picks = first_picks(picker, candidates, 5000)
    chi_square = sum((picks[each.endpoint.name] - 1000) ** 2 / 1000 for each in candidates)
    assert chi_square < 18.5  # 4 degrees of freedom, 0.1 %
    assert picks.total() == 5000


def turn(
    picker: RoundRobinPicker, candidates: Sequence[Candidate], request: SchedulingRequest = REQUEST
) -> list[str]:
    """The order of a decision that is carried out."""
    order = picker.pick(request, candidates, [], random.Random())
    picker.remember(request, order[0])
    return names(order)


def test_round_robin_goes_round() -> None:
    candidates = [candidate(number) for number in (3, 1, 2)]
    picker = RoundRobinPicker()
    orders = [turn(picker, candidates) for _ in range(4)]
    assert orders == [
        ["pod-1", "pod-2", "pod-3"],
        ["pod-2", "pod-3", "pod-1"],
        ["pod-3", "pod-1", "pod-2"],
        ["pod-1", "pod-2", "pod-3"],
    ]


def test_a_turn_that_is_only_looked_at_is_not_taken() -> None:
    picker = RoundRobinPicker()
    candidates = [candidate(1), candidate(2)]
    looked = [names(picker.pick(REQUEST, candidates, [], random.Random())) for _ in range(2)]
    assert looked == [["pod-1", "pod-2"]] * 2


def test_round_robin_while_endpoints_come_and_go() -> None:
    picker = RoundRobinPicker()

    def turn_of(*numbers: int) -> str:
        return turn(picker, [candidate(each) for each in numbers])[0]

    assert turn_of(1, 2, 3) == "pod-1"
    assert turn_of(1, 2, 3) == "pod-2"
    assert turn_of(1, 3) == "pod-3"  # the one just picked left: the next one's turn stays
    assert turn_of(1, 2, 3) == "pod-1"
    assert turn_of(2, 3, 4) == "pod-2"
    assert turn_of(1) == "pod-1"
    assert turn_of(1) == "pod-1"


def test_round_robin_forgets_models_that_are_gone() -> None:
    profile = Profile("turns", picker=RoundRobinPicker())
    outer = Profile("outer", picker=MaxScorePicker(), fallback=profile)
    candidates = [candidate(1), candidate(2), candidate(3)]

    def turn_of(model: str | None) -> str:
        request = SchedulingRequest(model=model)
        decision = profile.run(request, candidates, random.Random(1))
        profile.remember(request, decision)
        return decision.chosen.endpoint.name

    assert [turn_of("stays"), turn_of("leaves"), turn_of(None)] == ["pod-1"] * 3
    outer.keep_models({"stays"})
    assert [turn_of("stays"), turn_of("leaves"), turn_of(None)] == ["pod-2", "pod-1", "pod-2"]


def test_a_fallback_learns_only_from_what_it_decides() -> None:
    turns = Profile("turns", picker=RoundRobinPicker())
    kv = Profile("kv", picker=MaxScorePicker(), scorers=[(LeastKvCacheScorer(), 1.0)], fallback=turns)

    def chosen(candidates: Sequence[Candidate]) -> str:
        decision = kv.run(REQUEST, candidates, random.Random(1))
        kv.remember(REQUEST, decision)
        return decision.chosen.endpoint.name

    mute, telling = [candidate(1), candidate(2)], [candidate(1, kv=0.1), candidate(2, kv=0.9)]
    assert [chosen(mute), chosen(telling), chosen(mute), chosen(mute)] == ["pod-1", "pod-1", "pod-2", "pod-1"]


def test_round_robin_counts_each_model_by_itself() -> None:
    picker = RoundRobinPicker()
    candidates = [candidate(1), candidate(2)]
    other = SchedulingRequest(model="other")
    turns = [turn(picker, candidates, request)[0] for request in (REQUEST, other, REQUEST, other)]
    assert turns == ["pod-1", "pod-1", "pod-2", "pod-2"]


# -- pool ----------------------------------------------------------------------------------------------------------

V6 = Endpoint(name="six", address="[fd00::1]:8000", models=(MODEL,))
SNAPSHOT = Snapshot(
    [
        endpoint(1),
        Endpoint(name="pod-1b", address="10.0.0.1:8001", models=(MODEL,), labels={"gpu": "a10"}),
        endpoint(2),
        Endpoint(name="other", address="10.0.0.9:8000", models=("other", "lora"), labels={"gpu": "l4"}),
        V6,
    ]
)
OF_MODEL = {"pod-1", "pod-1b", "pod-2", "six"}


@pytest.mark.parametrize(
    ("request_", "allowed"),
    [
        (SchedulingRequest(model=MODEL), OF_MODEL),
        (SchedulingRequest(model="lora"), {"other"}),
        (SchedulingRequest(), OF_MODEL | {"other"}),
        (SchedulingRequest(model=MODEL, subset=("10.0.0.1:8000",)), {"pod-1"}),
        (SchedulingRequest(model=MODEL, subset=("10.0.0.1",)), {"pod-1", "pod-1b"}),
        (SchedulingRequest(model=MODEL, subset=("10.0.0.1:8001", "10.0.0.2")), {"pod-1b", "pod-2"}),
        (SchedulingRequest(model=MODEL, subset=("fd00::1",)), {"six"}),
        (SchedulingRequest(model=MODEL, subset=("[fd00::1]:8000",)), {"six"}),
        (SchedulingRequest(model=MODEL, subset=("10.0.0.9", "10.0.0.2")), {"pod-2"}),
        (SchedulingRequest(subset=("10.0.0.9",)), {"other"}),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1:8001"), {"pod-1b"}),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1"), {"pod-1"}),
        (SchedulingRequest(model=MODEL, pin="fd00::1"), {"six"}),
        (SchedulingRequest(model=MODEL, pin="[fd00::1]:8000"), {"six"}),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1", subset=("10.0.0.1:8001",)), {"pod-1b"}),
        (SchedulingRequest(model=MODEL, selector="gpu"), {"pod-1b"}),
        (SchedulingRequest(selector="gpu"), {"pod-1b", "other"}),
        (SchedulingRequest(model=MODEL, selector=" "), OF_MODEL),
        (SchedulingRequest(model=MODEL, selector="gpu!=a10"), OF_MODEL - {"pod-1b"}),
        (SchedulingRequest(model=MODEL, selector="!gpu", subset=("10.0.0.1",)), {"pod-1"}),
        (SchedulingRequest(model=MODEL, selector="gpu", pin="10.0.0.1"), {"pod-1b"}),
        (SchedulingRequest(model=MODEL, selector="!gpu", pin="[fd00::1]:8000"), {"six"}),
    ],
)
def test_pool(request_: SchedulingRequest, allowed: set[str]) -> None:
    assert {each.name for each in pool(SNAPSHOT, request_, allow_pinning=True)} == allowed


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (SchedulingRequest(model="none"), ModelNotFound),
        (SchedulingRequest(model=""), ModelNotFound),
        (SchedulingRequest(model=MODEL, subset=()), NoReadyEndpoint),
        (SchedulingRequest(subset=()), NoReadyEndpoint),
        (SchedulingRequest(model=MODEL, subset=("10.0.0.9",)), NoReadyEndpoint),
        (SchedulingRequest(model=MODEL, subset=("10.0.0", "10.0.0.1:80", "0.0.1")), NoReadyEndpoint),
        (SchedulingRequest(model="none", subset=()), ModelNotFound),
        (SchedulingRequest(model=MODEL, pin="10.0.0.9:8000"), BadPin),
        (SchedulingRequest(model=MODEL, pin="pod-1"), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.2", subset=("10.0.0.1",)), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.2", selector="gpu"), BadPin),
        (SchedulingRequest(model=MODEL, pin="[fd00::1]:8000", selector="gpu"), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1:8000", selector="gpu=a10"), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1:8000", subset=("10.0.0.1:8001",)), BadPin),
        (SchedulingRequest(model=MODEL, pin="[fd00::1]"), BadPin),
        (SchedulingRequest(model=MODEL, pin="[fd00::1]:8001"), BadPin),
        (SchedulingRequest(model=MODEL, pin="fd00::1:8000"), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1:"), BadPin),
        (SchedulingRequest(model=MODEL, pin="10.0.0.1:8000,10.0.0.2:8000"), BadPin),
        (SchedulingRequest(model=MODEL, selector="gpu=l4"), NoReadyEndpoint),
        (SchedulingRequest(model=MODEL, selector="gpu", subset=("10.0.0.2",)), NoReadyEndpoint),
        (SchedulingRequest(model=MODEL, selector="gpu="), NoReadyEndpoint),
        (SchedulingRequest(model=MODEL, selector="gpu in a10"), BadSelector),
        (SchedulingRequest(selector="="), BadSelector),
    ],
)
def test_pool_refuses(request_: SchedulingRequest, error: type[Exception]) -> None:
    with pytest.raises(error):
        pool(SNAPSHOT, request_, allow_pinning=True)


def test_a_selector_that_selects_nobody_is_told_from_an_empty_house() -> None:
    with pytest.raises(NoReadyEndpoint, match="external-filter"):
        pool(SNAPSHOT, SchedulingRequest(model=MODEL, selector="gpu=h100"))


@pytest.mark.parametrize(
    ("request_", "reasons"),
    [
        (SchedulingRequest(model=MODEL), {}),
        (
            SchedulingRequest(model=MODEL, subset=("10.0.0.1", "10.0.0.2"), selector="!gpu", pin="10.0.0.2"),
            {
                "10.0.0.1:8000": "pin",
                "10.0.0.1:8001": "external-filter",
                "[fd00::1]:8000": "subset",
            },
        ),
    ],
)
def test_why_endpoints_of_the_model_are_left_out(
    request_: SchedulingRequest, reasons: dict[str, str]
) -> None:
    assert left_out(SNAPSHOT, request_, allow_pinning=True) == reasons


def test_nobody_is_there() -> None:
    for request in (SchedulingRequest(model=MODEL), SchedulingRequest()):
        with pytest.raises(NoReadyEndpoint):
            pool(Snapshot(), request)


def test_a_pin_must_be_wanted() -> None:
    with pytest.raises(BadPin):
        pool(SNAPSHOT, SchedulingRequest(model=MODEL, pin="10.0.0.1:8000"))


# -- profiles ------------------------------------------------------------------------------------------------------


def test_every_policy_knows_its_name() -> None:
    built = registry.build()
    assert tuple(built) == registry.POLICIES
    assert all(name == profile.name for name, profile in built.items())
    assert registry.build()["round-robin"] is not built["round-robin"]


def test_a_fallback_says_its_reason() -> None:
    candidates = [candidate(1, 3), candidate(2, 1)]
    decision = registry.build()["least-kv-cache"].run(REQUEST, candidates, random.Random(1))
    assert (decision.policy, decision.decided_by) == ("least-kv-cache", "least-request")
    assert decision.fallback_reason == "no-stats"
    assert decision.chosen.endpoint.name == "pod-2"
    assert [each.scorer for each in decision.scores] == ["least-request"]


def test_with_data_there_is_no_fallback() -> None:
    candidates = [candidate(1, 0, kv=0.9), candidate(2, 9, kv=0.1), candidate(3)]
    decision = registry.build()["least-kv-cache"].run(REQUEST, candidates, random.Random(1))
    assert (decision.decided_by, decision.fallback_reason) == ("least-kv-cache", None)
    assert decision.chosen.endpoint.name == "pod-2"


def test_without_a_fallback_missing_data_is_the_callers() -> None:
    profile = Profile("kv", picker=MaxScorePicker(), scorers=[(LeastKvCacheScorer(), 1.0)])
    with pytest.raises(MissingDataError):
        profile.run(REQUEST, [candidate(1)], random.Random(1))


def test_a_decision_explains_itself() -> None:
    candidates = [candidate(1, 4), candidate(2, 2), candidate(3, 0, reachable=False)]
    decision = registry.build()["least-request"].run(REQUEST, candidates, random.Random(1))
    assert decision.filtered == (("reachable", ("pod-3",)),)
    assert names(decision.candidates) == ["pod-1", "pod-2"]
    (scores,) = decision.scores
    assert (scores.scorer, scores.weight, scores.values) == ("least-request", 1.0, (0.0, 1.0))
    assert [each.name for each in decision.order] == ["pod-2", "pod-1", "pod-2"]


@pytest.mark.parametrize(
    ("numbers", "tries", "order"),
    [
        ([1], 1, ["pod-1"]),
        ([1], 3, ["pod-1", "pod-1", "pod-1"]),
        ([1, 2], 3, ["pod-1", "pod-2", "pod-1"]),
        ([1, 2, 3], 3, ["pod-1", "pod-2", "pod-3"]),
        ([1, 2, 3], 2, ["pod-1", "pod-2"]),
    ],
)
def test_an_order_is_as_long_as_envoys_tries(numbers: list[int], tries: int, order: list[str]) -> None:
    candidates = [candidate(number) for number in numbers]
    made = registry.build()["round-robin"].run(REQUEST, candidates, random.Random(1), tries=tries)
    assert [each.name for each in made.order] == order
    assert made.order[0] == made.chosen.endpoint


@pytest.mark.parametrize(("weights", "chosen"), [((1.0, 3.0), "pod-2"), ((3.0, 1.0), "pod-1")])
def test_weighted_scorers_add_up(weights: tuple[float, float], chosen: str) -> None:
    scorers: list[tuple[Scorer, float]] = [
        (LeastRequestScorer(), weights[0]),
        (LeastKvCacheScorer(), weights[1]),
    ]
    profile = Profile("both", picker=MaxScorePicker(), scorers=scorers)
    candidates = [candidate(1, 0, kv=1.0), candidate(2, 9, kv=0.0)]
    assert profile.run(REQUEST, candidates, random.Random(1)).chosen.endpoint.name == chosen


def told(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[EngineStats]:
    """Whatever an engine may tell: every field, or none."""
    fields: dict[str, st.SearchStrategy[object]] = {
        field: st.none() | numbers
        for field in EngineStats.__struct_fields__
        if field not in ("at", "loras", "waiting_loras", "max_loras")
    }
    loras = st.none() | st.frozensets(st.sampled_from([MODEL, "lora-1", "lora-2"]))
    return st.builds(
        EngineStats,
        at=st.just(0.0),
        loras=loras,
        waiting_loras=loras,
        max_loras=st.none() | st.integers(0, 4),
        **fields,
    )


CANDIDATES = st.lists(
    st.tuples(
        st.integers(0, 100) | st.sampled_from([0, 10**6]),
        st.none() | told(st.floats()) | told(st.sampled_from([0.0, 0.5, 1.0, 100.0, 1e-300, 1e14])),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
).map(
    lambda rows: [
        Candidate(endpoint(number), in_flight, stats, reachable)
        for number, (in_flight, stats, reachable) in enumerate(rows)
    ]
)
REQUESTS = st.builds(
    SchedulingRequest,
    model=st.just(MODEL),
    prompt_tokens=st.integers(0, 10**6) | st.just(10**400),
    max_output_tokens=st.none() | st.integers(-1, 10**6) | st.just(10**400),
    adapter=st.booleans(),
    prompt=st.none()
    | st.binary(max_size=2000).map(lambda text: Prompt({"prompt": msgspec.Raw(text)}))
    | st.integers(0, 3).map(
        lambda number: Prompt({"prompt": msgspec.Raw(b'"%s"' % (b"%d" % number * 2000))})
    ),
    user=st.none() | st.text(max_size=3),
    session=st.none() | st.sampled_from(["", "10.0.0.1:8000", "10.0.0.3:8000", "nobody"]),
    session_key=st.none() | st.binary(max_size=3),
    standing=st.none()
    | st.tuples(
        st.lists(st.floats(0, 1e15) | st.just(0.0), min_size=3, max_size=3).map(sorted), st.floats(0, 1)
    ).map(lambda drawn: Standing(least=drawn[0][0], own=drawn[0][1], most=drawn[0][2], below=drawn[1])),
)
MIXES = st.lists(
    st.tuples(
        st.sampled_from(sorted(set(registry.POLICIES) - mixes.PICKING - mixes.ALONE)), st.integers(1, 10**6)
    ),
    min_size=2,
    unique_by=lambda member: member[0],
).map(mixes.canonical)
ANY_POLICY = st.sampled_from(sorted(set(registry.POLICIES) - mixes.ALONE)) | MIXES


@given(CANDIDATES, REQUESTS, ANY_POLICY, st.integers(0, 1000), st.integers(1, 10))
def test_what_holds_of_every_decision(
    candidates: list[Candidate], request_: SchedulingRequest, policy: str, seed: int, tries: int
) -> None:
    decision = registry.build().find(policy).run(request_, candidates, random.Random(seed), tries=tries)
    everyone = {each.endpoint.address for each in candidates}
    order = [each.address for each in decision.order]
    left = [each.endpoint.address for each in decision.candidates]
    assert decision.policy == policy
    assert any(decision.chosen is each for each in candidates)
    assert order[0] == decision.chosen.endpoint.address
    assert set(order) <= set(left) <= everyone
    assert len(order) == tries
    assert len(set(order)) == min(tries, len(left))  # nobody twice before everybody once
    assert all(
        one == again for one, again in zip(order, order[len(left) :], strict=False)
    )  # then round again
    gone = {name for _, names_ in decision.filtered for name in names_}
    assert gone | {each.endpoint.name for each in decision.candidates} == set(names(candidates))
    for scores in decision.scores:
        assert len(scores.values) == len(left)
        assert all(math.isfinite(value) and 0 <= value <= 1 for value in scores.values)
    if any(each.reachable for each in candidates):
        assert decision.chosen.reachable
    elif not request_.adapter:
        assert set(left) == everyone


@given(CANDIDATES, REQUESTS, ANY_POLICY, st.integers(0, 1000))
def test_the_best_total_is_chosen_and_of_equals_who_has_the_least_to_do(
    candidates: list[Candidate], request_: SchedulingRequest, policy: str, seed: int
) -> None:
    decision = registry.build().find(policy).run(request_, candidates, random.Random(seed))
    if not decision.scores:
        return  # chance, or whose turn it is
    total = totals(decision.scores, len(decision.candidates))
    assert all(math.isfinite(each) and 0 <= each <= 1 + 1e-9 for each in total)
    best = [each for each, mine in zip(decision.candidates, total, strict=True) if mine == max(total)]
    assert decision.chosen.in_flight == min(each.in_flight for each in best)
    assert any(decision.chosen is each for each in best)


@given(CANDIDATES, ANY_POLICY, st.integers(0, 1000))
def test_the_same_chance_makes_the_same_decision(candidates: list[Candidate], policy: str, seed: int) -> None:
    one, other = (
        registry.build().find(policy).run(REQUEST, candidates, random.Random(seed)) for _ in range(2)
    )
    assert one.order == other.order


@given(CANDIDATES, st.integers(0, 1000))
def test_least_request_picks_the_least_loaded(candidates: list[Candidate], seed: int) -> None:
    decision = registry.build()["least-request"].run(REQUEST, candidates, random.Random(seed))
    assert decision.chosen.in_flight == min(each.in_flight for each in decision.candidates)
