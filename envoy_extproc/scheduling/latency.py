"""How long a request will take on each candidate, from what engines say of the requests they finished lately.

    expected = queue + prompt * prefill per token + output * decode per token        seconds

prompt              the request's own estimate; else how long prompts are, the mean over the candidates
output              how long answers are, the mean over the candidates, and never more than the request allows
prefill per token   prefill_seconds / prompt_tokens_per_request; where an engine does not tell the first, what of
                    time_to_first_token is not queue_seconds
decode per token    time_per_output_token; else decode_seconds / generation_tokens_per_request
queue               ahead * (prefill_seconds + decode_seconds) / running, which is how often the batch lets one in; where
                    that cannot be said, queue_seconds while somebody waits

The lengths are those of the request, so they are the same on every candidate: an engine that happened to get short
answers is not quicker for this one. `queue` is not the engine's mean wait, which is of requests that have left its queue:
`ahead` are those that wait there now, and those sent since the last scrape, so that between two scrapes a burst does not
all go to one engine. A rate an engine does not tell is the mean of the others': it may have been idle, not slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.scorers import known

_PROMPT = 10.0
_OUTPUT = 100.0
"""Tokens where neither the request nor any engine tells how many: AIBrix's guesses."""

_MOST_TOKENS = 10**9
_MOST_SECONDS = 1e12
"""A client may write any number, an engine divide by next to nothing; up to these, sums and products stay finite."""


class LeastLatencyScorer:
    """The shortest expected time over a candidate's own, so 1 for the shortest; the module says how it is expected.

    A candidate that has not been heard of counts as the slowest one.
    """

    name = "least-latency"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        seconds = expected_seconds(request, candidates)
        heard = [each for each in seconds if each is not None]
        low, worst = min(heard), max(heard)
        return [_share(low, worst if each is None else each) for each in seconds]


class _Rates(msgspec.Struct, frozen=True):
    """Seconds per token of one engine; None where it does not tell."""

    prefill: float | None
    decode: float | None


def expected_seconds(request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float | None]:
    """How long `request` will take on each candidate; None for one that has not been heard of.

    Raises:
        MissingDataError: no engine tells how quick it is.
    """
    told = [None if each.stats is None else _rates(each.stats) for each in candidates]
    prefill = _mean([None if each is None else each.prefill for each in told])
    decode = _mean([None if each is None else each.decode for each in told])
    if prefill is None and decode is None:
        raise MissingDataError("no-stats")
    prompt, output = _lengths(request, candidates)
    seconds: list[float | None] = []
    for candidate, rates in zip(candidates, told, strict=True):
        if candidate.stats is None or rates is None:
            seconds.append(None)
            continue
        own = prompt * _or(rates.prefill, prefill) + output * _or(rates.decode, decode)
        seconds.append(min(own + _queue(candidate.stats, candidate.in_flight, own), _MOST_SECONDS))
    return seconds


def _lengths(request: SchedulingRequest, candidates: Sequence[Candidate]) -> tuple[float, float]:
    heard = [each.stats for each in candidates if each.stats is not None]
    output = _or(_mean([each.generation_tokens_per_request for each in heard]), None)
    if request.max_output_tokens is not None:
        most = float(max(0, min(request.max_output_tokens, _MOST_TOKENS)))
        output = min(most, output or most)
    prompt = float(min(request.prompt_tokens, _MOST_TOKENS))
    return (
        prompt or _or(_mean([each.prompt_tokens_per_request for each in heard]), _PROMPT),
        output or _OUTPUT,
    )


def _rates(stats: EngineStats) -> _Rates:
    prefill = known(stats.prefill_seconds)
    first = known(stats.time_to_first_token)
    if prefill is None and first is not None:
        prefill = max(0.0, first - (known(stats.queue_seconds) or 0.0))
    decode = known(stats.time_per_output_token)
    if decode is None:
        decode = _ratio(known(stats.decode_seconds), known(stats.generation_tokens_per_request))
    return _Rates(_ratio(prefill, known(stats.prompt_tokens_per_request)), decode)


def _queue(stats: EngineStats, in_flight: int, own: float) -> float:
    """Seconds until the batch lets the request in; `own` is what the request takes in it."""
    running, waiting = known(stats.running), known(stats.waiting) or 0.0
    unseen = max(0.0, in_flight - (running or 0.0) - waiting)
    ahead = waiting + unseen
    if not ahead:
        return 0.0
    if running is None:
        return known(stats.queue_seconds) or 0.0
    spent = [known(stats.prefill_seconds), known(stats.decode_seconds)]
    turn = sum(each for each in spent if each is not None) or own
    return ahead * turn / max(running, 1.0)


def _share(low: float, mine: float) -> float:
    return 1.0 if mine <= low else low / mine


def _ratio(whole: float | None, parts: float | None) -> float | None:
    return min(whole / parts, _MOST_SECONDS) if whole is not None and parts else None


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in map(known, values) if value is not None]
    return sum(told) / len(told) if told else None


def _or(value: float | None, otherwise: float | None) -> float:
    return value if value is not None else otherwise or 0.0
