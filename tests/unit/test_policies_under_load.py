"""What each policy does when a prompt is hot, a pod dies, comes or goes, engines fall silent, or all are full.

Eight virtual pods with the real director. The numbers are those of docs/routing.md: its table is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from math import ceil
from pathlib import Path
from statistics import mean

import pytest

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.scheduling import registry
from envoy_extproc.simulation.options import EngineOptions
from tests.support.virtual_fleet import QUICK, Exchange, VirtualFleet, pod
from tests.support.workload import Arrival, SharedPrefixes, alike, flood

pytestmark = pytest.mark.unmeasured

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
PODS = 8
MIXES = (
    "prefix-cache:3,least-request:1",
    "queue-scorer:2,kv-cache-utilization-scorer:2,prefix-cache-scorer:3",
    "least-kv-cache:2,least-request:1",
)
EVERY = (*registry.POLICIES, *MIXES)
FULL = EngineOptions(ttft_seconds=0.01, tpot_seconds=0.02, max_running=8)


def section(title: str) -> str:
    return PAGE.partition(f"### {title}\n")[2].partition("\n### ")[0].partition("\n## ")[0]


def rows() -> Iterator[tuple[str, Sequence[float]]]:
    """Each policy of the table, and its numbers."""
    for line in section("The busiest pod").splitlines():
        if line.startswith("| `"):
            names, *numbers = line.strip("| ").split(" | ")
            for name in re.findall("`(.+?)`", names):
                yield name, [float(number) for number in numbers]


TABLE = dict(rows())


@cache
def load(rate: float, seconds: float, share: float = 0.0, answer: int = 40) -> list[Arrival]:
    return alike(rate, seconds, seed=1, share=share, answer_tokens=answer)


def fleet(policy: str, count: int = PODS, options: EngineOptions = QUICK) -> VirtualFleet:
    """Half of the pods of `pd` prefill, so they are twice as many: those that answer are `count`, and the first of all."""
    return VirtualFleet(
        policy, pods=[each for n in range(1, count + 1) for each in pods(policy, n)], options=options, seed=1
    )


def pods(policy: str, number: int) -> list[Endpoint]:
    if policy != "pd":
        return [pod(number)]
    return [pod(number, role_name="decode"), pod(number + 20, role_name="prefill")]


def busiest(found: Sequence[Exchange]) -> float:
    """The most in flight on one pod, times the mean of all, at any decision."""
    counts = [answering(each.in_flight) for each in found]
    return max(max(each) * len(each) / sum(each) for each in counts if sum(each) >= PODS)


def answering(in_flight: Mapping[str, int]) -> list[int]:
    return [number for name, number in in_flight.items() if name < "pod-20"]


def between(run: VirtualFleet, begin: float, end: float) -> list[Exchange]:
    return [each for each in run.exchanges if begin <= each.at < end]


def share(found: Sequence[Exchange], name: str) -> float:
    """What a pod got, times the mean of all eight."""
    return sum(each.pod == name for each in found) * PODS / len(found)


# -- the table -----------------------------------------------------------------------------------------------------


@cache
def silence(policy: str) -> VirtualFleet:
    """No engine's page can be read from second 2 on."""
    run = fleet(policy)
    run.at(2.0, lambda: run.silence(*run.pods))
    run.run(load(60, 8.5), until=8.5)
    return run


def as_usual(policy: str) -> float:
    return busiest(between(silence(policy), 0.8, 2))


def old_figures(policy: str) -> float:
    return busiest(between(silence(policy), 2, 4.1))


def no_figures(policy: str) -> float:
    return busiest(between(silence(policy), 7.5, 8.5))


def hot_prompt(policy: str) -> float:
    run = fleet(policy)
    run.run(load(60, 5, 0.8), until=5)
    return busiest(between(run, 1, 5))


@cache
def newcomer(policy: str) -> VirtualFleet:
    """The eighth pod comes at second 2."""
    run = fleet(policy, PODS - 1)
    run.at(2.0, lambda: run.add(*pods(policy, PODS)))
    run.run(load(60, 6), until=6)
    return run


def a_pod_comes(policy: str) -> float:
    """Of the newcomer."""
    counts = [
        (each.in_flight["pod-08"], answering(each.in_flight)) for each in between(newcomer(policy), 2.001, 6)
    ]
    return max(its * len(all_) / sum(all_) for its, all_ in counts)


@cache
def overrun(policy: str) -> VirtualFleet:
    """Nearly twice the requests that all pods together can serve."""
    run = fleet(policy, options=FULL)
    run.run(load(130, 4), until=4)
    return run


def all_are_full(policy: str) -> float:
    return busiest(between(overrun(policy), 2, 4))


def one_is_silent(policy: str) -> float:
    run = fleet(policy)
    run.at(2.0, lambda: run.silence("pod-03"))
    run.run(load(60, 6.5), until=6.5)
    return share(between(run, 4.5, 6.5), "pod-03")


SITUATIONS = (as_usual, hot_prompt, old_figures, no_figures, a_pod_comes, all_are_full)


def test_the_table_has_every_policy() -> None:
    assert sorted(TABLE) == sorted(EVERY)


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("column", range(len(SITUATIONS)))
def test_the_busiest_pod_has_no_more_than_the_table_says(policy: str, column: int) -> None:
    told = TABLE[policy][column]
    assert told / 2.5 <= SITUATIONS[column](policy) <= told


@pytest.mark.parametrize("policy", EVERY)
def test_what_a_pod_gets_whose_engine_does_not_tell(policy: str) -> None:
    assert one_is_silent(policy) == pytest.approx(TABLE[policy][-1], abs=0.3)


# -- a prompt is hot -----------------------------------------------------------------------------------------------

BY_PREFIX = [policy for policy in EVERY if "prefix-cache" in policy]
CONVERSATIONS = SharedPrefixes(
    rate=16, seconds=16, system_prompts=40, system_tokens=600, turns=4, user_tokens=40, think_seconds=2
)
SMALL = EngineOptions(ttft_seconds=0.02, tpot_seconds=0.02, max_running=64, kv_blocks=700)
"""Caches with room for a quarter of the system prompts."""


@pytest.mark.parametrize("policy", BY_PREFIX)
def test_the_holder_of_a_hot_prompt_has_no_more_than_the_rule(policy: str) -> None:
    run = fleet(policy)
    run.run(load(60, 5, 0.8), until=5)
    asked = [each for each in between(run, 0.5, 5) if each.arrival.headers["x-aibrix-session-key"] == "hot"]
    for each in asked:
        chosen, mean = each.chosen.chosen, (sum(each.in_flight.values()) + 1) / PODS
        assert chosen.prefix_match is not None
        assert chosen.in_flight <= 1.25 * mean + 8 * chosen.prefix_match
    assert len({each.pod for each in asked}) > 1


def test_bounded_load_keeps_its_bound() -> None:
    run = fleet("bounded-load")
    run.run(load(60, 5, 0.8), until=5)
    for each in run.exchanges:
        assert each.chosen.chosen.in_flight < ceil(1.25 * (sum(each.in_flight.values()) + 1) / PODS)


@cache
def talked(policy: str) -> tuple[float, float]:
    """Share of the prompts found in caches, and mean seconds to the first token."""
    run = fleet(policy, options=SMALL)
    run.run(CONVERSATIONS.arrivals(1), until=40)
    assert {each.outcome for each in run.exchanges} == {"success"}
    hits = sum(each.cached_tokens for each in run.exchanges) / sum(
        each.prompt_tokens for each in run.exchanges
    )
    return hits, mean(each.time_to_first_token or 0.0 for each in run.exchanges)


@pytest.mark.parametrize("policy", [*BY_PREFIX, "session-affinity"])
def test_prompts_that_begin_alike_are_found_in_caches(policy: str) -> None:
    hits, seconds = talked(policy)
    for other in ("round-robin", "least-request"):
        assert hits > talked(other)[0] + 0.1
        assert seconds < talked(other)[1]


# -- a pod dies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY)
def test_a_pod_that_dies(policy: str) -> None:
    run = fleet(policy)
    held = list[int]()
    run.at(2.0, lambda: held.append(len(run.pods["pod-03"].work)))
    run.at(2.0, lambda: run.kill("pod-03"))
    run.at(4.0, lambda: run.revive("pod-03"))
    run.run(load(60, 6.5), until=30)
    met = [each for each in between(run, 2, 4) if "pod-03" in each.asked]
    assert all(each.at <= 2.2 for each in met)
    broken = [each for each in run.exchanges if each.outcome != "success"]
    assert [len(broken)] == held
    assert all(each.at < 2 and each.pod == "pod-03" for each in broken)
    assert all(each.chosen.chosen.reachable for each in between(run, 2, 4))
    assert all(
        "pod-03" not in gone for each in between(run, 6.05, 6.5) for _, gone in each.chosen.filtered[:1]
    )
    assert run.in_flight.total == 0


@pytest.mark.parametrize("policy", [policy for policy in EVERY if policy != "pd"])
def test_where_all_are_dead_somebody_is_asked(policy: str) -> None:
    run = fleet(policy, 2)
    for name in run.pods:
        run.at(2.0, partial(run.kill, name))
    run.run(load(10, 4), until=5)
    late = between(run, 2.3, 4)
    assert {each.outcome for each in late} == {"failed"}
    assert all({*each.asked} == {"pod-01", "pod-02"} for each in late)


def test_an_idle_pod_that_dies_is_noticed_soon_after_somebody_asks_for_it() -> None:
    run = fleet("round-robin", 2)
    run.at(9.0, lambda: run.kill("pod-01"))
    run.run([each for each in load(60, 10) if each.at > 9.5], until=20)
    met = [each.at for each in run.exchanges if "pod-01" in each.asked]
    assert met
    assert max(met) - min(met) <= 0.2
    assert {each.outcome for each in run.exchanges} == {"success"}


def test_a_prefill_pod_that_dies_is_not_chosen_for_long() -> None:
    run = fleet("pd")
    run.at(2.0, lambda: run.kill("pod-23"))
    run.run(load(60, 5), until=30)
    assert any(_prefill(each) == "pod-23" for each in between(run, 1, 2))
    assert all(_prefill(each) != "pod-23" for each in between(run, 2.2, 5))


def _prefill(each: Exchange) -> str:
    assert each.chosen.prefill is not None
    return each.chosen.prefill.endpoint.name


# -- a pod goes, a pod comes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY)
def test_a_pod_that_is_removed_gets_nothing_and_finishes_what_it_has(policy: str) -> None:
    run = fleet(policy)
    run.at(2.0, lambda: run.remove("pod-03"))
    run.run(load(60, 3, 0.5), until=30)
    assert run.pods["pod-03"].most > 0
    assert all("pod-03" not in each.asked for each in between(run, 2, 3))
    assert {each.outcome for each in run.exchanges} == {"success"}
    assert run.in_flight.total == 0


@pytest.mark.parametrize("policy", EVERY)
def test_a_pod_that_comes_has_its_share_soon(policy: str) -> None:
    assert 0.5 < share(between(newcomer(policy), 4, 6), "pod-08") < 2


def moved(policy: str, *, sessions: bool) -> tuple[Counter[str], int]:
    """Where turns went whose turn before had been at another pod, since the eighth pod came; and how many turns there were."""
    run = VirtualFleet(policy, pods=PODS - 1, options=QUICK, seed=1, sessions=sessions)
    run.at(8.0, lambda: run.add(pod(PODS)))
    run.run(CONVERSATIONS.arrivals(1), until=40)
    last, turns, found = dict[int, str](), 0, Counter[str]()
    for each in run.exchanges:
        before = last.get(each.arrival.conversation)
        if before is not None and each.at >= 8:
            turns += 1
            if before != each.pod:
                found[each.pod] += 1
        last[each.arrival.conversation] = each.pod
    return found, turns


def test_a_pod_that_comes_takes_its_own_share_of_the_keys_and_nothing_else() -> None:
    found, turns = moved("session-affinity", sessions=False)
    assert found.keys() == {"pod-08"}
    assert found.total() < turns / PODS


def test_sessions_stay_where_they_are() -> None:
    assert moved("session-affinity", sessions=True)[0] == {}


@pytest.mark.parametrize("policy", BY_PREFIX)
def test_conversations_stay_where_they_are(policy: str) -> None:
    found, turns = moved(policy, sessions=False)
    assert found.total() < turns / 20


# -- all are full --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY)
def test_where_all_are_full_nobody_starves(policy: str) -> None:
    found = between(overrun(policy), 1, 4)
    shares = [share(found, f"pod-{number:02}") for number in range(1, PODS + 1)]
    assert min(shares) > (0.1 if policy == "throughput" else 0.35)  # which may not see that one is idle
    assert max(shares) < 2


def test_prefill_pods_share_evenly() -> None:
    counts = Counter(_prefill(each) for each in between(overrun("pd"), 1, 4))
    assert len(counts) == PODS
    assert max(counts.values()) < 1.3 * counts.total() / PODS


# -- one user floods -----------------------------------------------------------------------------------------------


def waits(policy: str, rate: float) -> Mapping[str, float]:
    """Mean seconds to the first token of a user with so many requests a second, and of one with three."""
    run = fleet(policy, options=FULL)
    run.run(flood(rate, 3, 12, seed=1), until=60)
    return {
        user: mean(each.time_to_first_token or 0.0 for each in between(run, 3, 12) if each.user == user)
        for user in ("heavy", "light")
    }


def test_a_light_user_waits_less_beside_one_who_floods() -> None:
    alike_, fair = waits("least-request", 90), waits("vtc-basic", 90)
    assert alike_["light"] > 0.5
    assert fair["light"] < alike_["light"] / 10
    assert fair["heavy"] < alike_["heavy"] * 2


def test_below_what_pods_can_serve_that_has_its_price() -> None:
    assert waits("vtc-basic", 65)["heavy"] > 1.5 * waits("least-request", 65)["heavy"]
