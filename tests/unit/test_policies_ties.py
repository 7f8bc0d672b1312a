"""Of equals each is as likely, by every policy: first, and second where the first does not answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.openai import request, routes
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest, Standing
from tests.support.builders import MODEL, endpoint
from tests.support.workload import body, text

pytestmark = pytest.mark.unmeasured

MIXES = (
    "prefix-cache:3,least-request:1",
    "queue-scorer,throughput",
    "least-kv-cache:2,weighted-random-picker",
)
EVERY = (*registry.POLICIES, *MIXES)
DRAWS = 1200
CRITICAL = {5: 18.47, 12: 31.26}
"""Chi-square with one degree of freedom less, exceeded by chance once in a thousand times. The seeds are fixed."""

STATS = EngineStats(
    at=0.0,
    running=3,
    waiting=1,
    kv_cache_usage=0.5,
    generation_tokens_per_second=100.0,
    prompt_tokens_per_second=100.0,
    prefill_seconds=0.1,
    decode_seconds=1.0,
    time_per_output_token=0.02,
    prompt_tokens_per_request=100.0,
    generation_tokens_per_request=50.0,
    loras=frozenset(),
    max_loras=2,
)
ROUTE = next(route for route in routes.ROUTES if route.path == "/v1/chat/completions")


def prompt() -> Prompt:
    read = request.read(body([{"role": "user", "content": text("a question ", 300)}], 20), ROUTE)[1]
    assert read is not None
    return read


def asked(policy: str) -> SchedulingRequest:
    """A request for which nobody is better than others: of a key each would have its own home."""
    keyed = policy in ("bounded-load", "session-affinity")
    return SchedulingRequest(
        model=MODEL,
        prompt_tokens=300,
        prompt=None if keyed else prompt(),
        adapter=policy.startswith("lora"),
        standing=Standing(own=5.0, least=5.0, most=5.0, below=0.5),
    )


def equals(policy: str, count: int, stats: EngineStats | None) -> list[Candidate]:
    """So many to choose from; `pd` has a prefill endpoint besides."""
    label = {"role-name": "decode"}
    found = [
        Candidate(msgspec.structs.replace(endpoint(n), labels=label), 2, stats) for n in range(1, count + 1)
    ]
    if policy == "pd":
        found.append(
            Candidate(msgspec.structs.replace(endpoint(99), labels={"role-name": "prefill"}), 2, stats)
        )
    return found


def chi_square(counts: Counter[str], count: int) -> float:
    expected = counts.total() / count
    names = [endpoint(number).name for number in range(1, count + 1)]
    assert counts.keys() <= set(names)
    return sum((counts[name] - expected) ** 2 / expected for name in names)


@pytest.mark.parametrize("stats", [STATS, None])
@pytest.mark.parametrize("count", list(CRITICAL))
@pytest.mark.parametrize("policy", [policy for policy in EVERY if policy != "round-robin"])
def test_of_equals_each_is_as_likely(policy: str, count: int, stats: EngineStats | None) -> None:
    profile, rng = registry.build().find(policy), random.Random(11)
    candidates, question = equals(policy, count, stats), asked(policy)
    first, second = Counter[str](), Counter[str]()
    for _ in range(DRAWS):
        order = profile.run(question, candidates, rng).order
        first[order[0].name] += 1
        second[order[1].name] += 1
    assert chi_square(first, count) < CRITICAL[count]
    assert chi_square(second, count) < CRITICAL[count]


@pytest.mark.parametrize("by", ["round-robin", "pd"])
def test_whoever_takes_turns_takes_them_evenly(by: str) -> None:
    profile, rng = registry.build().find(by), random.Random(11)
    candidates: Sequence[Candidate] = equals(by, 5, STATS)
    if by == "pd":  # it is the prefill endpoints that take turns
        labels = [{"role-name": "prefill"}] * 5 + [{"role-name": "decode"}]
        candidates = [
            Candidate(msgspec.structs.replace(each.endpoint, labels=label), 2, STATS)
            for each, label in zip(candidates, labels, strict=True)
        ]
    counts = Counter[str]()
    for _ in range(100):
        decision = profile.run(asked(by), candidates, rng)
        profile.remember(asked(by), decision)
        counts[(decision.prefill or decision.chosen).endpoint.name] += 1
    assert set(counts.values()) == {20}
