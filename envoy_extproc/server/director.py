"""Joins what is known of every endpoint at one moment into candidates, and lets the policy decide."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.errors import UnknownProfile
from envoy_extproc.scheduling import lora
from envoy_extproc.scheduling.configs import AUTO, ModelConfig, choose
from envoy_extproc.scheduling.explain import Asked, Explanation, Source, explain
from envoy_extproc.scheduling.fairness import VtcScorer
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.scheduling.pool import left_out, pool
from envoy_extproc.scheduling.registry import Policies
from envoy_extproc.scheduling.scorers_prefix import PrefixCacheScorer
from envoy_extproc.server.model_configs import ModelConfigs
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.prompts import Prompts

_UNKNOWN = EngineState()

_MISSED_SCRAPES = 2.5
"""Intervals after which what an engine said is old: one scrape may fail, and the next be late."""

_LOOK_SECONDS = 2.0
"""Between two looks at all engines, for adapters and for what they say of their caches. A new adapter is routed by load until
then, which is no mistake; an engine that begins anew takes longer to load its model."""


class RoutingRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says of routing.

    Attributes:
        policy: for whoever asks for none.
        model_policies: instead of `policy`, by model.
        locked: the models whose policy no client can change.
        configs: the models' own configurations, instead of what their pods say.
        allow_strategy_header: whether `routing-strategy` is honoured.
        tries: endpoints named to Envoy for one request, some more than once where there are fewer.
        allow_pinning: whether `target-pod-ip` is honoured.
        max_stats_age: seconds after which what an engine said is not believed; longer where it is asked more seldom.
    """

    policy: str = "least-request"
    model_policies: Mapping[str, str] = msgspec.field(default_factory=dict)
    locked: AbstractSet[str] = frozenset()
    configs: Mapping[str, ModelConfig] = msgspec.field(default_factory=dict)
    allow_strategy_header: bool = True
    tries: int = 3
    allow_pinning: bool = False
    max_stats_age: float = 2.0


class Director:
    """Decides for each request by the state of the moment.

    Args:
        profiles: the policies.
        rules: what the operator says.
        in_flight: exchanges on an address now.
        states: what the scraper knows, by address.
        rng: breaks ties.
        avoided: whether the pod at an address failed so lately that another one should be asked.
        fresher: what the engine at an address last said, in an answer or in the scrape that is given.
        chosen: is told the address of every endpoint that is chosen.
        fairness: what each user has been served.
        prompts: those under way, of the index that `profiles` go by; None makes them.
        remember: how many of the last decisions are kept for people to look at.

    Raises:
        UnknownStrategy: `rules` name a policy there is not.
    """

    def __init__(
        self,
        *,
        profiles: Policies,
        rules: RoutingRules,
        in_flight: Callable[[str], int],
        states: Mapping[str, EngineState],
        rng: random.Random,
        avoided: Callable[[str, float], bool] = lambda _address, _now: False,
        fresher: Callable[[str, EngineStats | None], EngineStats | None] = lambda _address, scraped: scraped,
        chosen: Callable[[str], None] = lambda _address: None,
        fairness: Fairness | None = None,
        prompts: Prompts | None = None,
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
        self._fresher = fresher
        self._chosen = chosen
        self._fairness = fairness
        self._prompts = Prompts(profiles.prefixes) if prompts is None else prompts
        self._configs = ModelConfigs(rules.configs, profiles.find)
        self._named = self._names()
        self._adapters: AbstractSet[str] = frozenset()
        self._look_again = float("-inf")

    def update(self, snapshot: Snapshot) -> None:
        """Decides among the endpoints of `snapshot` from now on; policies forget models that nobody serves any more."""
        self.snapshot = snapshot
        self._configs.update(snapshot)
        self._named = self._names()
        self._profiles.keep_models(snapshot.by_model.keys())
        self._profiles.prefixes.keep(snapshot.by_address)

    def lookup(self, address: str) -> Endpoint | None:
        """The endpoint of an address; None if discovery does not know it."""
        return self.snapshot.by_address.get(address)

    def is_ready(self, address: str, now: float) -> bool:
        """Whether the pod at an address is reachable and did not fail lately, at `now`."""
        return self._states.get(address, _UNKNOWN).reachable and not self._avoided(address, now)

    def schedule(self, request: SchedulingRequest, now: float) -> Decision:
        """Where `request` goes at `now`, monotonic seconds.

        Raises:
            GatewayError: it goes nowhere; the error says why.
        """
        asked = self._asked(request)
        profile = self._profiles.find(asked.policy)
        request, candidates = self._join(request, now)
        decision = profile.run(request, candidates, self._rng, tries=self._rules.tries)
        if profile.name not in self._named:
            decision = msgspec.structs.replace(decision, improvised=True)
        if asked.profile is not None:
            decision = msgspec.structs.replace(decision, profile=asked.profile)
        if request.standing is not None and decision.weighs(VtcScorer.name):
            decision = msgspec.structs.replace(decision, ticket=self._charge(request, now))
        kept = request
        if request.prompt is not None:
            decision = self._with_match(request, decision, now)
            kept = msgspec.structs.replace(request, prompt=None)  # which may hold megabytes
        profile.remember(request, decision)
        self.decisions.append((now, kept, decision))
        self._chosen(decision.chosen.endpoint.address)
        return decision

    def explain(self, request: SchedulingRequest, now: float) -> Explanation:
        """Where `request` would go at `now`, and why. Nobody's turn, count or chance is changed by it.

        Raises:
            GatewayError: it would go nowhere; the error says why.
        """
        asked = self._asked(request)
        profile = self._profiles.find(asked.policy)
        request, candidates = self._join(request, now)
        chance = random.Random()  # noqa: S311  breaks ties
        chance.setstate(self._rng.getstate())
        decision = profile.run(request, candidates, chance, tries=self._rules.tries)
        out = left_out(self.snapshot, request, allow_pinning=self._rules.allow_pinning)
        others = [endpoint for endpoint in self.snapshot.endpoints if endpoint.address in out]
        return explain(
            decision,
            asked,
            [*candidates, *self.candidates(others, now)],
            model=request.model,
            prompt_tokens=request.prompt_tokens,
            tokenizer=request.tokenizer,
            left_out=out,
        )

    def asked(self, request: SchedulingRequest) -> Asked:
        """Whose policy counts for a `request` that was decided, though the profile it asked for may be gone since."""
        try:
            return self._asked(request)
        except UnknownProfile:
            return self._asked(msgspec.structs.replace(request, profile=None))

    def _asked(self, request: SchedulingRequest) -> Asked:
        """Whose policy counts for `request`: a locked one, the client's, its profile's, the model's, then everybody's.

        Raises:
            UnknownProfile: it asks for a profile there is not.
        """
        rules, model = self._rules, request.model or ""
        own, config = rules.model_policies.get(model), self._configs.get(model)
        profile = choose(config, request) if model in self.snapshot.by_model else None
        source: Source
        if own is not None and model in rules.locked:
            source, policy = "locked", own
        elif config is not None and config.locked_routing_strategy:
            source, policy = "locked", config.locked_routing_strategy
        elif request.policy is not None and rules.allow_strategy_header:
            source, policy = "header", request.policy
        elif profile is not None and profile[1].routing_strategy:
            source, policy = "profile", profile[1].routing_strategy
        elif own is not None:
            source, policy = "model", own
        else:
            source, policy = "routing", rules.policy
        found = profile[0] if profile is not None and request.profile == AUTO else None
        return Asked(policy, source, None if source == "header" else request.policy, found)

    def candidates(self, endpoints: Sequence[Endpoint], now: float) -> list[Candidate]:
        """The endpoints as they are at `now`."""
        states, in_flight, patience = self._states, self._in_flight, self._rules.max_stats_age
        avoided, fresher = self._avoided, self._fresher
        joined = []
        for endpoint in endpoints:
            address = endpoint.address
            state = states.get(address, _UNKNOWN)
            scraped = state.stats
            if scraped is not None and now - scraped.at > patience:
                scraped = _fresh(scraped, state, now, patience)
            stats = fresher(address, scraped)
            if stats is not scraped:
                stats = _fresh(stats, state, now, patience)
            reachable = state.reachable and not avoided(address, now)
            joined.append(Candidate(endpoint, in_flight(address), stats, reachable))
        return joined

    def observed(self, now: float) -> list[tuple[Candidate, EngineState, bool]]:
        """Every endpoint, what the scraper knows of it, and whether requests to it failed lately."""
        endpoints = self.snapshot.endpoints
        return [
            (candidate, self._states.get(endpoint.address, _UNKNOWN), self._avoided(endpoint.address, now))
            for endpoint, candidate in zip(endpoints, self.candidates(endpoints, now), strict=True)
        ]

    def _with_match(self, request: SchedulingRequest, decision: Decision, now: float) -> Decision:
        """The decision, its chosen candidate with the share of the prompt that it holds, where the policy goes by that."""
        if not decision.weighs(PrefixCacheScorer.name):
            return decision
        index = self._profiles.prefixes
        blocks = index.blocks(request)
        if not blocks:
            return decision
        (share,) = index.shares(request, [decision.chosen])
        ticket = self._prompts.sent(blocks, decision.chosen.endpoint, share, now, decision.ticket)
        chosen = msgspec.structs.replace(decision.chosen, prefix_match=share)
        return msgspec.structs.replace(decision, chosen=chosen, ticket=ticket)

    def _names(self) -> set[str]:
        """Every policy that the operator or a pod names."""
        rules = self._rules
        written = (rules.policy, *rules.model_policies.values(), *self._configs.policies)
        return {*self._profiles, *[self._profiles.find(text).name for text in written]}

    def _charge(self, request: SchedulingRequest, now: float) -> str:
        assert self._fairness is not None
        assert request.user is not None
        return self._fairness.charge(request.user, request.prompt_tokens, request.max_output_tokens, now)

    def _join(self, request: SchedulingRequest, now: float) -> tuple[SchedulingRequest, list[Candidate]]:
        endpoints = pool(self.snapshot, request, allow_pinning=self._rules.allow_pinning)
        if now >= self._look_again:
            self._look_again = now + _LOOK_SECONDS
            self._adapters = lora.adapters(self._states.values())
            self._prompts.look(self._states)
        if request.model in self._adapters:
            request = msgspec.structs.replace(request, adapter=True)
        if request.user is not None and self._fairness is not None:
            standing = self._fairness.standing(request.user, now)
            request = msgspec.structs.replace(request, standing=standing)
        return request, self.candidates(endpoints, now)


def _fresh(stats: EngineStats | None, state: EngineState, now: float, patience: float) -> EngineStats | None:
    if stats is None:
        return None
    age = now - stats.at
    return stats if age <= patience or age <= _MISSED_SCRAPES * state.interval else None
