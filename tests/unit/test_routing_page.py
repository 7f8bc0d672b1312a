"""docs/routing.md keeps to what is there: its tables are the code's, and its formulas come to what the code comes to."""

from __future__ import annotations

import hashlib
import random
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from envoy_extproc import mixes
from envoy_extproc.endpoints import EngineStats
from envoy_extproc.errors import NoReadyEndpoint
from envoy_extproc.scheduling import explain, guide, registry, selectors
from envoy_extproc.scheduling.fairness import FairnessRules
from envoy_extproc.scheduling.hashing import capacity
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest
from envoy_extproc.scheduling.profile import totals
from envoy_extproc.scheduling.scorers_prefix import PrefixLoadFilter
from envoy_extproc.state.fairness import Fairness
from tests.support import arithmetic
from tests.support.builders import MODEL, candidate, endpoint
from tests.support.pages import DOCS, section

PAGE = (DOCS / "routing.md").read_text(encoding="utf-8")
SETTINGS = {  # the page says that they are the defaults
    "load_bound": 1.25,
    "apart_tokens": 8000.0,
    "fairness_weight": 1.0,
    "load_weight": 1.0,
}


def part(title: str) -> str:
    """The text under a heading of the third level."""
    text = PAGE.partition(f"\n### {title}\n")[2]
    assert text, title
    return re.split(r"\n##+ ", text)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of its tables, headings and rules left out."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines]


def first_cells(text: str) -> list[str]:
    return [name for row in rows(text) for name in re.findall("`(.+?)`", row[0])]


def definitions(text: str) -> dict[str, str]:
    """What stands as ``name = formula`` in its blocks."""
    found = re.findall(r"^    (\w+) += (.+)$", text, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


# -- the tables ----------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_code() -> None:
    assert runpy.run_path(str(DOCS / "generate.py"))["PAGES"]["routing.md"]() == PAGE


def test_every_policy_is_there_once() -> None:
    assert sorted(first_cells(part("Every policy"))) == sorted(registry.POLICIES)
    assert not guide.GUIDE.keys() & guide.ALIASES.keys()


def test_the_short_list_leads_to_policies() -> None:
    table = [line for line in part("Which one?").splitlines() if line.startswith("| ")][1:]
    named = [re.findall("`([^`]+)`", line.strip("|").split(" | ")[1]) for line in table]
    policies = [text for texts in named for text in texts if not text.startswith("auth.")]
    assert all(registry.build().find(text).name for text in policies)
    first = {member for text in policies for member, _ in mixes.parse(text, registry.POLICIES)}
    assert first >= guide.GUIDE.keys() - {"throughput", "running-requests-size-scorer", "load-aware-scorer"}


@pytest.mark.parametrize("name", guide.ALIASES)
def test_another_name_is_of_the_same(name: str) -> None:
    request = SchedulingRequest(model="sql", adapter=True, prompt=None)
    candidates = [
        Candidate(endpoint(1), 3, EngineStats(at=0, kv_cache_usage=0.3, waiting=1, loras=frozenset({"sql"}))),
        Candidate(endpoint(2), 3, EngineStats(at=0, kv_cache_usage=0.6, waiting=0, loras=frozenset())),
    ]
    told = []
    for policy in (name, guide.ALIASES[name].policy):
        decision = registry.build()[policy].run(request, candidates, random.Random(1))
        told.append((decision.decided_by == policy, totals(decision.scores, 2), decision.fallback_reason))
    assert told[0] == told[1]


SILENT = [candidate(1, 2), candidate(2, 1)]


@pytest.mark.parametrize("policy", guide.GUIDE)
def test_who_decides_without_data(policy: str) -> None:
    row = next(row for row in rows(part("Every policy")) if row[0] == f"`{policy}`")
    fallback, *reasons = re.findall("`(.+?)`", row[3]) or [None]
    profile = registry.build()[policy]
    if policy == "pd":
        assert row[3] == "503"
        with pytest.raises(NoReadyEndpoint):
            profile.run(SchedulingRequest(model=MODEL), SILENT, random.Random(1))
        return
    asked = SchedulingRequest(model=MODEL, adapter=policy == "lora-affinity")
    seen = {}
    for request in (asked, msgspec.structs.replace(asked, session="10.9.9.9:80")):
        decision = profile.run(request, SILENT, random.Random(1))
        seen[decision.fallback_reason] = decision.decided_by
    if fallback is None:
        assert row[3] == "needs none"
        assert seen == {None: policy}
    else:
        assert seen == dict.fromkeys(reasons, fallback)


def test_every_reason_is_a_sentence_in_explanations() -> None:
    reasons = {reason for words in guide.GUIDE.values() for reason in words.lacks}
    assert reasons | {"scorer-failed"} == explain._REASONS.keys()


@pytest.mark.parametrize("policy", registry.POLICIES)
def test_what_a_mixture_makes_of_it(policy: str) -> None:
    words = {row[0].strip("`"): row[-2] for row in rows(part("Every policy"))}
    if words[policy] == "no":
        with pytest.raises(mixes.MixError):
            mixes.parse(f"{policy},least-request", registry.POLICIES)
        return
    policies, request, candidates = registry.build(), REQUEST, FLEET
    if policy.startswith("lora"):
        request = msgspec.structs.replace(request, model="sql", adapter=True)
    if policy.startswith("prefix"):
        policies.prefixes.learn(policies.prefixes.blocks(request)[:12], candidates[0].endpoint)
    alone = policies[policy].run(request, candidates, random.Random(1)).scores[0].values
    other = "throughput" if policy == "least-request" else "least-request"
    mixed = policies.find(f"{policy},{other}")
    (own, _) = mixed.run(request, candidates, random.Random(1)).scores
    width = max(alone) - min(alone)
    spread = tuple((value - min(alone)) / width for value in alone)
    assert own.values == pytest.approx(alone if words[policy] == "as it is" else spread)


# -- the example ---------------------------------------------------------------------------------------------------

EXAMPLE = part("An example")
GIVEN = {name: float(number) for name, number in re.findall(r"`(\w+) = (\d+)`", EXAMPLE)}
MEASURED = {row[0].strip("`"): list(map(float, row[1:])) for row in rows(EXAMPLE) if len(row) == 4}
EXPECTED = {row[0].strip("`"): (list(map(float, row[1:4])), row[4]) for row in rows(EXAMPLE) if len(row) == 5}
PODS = range(3)
"""In the order of their addresses."""


def hashes() -> list[float]:
    """As the page has it: the 64-bit BLAKE2b hash of key, 0x00 and ip:port, as a share of all there can be."""
    (key,) = re.findall(r"session key is `(.+?)`", EXAMPLE)
    texts = [f"{key}\x0010.0.0.{pod + 1}:8000".encode() for pod in PODS]
    return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / 2**64 for text in texts]


def names_of(pod: int) -> dict[str, float]:
    """All that formulas may ask for, of one pod of the example."""
    in_flight = MEASURED["in_flight"]
    return {
        **SETTINGS,
        **GIVEN,
        **{name: values[pod] for name, values in MEASURED.items()},
        "hash": hashes()[pod],
        "place": pod / (len(PODS) - 1),
        "in_flight_of_all": sum(in_flight),
        "most_in_flight": max(in_flight),
        "endpoints": len(PODS),
    }


def scores(formula: str, measure: str | None, known: Mapping[str, str]) -> list[float]:
    """A formula for every pod; `measure` is what `mine`, `most`, `fewest` and `least` are of."""
    if measure is None:
        return [arithmetic.value(formula, names_of(pod), known) for pod in PODS]
    of = [arithmetic.value(measure, names_of(pod), known) for pod in PODS]
    bounds = {"most": max(of), "fewest": min(of), "least": min(of)}
    return [arithmetic.value(formula, {"mine": mine, **bounds}) for mine in of]


def by_the_page(policy: str) -> list[float]:
    """A policy's scores by the formulas in its row and in the section that the row leads to."""
    row = next(row for row in rows(part("Every policy")) if row[0] == f"`{policy}`")
    formulas = re.findall(r"`([^`]+)`(?: of `([^`]+)`)?", row[1])
    known = definitions(PAGE)
    if policy == "bounded-load":
        free, busy = [scores(formula, None, known) for formula, _ in formulas]
        bound = arithmetic.value(known["bound"], names_of(0))
        room = [count < bound for count in MEASURED["in_flight"]]
        return [free[pod] if room[pod] else busy[pod] for pod in PODS]
    if policy == "vtc-basic":
        return scores(known["score"], None, known)
    formula, measure = formulas[-1]
    return scores(formula, measure or None, known)


BY_FORMULA = [
    *(
        "least-request",
        "prefix-cache",
        "bounded-load",
        "least-latency",
        "least-kv-cache",
        "least-utilization",
    ),
    *("throughput", "vtc-basic", "queue-scorer", "running-requests-size-scorer", "load-aware-scorer"),
]


@pytest.mark.parametrize("policy", BY_FORMULA)
def test_the_formulas_come_to_the_scores_of_the_example(policy: str) -> None:
    assert by_the_page(policy) == pytest.approx(EXPECTED[policy][0], abs=0.0006)


def test_the_example_is_complete() -> None:
    (mixture,) = EXPECTED.keys() - guide.GUIDE.keys()
    unlike = {"session-affinity", "lora-affinity"}  # levels, not formulas: see their words
    assert {mixture, *BY_FORMULA, *unlike} == EXPECTED.keys()
    assert EXPECTED["session-affinity"][0] == [0.0, 0.0, 1.0]
    levels = re.findall(r"(\d\.\d) (?:it runs|there is room|it waits)", guide.GUIDE["lora-affinity"].score)
    assert list(map(float, levels)) == EXPECTED["lora-affinity"][0]


def test_a_mixture_is_the_weighted_mean() -> None:
    (text,) = EXPECTED.keys() - guide.GUIDE.keys()
    members = mixes.parse(text, registry.POLICIES)
    weight = sum(weight for _, weight in members)
    mean = [sum(EXPECTED[name][0][pod] * weight for name, weight in members) / weight for pod in PODS]
    assert EXPECTED[text][0] == pytest.approx(mean, abs=0.0006)


@pytest.mark.parametrize("policy", EXPECTED)
def test_the_best_score_is_chosen_and_of_equals_the_less_busy(policy: str) -> None:
    values, chosen = EXPECTED[policy]
    best = min(PODS, key=lambda pod: (-values[pod], MEASURED["in_flight"][pod]))
    assert chosen == ("pod-a", "pod-b", "pod-c")[best]


# -- the formulas by themselves, where the example has one case of several -----------------------------------------

REQUEST: SchedulingRequest = runpy.run_path(str(DOCS / "generate.py"))["_REQUEST"]


def stats(**told: Any) -> EngineStats:
    return EngineStats(at=0.0, **told)


FLEET: Sequence[Candidate] = [
    Candidate(
        endpoint(number),
        count,
        stats(
            running=running,
            waiting=float(waiting),
            kv_cache_usage=usage,
            prompt_tokens_per_second=100.0 * number,
            prefill_seconds=0.1 * number,
            time_per_output_token=0.01,
            prompt_tokens_per_request=100.0,
            loras=frozenset({"sql"}) if number == 1 else frozenset({"x"}),
            max_loras=2 if number == 2 else 1,
        ),
    )
    for number, count, running, waiting, usage in (
        (1, 2, 2.0, 1, 0.25),
        (2, 2, 5.0, 0, 0.5),
        (3, 1, 3.0, 7, 0.65),
    )
]


@pytest.mark.parametrize("utilization", [0.0, 0.3, 1.0, 1.7])
def test_an_engine_that_tells_its_utilization(utilization: float) -> None:
    formula = re.findall("`(.+?)`", guide.GUIDE["least-utilization"].score)[0]
    told = [Candidate(endpoint(1), 0, stats(utilization=utilization, waiting=9.0))]
    decision = registry.build()["least-utilization"].run(SchedulingRequest(), told, random.Random(1))
    assert decision.scores[0].values == (arithmetic.value(formula, {"utilization": utilization}),)


@pytest.mark.parametrize("in_flight", [(0, 0), (1, 0), (9, 0, 0), (5, 5, 5), (30, 1, 2, 3)])
def test_the_bound_of_a_key(in_flight: tuple[int, ...]) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight, start=1)]
    names = SETTINGS | {"in_flight_of_all": sum(in_flight), "endpoints": len(in_flight)}
    assert capacity(1.25, candidates) == arithmetic.value(definitions(PAGE)["bound"], names)


@pytest.mark.parametrize("held", [0, 1, 8, 16])
@pytest.mark.parametrize("count", range(14))
def test_the_limit_of_a_prefix(held: int, count: int) -> None:
    policies = registry.build()
    blocks = policies.prefixes.blocks(REQUEST)
    candidates = [candidate(1, count), candidate(2, 0), candidate(3, 0)]
    policies.prefixes.learn(blocks[:held], candidates[0].endpoint)
    policies.prefixes.learn(blocks[:1], candidates[1].endpoint)
    names = SETTINGS | {"in_flight_of_all": count, "endpoints": 3, "held": held, "blocks": len(blocks)}
    limit = arithmetic.value(definitions(PAGE)["limit"], names)
    left = PrefixLoadFilter(policies.prefixes).filter(REQUEST, candidates)
    assert (candidates[0] in left) == (count <= limit)


@pytest.mark.parametrize("others", [(), (0,), (9,), (0, 1000, 1000, 5000), (400, 2000, 20_000)])
def test_the_score_of_a_user(others: tuple[int, ...]) -> None:
    fairness = Fairness(FairnessRules(input_weight=1, output_weight=0))
    own = 1000
    for user in range(1 + len(others)):
        fairness.charge(f"{user}", 0, 0, 0.0)  # all come before anybody is served
    for user, served in enumerate((own, *others)):
        fairness.charge(f"{user}", served, 0, 0.0)
    request = SchedulingRequest(model=MODEL, standing=fairness.standing("0", 0.0))
    decision = registry.build()["vtc-basic"].run(request, FLEET, random.Random(1))
    known = definitions(PAGE)
    for place, (each, score) in enumerate(zip(FLEET, decision.scores[0].values, strict=True)):
        names = SETTINGS | {"least_served": min(own, *others, own), "most_served": max(own, *others, own)}
        names |= {
            "others": len(others) or 1,
            "less": sum(map(own.__gt__, others)),
            "alike": others.count(own),
        }
        names |= {"in_flight": each.in_flight, "most_in_flight": 2, "place": place / 2}
        assert score == pytest.approx(arithmetic.value(known["score"], names, known))


def test_the_pair_with_the_least_load() -> None:
    roles = [
        ("prefill", 1, 6.0),
        ("prefill", 2, 2.0),
        ("decode", 1, 1.0),
        ("decode", 2, 8.0),
        ("decode", 2, 5.0),
    ]
    candidates = [
        Candidate(
            msgspec.structs.replace(endpoint(number), labels={"role-name": role, "roleset-name": f"{of}"}),
            0,
            stats(running=load),
        )
        for number, (role, of, load) in enumerate(roles, start=1)
    ]
    formula = definitions(PAGE)["load"]
    loads = {
        number: arithmetic.value(
            formula,
            {
                "prefill": next(load for role, at, load in roles if (role, at) == ("prefill", of)),
                "decode": own,
                "most_prefill": 6.0,
                "most_decode": 8.0,
            },
        )
        for number, (role, of, own) in enumerate(roles, start=1)
        if role == "decode"
    }
    decision = registry.build()["pd"].run(SchedulingRequest(), candidates, random.Random(1))
    assert decision.chosen.endpoint.name == f"pod-{min(loads, key=loads.__getitem__)}" == "pod-5"
    scored = dict(
        zip([each.endpoint.name for each in decision.candidates], decision.scores[0].values, strict=True)
    )
    assert sorted(scored, key=scored.__getitem__) == [
        f"pod-{number}" for number in sorted(loads, key=loads.__getitem__, reverse=True)
    ]


def test_every_formula_is_one_that_is_held() -> None:
    known = definitions(PAGE)
    assert known.keys() == {
        *("expected", "prefill", "decode", "queue", "limit", "bound", "score", "apart", "user", "load"),
    }


# -- the rest ------------------------------------------------------------------------------------------------------


def test_the_policies_that_cannot_be_mixed_are_named() -> None:
    (sentence,) = re.findall(r"[^.]*cannot be in a mixture\.", section("routing.md", "Mixtures"))
    assert set(re.findall("`(.+?)`", sentence)) == mixes.PICKING


@pytest.mark.parametrize(
    "term", [*first_cells(section("routing.md", "Selecting by label")), "gpu in (a10,l4),!spot"]
)
def test_the_selectors_can_be_read(term: str) -> None:
    assert selectors.parse(term).requirements


def test_the_mixture_can_be_read() -> None:
    (text,) = re.findall(r"^    (\S+)$", section("routing.md", "Mixtures"), re.MULTILINE)
    assert registry.build().find(text).name == text


def test_links_within_the_page_lead_to_headings() -> None:
    headings = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links
    assert set(links) <= anchors
