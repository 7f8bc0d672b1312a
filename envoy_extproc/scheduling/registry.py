"""The policies by name. A new one is a row here, a row in docs/routing.md and a table in its test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from envoy_extproc import mixes
from envoy_extproc.errors import UnknownStrategy
from envoy_extproc.scheduling.filters import LoraAffinityFilter, ReachableFilter
from envoy_extproc.scheduling.interfaces import Filter, Picker, Scorer
from envoy_extproc.scheduling.latency import LeastLatencyScorer
from envoy_extproc.scheduling.pickers import MaxScorePicker, PowerOfTwoPicker, RandomPicker, RoundRobinPicker
from envoy_extproc.scheduling.profile import Profile
from envoy_extproc.scheduling.scorers import (
    LeastKvCacheScorer,
    LeastRequestScorer,
    LeastUtilizationScorer,
    LoraAffinityScorer,
    ThroughputScorer,
)

_PICKING: Mapping[str, Callable[[], Picker]] = {
    "random": RandomPicker,
    "round-robin": RoundRobinPicker,
    "power-of-two": PowerOfTwoPicker,
}

_SCORING: Mapping[str, Callable[[], Scorer]] = {
    "least-request": LeastRequestScorer,
    "least-kv-cache": LeastKvCacheScorer,
    "least-latency": LeastLatencyScorer,
    "least-utilization": LeastUtilizationScorer,
    "throughput": ThroughputScorer,
    "lora-affinity": LoraAffinityScorer,
    # AIBrix reads an old name of the same figure.
    "least-gpu-cache": LeastKvCacheScorer,
    # AIBrix means the share of time a GPU is busy, which no engine tells; this is the nearest that engines do.
    "least-busy-time": LeastUtilizationScorer,
}

_PLAIN = "least-request"
"""Decides where another policy lacks its data: it needs none but our own."""

_ADAPTER_BLIND = frozenset({"random", "round-robin", "lora-affinity"})
"""Policies without the filter for adapters: chance and turn are to be even, and the last one scores by readiness itself."""

_MIXES_REMEMBERED = 256
"""Clients can write any number of mixtures; a fleet's use a handful."""

POLICIES: tuple[str, ...] = (*_PICKING, *_SCORING)
"""Every name `routing.policy` and the header `routing-strategy` may have."""


class Policies(Mapping[str, Profile]):
    """The policies of one server by name, and the mixtures of them. Mixtures share the scorers of the policies in them."""

    def __init__(self) -> None:
        self._scorers = {name: make() for name, make in _SCORING.items()}
        self._mixes: dict[str, Profile] = {}
        self._fallback = self._scoring(_PLAIN, None)
        picking = {
            name: Profile(name, filters=_filters(name), picker=make()) for name, make in _PICKING.items()
        }
        scoring = {name: self._scoring(name, self._fallback) for name in _SCORING if name != _PLAIN}
        self._profiles = picking | {_PLAIN: self._fallback} | scoring

    def find(self, text: str) -> Profile:
        """The policy of that name, or the mixture that `text` writes.

        Raises:
            UnknownStrategy: it is neither.
        """
        found = self._profiles.get(text) or self._mixes.get(text)
        return self._read(text) if found is None else found

    def keep_models(self, models: Collection[str]) -> None:
        """Forgets what policies remember of models other than these."""
        for profile in self._profiles.values():
            profile.keep_models(models)

    def __getitem__(self, name: str) -> Profile:
        return self._profiles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def _read(self, text: str) -> Profile:
        try:
            members = mixes.parse(text, self._profiles.keys())
        except mixes.MixError as error:
            raise UnknownStrategy(
                f"The routing strategy is not valid: {error}.", param="routing-strategy"
            ) from None
        if len(members) == 1:
            return self._profiles[members[0][0]]
        if len(self._mixes) >= _MIXES_REMEMBERED:
            del self._mixes[next(iter(self._mixes))]
        mixture = self._mixes[text] = self._mixture(members)
        return mixture

    def _mixture(self, members: Collection[tuple[str, int]]) -> Profile:
        adapters_scored = any(name == LoraAffinityScorer.name for name, _ in members)
        return Profile(
            mixes.canonical(members),
            filters=_filters(LoraAffinityScorer.name if adapters_scored else ""),
            scorers=[(self._scorers[name], float(weight)) for name, weight in members],
            picker=MaxScorePicker(),
            fallback=self._fallback,
            mixed=True,
        )

    def _scoring(self, name: str, fallback: Profile | None) -> Profile:
        return Profile(
            name,
            filters=_filters(name),
            scorers=[(self._scorers[name], 1.0)],
            picker=MaxScorePicker(),
            fallback=fallback,
        )


def build() -> Policies:
    """One set of policies for one server; some remember whose turn it is."""
    return Policies()


def _filters(policy: str) -> list[Filter]:
    return [ReachableFilter()] if policy in _ADAPTER_BLIND else [ReachableFilter(), LoraAffinityFilter()]
