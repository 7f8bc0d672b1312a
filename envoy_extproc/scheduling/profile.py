"""A policy as filters, weighted scorers and a picker; running it is a function of what is handed in."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import msgspec

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
from envoy_extproc.scheduling.roster import names_of_others
from envoy_extproc.scheduling.scorers import spread


class Profile:
    """One policy.

    Args:
        name: the policy's name, as clients and configuration write it.
        picker: orders what the scorers scored.
        scorers: with their weights; the weighted mean decides. None at all is a picker's own choice.
        filters: applied in order before scoring.
        fallback: the profile that decides when no scorer has data.
        mixed: whether every scorer's word is spread over the whole of 0 to 1 first, so that weights alone say how much it
            counts; a scorer without data is then left out.
        own_scale: the scorers that are not spread in a mixture, by name.
    """

    def __init__(
        self,
        name: str,
        *,
        picker: Picker,
        scorers: Sequence[tuple[Scorer, float]] = (),
        filters: Sequence[Filter] = (),
        fallback: Profile | None = None,
        mixed: bool = False,
        own_scale: Collection[str] = (),
    ) -> None:
        self.name = name
        self._picker = picker
        self._scorers = tuple(scorers)
        self._filters = tuple(filters)
        self._fallback = fallback
        self._mixed = mixed
        self._own_scale = own_scale
        parts = (picker, *(scorer for scorer, _ in self._scorers), *self._filters)
        self._remembering = tuple(part for part in parts if isinstance(part, Remembering))

    @property
    def fallback(self) -> str | None:
        """The policy that decides when no scorer has data; None where there is none."""
        return None if self._fallback is None else self._fallback.name

    def run(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        rng: random.Random,
        *,
        tries: int = 3,
    ) -> Decision:
        """Decides among `candidates`, of which there is at least one; nothing is remembered of it, see `remember`.

        Args:
            request: what is known of the request.
            candidates: who may be chosen.
            rng: breaks ties and draws samples.
            tries: how many endpoints the order names, the chosen one included.

        Raises:
            MissingDataError: no scorer has data, and there is no fallback.
        """
        left, filtered = self._filter(request, candidates)
        try:
            scores, missing = self._score(request, left)
        except MissingDataError as nothing:
            if self._fallback is None:
                raise
            return self._fall_back(request, candidates, rng, tries, nothing.reason)
        ordered = self._picker.pick(request, left, totals(scores, len(left)), rng)
        return Decision(
            policy=self.name,
            decided_by=self.name,
            chosen=ordered[0],
            order=tried(ordered, tries),
            candidates=tuple(left),
            filtered=filtered,
            scores=scores,
            missing=missing,
        )

    def remember(self, request: SchedulingRequest, decision: Decision) -> None:
        """Lets its parts learn from a decision of `run` that is carried out."""
        for part in self._remembering:
            part.remember(request, decision.chosen)
        if self._fallback is not None and decision.fallback_reason is not None:
            self._fallback.remember(request, decision)

    def keep_models(self, models: Collection[str]) -> None:
        """Forgets what its parts remember of models other than these."""
        for part in self._remembering:
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
                filtered.append((step.name, names_of_others(candidates, left)))
            candidates = left
        return candidates, tuple(filtered)

    def _score(
        self, request: SchedulingRequest, left: Sequence[Candidate]
    ) -> tuple[tuple[Scores, ...], tuple[str, ...]]:
        """Every scorer's word, and who had none."""
        if not self._mixed:
            return tuple(
                [Scores(one.name, weight, tuple(one.score(request, left))) for one, weight in self._scorers]
            ), ()
        scores, missing = [], []
        for scorer, weight in self._scorers:
            try:
                values = scorer.score(request, left)
            except MissingDataError as nothing:
                missing.append((scorer.name, nothing))
            else:
                if scorer.name not in self._own_scale:
                    values = spread(values)
                scores.append(Scores(scorer.name, weight, tuple(values)))
        if not scores:
            raise missing[0][1]
        return tuple(scores), tuple([name for name, _ in missing])

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
        return msgspec.structs.replace(
            decision,
            policy=self.name,
            fallback_reason=reason,
            missing=tuple([scorer.name for scorer, _ in self._scorers]),
        )


def totals(scores: Sequence[Scores], count: int) -> Sequence[float]:
    """The weighted mean of all scores, for each of `count` candidates."""
    if len(scores) == 1:
        return scores[0].values
    whole = sum([each.weight for each in scores]) or 1.0
    if len(scores) == 2:  # as most mixtures have: once through instead of three times
        (one, other), (mine, theirs) = [each.values for each in scores], [each.weight for each in scores]
        return [(mine * a + theirs * b) / whole for a, b in zip(one, other, strict=True)]
    sums = [0.0] * count
    for each in scores:
        weight = each.weight
        sums = [total + weight * value for total, value in zip(sums, each.values, strict=True)]
    return [total / whole for total in sums]


def tried(ordered: Sequence[Candidate], tries: int) -> tuple[Endpoint, ...]:
    """The endpoints to try: exactly `tries` of them; where there are fewer candidates, round again.

    Envoy tries them one by one, as often as `tries` says. A list that ran out before would leave the last tries to
    Envoy's own load balancer, which knows nothing of models, pins and subsets: another model's pod would answer.
    """
    return tuple([ordered[number % len(ordered)].endpoint for number in range(tries)])
