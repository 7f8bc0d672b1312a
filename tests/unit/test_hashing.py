"""Hashing with bounded loads, the endpoint picker's scorers, and pickers in mixtures."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc import mixes
from envoy_extproc.endpoints import EngineStats
from envoy_extproc.openai.prompt import BlockRule, Prompt
from envoy_extproc.scheduling import hashing, registry
from envoy_extproc.scheduling.aliases import (
    KvCacheUtilizationScorer,
    LoadAwareScorer,
    QueueScorer,
    RunningRequestsSizeScorer,
)
from envoy_extproc.scheduling.interfaces import (
    Candidate,
    Decision,
    MissingDataError,
    SchedulingRequest,
    Scorer,
)
from envoy_extproc.scheduling.pickers import WeightedRandomPicker
from tests.support.builders import MODEL, candidate, endpoint

pytestmark = pytest.mark.unmeasured

REQUEST = SchedulingRequest(model=MODEL)


def decided(policy: str, candidates: Sequence[Candidate], seed: int = 1, **known: Any) -> Decision:
    request = SchedulingRequest(model=MODEL, **known)
    return registry.build().find(policy).run(request, candidates, random.Random(seed))


# -- bounded loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "in_flight", "capacity"),
    [
        (1.25, [0], 2),
        (1.25, [0, 0, 0, 0], 1),
        (1.25, [3, 0, 0, 0], 2),  # ceil(1.25 * 4 / 4)
        (1.25, [9, 9, 9, 8], 12),  # ceil(1.25 * 36 / 4)
        (2.0, [9, 9, 9, 8], 18),
        (1.0, [1, 1], 2),
    ],
)
def test_the_capacity(factor: float, in_flight: list[int], capacity: int) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight)]
    assert hashing.capacity(factor, candidates) == capacity


def test_the_heaviest_with_room_is_chosen_and_the_others_come_in_their_order() -> None:
    idle = [candidate(number) for number in range(1, 6)]
    weights = hashing.weights(b"k", idle)
    walk = sorted(range(5), key=lambda place: -weights[place])
    loads = [0] * 5
    loads[walk[0]], loads[walk[1]] = 9, 2  # capacity 3: the first is full, the second is not
    decision = decided("bounded-load", [candidate(n + 1, loads[n]) for n in range(5)], session_key=b"k")
    assert [each.name for each in decision.order] == [f"pod-{walk[place] + 1}" for place in (1, 2, 3)]
    (scores,) = decision.scores
    assert scores.values[walk[0]] == weights[walk[0]] / 2
    assert scores.values[walk[1]] == 0.5 + weights[walk[1]] / 2


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.binary(max_size=8),
    st.floats(1.01, 4),
)
def test_nobody_is_given_more_than_the_bound(in_flight: list[int], key: bytes, factor: float) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight)]
    policies = registry.build(registry.Tuning(load_bound=factor))
    for request in (SchedulingRequest(session_key=key), SchedulingRequest()):
        chosen = policies["bounded-load"].run(request, candidates, random.Random(1)).chosen
        mean = (sum(in_flight) + 1) / len(in_flight)
        assert chosen.in_flight + 1 <= math.ceil(factor * mean)


def test_requests_of_few_keys_fill_up_to_the_bound() -> None:
    loads = Counter[int]()
    for number in range(400):
        candidates = [candidate(place, loads[place]) for place in range(8)]
        chosen = decided("bounded-load", candidates, session_key=b"%d" % (number % 3)).chosen
        loads[int(chosen.endpoint.name.removeprefix("pod-"))] += 1
    assert max(loads.values()) <= math.ceil(1.25 * 400 / 8)
    assert min(loads.values()) < 400 / 8  # the keys' own come first


@given(st.integers(2, 9), st.integers(0, 8), st.binary(max_size=4))
def test_a_key_moves_only_with_its_pod_while_there_is_room(count: int, gone: int, key: bytes) -> None:
    idle = [candidate(number) for number in range(count)]
    left = [each for number, each in enumerate(idle) if number != gone % count]
    before = decided("bounded-load", idle, session_key=key).chosen
    after = decided("bounded-load", left, session_key=key).chosen
    assert (after == before) is (before in left)


@pytest.mark.parametrize(
    ("known", "same"),
    [
        ({"session_key": b"a", "user": "b"}, {"session_key": b"a"}),
        ({"user": "b"}, {"session_key": b"b"}),
        ({"user": "x" * 300}, {"session_key": hashing.key("x" * 300)}),
    ],
)
def test_what_the_key_is(known: dict[str, Any], same: dict[str, Any]) -> None:
    idle = [candidate(number) for number in range(9)]
    one, other = decided("bounded-load", idle, **known), decided("bounded-load", idle, **same)
    assert one.order == other.order
    assert one.decided_by == "bounded-load"


def prompt(*texts: str) -> Prompt:
    said = [{"role": "user", "content": text} for text in texts]
    return Prompt({"messages": msgspec.Raw(msgspec.json.encode(said))})


def test_a_prompt_is_a_key_by_its_beginning() -> None:
    idle = [candidate(number) for number in range(60)]
    one, other = "a" * 1100, "b" * 1100
    first = decided("bounded-load", idle, prompt=prompt(one)).order
    assert decided("bounded-load", idle, prompt=prompt(one, "and then?" * 100)).order == first
    assert decided("bounded-load", idle, prompt=prompt(other)).order != first
    assert decided("bounded-load", idle, prompt=prompt(other), user="b").order == (
        decided("bounded-load", idle, user="b").order
    )
    short = decided("bounded-load", idle, prompt=prompt("hi"))
    assert short.fallback_reason == "no-key"


def test_a_prompt_has_the_same_home_on_every_server() -> None:
    """Whatever the seed of their indexes is, which is another one in every process."""
    idle = [candidate(number) for number in range(60)]

    def home(seed: int, text: str, model: str = MODEL, before: str | None = None) -> str:
        policies = registry.build(registry.Tuning(prefix_rule=BlockRule(seed=seed)))
        asked = SchedulingRequest(model=model, prompt=prompt(text))
        if before is not None:
            policies[before].run(asked, idle, random.Random(1))  # has read it already
        return policies["bounded-load"].run(asked, idle, random.Random(1)).chosen.endpoint.name

    texts = [letter * 600 for letter in "abc"]
    homes = [home(1, text) for text in texts]
    assert len(set(homes)) > 1
    assert [home(2, text) for text in texts] == homes
    assert [home(3, text, before="prefix-cache") for text in texts] == homes
    assert [home(1, text, "another") for text in texts] != homes


def test_without_a_key_chance_decides_among_those_with_room() -> None:
    candidates = [candidate(1), candidate(2, 30), candidate(3)]  # capacity ceil(1.25 * 31 / 3) = 13
    decisions = [decided("bounded-load", candidates, seed) for seed in range(400)]
    assert {(each.decided_by, each.fallback_reason) for each in decisions} == {("random", "no-key")}
    chosen = Counter(each.chosen.endpoint.name for each in decisions)
    assert chosen.keys() == {"pod-1", "pod-3"}
    assert all(150 < count < 250 for count in chosen.values())
    assert all(each.order[2].name == "pod-2" for each in decisions)
    full = [candidate(1, 1), candidate(2, 5)]  # capacity ceil(1.25 * 7 / 2) = 5
    assert {decided("bounded-load", full, seed).chosen.endpoint.name for seed in range(50)} == {"pod-1"}


# -- the endpoint picker's scorers ---------------------------------------------------------------------------------


def told(*stats: dict[str, Any] | None) -> list[Candidate]:
    return [
        Candidate(endpoint(number), 0, None if each is None else EngineStats(at=0.0, **each))
        for number, each in enumerate(stats, 1)
    ]


NAN = math.nan


@pytest.mark.parametrize(
    ("scorer", "field"), [(QueueScorer(), "waiting"), (RunningRequestsSizeScorer(), "running")]
)
@pytest.mark.parametrize(
    ("counts", "scores"),
    [
        ([0], [1.0]),
        ([4, 4], [1.0, 1.0]),
        ([0, 10, 5], [1.0, 0.0, 0.5]),
        ([2, None, 4], [1.0, 0.0, 0.0]),
        ([2, NAN], [1.0, 1.0]),
        ([2, -1.0, 3], [1.0, 0.0, 0.0]),
    ],
)
def test_fewest(scorer: Scorer, field: str, counts: list[float | None], scores: list[float]) -> None:
    candidates = told(*[None if count is None else {field: count} for count in counts])
    assert scorer.score(REQUEST, candidates) == scores


@pytest.mark.parametrize(
    ("waiting", "score"), [(0, 0.5), (64, 0.25), (128, 0.0), (1000, 0.0), (1, 0.49609375), (None, 0.0)]
)
def test_load_aware(waiting: float | None, score: float) -> None:
    candidates = told(None if waiting is None else {"waiting": waiting}, {"waiting": 32})
    assert LoadAwareScorer().score(REQUEST, candidates) == [score, 0.375]


@pytest.mark.parametrize(
    "scorer", [QueueScorer(), RunningRequestsSizeScorer(), LoadAwareScorer(), KvCacheUtilizationScorer()]
)
def test_without_data_they_say_so(scorer: Scorer) -> None:
    with pytest.raises(MissingDataError) as missing:
        scorer.score(REQUEST, told(None, {}))
    assert missing.value.reason == "no-stats"


def test_names_of_the_endpoint_picker_are_told_as_they_were_asked() -> None:
    candidates = told({"kv_cache_usage": 0.5, "waiting": 0}, {"kv_cache_usage": 0.25, "waiting": 0})
    decision = decided("kv-cache-utilization-scorer", candidates)
    assert (decision.decided_by, decision.scores[0].scorer) == (("kv-cache-utilization-scorer",) * 2)
    assert decision.scores[0].values == (0.5, 0.75)
    adapters = decided("lora-affinity-scorer", told({"loras": frozenset({MODEL})}, {}), adapter=True)
    assert adapters.scores[0].values == (1.0, 0.0)


def test_in_a_mixture_they_keep_their_own_scale() -> None:
    candidates = told({"kv_cache_usage": 0.41, "waiting": 0}, {"kv_cache_usage": 0.40, "waiting": 1})
    decision = decided("queue-scorer:2,kv-cache-utilization-scorer:2", candidates)
    assert [each.values for each in decision.scores] == [(1.0, 0.0), pytest.approx((0.59, 0.60))]
    assert decision.chosen.endpoint.name == "pod-1"
    spread = decided("kv-cache-utilization-scorer,least-kv-cache", candidates)
    assert [each.values for each in spread.scores] == [pytest.approx((0.59, 0.60)), (0.0, 1.0)]


# -- pickers in mixtures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([1.0, 1.0], [0.5, 0.5]),
        ([0.75, 0.25], [0.75, 0.25]),
        ([0.3, 0.1, 0.1], [0.6, 0.2, 0.2]),
        ([1.0, 0.0], [1.0, 0.0]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([0.0], [1.0]),
    ],
)
def test_twice_the_score_is_twice_as_likely(scores: list[float], shares: list[float]) -> None:
    candidates = [candidate(number) for number in range(len(scores))]
    rng, picker = random.Random(1), WeightedRandomPicker()
    orders = [picker.pick(REQUEST, candidates, scores, rng) for _ in range(4000)]
    first = Counter(order[0].endpoint.name for order in orders)
    assert [first[f"pod-{place}"] / 4000 for place in range(len(scores))] == pytest.approx(shares, abs=0.03)
    assert all({id(each) for each in order} == {id(each) for each in candidates} for order in orders)


def test_the_rest_of_the_order_is_drawn_likewise() -> None:
    candidates = [candidate(number) for number in range(3)]
    rng, picker = random.Random(1), WeightedRandomPicker()
    orders = [picker.pick(REQUEST, candidates, [0.5, 0.4, 0.1], rng) for _ in range(4000)]
    behind = Counter(order[1].endpoint.name for order in orders if order[0].endpoint.name == "pod-0")
    assert behind["pod-1"] / behind.total() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("queue-scorer:2, weighted-random-picker", "queue-scorer:2,weighted-random-picker"),
        ("max-score-picker,queue-scorer", "max-score-picker,queue-scorer:1"),
        (
            "queue-scorer:2,kv-cache-utilization-scorer:2,weighted-random-picker",
            "queue-scorer:2,kv-cache-utilization-scorer:2,weighted-random-picker",
        ),
    ],
)
def test_a_picker_can_be_in_a_mixture(text: str, name: str) -> None:
    assert registry.build().find(text).name == name


def test_the_picker_picks() -> None:
    candidates = told({"waiting": 1}, {"waiting": 2}, {"waiting": 4})  # scores 1, 2/3, 0
    chosen = Counter(
        decided("queue-scorer,weighted-random-picker", candidates, seed).chosen.endpoint.name
        for seed in range(1000)
    )
    assert chosen.keys() == {"pod-1", "pod-2"}
    assert 540 < chosen["pod-1"] < 660
    best = {decided("queue-scorer,max-score-picker", candidates, seed).order[0].name for seed in range(50)}
    assert best == {"pod-1"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("weighted-random-picker", "no policy 'weighted-random-picker'"),
        ("weighted-random-picker,max-score-picker", "one picker"),
        ("queue-scorer,weighted-random-picker,max-score-picker", "one picker"),
        ("queue-scorer,max-score-picker:2", "a picker has no weight"),
        ("queue-scorer:0,max-score-picker", "a weight above 0"),
        ("queue-scorer,max-score-picker,max-score-picker", "once"),
    ],
)
def test_what_is_wrong_with_a_picker_is_said(text: str, why: str) -> None:
    with pytest.raises(mixes.MixError, match=why):
        mixes.parse(text, registry.POLICIES)


@given(st.lists(st.sampled_from(sorted([*registry.POLICIES, *mixes.PICKERS])), max_size=5))
def test_a_mixture_is_read_as_it_is_named(names: list[str]) -> None:
    policies = registry.build()
    try:
        members = mixes.parse(",".join(names), registry.POLICIES)
    except mixes.MixError:
        return
    name = policies.find(",".join(names)).name
    assert policies.find(name).name == name
    assert len(members) == len(names)
