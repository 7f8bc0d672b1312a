"""The policies by name. A new one is a row here, its words in `guide.py` and a table in its test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

import msgspec

from envoy_extproc import mixes
from envoy_extproc.errors import UnknownStrategy
from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.aliases import (
    KvCacheUtilizationScorer,
    LoadAwareScorer,
    LoraAffinityPickerScorer,
    QueueScorer,
    RunningRequestsSizeScorer,
)
from envoy_extproc.scheduling.disaggregation import NAME as PAIRS
from envoy_extproc.scheduling.disaggregation import PairProfile
from envoy_extproc.scheduling.fairness import FairnessRules, VtcScorer
from envoy_extproc.scheduling.filters import LoraAffinityFilter, ReachableFilter
from envoy_extproc.scheduling.hashing import BoundedLoadScorer, BoundedRandomPicker
from envoy_extproc.scheduling.interfaces import Filter, Picker, Scorer
from envoy_extproc.scheduling.latency import LeastLatencyScorer
from envoy_extproc.scheduling.pickers import (
    MaxScorePicker,
    PowerOfTwoPicker,
    RandomPicker,
    RoundRobinPicker,
    WeightedRandomPicker,
)
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.scheduling.profile import Profile
from envoy_extproc.scheduling.scorers import (
    LeastKvCacheScorer,
    LeastRequestScorer,
    LeastUtilizationScorer,
    LoraAffinityScorer,
    ThroughputScorer,
)
from envoy_extproc.scheduling.scorers_prefix import PrefixCacheScorer, PrefixLoadFilter
from envoy_extproc.scheduling.session import SessionAffinityScorer

_PICKING: Mapping[str, Callable[[], Picker]] = {
    "random": RandomPicker,
    "round-robin": RoundRobinPicker,
    "power-of-two": PowerOfTwoPicker,
}

_OWN_SCALE: Mapping[str, Callable[[], Scorer]] = {
    "queue-scorer": QueueScorer,
    "kv-cache-utilization-scorer": KvCacheUtilizationScorer,
    "lora-affinity-scorer": LoraAffinityPickerScorer,
    "running-requests-size-scorer": RunningRequestsSizeScorer,
    "load-aware-scorer": LoadAwareScorer,
}
"""The endpoint picker's scorers: in a mixture they count as they are, as they do there."""

_SCORING: Mapping[str, Callable[[], Scorer]] = {
    "least-request": LeastRequestScorer,
    "least-kv-cache": LeastKvCacheScorer,
    "least-latency": LeastLatencyScorer,
    "least-utilization": LeastUtilizationScorer,
    "throughput": ThroughputScorer,
    "lora-affinity": LoraAffinityScorer,
    "session-affinity": SessionAffinityScorer,
    "bounded-load": BoundedLoadScorer,
    "vtc-basic": VtcScorer,
    # AIBrix reads an old name of the same figure.
    "least-gpu-cache": LeastKvCacheScorer,
    # AIBrix means the share of time a GPU is busy, which no engine tells; this is the nearest that engines do.
    "least-busy-time": LeastUtilizationScorer,
    **_OWN_SCALE,
}

_PREFIX: tuple[str, ...] = ("prefix-cache", "prefix-cache-scorer")
"""Policies that go by what endpoints hold of a prompt, AIBrix's name and the endpoint picker's; they share one index. In a
mixture they count as they are, too: spread out, a match of a hundredth of the prompt would count as a whole one."""

AS_THEY_ARE: frozenset[str] = frozenset({*_OWN_SCALE, *_PREFIX})
"""Policies whose scores are not spread over the whole of 0 to 1 in a mixture."""

_PICKERS: Mapping[str, Callable[[], Picker]] = {
    "max-score-picker": MaxScorePicker,
    "weighted-random-picker": WeightedRandomPicker,
}

_PLAIN = "least-request"
"""Decides where another policy lacks its data: it needs none but our own."""

_READINESS = frozenset({"lora-affinity", "lora-affinity-scorer"})
"""Policies that score by how ready an endpoint is for an adapter."""

_ADAPTER_BLIND = frozenset({"random", "round-robin"}) | _READINESS
"""Policies without the filter for adapters: chance and turn are to be even, and the last ones score by readiness itself."""

_MIXES_REMEMBERED = 256
"""Clients can write any number of mixtures; a fleet's use a handful."""

POLICIES: tuple[str, ...] = (*_PICKING, *_SCORING, *_PREFIX, PAIRS)
"""Every name of our own that `routing.policy` and the header `routing-strategy` may have."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator can set of policies; see `settings.Routing`."""

    load_bound: float = 1.25
    fairness: FairnessRules = FairnessRules()
    prefix_rule: BlockRule = BlockRule()
    prefix_blocks_per_endpoint: int = 31_250
    prefix_blocks: int = 1_000_000


_DEFAULT = Tuning()
_NONE: Mapping[str, Scorer] = MappingProxyType({})


class Policies(Mapping[str, Profile]):
    """The policies of one server by name, and the mixtures of them. Mixtures share the scorers of the policies in them.

    Args:
        tuning: what the operator sets.
        scorers: of other packages, by the names of their policies, none of which is in `POLICIES`.
    """

    def __init__(self, tuning: Tuning, scorers: Mapping[str, Scorer] = _NONE) -> None:
        self._scorers: dict[str, Scorer] = {name: make() for name, make in _SCORING.items()}
        self._scorers["bounded-load"] = BoundedLoadScorer(tuning.load_bound, tuning.prefix_rule)
        self._scorers["vtc-basic"] = VtcScorer(tuning.fairness)
        self.prefixes = PrefixIndex(
            tuning.prefix_rule,
            per_endpoint=tuning.prefix_blocks_per_endpoint,
            in_all=tuning.prefix_blocks,
        )
        self._scorers |= dict.fromkeys(_PREFIX, PrefixCacheScorer(self.prefixes))
        self._scorers |= scorers
        self._prefix_load = PrefixLoadFilter(self.prefixes, tuning.load_bound)
        self._mixes: dict[str, Profile] = {}
        self._fallback = self._scoring(_PLAIN, None)
        picking = {
            name: Profile(name, filters=_filters(name), picker=make()) for name, make in _PICKING.items()
        }
        scoring = {name: self._scoring(name, self._fallback) for name in _SCORING if name != _PLAIN}
        by_chance = Profile(
            "random", filters=_filters("random"), picker=BoundedRandomPicker(tuning.load_bound)
        )
        scoring["bounded-load"] = self._scoring("bounded-load", by_chance)
        prefix = {name: self._by_prefix(name) for name in _PREFIX}
        self._profiles = picking | {_PLAIN: self._fallback} | scoring | prefix | {PAIRS: PairProfile()}
        self._profiles |= {name: self._scoring(name, self._fallback) for name in scorers}

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
        names = [name for name, _ in members]
        filters = _filters(next((name for name in names if name in _READINESS), ""))
        if any(name in _PREFIX for name in names):
            filters.append(self._prefix_load)
        picker = next((_PICKERS[name] for name in names if name in _PICKERS), MaxScorePicker)
        return Profile(
            mixes.canonical(members),
            filters=filters,
            scorers=[
                (self._scorers[name], float(weight)) for name, weight in members if name not in _PICKERS
            ],
            picker=picker(),
            fallback=self._fallback,
            mixed=True,
            own_scale=AS_THEY_ARE,
        )

    def _by_prefix(self, name: str) -> Profile:
        return Profile(
            name,
            filters=[*_filters(name), self._prefix_load],
            scorers=[(self._scorers[name], 1.0)],
            picker=MaxScorePicker(),
            fallback=self._fallback,
        )

    def _scoring(self, name: str, fallback: Profile | None) -> Profile:
        return Profile(
            name,
            filters=_filters(name),
            scorers=[(self._scorers[name], 1.0)],
            picker=MaxScorePicker(),
            fallback=fallback,
        )


def build(tuning: Tuning = _DEFAULT, scorers: Mapping[str, Scorer] = _NONE) -> Policies:
    """One set of policies for one server; some remember whose turn it is. See `Policies`."""
    return Policies(tuning, scorers)


def _filters(policy: str) -> list[Filter]:
    return [ReachableFilter()] if policy in _ADAPTER_BLIND else [ReachableFilter(), LoraAffinityFilter()]
