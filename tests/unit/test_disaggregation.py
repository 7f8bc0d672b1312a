"""Prefill and decode apart: which pair is chosen, and what the two and the client are told."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.endpoints import Endpoint, EngineStats, Snapshot
from envoy_extproc.errors import NoReadyEndpoint
from envoy_extproc.exchange.commands import Continue
from envoy_extproc.exchange.events import Scheduled
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.disaggregation import PairProfile
from envoy_extproc.scheduling.explain import Asked, explain
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.server.director import Director, RoutingRules
from tests.support.builders import MODEL, endpoint
from tests.support.playbook import Playbook, asked, handover, reply

REQUEST = SchedulingRequest(model=MODEL)
GROUP = "stormservice.orchestration.aibrix.ai/pod-group-index"


def pod(
    number: int,
    role: str | None,
    roleset: str | None = "a",
    *,
    in_flight: int = 0,
    reachable: bool = True,
    labels: dict[str, str] | None = None,
    **stats: Any,
) -> Candidate:
    """The endpoint of that number; with figures its engine has been scraped."""
    own = {"role-name": role, "roleset-name": roleset, **(labels or {})}
    known = {name: value for name, value in own.items() if value is not None}
    told = EngineStats(at=stats.pop("at", 0.0), **stats) if stats else None
    return Candidate(msgspec.structs.replace(endpoint(number), labels=known), in_flight, told, reachable)


def decided(*candidates: Candidate, tries: int = 3, by: PairProfile | None = None) -> Decision:
    return (by or PairProfile()).run(REQUEST, candidates, random.Random(1), tries=tries)


def pair(made: Decision) -> tuple[str, str]:
    assert made.prefill is not None
    return made.prefill.endpoint.name, made.chosen.endpoint.name


P, D = "prefill", "decode"


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([pod(1, P), pod(2, D)], ("pod-1", "pod-2")),
        ([pod(1, D), pod(2, P)], ("pod-2", "pod-1")),
        ([pod(1, P, None), pod(2, D, None)], ("pod-1", "pod-2")),  # without rolesets all are of one
        ([pod(1, P, running=2), pod(2, P, running=1), pod(3, D)], ("pod-2", "pod-3")),
        ([pod(1, P, running=1, waiting=3), pod(2, P, running=2), pod(3, D)], ("pod-2", "pod-3")),
        # whose engine does not tell counts as the busiest of the others
        ([pod(1, P), pod(2, P, running=1), pod(3, P, running=4), pod(4, D)], ("pod-2", "pod-4")),
        ([pod(1, P, kv_cache_usage=0.1), pod(2, P, running=1), pod(4, P, waiting=4), pod(3, D)], ("pod-2", "pod-3")),
        ([pod(1, P), pod(2, D, in_flight=2), pod(3, D, in_flight=1)], ("pod-1", "pod-3")),
        ([pod(1, P), pod(2, D, running=9), pod(3, D, in_flight=5)], ("pod-1", "pod-3")),
        # 4/4 + 1/4 against 1/4 + 2/4: the sum decides, within a roleset alone
        (
            [
                pod(1, P, "a", running=4), pod(2, D, "a", in_flight=1),
                pod(3, P, "b", running=1), pod(4, D, "b", in_flight=2), pod(5, D, "b", in_flight=4),
            ],
            ("pod-3", "pod-4"),
        ),
        # 1/4 + 4/4 against 3/4 + 1/4
        (
            [
                pod(1, P, "a", running=1), pod(2, D, "a", in_flight=4),
                pod(3, P, "b", running=3), pod(4, D, "b", in_flight=1), pod(5, P, "b", running=4),
            ],
            ("pod-3", "pod-4"),
        ),
        # a roleset without one of the roles is none
        ([pod(1, P, "a"), pod(2, P, "b", running=9), pod(3, D, "b"), pod(4, D, "c")], ("pod-2", "pod-3")),
        # the endpoint picker's label; AIBrix's goes first
        (
            [
                pod(1, None, None, labels={"llm-d.ai/role": P}),
                pod(2, None, None, labels={"llm-d.ai/role": D}),
                pod(3, D, "b", labels={"llm-d.ai/role": P}),
            ],
            ("pod-1", "pod-2"),
        ),
        # of a group that holds one model only the first pod takes requests
        (
            [pod(1, P, labels={GROUP: "1"}), pod(2, P, running=5, labels={GROUP: "0"}), pod(3, D)],
            ("pod-2", "pod-3"),
        ),
        ([pod(1, P), pod(2, D, reachable=False), pod(3, D, in_flight=99)], ("pod-1", "pod-3")),
        # better one that seems out of reach than none
        ([pod(1, P, reachable=False), pod(2, D)], ("pod-1", "pod-2")),
        ([pod(1, P), pod(2, D), pod(3, None), pod(4, "both")], ("pod-1", "pod-2")),
    ],
)  # fmt: skip
def test_the_pair(candidates: list[Candidate], chosen: tuple[str, str]) -> None:
    assert pair(decided(*candidates)) == chosen


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        # prefill: 17 apart outweighs the decode side, 16 does not
        (
            [
                pod(1, P, "a", running=17), pod(2, D, "a"),
                pod(3, P, "b", running=0), pod(4, D, "b", in_flight=15),
            ],
            ("pod-3", "pod-4"),
        ),
        (
            [
                pod(1, P, "a", running=15), pod(2, D, "a"), pod(5, P, "a", running=16),
                pod(3, P, "b", running=0), pod(4, D, "b", in_flight=15),
            ],
            ("pod-1", "pod-2"),
        ),
        # decode: 16 apart, the idlest alone
        (
            [
                pod(1, P, "a", running=0), pod(2, D, "a", in_flight=17),
                pod(3, P, "b", running=15), pod(4, D, "b", in_flight=1), pod(5, D, "b", in_flight=3),
            ],
            ("pod-3", "pod-4"),
        ),
        (
            [
                pod(1, P, "a", running=0), pod(2, D, "a", in_flight=12),
                pod(3, P, "b", running=15), pod(4, D, "b"), pod(5, D, "b", in_flight=15),
            ],
            ("pod-1", "pod-2"),
        ),
        # decode: throughput 2,049 tokens per second apart
        (
            [
                pod(1, P), pod(2, D, generation_tokens_per_second=2049.0),
                pod(3, D, in_flight=9, generation_tokens_per_second=0.0),
            ],
            ("pod-1", "pod-3"),
        ),
        (
            [
                pod(1, P), pod(2, D, generation_tokens_per_second=2048.0),
                pod(3, D, in_flight=9, generation_tokens_per_second=0.0),
            ],
            ("pod-1", "pod-2"),
        ),
    ],
)  # fmt: skip
def test_imbalance_decides_by_itself(candidates: list[Candidate], chosen: tuple[str, str]) -> None:
    assert pair(decided(*candidates)) == chosen


@pytest.mark.parametrize(
    "candidates",
    [
        [pod(1, None)],
        [pod(1, P), pod(2, P)],
        [pod(1, D)],
        [pod(1, P, "a"), pod(2, D, "b")],
        [pod(1, P), pod(2, D, labels={GROUP: "1"})],
    ],
)
def test_without_a_roleset_there_is_nowhere_to_go(candidates: list[Candidate]) -> None:
    with pytest.raises(NoReadyEndpoint) as refused:
        decided(*candidates)
    assert refused.value.status == 503
    assert "prefill and a decode endpoint" in refused.value.message


def test_retries_stay_in_the_roleset_of_the_prefill() -> None:
    made = decided(
        pod(1, P, "a"),
        pod(2, D, "a"),
        pod(3, D, "a", in_flight=40),
        pod(4, P, "b"),
        pod(5, D, "b", in_flight=1),
    )
    assert [each.name for each in made.order] == ["pod-2", "pod-3", "pod-2"]


def test_a_decision_explains_itself() -> None:
    candidates = [
        pod(1, P, "a", running=2), pod(2, D, "a", in_flight=4), pod(3, P, "b", running=4), pod(4, D, "b"),
        pod(5, D, "c"), pod(6, D, "b", reachable=False), pod(7, D, "a", in_flight=20),
    ]  # fmt: skip
    made = decided(*candidates)
    (scores,) = made.scores
    assert [each.endpoint.name for each in made.candidates] == ["pod-2", "pod-7", "pod-4"]
    # the decode side is 20 apart: but for the idlest, pod-4, all are half a point lower
    assert scores.values == pytest.approx((0.5 - (0.5 + 0.2) / 4, 0.5 - (0.5 + 1) / 4, 1 - 1 / 4))
    assert made.filtered == (("reachable", ("pod-6",)), ("role", ("pod-1", "pod-3", "pod-5")))
    told = explain(made, Asked("pd", "routing"), candidates, model=MODEL)
    assert told.because[1:] == (
        "Left out by reachable: pod-6.",
        "Left out by role: pod-1, pod-3, pod-5.",
        "pod-4 has the best total, 0.750.",
        "pod-3 prefills its prompt.",
    )


def test_prefill_endpoints_are_sent_requests_in_turn_between_two_scrapes() -> None:
    by = registry.build()["pd"]
    counts = Counter[str]()
    scraped = [
        pod(1, P, running=3, at=5.0),
        pod(2, P, running=0, at=5.0),
        pod(3, P, running=0, at=5.0),
        pod(4, D),
    ]
    for _ in range(9):
        made = by.run(REQUEST, scraped, random.Random(1))
        by.remember(REQUEST, made)
        counts[pair(made)[0]] += 1
    assert counts == {"pod-2": 4, "pod-3": 4, "pod-1": 1}
    again = [pod(1, P, running=0, at=6.0), pod(2, P, running=1, at=6.0), pod(4, D)]
    assert pair(by.run(REQUEST, again, random.Random(1)))[0] == "pod-1"


def test_where_no_engine_tells_they_take_turns_and_newcomers_are_not_flooded() -> None:
    by = PairProfile()
    turns = []
    for step in range(9):
        candidates = [pod(1, P), pod(2, P), pod(9, D)] + ([pod(3, P)] if step > 3 else [])
        made = decided(*candidates, by=by)
        by.remember(REQUEST, made)
        turns.append(pair(made)[0])
    assert turns[:4] == ["pod-1", "pod-2", "pod-1", "pod-2"]
    assert sorted(turns[4:7]) == ["pod-1", "pod-2", "pod-3"]


def test_deciding_alone_remembers_nothing() -> None:
    by = PairProfile()
    assert pair(decided(pod(1, P), pod(2, P), pod(3, D), by=by)) == pair(
        decided(pod(1, P), pod(2, P), pod(3, D), by=by)
    )


def test_memory_is_bounded() -> None:
    by = PairProfile()
    for number in range(5000):
        made = decided(pod(1, P), pod(2, D), by=by)
        far = msgspec.structs.replace(endpoint(1), address=f"10.1.{number // 250}.{number % 250}:8000")
        by.remember(REQUEST, msgspec.structs.replace(made, prefill=Candidate(far)))
    assert len(by._sent) == 4096


PODS = st.lists(
    st.builds(
        pod,
        st.integers(1, 250),
        st.sampled_from([P, D, None]),
        st.sampled_from(["a", "b", None]),
        in_flight=st.integers(0, 40),
        reachable=st.booleans(),
        running=st.none() | st.floats(),
        generation_tokens_per_second=st.none() | st.floats(),
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda each: each.endpoint.address,
)


@given(PODS, st.integers(1, 5))
def test_what_holds_of_every_pair(candidates: Sequence[Candidate], tries: int) -> None:
    try:
        made = decided(*candidates, tries=tries)
    except NoReadyEndpoint:
        roles = Counter(
            (each.endpoint.labels.get("roleset-name"), each.endpoint.labels.get("role-name"))
            for each in candidates
        )
        assert not any(roles[name, P] and roles[name, D] for name in ("a", "b", None))
        return
    assert made.prefill is not None
    labels = made.prefill.endpoint.labels
    assert labels["role-name"] == P
    assert len(made.order) == tries
    assert made.order[0] == made.chosen.endpoint
    for each in made.order:
        assert each.labels["role-name"] == D
        assert each.labels.get("roleset-name") == labels.get("roleset-name")
    assert all(0 <= value <= 1 for value in made.scores[0].values)


# -- to the pods, to the client ------------------------------------------------------------------------------------


def endpoints() -> list[Endpoint]:
    return [each.endpoint for each in (pod(1, P), pod(2, D), pod(3, D))]


def test_the_director_sends_pairs() -> None:
    chosen = list[str]()
    director = Director(
        profiles=registry.build(),
        rules=RoutingRules(policy="pd"),
        in_flight={"10.0.0.1:8000": 0, "10.0.0.2:8000": 3, "10.0.0.3:8000": 1}.__getitem__,
        states={},
        rng=random.Random(1),
        chosen=chosen.append,
    )
    director.update(Snapshot(endpoints()))
    made = director.schedule(REQUEST, 0.0)
    assert pair(made) == ("pod-1", "pod-3")
    assert sorted(chosen) == ["10.0.0.1:8000", "10.0.0.3:8000"]  # both have work now
    assert made.decided_by == "pd"
    director.update(Snapshot(endpoints()[:1]))
    with pytest.raises(NoReadyEndpoint):
        director.schedule(REQUEST, 0.0)


NO_HEADERS: Mapping[str, str] = {}


def routed(*, native: bool = False, sent: Mapping[str, str] = NO_HEADERS) -> tuple[Playbook, Continue]:
    book = Playbook(native=native)
    book.request(end=False, subset=None, **sent)
    asked(book.body(b'{"model":"llama-3-8b"}'))
    made = decided(pod(1, P), pod(2, D))
    return book, reply(book.receive(Scheduled(book.now(), made)))


FORGED = {
    "x_prefiller_host_port": "169.254.169.254:80",
    "x_prefiller_url": "http://169.254.169.254",
    "x_encoder_hosts_ports": "6.6.6.6:1",
    "x_data_parallel_host_port": "6.6.6.6:1",
    "x_kv_cache_source_host_port": "6.6.6.6:1",
}


def test_the_decode_pod_is_told_who_prefills() -> None:
    _, reply_ = routed()
    sent = dict(reply_.set_headers)
    assert sent["x-prefiller-host-port"] == "10.0.0.1:8000"
    assert sent["target-pod"] == "10.0.0.2:8000"
    assert reply_.destination == ("10.0.0.2:8000",) * 3


def test_what_a_client_says_of_it_is_overwritten_or_removed() -> None:
    _, ours = routed(sent=FORGED)
    assert ("x-prefiller-host-port", "10.0.0.1:8000") in ours.set_headers
    kept = {name.replace("_", "-") for name in FORGED} - {"x-prefiller-host-port"}
    assert set(ours.remove_headers) == kept
    book = Playbook()
    plain = book.until_routed(b'{"model":"llama-3-8b"}', 1, **FORGED)
    assert set(plain.remove_headers) == kept | {"x-prefiller-host-port"}
    assert "x-prefiller-host-port" not in dict(plain.set_headers)


def test_the_client_is_told_who_prefilled() -> None:
    told = {("prefill-target-pod", "pod-1"), ("prefill-target-pod-ip", "10.0.0.1:8000")}
    book, _ = routed()
    (*_, answer) = book.answer(upstream="10.0.0.2:8000")
    assert isinstance(answer, Continue)
    assert told <= set(answer.set_headers)
    _, handed = routed(native=True)
    assert set(handover(handed).extras) == told
