"""Prefill and decode apart: for each request a pair of endpoints, one to compute the KV cache of its prompt, one to go on.

The decode endpoint is the request's destination; the prefill endpoint goes along in the header `x-prefiller-host-port`, by which
the sidecar or engine at the destination has it do its part. Both are of one roleset, the group that shares KV caches.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import msgspec

from envoy_extproc.errors import NoReadyEndpoint
from envoy_extproc.scheduling.filters import ReachableFilter
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest, Scores
from envoy_extproc.scheduling.pickers import MaxScorePicker
from envoy_extproc.scheduling.profile import Profile, tried
from envoy_extproc.scheduling.scorers import known

NAME = "pd"

_ROLES = ("role-name", "llm-d.ai/role")
"""Labels of a pod's role: AIBrix's, the endpoint picker's."""

_ROLESET = "roleset-name"
_GROUP_INDEX = "stormservice.orchestration.aibrix.ai/pod-group-index"
"""Of the pods that hold one model between them only the first, 0, takes requests."""

_PREFILL_SPREAD = 16
_DECODE_SPREAD = 16
_THROUGHPUT_SPREAD = 2048.0
"""AIBrix's bounds: requests, and generated tokens per second, between the busiest and the idlest from which on only the
idlest will do."""

_REMEMBERED = 4096
"""Prefill endpoints; of more than that, those that got nothing for longest are forgotten."""


class _Sent(msgspec.Struct, frozen=True):
    """What a prefill endpoint was sent: `count` requests since the scrape at `at`, the last one as the `turn`-th of all."""

    at: float | None
    count: int
    turn: int


_NOTHING_SENT = _Sent(None, 0, 0)


class _Roleset(msgspec.Struct):
    prefill: list[Candidate] = msgspec.field(default_factory=list)
    decode: list[Candidate] = msgspec.field(default_factory=list)


class PairProfile(Profile):
    """The policy `pd`.

    Of all rolesets with both roles ready, the pair with the least
    ``load of prefill / most of any prefill + load of decode / most of any decode``. Load is what runs and waits in the
    engine; of a decode endpoint at least what this server has there, of a prefill endpoint also what it was sent since
    that was told. Pairs beyond the bounds of imbalance come after all others.
    """

    def __init__(self) -> None:
        super().__init__(NAME, picker=MaxScorePicker(), filters=[ReachableFilter()])
        self._sent: dict[str, _Sent] = {}
        self._turn = 0

    def run(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        rng: random.Random,
        *,
        tries: int = 3,
    ) -> Decision:
        """See `Profile`. The endpoints to try are all of the chosen one's roleset: the prefill endpoint serves no other.

        Raises:
            NoReadyEndpoint: no roleset has both roles.
        """
        left, filtered = self._filter(request, candidates)
        rolesets = _complete(left)
        if not rolesets:  # better one that seems out of reach than none
            left, filtered = candidates, ()
            rolesets = _complete(left)
        if not rolesets:
            raise NoReadyEndpoint(
                "No roleset of this model has a prefill and a decode endpoint that are ready."
            )
        prefill = self._busyness(rolesets)
        decode = [candidate for of in rolesets for candidate in of.decode]
        scores = _scores(rolesets, [min(of)[0] for of in prefill], max(map(max, prefill))[0])
        ordered = self._picker.pick(request, decode, scores, rng)
        homes = {each.endpoint.address: place for place, of in enumerate(rolesets) for each in of.decode}
        home = homes[ordered[0].endpoint.address]
        mates = [candidate for candidate in ordered if homes[candidate.endpoint.address] == home]
        return Decision(
            policy=self.name,
            decided_by=self.name,
            chosen=ordered[0],
            order=tried(mates, tries),
            candidates=tuple(decode),
            filtered=(*filtered, *_others(left, decode)),
            scores=(Scores(self.name, 1.0, tuple(scores)),),
            prefill=rolesets[home].prefill[prefill[home].index(min(prefill[home]))],
        )

    def remember(self, request: SchedulingRequest, decision: Decision) -> None:
        """The prefill endpoint has one more to do, until its engine tells."""
        assert decision.prefill is not None
        address, at = decision.prefill.endpoint.address, _told_at(decision.prefill)
        before = self._sent.pop(address, _NOTHING_SENT)
        self._turn += 1
        self._sent[address] = _Sent(at, before.count + 1 if before.at == at else 1, self._turn)
        if len(self._sent) > _REMEMBERED:
            del self._sent[next(iter(self._sent))]

    def _busyness(self, rolesets: Sequence[_Roleset]) -> list[list[tuple[float, int]]]:
        """The load of each prefill endpoint; of equals, the one that got its last request longest ago is less busy.

        One whose engine does not tell counts as the busiest of those that do.
        """
        loads = [[self._load(each) for each in of.prefill] for of in rolesets]
        worst = max([load for of in loads for load, _ in of if load is not None], default=0.0)
        return [[(worst if load is None else load, turn) for load, turn in of] for of in loads]

    def _load(self, candidate: Candidate) -> tuple[float | None, int]:
        sent, at = self._sent.get(candidate.endpoint.address, _NOTHING_SENT), _told_at(candidate)
        load = _engine_load(candidate)
        since = sent.count if at is not None and sent.at == at else 0
        return None if load is None else load + since, sent.turn


def _scores(rolesets: Sequence[_Roleset], prefill: Sequence[float], busiest: float) -> Sequence[float]:
    """The score of each decode endpoint with the prefill endpoint of its roleset, whose load is in `prefill`.

    `busiest` is the highest load of any prefill endpoint.
    """
    idlest = min(prefill)
    bound = idlest if busiest - idlest > _PREFILL_SPREAD else busiest
    pairs = [
        (load, each, _decode_load(each))
        for of, load in zip(rolesets, prefill, strict=True)
        for each in of.decode
    ]
    most = max([load for _, _, load in pairs])
    within = _within([(each, load) for other, each, load in pairs if other <= bound])
    return [
        1.0
        - (_share(load, busiest) + _share(own, most)) / 4
        - (0.0 if load <= bound and within(each, own) else 0.5)
        for load, each, own in pairs
    ]


def _complete(candidates: Sequence[Candidate]) -> list[_Roleset]:
    """The rolesets that have both roles."""
    rolesets: defaultdict[str, _Roleset] = defaultdict(_Roleset)
    for candidate in candidates:
        labels = candidate.endpoint.labels
        role = labels.get(_ROLES[0]) or labels.get(_ROLES[1])
        if role in ("prefill", "decode") and labels.get(_GROUP_INDEX, "0") == "0":
            roleset = rolesets[labels.get(_ROLESET, "")]
            (roleset.prefill if role == "prefill" else roleset.decode).append(candidate)
    return [each for each in rolesets.values() if each.prefill and each.decode]


def _within(decode: Sequence[tuple[Candidate, float]]) -> Callable[[Candidate, float], bool]:
    """Whether a decode endpoint, with its load, will do: any, or the idlest alone where others are too much busier."""
    loads = [load for _, load in decode]
    least = min(loads)
    if max(loads) - least >= _DECODE_SPREAD:
        return lambda _, load: load == least
    rates = [_throughput(each) for each, _ in decode]
    slowest = min(rates)
    if max(rates) - slowest > _THROUGHPUT_SPREAD:
        return lambda each, _: _throughput(each) == slowest
    return lambda _, __: True


def _others(left: Sequence[Candidate], decode: Sequence[Candidate]) -> Sequence[tuple[str, tuple[str, ...]]]:
    """Who was no destination at all, for an explanation."""
    kept = {candidate.endpoint.address for candidate in decode}
    names = tuple([each.endpoint.name for each in left if each.endpoint.address not in kept])
    return (("role", names),) if names else ()


def _told_at(candidate: Candidate) -> float | None:
    return None if candidate.stats is None else candidate.stats.at


def _engine_load(candidate: Candidate) -> float | None:
    stats = candidate.stats
    running, waiting = (None, None) if stats is None else (known(stats.running), known(stats.waiting))
    return None if running is None and waiting is None else (running or 0.0) + (waiting or 0.0)


def _decode_load(candidate: Candidate) -> float:
    return max(float(candidate.in_flight), _engine_load(candidate) or 0.0)


def _throughput(candidate: Candidate) -> float:
    stats = candidate.stats
    return 0.0 if stats is None else known(stats.generation_tokens_per_second) or 0.0


def _share(load: float, most: float) -> float:
    return load / most if most else 0.0
