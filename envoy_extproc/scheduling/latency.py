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

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.roster import in_flight
from envoy_extproc.scheduling.scorers import known

_PROMPT = 10.0
_OUTPUT = 100.0
"""Tokens where neither the request nor any engine tells how many: AIBrix's guesses."""

_MOST_TOKENS = 10**9
_MOST_SECONDS = 1e12
"""A client may write any number, an engine divide by next to nothing; up to these, sums and products stay finite."""

_SPARE = 4096
"""Engines whose figures are kept beyond those of one decision's candidates: another model has others."""


class LeastLatencyScorer:
    """The shortest expected time over a candidate's own, so 1 for the shortest; the module says how it is expected.

    A candidate that has not been heard of counts as the slowest one.
    """

    name = "least-latency"

    def __init__(self) -> None:
        self._figures = Figures()

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`."""
        seconds = expected_seconds(request, candidates, self._figures)
        heard = [each for each in seconds if each is not None]
        low, worst = min(heard), max(heard)
        if len(heard) < len(seconds):
            heard = [worst if each is None else each for each in seconds]
        return [1.0 if mine <= low else low / mine for mine in heard]


_Row: TypeAlias = tuple[
    EngineStats | None, float | None, float | None, float | None, float | None, float, float, float, float
]
"""What an engine tells, whatever the request: (stats, prefill, decode, prompt, output, running, waiting, turn, slots).

prefill and decode are seconds per token, prompt and output tokens per request, each None where it does not tell. In every
`turn` seconds the batch lets `slots` requests in. Where `turn` is 0 it is what the request itself takes; where `slots` is 0
nobody can say, and `turn` is the whole wait.
"""

_UNHEARD: _Row = (None, None, None, None, None, 0.0, 0.0, 0.0, 0.0)


class Figures:
    """Remembers what stats come to: they never change, and most are there for many decisions."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}  # by the id of the stats, which is theirs while the row holds them

    def of(self, candidates: Iterable[Candidate]) -> Sequence[_Row]:
        """The row of each candidate."""
        get, learn = self._rows.get, self._learn
        rows = [get(id(each.stats)) or learn(each.stats) for each in candidates]
        if len(self._rows) > len(rows) + _SPARE:
            self._rows = {id(row[0]): row for row in rows}
        return rows

    def _learn(self, stats: EngineStats | None) -> _Row:
        row = self._rows[id(stats)] = _UNHEARD if stats is None else _row(stats)
        return row


def expected_seconds(
    request: SchedulingRequest, candidates: Sequence[Candidate], figures: Figures | None = None
) -> Sequence[float | None]:
    """How long `request` will take on each candidate; None for one that has not been heard of.

    Raises:
        MissingDataError: no engine tells how quick it is.
    """
    rows = (figures or Figures()).of(candidates)
    prefill, decode = _mean([row[1] for row in rows]), _mean([row[2] for row in rows])
    if prefill is None and decode is None:
        raise MissingDataError("no-stats")
    lengths = _lengths(request, rows)
    return _seconds(rows, in_flight(candidates), lengths, (prefill or 0.0, decode or 0.0))


def _seconds(
    rows: Sequence[_Row], sent: Sequence[int], lengths: tuple[float, float], otherwise: tuple[float, float]
) -> Sequence[float | None]:
    """The formula; `otherwise` are the rates of an engine that does not tell its own.

    One loop that calls no function of ours: it is gone through for every candidate of every decision.
    """
    (prompt, output), (mean_prefill, mean_decode) = lengths, otherwise
    seconds: list[float | None] = []
    add = seconds.append
    for (stats, prefill, decode, _, _, running, waiting, turn, slots), count in zip(rows, sent, strict=True):
        if stats is None:
            add(None)
            continue
        own = prompt * (mean_prefill if prefill is None else prefill) + output * (
            mean_decode if decode is None else decode
        )
        unseen = count - running - waiting
        ahead = waiting + unseen if unseen > 0.0 else waiting
        queue = (ahead * (turn or own) / slots if slots else turn) if ahead else 0.0
        whole = own + queue
        add(whole if whole < _MOST_SECONDS else _MOST_SECONDS)  # noqa: FURB136  `min` takes a third of the loop
    return seconds


def _lengths(request: SchedulingRequest, rows: Sequence[_Row]) -> tuple[float, float]:
    output = _mean([row[4] for row in rows]) or 0.0
    if request.max_output_tokens is not None:
        most = float(max(0, min(request.max_output_tokens, _MOST_TOKENS)))
        output = min(most, output or most)
    prompt: float | None = float(min(request.prompt_tokens, _MOST_TOKENS)) or _mean([row[3] for row in rows])
    return _PROMPT if prompt is None else prompt, output or _OUTPUT


def _row(stats: EngineStats) -> _Row:
    prompt, output = known(stats.prompt_tokens_per_request), known(stats.generation_tokens_per_request)
    running, prefill, decode = known(stats.running), known(stats.prefill_seconds), known(stats.decode_seconds)
    queue = known(stats.queue_seconds) or 0.0
    first, per_token = known(stats.time_to_first_token), known(stats.time_per_output_token)
    reading = max(0.0, first - queue) if prefill is None and first is not None else prefill
    return (
        stats,
        _ratio(reading, prompt),
        _ratio(decode, output) if per_token is None else per_token,
        prompt,
        output,
        running or 0.0,
        known(stats.waiting) or 0.0,
        queue if running is None else (prefill or 0.0) + (decode or 0.0),
        0.0 if running is None else max(running, 1.0),
    )


def _ratio(whole: float | None, parts: float | None) -> float | None:
    return min(whole / parts, _MOST_SECONDS) if whole is not None and parts else None


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None
