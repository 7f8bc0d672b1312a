"""A policy as filters, weighted scorers and a picker; running it is a function of what is handed in."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.scheduling.interfaces import (
    Candidate,
    Decision,
    Filter,
    MissingDataError,
    Picker,
    Remembering,
    SchedulingRequest,
    Scorer,
    Scores,
)


class Profile:
    """One policy.

    Args:
        name: the policy's name, as clients and configuration write it.
        picker: orders what the scorers scored.
        scorers: with their weights; their sum decides. None at all is a picker's own choice.
        filters: applied in order before scoring.
        fallback: the profile that decides when a scorer has no data.
    """

    def __init__(
        self,
        name: str,
        *,
        picker: Picker,
        scorers: Sequence[tuple[Scorer, float]] = (),
        filters: Sequence[Filter] = (),
        fallback: Profile | None = None,
    ) -> None:
        self.name = name
        self._picker = picker
        self._scorers = tuple(scorers)
        self._filters = tuple(filters)
        self._fallback = fallback

    def run(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        rng: random.Random,
        *,
        tries: int = 3,
    ) -> Decision:
        """Decides among `candidates`, of which there is at least one.

        Args:
            request: what is known of the request.
            candidates: who may be chosen.
            rng: breaks ties and draws samples.
            tries: how many endpoints the order names, the chosen one included.
        """
        left, filtered = self._filter(request, candidates)
        try:
            scores = tuple(
                Scores(scorer.name, weight, tuple(scorer.score(request, left)))
                for scorer, weight in self._scorers
            )
        except MissingDataError as missing:
            if self._fallback is None:
                raise
            return self._fall_back(request, candidates, rng, tries, missing.reason)
        ordered = self._picker.pick(request, left, _weighted(scores, len(left)), rng)
        return Decision(
            policy=self.name,
            decided_by=self.name,
            chosen=ordered[0],
            order=_order(ordered, tries),
            candidates=tuple(left),
            filtered=filtered,
            scores=scores,
        )

    def keep_models(self, models: Collection[str]) -> None:
        """Forgets what its parts remember of models other than these."""
        for part in (self._picker, *(scorer for scorer, _ in self._scorers), *self._filters):
            if isinstance(part, Remembering):
                part.keep_models(models)
        if self._fallback is not None:
            self._fallback.keep_models(models)

    def _filter(
        self, request: SchedulingRequest, candidates: Sequence[Candidate]
    ) -> tuple[Sequence[Candidate], tuple[tuple[str, tuple[str, ...]], ...]]:
        filtered = []
        for step in self._filters:
            left = step.filter(request, candidates)
            if len(left) != len(candidates):
                gone = tuple(candidate.endpoint.name for candidate in candidates if candidate not in left)
                filtered.append((step.name, gone))
            candidates = left
        return candidates, tuple(filtered)

    def _fall_back(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        rng: random.Random,
        tries: int,
        reason: str,
    ) -> Decision:
        assert self._fallback is not None
        decision = self._fallback.run(request, candidates, rng, tries=tries)
        return Decision(
            policy=self.name,
            decided_by=decision.decided_by,
            fallback_reason=reason,
            chosen=decision.chosen,
            order=decision.order,
            candidates=decision.candidates,
            filtered=decision.filtered,
            scores=decision.scores,
        )


def _order(ordered: Sequence[Candidate], tries: int) -> tuple[Endpoint, ...]:
    """Exactly `tries` endpoints; where there are fewer candidates, round again.

    Envoy tries them one by one, as often as `tries` says. A list that ran out before would leave the last tries to
    Envoy's own load balancer, which knows nothing of models, pins and subsets: another model's pod would answer.
    """
    return tuple([ordered[number % len(ordered)].endpoint for number in range(tries)])


def _weighted(scores: Sequence[Scores], count: int) -> Sequence[float]:
    if len(scores) == 1:
        return scores[0].values
    return [sum(each.weight * each.values[place] for each in scores) for place in range(count)]
