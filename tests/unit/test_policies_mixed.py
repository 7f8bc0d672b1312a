"""Mixtures of policies: how they are written, and what they decide."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc import mixes
from envoy_extproc.errors import UnknownStrategy
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.server import configured
from envoy_extproc.server.director import RoutingRules
from envoy_extproc.settings import SettingsError, parse
from tests.support.builders import MODEL, candidate

REQUEST = SchedulingRequest(model=MODEL)
KV, LEAST = "least-kv-cache", "least-request"


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("random", [("random", 1)]),
        (" round-robin ", [("round-robin", 1)]),
        (f"{KV}:2,{LEAST}:1", [(KV, 2), (LEAST, 1)]),
        (f"{KV},{LEAST}", [(KV, 1), (LEAST, 1)]),
        (f" {KV} : 2 ,\t{LEAST}", [(KV, 2), (LEAST, 1)]),
        (f"{KV}:0,{LEAST}:3", [(LEAST, 3)]),
        (f"{LEAST}:3", [(LEAST, 3)]),
        (f"{KV}:1000000,{LEAST}:0000001", [(KV, 1_000_000), (LEAST, 1)]),
    ],
)
def test_how_policies_are_written(text: str, members: list[tuple[str, int]]) -> None:
    assert list(mixes.parse(text, registry.POLICIES)) == members


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no policy ''; there are random, "),
        ("best", "no policy 'best'; there are random, "),
        ("Least-Request", "no policy 'Least-Request'"),
        (f"best:2,{LEAST}", "no policy 'best'"),
        (f"{KV},", "no policy ''"),
        (":2", "no policy ''"),
        (f"random:1,{LEAST}", "'random' does not score"),
        (f"{LEAST},round-robin", "'round-robin' does not score"),
        (f"power-of-two:0,{LEAST}", "'power-of-two' does not score"),
        (f"pd,{LEAST}", "'pd' chooses pairs"),
        (f"{KV}:-1,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:1.5,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:1:2,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:1000001,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:{'9' * 100},{LEAST}", "from 0 to 1000000"),
        (f"{KV}:²,{LEAST}", "from 0 to 1000000"),
        (f"{KV}:0,{LEAST}:0", "a weight above 0"),
        (f"{KV}:1,{KV}:2", "once"),
        ("x" * 513, "at most 512 characters"),
    ],
)
def test_what_is_wrong_is_said(text: str, why: str) -> None:
    with pytest.raises(mixes.MixError) as wrong:
        mixes.parse(text, registry.POLICIES)
    assert why in str(wrong.value)
    with pytest.raises(UnknownStrategy) as refused:
        registry.build().find(text)
    assert why in refused.value.message
    assert refused.value.param == "routing-strategy"


def test_all_policies_with_weights_fit() -> None:
    scoring = [name for name in registry.POLICIES if name not in mixes.PICKING | mixes.ALONE]
    assert len(
        mixes.parse(mixes.canonical([(name, mixes.MAX_WEIGHT) for name in scoring]), registry.POLICIES)
    ) == len(scoring)


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from([KV, LEAST, ":", ",", "1", " ", "0"]), max_size=9).map("".join)
)
def test_any_text_is_a_policy_or_a_refusal(text: str) -> None:
    try:
        profile = registry.build().find(text)
    except UnknownStrategy:
        return
    assert registry.build().find(profile.name).name == profile.name


def test_the_policies_that_cannot_be_mixed_are_those_that_do_not_score() -> None:
    candidates = [candidate(1, kv=0.5), candidate(2, kv=0.5)]
    keyed = SchedulingRequest(model=MODEL, session_key=b"key")
    silent = {
        name
        for name, profile in registry.build().items()
        if name not in mixes.ALONE and not profile.run(keyed, candidates, random.Random(1)).scores
    }
    assert silent == mixes.PICKING


def decided(policy: str, candidates: list[Candidate]) -> Decision:
    return registry.build().find(policy).run(REQUEST, candidates, random.Random(1))


@pytest.mark.parametrize(
    ("policy", "chosen", "totals"),
    [
        (f"{KV}:2,{LEAST}:1", "pod-1", [2 / 3, 1 / 3]),
        (f"{KV}:1,{LEAST}:2", "pod-2", [1 / 3, 2 / 3]),
        (f"{KV}:1000000,{LEAST}:1", "pod-1", [1e6 / (1e6 + 1), 1 / (1e6 + 1)]),
    ],
)
def test_weights_decide(policy: str, chosen: str, totals: list[float]) -> None:
    decision = decided(policy, [candidate(1, 9, kv=0.40), candidate(2, 0, kv=0.41)])
    assert (decision.policy, decision.decided_by, decision.fallback_reason) == (policy, policy, None)
    assert decision.chosen.endpoint.name == chosen
    kv, least = decision.scores
    assert (kv.values, least.values) == ((1.0, 0.0), (0.0, 1.0))  # spread: 1 % of the cache is all there is
    weight = kv.weight + least.weight
    mean = [(a * kv.weight + b * least.weight) / weight for a, b in zip(kv.values, least.values, strict=True)]
    assert mean == pytest.approx(totals)


def test_what_all_have_alike_does_not_decide() -> None:
    decision = decided(f"{KV}:1000000,{LEAST}:1", [candidate(1, 1, kv=0.3), candidate(2, 0, kv=0.3)])
    assert decision.scores[0].values == (1.0, 1.0)
    assert decision.chosen.endpoint.name == "pod-2"


def test_a_member_without_data_is_left_out_and_named() -> None:
    decision = decided(
        f"least-latency:9,{LEAST}:1,{KV}:1", [candidate(1, 1, kv=0.1), candidate(2, 0, kv=0.1)]
    )
    assert decision.missing == ("least-latency",)
    assert [each.scorer for each in decision.scores] == [LEAST, KV]
    assert decision.fallback_reason is None
    assert decision.chosen.endpoint.name == "pod-2"


def test_without_any_data_least_request_decides() -> None:
    policy = "least-latency:1,least-kv-cache:1"
    decision = decided(policy, [candidate(1, 3), candidate(2, 1)])
    assert (decision.policy, decision.decided_by, decision.fallback_reason) == (policy, LEAST, "no-stats")
    assert decision.missing == ("least-latency", KV)
    assert decision.chosen.endpoint.name == "pod-2"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f" {KV} ,{LEAST}:02 ", f"{KV}:1,{LEAST}:2"),
        (f"{LEAST}:7", LEAST),
        (f"{KV}:0,{LEAST}", LEAST),
    ],
)
def test_a_mixture_has_one_name_however_it_is_written(text: str, name: str) -> None:
    assert registry.build().find(text).name == name


def test_only_so_many_mixtures_are_kept() -> None:
    policies = registry.build()
    for weight in range(1, 1000):
        policies.find(f"{KV}:{weight},{LEAST}")
    assert len(policies._mixes) == 256
    newest = policies.find(f"{KV}:999,{LEAST}")
    assert policies.find(f"{KV}:999,{LEAST}") is newest


# -- in the configuration ------------------------------------------------------------------------------------------

ENDPOINTS: dict[str, Any] = {
    "static": {"endpoints": [{"name": "a", "address": "10.0.0.1:8000", "models": [MODEL]}]}
}


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({"routing": {"policy": f"random,{LEAST}"}}, "routing.policy: the policy 'random' does not score"),
        ({"routing": {"policy": f"{KV}:x,{LEAST}"}}, "routing.policy: a weight is a whole number"),
        ({"routing": {"policy": ""}}, "routing.policy: no policy ''"),
        ({"models": {"m": {"policy": f"{KV}:0,{LEAST}:0"}}}, "models.m.policy: a mixture needs a weight"),
        ({"models": {"m": {"policy": ""}}}, "models.m.policy: no policy ''"),
        ({"models": {"m": {"locked": True}}}, "models.m: locked: true needs a policy"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(section: dict[str, Any], wrong: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse({"discovery": ENDPOINTS} | section, policies=registry.POLICIES)
    assert f"configuration: {wrong}" in str(refused.value)


def test_what_a_configuration_says_is_what_rules() -> None:
    settings = parse(
        {
            "discovery": ENDPOINTS,
            "routing": {"policy": f"{KV}:2,{LEAST}", "allow_strategy_header": False},
            "models": {"m": {"policy": "random", "locked": True}, "n": {"policy": LEAST}, "o": {}},
        },
        policies=registry.POLICIES,
    )
    assert configured.rules(settings) == RoutingRules(
        policy=f"{KV}:2,{LEAST}",
        model_policies={"m": "random", "n": LEAST},
        locked=frozenset({"m"}),
        allow_strategy_header=False,
    )
