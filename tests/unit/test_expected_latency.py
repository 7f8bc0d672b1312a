"""`least-latency` looks into an engine's stats once and remembers what it found: that changes no bit of any result."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.latency import Figures, LeastLatencyScorer, expected_seconds
from envoy_extproc.scheduling.roster import Roster
from tests.support.builders import MODEL, endpoint

FIELDS = (
    "running",
    "waiting",
    "queue_seconds",
    "prefill_seconds",
    "decode_seconds",
    "time_to_first_token",
    "time_per_output_token",
    "prompt_tokens_per_request",
    "generation_tokens_per_request",
)
ODD = st.sampled_from([0.0, -0.0, -1.0, 5e-324, 1e-9, 1e12, 9.9e14, 1e15, float("inf"), float("nan")])
FIGURES = st.none() | st.floats(0.0, 1e4) | st.integers(0, 99).map(lambda part: part / 7) | ODD
STATS = st.none() | st.builds(EngineStats, at=st.just(0.0), **dict.fromkeys(FIELDS, FIGURES))
REQUESTS = st.builds(
    SchedulingRequest,
    model=st.just(MODEL),
    prompt_tokens=st.just(0) | st.integers(0, 10**10),
    max_output_tokens=st.none() | st.integers(-1, 10**10),
)
DECISIONS = st.tuples(REQUESTS, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1))
"""The request, and for each candidate which of ten stats it has, and its exchanges in flight."""


# -- the formula, plainly: each candidate by itself, nothing remembered --------------------------------------------


def told(value: float | None) -> float | None:
    return value if value is not None and 0 <= value < 1e15 else None


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def ratio(whole: float | None, parts: float | None) -> float | None:
    return min(whole / parts, 1e12) if whole is not None and parts else None


def prefill_per_token(stats: EngineStats) -> float | None:
    spent, first = told(stats.prefill_seconds), told(stats.time_to_first_token)
    if spent is None and first is not None:
        spent = max(0.0, first - (told(stats.queue_seconds) or 0.0))
    return ratio(spent, told(stats.prompt_tokens_per_request))


def decode_per_token(stats: EngineStats) -> float | None:
    own = told(stats.time_per_output_token)
    average = ratio(told(stats.decode_seconds), told(stats.generation_tokens_per_request))
    return average if own is None else own


def wait(stats: EngineStats, in_flight: int, own: float) -> float:
    running, waiting = told(stats.running), told(stats.waiting) or 0.0
    ahead = waiting + max(0.0, in_flight - (running or 0.0) - waiting)
    if not ahead:
        return 0.0
    if running is None:
        return told(stats.queue_seconds) or 0.0
    turn = (told(stats.prefill_seconds) or 0.0) + (told(stats.decode_seconds) or 0.0)
    return ahead * (turn or own) / max(running, 1.0)


def lengths(request: SchedulingRequest, heard: Sequence[EngineStats]) -> tuple[float, float]:
    prompt: float | None = float(min(request.prompt_tokens, 10**9))
    if not prompt:
        prompt = mean([told(each.prompt_tokens_per_request) for each in heard])
    output = mean([told(each.generation_tokens_per_request) for each in heard])
    if request.max_output_tokens is not None:
        most = float(max(0, min(request.max_output_tokens, 10**9)))
        output = min(most, output or most)
    return 10.0 if prompt is None else prompt, output or 100.0


def plainly(request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float | None] | None:
    """The seconds of each; None where no engine tells how quick it is."""
    heard = [each.stats for each in candidates if each.stats is not None]
    prefill = mean([prefill_per_token(each) for each in heard])
    decode = mean([decode_per_token(each) for each in heard])
    if prefill is None and decode is None:
        return None
    prompt, output = lengths(request, heard)

    def seconds(stats: EngineStats | None, in_flight: int) -> float | None:
        if stats is None:
            return None
        reads, writes = prefill_per_token(stats), decode_per_token(stats)
        own = prompt * ((prefill or 0.0) if reads is None else reads)
        own += output * ((decode or 0.0) if writes is None else writes)
        return min(own + wait(stats, in_flight, own), 1e12)

    return [seconds(each.stats, each.in_flight) for each in candidates]


def shares(seconds: Sequence[float | None]) -> Sequence[float]:
    heard = [each for each in seconds if each is not None]
    low, worst = min(heard), max(heard)
    times = [worst if each is None else each for each in seconds]
    return [1.0 if mine <= low else low / mine for mine in times]


# -- and what is remembered of it ----------------------------------------------------------------------------------


def bits(values: Sequence[float | None]) -> list[str | None]:
    return [None if value is None else value.hex() for value in values]


def made(stats: Sequence[EngineStats | None], draw: Sequence[tuple[int, int]]) -> Sequence[Candidate]:
    return [
        Candidate(endpoint(number), sent, stats[which % len(stats)])
        for number, (which, sent) in enumerate(draw, 1)
    ]


def roster(candidates: Sequence[Candidate]) -> Roster:
    return Roster.of(
        candidates,
        in_flight=[each.in_flight for each in candidates],
        places={each.endpoint.address: place for place, each in enumerate(candidates)},
        all_reachable=True,
    )


@given(st.lists(STATS, min_size=1, max_size=10), st.lists(DECISIONS, min_size=1, max_size=5), st.booleans())
def test_every_bit_is_the_plain_formulas(
    stats: list[EngineStats | None],
    decisions: list[tuple[SchedulingRequest, list[tuple[int, int]]]],
    in_columns: bool,
) -> None:
    """One scorer, several decisions, the same stats in any of them and on any candidate."""
    scorer, figures = LeastLatencyScorer(), Figures()
    for request, draw in decisions:
        candidates = made(stats, draw)
        expected = plainly(request, candidates)
        given_ = roster(candidates) if in_columns else candidates
        if expected is None:
            with pytest.raises(MissingDataError):
                scorer.score(request, given_)
            continue
        assert bits(expected_seconds(request, given_, figures)) == bits(expected)
        assert bits(scorer.score(request, given_)) == bits(shares(expected))


def test_every_bit_of_a_fleet_of_which_some_are_scraped_between_decisions() -> None:
    rng, scorer = random.Random(1), LeastLatencyScorer()

    def scraped() -> EngineStats:
        figures = {name: rng.uniform(0.0, 9.0) for name in FIELDS if rng.random() < 0.8}
        return msgspec.structs.replace(EngineStats(at=0.0), **figures)

    stats = [scraped() for _ in range(300)]
    for _ in range(30):
        for _ in range(20):
            stats[rng.randrange(300)] = scraped()
        request = SchedulingRequest(model=MODEL, prompt_tokens=rng.randrange(9000))
        candidates = made(stats, [(place, rng.randrange(40)) for place in range(300)])
        expected = plainly(request, candidates)
        assert expected is not None
        assert bits(scorer.score(request, roster(candidates))) == bits(shares(expected))


def engine(**told_: Any) -> EngineStats:
    return EngineStats(at=0.0, running=1.0, waiting=0.0, time_per_output_token=0.5, **told_)


def test_stats_that_are_gone_are_not_taken_for_those_in_their_place() -> None:
    """The memory of an object that is freed is the next one's, with the same id."""
    scorer, request = (
        LeastLatencyScorer(),
        SchedulingRequest(model=MODEL, prompt_tokens=1, max_output_tokens=1),
    )
    ids = set()
    for number in range(1, 10_001):
        stats = EngineStats(at=0.0, time_per_output_token=float(number))
        ids.add(id(stats))
        candidates = [Candidate(endpoint(1), 0, engine()), Candidate(endpoint(2), 0, stats)]
        assert list(scorer.score(request, candidates)) == [1.0, 0.5 / number]
    assert len(ids) < 10_000, "no id came back, so this showed nothing"


def test_stats_are_not_kept_for_ever() -> None:
    """Of one that is scraped five times a second for a day, too."""
    scorer, request = LeastLatencyScorer(), SchedulingRequest(model=MODEL, prompt_tokens=1)
    first, stays = engine(), engine()
    unused = sys.getrefcount(first)
    scorer.score(request, [Candidate(endpoint(1), 0, first)])
    assert sys.getrefcount(first) > unused
    for _ in range(5000):
        scorer.score(request, [Candidate(endpoint(1), 0, engine()), Candidate(endpoint(2), 0, stays)])
    assert sys.getrefcount(first) == unused
    assert sys.getrefcount(stays) > unused


def test_whoever_is_still_there_stays_remembered() -> None:
    figures = Figures()
    stays = [Candidate(endpoint(number), 0, engine(life=number)) for number in range(1, 5001)]
    rows = list(figures.of(stays))
    for _ in range(8):
        others = [Candidate(endpoint(number), 0, engine()) for number in range(1, 1001)]
        now = figures.of([*stays, *others])
        assert all(map(operator.is_, now, rows))
