"""The order in which candidates are tried: the first is the choice, the others are fallbacks for retries."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Collection, Sequence

from envoy_extproc.scheduling.interfaces import MOST_TRIES, Candidate, SchedulingRequest
from envoy_extproc.scheduling.roster import in_flight

_MANY = 256
"""Scores of which the ten best are found sooner than all are sorted."""


class MaxScorePicker:
    """The best score first; of equals the one with fewer exchanges in flight, of those any.

    Of more than `MOST_TRIES` candidates only as many are put in order: the others need not be compared with each other.
    """

    name = "max-score-picker"

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        few = len(candidates) <= MOST_TRIES
        places = range(len(candidates)) if few else _best(scores, candidates, rng)
        keys = [(-scores[place], candidates[place].in_flight, rng.random(), place) for place in places]
        keys.sort()
        return [candidates[key[3]] for key in keys]


def _best(scores: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> Sequence[int]:
    """The places of `MOST_TRIES` candidates that none of the others should come before."""
    best = heapq.nlargest(MOST_TRIES, scores) if len(scores) > _MANY else sorted(scores)[-MOST_TRIES:]
    worst = min(best)
    places = [place for place, score in enumerate(scores) if score > worst] if max(best) > worst else []
    equals = [place for place, score in enumerate(scores) if score == worst]
    loads = in_flight(candidates)
    counts = [loads[place] for place in equals]
    most = sorted(counts)[MOST_TRIES - len(places) - 1]
    near = [(count, place) for place, count in zip(equals, counts, strict=True) if count <= most]
    places += [place for count, place in near if count < most]
    return places + rng.sample([place for count, place in near if count == most], MOST_TRIES - len(places))


class WeightedRandomPicker:
    """By chance, a candidate with twice the score twice as likely; one of score 0 comes after all others.

    The order is a sample without replacement (A-Res: Efraimidis and Spirakis 2006, in its logarithm).
    """

    name = "weighted-random-picker"

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        keys = [
            (rng.expovariate(1.0) / score if score > 0 else math.inf, rng.random(), place)
            for place, score in enumerate(scores)
        ]
        keys.sort()
        return [candidates[key[2]] for key in keys]


class RandomPicker:
    """Any order, each as likely."""

    name = "random-picker"

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        return rng.sample(candidates, len(candidates))


class RoundRobinPicker:
    """One after the other in the order of addresses, for each model by itself.

    It remembers the address it gave last, not a position, so endpoints that come and go disturb nobody's turn.
    """

    name = "round-robin-picker"

    def __init__(self) -> None:
        self._last: dict[str | None, str] = {}

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        ring = sorted(candidates, key=lambda candidate: candidate.endpoint.address)
        last = self._last.get(request.model, "")
        turn = next((place for place, c in enumerate(ring) if c.endpoint.address > last), 0)
        return ring[turn:] + ring[:turn]

    def remember(self, request: SchedulingRequest, chosen: Candidate) -> None:
        """See `Remembering`."""
        self._last[request.model] = chosen.endpoint.address

    def keep_models(self, models: Collection[str]) -> None:
        """See `Remembering`. None, whose turn is that of requests that name no model, is always kept."""
        for gone in [model for model in self._last if model is not None and model not in models]:
            del self._last[gone]


class PowerOfTwoPicker:
    """Of two drawn at random the one with fewer exchanges in flight (Mitzenmacher 2001); the others by their load."""

    name = "power-of-two-picker"

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        mixed = rng.sample(candidates, len(candidates))
        first = min(mixed[:2], key=lambda candidate: candidate.in_flight)
        others = sorted(
            (candidate for candidate in mixed if candidate is not first),
            key=lambda candidate: candidate.in_flight,
        )
        return [first, *others]
