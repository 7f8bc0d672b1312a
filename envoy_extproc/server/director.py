"""Joins what is known of every endpoint at one moment into candidates, and lets the policy decide."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.errors import UnknownStrategy
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.scheduling.pool import pool
from envoy_extproc.scheduling.profile import Profile

_UNKNOWN = EngineState()


class RoutingRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says of routing.

    Attributes:
        policy: for whoever asks for none.
        model_policies: instead of `policy`, by model.
        tries: endpoints named to Envoy for one request, some more than once where there are fewer.
        allow_pinning: whether `target-pod-ip` is honoured.
        max_stats_age: seconds after which what an engine said is not believed.
    """

    policy: str = "least-request"
    model_policies: Mapping[str, str] = msgspec.field(default_factory=dict)
    tries: int = 3
    allow_pinning: bool = False
    max_stats_age: float = 2.0


class Director:
    """Decides for each request by the state of the moment.

    Args:
        profiles: the policies by name.
        rules: what the operator says.
        in_flight: exchanges on an address now.
        states: what the scraper knows, by address.
        rng: breaks ties.
        avoided: whether the pod at an address failed so lately that another one should be asked.
        remember: how many of the last decisions are kept for people to look at.
    """

    def __init__(
        self,
        *,
        profiles: Mapping[str, Profile],
        rules: RoutingRules,
        in_flight: Callable[[str], int],
        states: Mapping[str, EngineState],
        rng: random.Random,
        avoided: Callable[[str, float], bool] = lambda _address, _now: False,
        remember: int = 100,
    ) -> None:
        self.snapshot = Snapshot()
        self.decisions: deque[tuple[float, SchedulingRequest, Decision]] = deque(maxlen=remember)
        self._profiles = profiles
        self._rules = rules
        self._in_flight = in_flight
        self._states = states
        self._rng = rng
        self._avoided = avoided

    def update(self, snapshot: Snapshot) -> None:
        """Decides among the endpoints of `snapshot` from now on; policies forget models that nobody serves any more."""
        self.snapshot = snapshot
        for profile in self._profiles.values():
            profile.keep_models(snapshot.by_model.keys())

    def lookup(self, address: str) -> Endpoint | None:
        """The endpoint of an address; None if discovery does not know it."""
        return self.snapshot.by_address.get(address)

    def schedule(self, request: SchedulingRequest, now: float) -> Decision:
        """Where `request` goes at `now`, monotonic seconds.

        Raises:
            GatewayError: it goes nowhere; the error says why.
        """
        profile = self._profile(request)
        endpoints = pool(self.snapshot, request, allow_pinning=self._rules.allow_pinning)
        candidates = self.candidates(endpoints, now)
        decision = profile.run(request, candidates, self._rng, tries=self._rules.tries)
        self.decisions.append((now, request, decision))
        return decision

    def candidates(self, endpoints: Sequence[Endpoint], now: float) -> list[Candidate]:
        """The endpoints as they are at `now`."""
        states, in_flight, oldest = self._states, self._in_flight, now - self._rules.max_stats_age
        avoided = self._avoided
        joined = []
        for endpoint in endpoints:
            address = endpoint.address
            state = states.get(address, _UNKNOWN)
            joined.append(
                Candidate(
                    endpoint,
                    in_flight(address),
                    _fresh(state.stats, oldest),
                    state.reachable and not avoided(address, now),
                )
            )
        return joined

    def _profile(self, request: SchedulingRequest) -> Profile:
        name = request.policy
        if name is None:
            name = self._rules.model_policies.get(request.model or "", self._rules.policy)
        profile = self._profiles.get(name)
        if profile is None:
            known = ", ".join(self._profiles)
            raise UnknownStrategy(
                f"There is no routing strategy {name[:64]!r}; there are {known}.", param="routing-strategy"
            )
        return profile


def _fresh(stats: EngineStats | None, oldest: float) -> EngineStats | None:
    return stats if stats is not None and stats.at >= oldest else None
