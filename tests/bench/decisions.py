"""What one decision takes by policy and fleet, with prompts of 8,000 tokens; and what the prefix index takes of memory.

    .venv/bin/python -m tests.bench.decisions [--markdown] [--rounds 3] [--endpoints 1000] [--policy prefix-cache ...]

`Director.schedule` is timed as a whole, the reading of the prompt included, in CPU time, while every pod has some requests in
flight. The requests are turns of conversations: ten system prompts of 2,000 tokens, each with many conversations that grow
to 8,000, of a hundred users. On a busy machine even CPU time is longer: with `--rounds` the same decisions are made so many
times over, and of each the shortest time counts.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes
from envoy_extproc.openai.prompt import BlockRule, Prompt, render
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.fairness import FairnessRules
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.state.breakers import BreakerRules, Breakers
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.load_reports import LoadReports
from envoy_extproc.state.memory import InFlight, Lease
from tests.bench.micro import microseconds

MODEL = "llama-3-8b"
_SYSTEM_BYTES, _TURN_BYTES, _TURNS = 8000, 2000, 12  # 32 KB in all: 8,000 tokens
_SYSTEMS = 10
_PER_POD = 4  # in flight on each
_WARM, _MEASURED = 1500, 3000
_MILLION = 1_000_000
_USERS = 100

POLICIES = (
    "least-request",
    "prefix-cache",
    "prefix-cache:3,least-request:1",
    "least-latency",
    "session-affinity",
    "bounded-load",
    "vtc-basic",
    "pd",
)
GOALS = {100: 0.3, 1000: 1.5}
"""Milliseconds for the 99th percentile, by endpoints; meant for `prefix-cache` mixtures."""


def text(rng: random.Random, size: int) -> str:
    """About `size` bytes of words."""
    return " ".join([f"{rng.getrandbits(20):05x}" for _ in range(size // 6)])


def bodies(rng: random.Random, conversations: int) -> Iterator[tuple[int, bytes]]:
    """(number, body) of turns of `conversations`, each at another turn at first; one that is over makes place for a new one."""
    systems = [text(rng, _SYSTEM_BYTES) for _ in range(_SYSTEMS)]
    speech = [text(rng, _TURN_BYTES) for _ in range(500)]

    def begin(turns: int) -> list[dict[str, str]]:
        said = [{"role": "user", "content": rng.choice(speech)} for _ in range(turns)]
        return [{"role": "system", "content": rng.choice(systems)}, *said]

    talks = [begin(rng.randint(1, _TURNS)) for _ in range(conversations)]
    while True:
        place = rng.randrange(conversations)
        talk = talks[place]
        talk.append({"role": "user", "content": rng.choice(speech)})
        yield place, msgspec.json.encode({"model": MODEL, "messages": talk})
        if len(talk) > _TURNS:
            talks[place] = begin(1)


def director(count: int, policy: str, in_flight: InFlight) -> Director:
    """One with `count` endpoints that tell everything, put together as `App` does it."""
    endpoints = [
        Endpoint(
            name=f"pod-{number}",
            address=f"10.0.{number // 250}.{number % 250}:8000",
            models=(MODEL,),
            labels={"role-name": "decode" if number % 2 else "prefill"},
        )
        for number in range(count)
    ]
    stats = EngineStats(
        at=0.0,
        running=3.0,
        waiting=0.0,
        kv_cache_usage=0.125,
        prefix_cache_hit_rate=0.5,
        prefill_seconds=0.2,
        decode_seconds=2.0,
        prompt_tokens_per_request=4000.0,
        generation_tokens_per_request=200.0,
    )
    breakers, reports = Breakers(BreakerRules(), jitter=lambda: 1.0), LoadReports()
    made = Director(
        profiles=registry.build(),
        rules=RoutingRules(policy=policy),
        in_flight=in_flight.count,
        counts=in_flight.counts,
        states={endpoint.address: EngineState(stats=stats) for endpoint in endpoints},
        rng=random.Random(1),
        avoided=breakers.avoided,
        doubted=breakers.doubted,
        fresher=reports.fresher,
        reports=reports.latest,
        fairness=Fairness(FairnessRules()),
    )
    made.update(Snapshot(endpoints))
    return made


def milliseconds(count: int, policy: str) -> list[float]:
    """Of each decision, in their order."""
    rng = random.Random(1)
    in_flight = InFlight()
    made = director(count, policy, in_flight)
    route = routes.find("/v1/chat/completions")
    assert route is not None
    under_way: deque[Lease] = deque()
    at: dict[int, str] = {}
    took = []
    gc.collect()
    gc.freeze()
    for number, (talk, body) in zip(range(_WARM + _MEASURED), bodies(rng, 4 * count), strict=False):
        inference, prompt = openai_request.read(body, route)
        request = SchedulingRequest(
            model=MODEL,
            prompt=prompt,
            prompt_tokens=inference.prompt_tokens_estimate,
            user=f"user-{talk % _USERS}" if "vtc" in policy else None,
            session=at.get(talk),
            session_key=b"%d" % talk,
        )
        began = time.thread_time()
        decision = made.schedule(request, 0.0)
        if number >= _WARM:
            took.append((time.thread_time() - began) * 1e3)
        at[talk] = decision.chosen.endpoint.address
        under_way.append(in_flight.acquire(decision.chosen.endpoint, MODEL))
        if len(under_way) > _PER_POD * count:
            under_way.popleft().release()
    gc.unfreeze()
    return took


def percentiles(count: int, policy: str, rounds: int) -> tuple[float, float]:
    """The 50th and the 99th, in milliseconds."""
    made = [milliseconds(count, policy) for _ in range(rounds)]
    took = sorted(map(min, zip(*made, strict=True)))
    return took[len(took) // 2], took[len(took) * 99 // 100]


def blocks() -> float:
    """Microseconds from a prompt of 8,000 tokens to its hashes."""
    rng = random.Random(1)
    said = [{"role": "user", "content": text(rng, _TURN_BYTES)} for _ in range(16)]
    raw = msgspec.Raw(msgspec.json.encode(said))
    rule = BlockRule()
    assert len(render({"messages": raw}, 10**9)) > 31_000

    def read() -> int:
        prompt = Prompt({"messages": raw})
        return len(prompt.hashes(rule, MODEL))

    return microseconds(read)


def index_bytes(holders: int) -> float:
    """Of a million blocks, each of them known of `holders` endpoints out of a hundred."""
    rng = random.Random(1)
    endpoints = [Endpoint(name=f"p{n}", address=f"10.0.0.{n}:1", models=(MODEL,)) for n in range(100)]
    index = PrefixIndex(per_endpoint=_MILLION, in_all=100 * _MILLION)
    for endpoint in endpoints:
        index.learn([1], endpoint)
    gc.collect()
    tracemalloc.start()
    for _ in range(_MILLION // 100):
        prompt = [rng.getrandbits(60) for _ in range(100)]
        for endpoint in rng.sample(endpoints, holders):
            index.learn(prompt, endpoint)
        del prompt
    index.match([])  # lets the last prompt go
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / index.distinct * _MILLION


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="What one decision takes by policy and fleet.")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of the same decisions; the shortest time counts"
    )
    parser.add_argument("--endpoints", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--policy", nargs="+", default=POLICIES)
    return parser.parse_args()


def show(rows: Sequence[tuple[int, str, float, float]]) -> None:
    """The table in Markdown."""
    print("| endpoints | policy | p50 | p99 | goal |\n|---|---|---|---|---|")
    for count, policy, p50, p99 in rows:
        goal = f"{GOALS[count]} ms" if count in GOALS and "prefix-cache" in policy else ""
        print(f"| {count:,} | `{policy}` | {p50:.3f} ms | {p99:.3f} ms | {goal} |")


def main() -> None:
    """Prints it all."""
    asked = arguments()
    print(f"a prompt of 8,000 tokens to its blocks: {blocks():.0f} us")
    rows = []
    for count in asked.endpoints:
        for policy in asked.policy:
            p50, p99 = percentiles(count, policy, asked.rounds)
            rows.append((count, policy, p50, p99))
            if not asked.markdown:
                print(f"{count:5} endpoints, {policy:32} p50 {p50:.3f} ms, p99 {p99:.3f} ms", flush=True)
    if asked.markdown:
        show(rows)
    for holders in (1, 4):
        print(f"a million blocks, each of {holders} endpoints: {index_bytes(holders) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
