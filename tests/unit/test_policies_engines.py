"""Policies that go by what engines tell of themselves: each formula as a table."""

from __future__ import annotations

import random
from typing import Any

import pytest

from envoy_extproc.endpoints import EngineState, EngineStats, ServedModel
from envoy_extproc.scheduling import lora, registry
from envoy_extproc.scheduling.filters import LoraAffinityFilter
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest, Scorer
from envoy_extproc.scheduling.latency import LeastLatencyScorer, expected_seconds
from envoy_extproc.scheduling.scorers import LeastUtilizationScorer, LoraAffinityScorer, ThroughputScorer
from tests.support.builders import MODEL, endpoint

REQUEST = SchedulingRequest(model=MODEL)
NAN = float("nan")


def told(*stats: dict[str, Any] | None, in_flight: int = 0) -> list[Candidate]:
    """One candidate for each; None for one that has not been heard of."""
    return [
        Candidate(endpoint(number), in_flight, None if each is None else EngineStats(at=0.0, **each))
        for number, each in enumerate(stats, 1)
    ]


@pytest.mark.parametrize(
    "scorer", [LeastLatencyScorer(), ThroughputScorer(), LeastUtilizationScorer()], ids=lambda each: each.name
)
@pytest.mark.parametrize("stats", [(None,), (None, {}), ({"running": 3.0},), ({"utilization": NAN},)])
def test_without_data_they_say_so(scorer: Scorer, stats: tuple[Any, ...]) -> None:
    with pytest.raises(MissingDataError) as missing:
        scorer.score(REQUEST, told(*stats))
    assert missing.value.reason == "no-stats"


@pytest.mark.parametrize(
    "policy",
    sorted(
        set(registry.POLICIES)
        - {"least-request", "lora-affinity", "lora-affinity-scorer", "bounded-load", "pd"}
    ),
)
def test_without_data_least_request_decides(policy: str) -> None:
    candidates = [Candidate(endpoint(1), 4), Candidate(endpoint(2), 0), Candidate(endpoint(3), 4)]
    decision = registry.build()[policy].run(REQUEST, candidates, random.Random(1))
    if policy in ("random", "round-robin", "power-of-two"):
        assert (decision.decided_by, decision.fallback_reason) == (policy, None)
    else:
        assert (decision.policy, decision.decided_by) == (policy, "least-request")
        reasons = {
            "session-affinity": "no-session",
            "vtc-basic": "no-user",
            "prefix-cache": "no-prompt",
            "prefix-cache-scorer": "no-prompt",
        }
        assert decision.fallback_reason == reasons.get(policy, "no-stats")
        assert decision.chosen.endpoint.name == "pod-2"


# -- least-utilization ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stats", "score"),
    [
        ({"utilization": 0.25}, 0.75),
        ({"utilization": 0.25, "waiting": 50.0, "kv_cache_usage": 1.0}, 0.75),  # its own word first
        ({"utilization": 1.5}, 0.0),
        (
            {"utilization": -1.0, "waiting": 1.0},
            0.8,
        ),  # SGLang writes -1 where it has no limit to compare with
        ({"waiting": 2.0}, 0.6),
        ({"waiting": 5.0}, 0.0),
        ({"waiting": 500.0}, 0.0),
        ({"kv_cache_usage": 0.4}, 0.5),
        ({"kv_cache_usage": 0.9}, 0.0),
        ({"waiting": 1.0, "kv_cache_usage": 0.4}, 0.5),
        ({"waiting": 4.0, "kv_cache_usage": 0.4}, 0.2),
        ({"waiting": 0.0, "kv_cache_usage": NAN}, 1.0),
        ({"running": 1.0}, 0.0),
        (None, 0.0),
    ],
)
def test_least_utilization(stats: dict[str, Any] | None, score: float) -> None:
    known = {"utilization": 0.5}
    scores = LeastUtilizationScorer().score(REQUEST, told(stats, known))
    assert scores == pytest.approx([score, 0.5])


# -- throughput ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stats", "scores"),
    [
        ([(0.0, 100.0), (0.0, 300.0)], [1.0, 0.0]),
        ([(100.0, 0.0), (0.0, 150.0)], [0.0, 1.0]),  # a prompt's token counts twice
        ([(100.0, 100.0), (50.0, 50.0), (0.0, 0.0)], [0.0, 0.5, 1.0]),
        ([(10.0, 10.0), (15.0, 0.0)], [1.0, 1.0]),
        ([(None, 100.0), (100.0, None)], [1.0, 0.0]),
        ([(None, None), (0.0, 10.0), (0.0, 20.0)], [0.0, 1.0, 0.0]),
        ([(NAN, 10.0), (0.0, 20.0)], [1.0, 0.0]),
        ([(1.0, 1.0)], [1.0]),
    ],
)
def test_throughput(stats: list[tuple[float | None, float | None]], scores: list[float]) -> None:
    candidates = told(
        *[
            {"prompt_tokens_per_second": prompt, "generation_tokens_per_second": generated}
            for prompt, generated in stats
        ]
    )
    assert ThroughputScorer().score(REQUEST, candidates) == scores


# -- least-latency -------------------------------------------------------------------------------------------------

ENGINE: dict[str, Any] = {
    "prefill_seconds": 0.5,  # 1 ms a token
    "prompt_tokens_per_request": 500.0,
    "time_per_output_token": 0.02,
    "decode_seconds": 4.0,
    "generation_tokens_per_request": 200.0,
    "running": 10.0,
    "waiting": 0.0,
}


@pytest.mark.parametrize(
    ("changed", "request_", "seconds"),
    [
        ({}, {"prompt_tokens": 1000, "max_output_tokens": 100}, 1.0 + 2.0),
        ({}, {"prompt_tokens": 1000}, 1.0 + 4.0),  # as long as answers are
        (
            {},
            {"prompt_tokens": 1000, "max_output_tokens": 5000},
            1.0 + 4.0,
        ),  # may become longer than they are
        ({}, {"prompt_tokens": 1000, "max_output_tokens": 0}, 1.0 + 2.0),  # says nothing that can be meant
        ({}, {}, 0.5 + 4.0),
        (
            {"prompt_tokens_per_request": None},
            {"prompt_tokens": 1000},
            4.0,
        ),  # no rate for prompts, from nobody
        ({"time_per_output_token": None}, {"prompt_tokens": 1000}, 1.0 + 4.0),
        ({"generation_tokens_per_request": None}, {"max_output_tokens": 50}, 0.5 + 1.0),
        ({"generation_tokens_per_request": None}, {}, 0.5 + 2.0),  # a guess of 100
        ({"prefill_seconds": None, "time_to_first_token": 1.5}, {"prompt_tokens": 1000}, 3.0 + 4.0),
        (
            {"prefill_seconds": None, "time_to_first_token": 1.5, "queue_seconds": 0.5},
            {"prompt_tokens": 1000},
            2.0 + 4.0,
        ),
        (
            {"prefill_seconds": None, "time_to_first_token": 0.2, "queue_seconds": 0.5},
            {"prompt_tokens": 1000},
            4.0,
        ),
        # The batch lets one in every 4.5 s / 10.
        ({"waiting": 4.0}, {"prompt_tokens": 1000}, 5.0 + 4 * 0.45),
        ({"waiting": 4.0, "running": 0.0}, {"prompt_tokens": 1000}, 5.0 + 4 * 4.5),
        ({"queue_seconds": 9.0}, {"prompt_tokens": 1000}, 5.0),  # nobody waits there any more
        ({"queue_seconds": 9.0, "waiting": 1.0, "running": None}, {"prompt_tokens": 1000}, 5.0 + 9.0),
        ({"waiting": 1.0, "running": None}, {"prompt_tokens": 1000}, 5.0),
        (
            {"waiting": 2.0, "prefill_seconds": None, "decode_seconds": None},
            {"prompt_tokens": 1000},
            4.0 + 2 * 0.4,
        ),
    ],
)
def test_expected_seconds(changed: dict[str, Any], request_: dict[str, Any], seconds: float) -> None:
    request = SchedulingRequest(model=MODEL, **request_)
    assert expected_seconds(request, told(ENGINE | changed)) == pytest.approx([seconds])


def test_what_was_sent_since_the_last_scrape_is_ahead() -> None:
    request = SchedulingRequest(model=MODEL, prompt_tokens=1000)
    scraped = ENGINE | {"running": 10.0, "waiting": 2.0}
    times = [expected_seconds(request, told(scraped, in_flight=sent))[0] for sent in (0, 12, 13, 22)]
    assert times == pytest.approx([5.0 + 0.9, 5.0 + 0.9, 5.0 + 1.35, 5.0 + 12 * 0.45])


def test_the_lengths_are_the_requests_own() -> None:
    """An engine that lately had short answers is not quicker for this one."""
    short = ENGINE | {"generation_tokens_per_request": 20.0, "time_per_output_token": 0.03}
    slow, quick = expected_seconds(SchedulingRequest(model=MODEL, prompt_tokens=1), told(short, ENGINE))
    assert slow is not None
    assert quick is not None
    assert (slow, quick) == pytest.approx((0.001 + 110 * 0.03, 0.001 + 110 * 0.02))


def test_an_engine_that_was_idle_is_taken_for_an_average_one() -> None:
    twice = ENGINE | {"prefill_seconds": 1.5, "time_per_output_token": 0.04}
    idle = {"running": 0.0, "waiting": 0.0}
    request = SchedulingRequest(model=MODEL, prompt_tokens=1000, max_output_tokens=100)
    assert expected_seconds(request, told(ENGINE, twice, idle)) == pytest.approx([3.0, 7.0, 5.0])


@pytest.mark.parametrize(
    ("stats", "scores"),
    [
        ([ENGINE, ENGINE], [1.0, 1.0]),
        ([ENGINE, ENGINE | {"waiting": 10.0}], [1.0, 0.5]),
        ([ENGINE, ENGINE | {"waiting": 10.0}, None], [1.0, 0.5, 0.5]),  # not heard of: as slow as the slowest
        ([{"time_per_output_token": 0.0}, {"time_per_output_token": 1.0}], [1.0, 0.0]),
        ([{"time_per_output_token": 0.0}, {"time_per_output_token": 0.0}], [1.0, 1.0]),
    ],
)
def test_least_latency(stats: list[dict[str, Any] | None], scores: list[float]) -> None:
    request = SchedulingRequest(model=MODEL, prompt_tokens=500)
    assert LeastLatencyScorer().score(request, told(*stats)) == pytest.approx(scores)


def test_a_long_prompt_and_a_long_answer_go_to_different_engines() -> None:
    reader = ENGINE | {"prefill_seconds": 0.1, "time_per_output_token": 0.04}
    writer = ENGINE | {"prefill_seconds": 1.0, "time_per_output_token": 0.01}
    policy = registry.build()["least-latency"]

    def chosen(prompt: int, output: int) -> str:
        request = SchedulingRequest(model=MODEL, prompt_tokens=prompt, max_output_tokens=output)
        return policy.run(request, told(reader, writer), random.Random(1)).chosen.endpoint.name

    assert (chosen(8000, 10), chosen(10, 200)) == ("pod-1", "pod-2")


# -- lora-affinity -------------------------------------------------------------------------------------------------

LORA = SchedulingRequest(model="lora-1", adapter=True)


def engine(
    active: str = "", waiting: str = "", most: int | None = 2, in_flight: int = 0, number: int = 1
) -> Candidate:
    stats = EngineStats(
        at=0.0,
        loras=frozenset(active.split()),
        waiting_loras=frozenset(waiting.split()),
        max_loras=most,
    )
    return Candidate(endpoint(number), in_flight, stats)


@pytest.mark.parametrize(
    ("candidate", "readiness"),
    [
        (engine("lora-1"), 1.0),
        (engine("lora-1 lora-2"), 1.0),
        (engine("lora-2"), 0.8),
        (engine("", "lora-1"), 0.8),
        (engine("lora-2 lora-3", "lora-1"), 0.6),
        (engine("lora-2 lora-3"), 0.0),
        (engine("lora-2", "lora-3"), 0.0),  # one that waits has the last place
        (engine("lora-2", "lora-1"), 0.6),  # it may be this one
        (
            engine("lora-2", "lora-2"),
            0.8,
        ),  # of one that runs some requests may wait, which takes no other place
        (engine("lora-2", "lora-2 lora-3", most=3), 0.8),
        (engine("", most=None), 0.0),
        (engine("", "lora-1", most=None), 0.6),
        (Candidate(endpoint(1)), None),
        (Candidate(endpoint(1), 0, EngineStats(at=0.0, max_loras=4)), None),
    ],
)
def test_how_ready_an_engine_is_for_an_adapter(candidate: Candidate, readiness: float | None) -> None:
    assert lora.readiness("lora-1", candidate) == readiness


def test_lora_affinity_scores_readiness() -> None:
    candidates = [engine("lora-1"), engine("x"), engine("x y"), Candidate(endpoint(4))]
    assert LoraAffinityScorer().score(LORA, candidates) == [1.0, 0.8, 0.0, 0.0]
    assert LoraAffinityScorer().score(REQUEST, candidates) == [1.0] * 4
    with pytest.raises(MissingDataError):
        LoraAffinityScorer().score(LORA, candidates[3:])


@pytest.mark.parametrize(
    ("request_", "candidates", "stay"),
    [
        (LORA, [("x y", 0), ("lora-1", 3), ("x", 0)], [1]),
        (LORA, [("x y", 0), ("x", 3), ("", 0)], [1, 2]),
        (LORA, [("x y", 0), ("x y", 3)], [0, 1]),
        (LORA, [("lora-1", 8), ("x y", 0)], [0]),
        (LORA, [("lora-1", 9), ("x y", 0)], [0, 1]),  # so busy that the adapter is better loaded elsewhere
        (LORA, [("lora-1", 9), ("lora-1", 8), ("x y", 0)], [0, 1]),
        (LORA, [(None, 0), ("x y", 0)], [1]),
        (LORA, [(None, 0), (None, 3)], [0, 1]),
        (REQUEST, [("x y", 0), ("lora-1", 3)], [0, 1]),
    ],
)
def test_the_readiest_come_before_load_unless_they_are_overrun(
    request_: SchedulingRequest, candidates: list[tuple[str | None, int]], stay: list[int]
) -> None:
    made = [
        Candidate(endpoint(number), in_flight)
        if active is None
        else engine(active, in_flight=in_flight, number=number)
        for number, (active, in_flight) in enumerate(candidates)
    ]
    left = LoraAffinityFilter().filter(request_, made)
    assert [made.index(each) for each in left] == stay


@pytest.mark.parametrize(
    ("policy", "adapter", "chosen"),
    [
        ("least-request", True, {"pod-2"}),
        ("least-request", False, {"pod-1"}),
        ("power-of-two", True, {"pod-2"}),
        ("lora-affinity", True, {"pod-2"}),
        ("lora-affinity", False, {"pod-1"}),
        ("round-robin", True, {"pod-1"}),
        ("lora-affinity:1,least-request:2", True, {"pod-1"}),  # where it is mixed, weights alone decide
        ("lora-affinity:2,least-request:1", True, {"pod-2"}),
        ("least-kv-cache,least-request", True, {"pod-2"}),
    ],
)
def test_policies_and_adapters(policy: str, adapter: bool, chosen: set[str]) -> None:
    request = SchedulingRequest(model="lora-1", adapter=adapter)
    candidates = [engine("x y", number=1), engine("lora-1", in_flight=2, number=2)]
    profile = registry.build().find(policy)
    picks = {profile.run(request, candidates, random.Random(seed)).chosen.endpoint.name for seed in range(20)}
    assert picks == chosen


@pytest.mark.parametrize(
    ("states", "adapters"),
    [
        ([], set()),
        ([EngineState()], set()),
        ([EngineState(served=(ServedModel(id="base"), ServedModel(id="a", parent="base")))], {"a"}),
        ([EngineState(served=(ServedModel(id="base"), ServedModel(id="other")))], set()),
        (
            [EngineState(stats=EngineStats(at=0.0, loras=frozenset({"a"}), waiting_loras=frozenset({"b"})))],
            {"a", "b"},
        ),
        (
            [
                EngineState(stats=EngineStats(at=0.0, loras=frozenset({"a"}))),
                EngineState(stats=EngineStats(at=0.0)),
            ],
            {"a"},
        ),
    ],
)
def test_which_models_are_adapters(states: list[EngineState], adapters: set[str]) -> None:
    assert lora.adapters(states) == adapters
