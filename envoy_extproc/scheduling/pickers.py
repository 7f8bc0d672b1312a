"""The order in which candidates are tried: the first is the choice, the others are fallbacks for retries."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest


class MaxScorePicker:
    """The best score first; of equals the one with fewer exchanges in flight, of those any."""

    name = "max-score-picker"

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        keys = [
            (-score, candidate.in_flight, rng.random(), place)
            for place, (score, candidate) in enumerate(zip(scores, candidates, strict=True))
        ]
        keys.sort()
        return [candidates[key[3]] for key in keys]


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
