"""The virtual fleet and its requests are what they say: the same every time, and read as the real parts are."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import msgspec
import pytest

from envoy_extproc.engines.dialects import DIALECTS
from envoy_extproc.engines.reading import read
from envoy_extproc.simulation.metrics import exposition
from envoy_extproc.simulation.options import EngineOptions
from tests.support.virtual_fleet import QUICK, Exchange, VirtualFleet, page
from tests.support.workload import SharedPrefixes, alike

pytestmark = pytest.mark.unmeasured

TALK = SharedPrefixes(
    rate=20, seconds=10, system_prompts=10, system_tokens=400, user_tokens=60, think_seconds=1
)


def played(policy: str = "prefix-cache", pods: int = 8) -> VirtualFleet:
    fleet = VirtualFleet(policy, pods=pods, options=QUICK, seed=3)
    fleet.run(TALK.arrivals(1), until=40)
    return fleet


def told(each: Exchange) -> tuple[object, ...]:
    return each.at, each.asked, each.outcome, each.cached_tokens, each.first_token_at, each.ended_at


def test_the_same_seed_is_the_same_run() -> None:
    one, other = played(), played()
    assert list(map(told, one.exchanges)) == list(map(told, other.exchanges))
    assert TALK.arrivals(1) != TALK.arrivals(2)


def test_requests_come_as_often_as_they_should() -> None:
    arrivals = msgspec.structs.replace(TALK, seconds=100).arrivals(5)
    assert len(arrivals) == pytest.approx(2000, rel=0.05)
    assert all(one.at <= other.at for one, other in pairwise(arrivals))
    early = [sum(each.at < 5 for each in TALK.arrivals(seed)) for seed in range(20)]
    assert mean(early) == pytest.approx(100, rel=0.1)  # from the first second on


def test_some_beginnings_are_more_popular_than_others() -> None:
    shares = sorted(
        (
            sum(b"system prompt %d " % number in each.body for each in TALK.arrivals(1))
            for number in range(10)
        ),
        reverse=True,
    )
    assert sum(shares) == len(TALK.arrivals(1))
    assert shares[0] > 3 * shares[-1] > 0


def test_a_share_of_the_prompts_is_alike() -> None:
    arrivals = alike(100, 10, seed=1, share=0.8)
    hot = sum(each.headers["x-aibrix-session-key"] == "hot" for each in arrivals)
    assert hot == pytest.approx(0.8 * len(arrivals), rel=0.05)


def test_a_turn_finds_the_turns_before_it_and_their_answers() -> None:
    """With one pod, whose cache has room for all."""
    run = played(pods=1)
    size = EngineOptions().block_size
    for one, other in pairwise(sorted(run.exchanges, key=lambda each: (each.arrival.conversation, each.at))):
        if one.arrival.conversation == other.arrival.conversation and one.ended_at < other.at:  # type: ignore[operator]
            assert other.cached_tokens > one.prompt_tokens + 0.7 * one.tokens - 2 * size


def test_a_page_says_what_the_engines_own_page_says() -> None:
    run = played()
    pod = next(iter(run.pods.values()))
    vllm = DIALECTS["vllm"]
    short = read(vllm, page(pod), 1.0)
    whole = read(vllm, exposition(QUICK, pod.batch.gauges, pod.batch.stats, pod.started), 1.0)
    assert short.stats == whole.stats
    assert short.stats.prefix_cache_hit_rate
    assert short.counters.items() <= whole.counters.items()


def test_nothing_is_left_when_all_is_over() -> None:
    run = played("vtc-basic")
    assert {each.outcome for each in run.exchanges} == {"success"}
    assert run.in_flight.total == 0
    assert all(not pod.work and not pod.batch.unfinished for pod in run.pods.values())
