"""The policies by name. A new one is a row here and a table in its test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from envoy_extproc.scheduling.filters import ReachableFilter
from envoy_extproc.scheduling.pickers import MaxScorePicker, PowerOfTwoPicker, RandomPicker, RoundRobinPicker
from envoy_extproc.scheduling.profile import Profile
from envoy_extproc.scheduling.scorers import LeastKvCacheScorer, LeastRequestScorer


def _least_request() -> Profile:
    return Profile(
        "least-request",
        filters=[ReachableFilter()],
        scorers=[(LeastRequestScorer(), 1.0)],
        picker=MaxScorePicker(),
    )


def _least_kv_cache() -> Profile:
    return Profile(
        "least-kv-cache",
        filters=[ReachableFilter()],
        scorers=[(LeastKvCacheScorer(), 1.0)],
        picker=MaxScorePicker(),
        fallback=_least_request(),
    )


_FACTORIES: Mapping[str, Callable[[], Profile]] = {
    "random": lambda: Profile("random", filters=[ReachableFilter()], picker=RandomPicker()),
    "round-robin": lambda: Profile("round-robin", filters=[ReachableFilter()], picker=RoundRobinPicker()),
    "least-request": _least_request,
    "power-of-two": lambda: Profile("power-of-two", filters=[ReachableFilter()], picker=PowerOfTwoPicker()),
    "least-kv-cache": _least_kv_cache,
}

POLICIES: tuple[str, ...] = tuple(_FACTORIES)
"""Every name `routing.policy` and the header `routing-strategy` may have."""


def build() -> Mapping[str, Profile]:
    """One set of profiles for one server; some remember whose turn it is."""
    return {name: factory() for name, factory in _FACTORIES.items()}
