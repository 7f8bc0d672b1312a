"""Joins what is known of every endpoint at one moment into candidates, and lets the policy decide."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
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
from envoy_extproc.server.candidates import UNKNOWN, Candidates, Sources
from envoy_extproc.server.model_configs import ModelConfigs
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.prompts import Prompts

_LOOK_SECONDS = 2.0
"""Between two looks at all engines, at most. A new adapter is routed by load until then, which is no mistake; an engine that
begins anew takes longer to load its model."""

_FEW = 3
"""One in so many endpoints of a model: to join a candidate anew takes as long as to see that three have not changed."""


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
        counts: the same by address, always the same object, those at 0 left out; None where it is not at hand.
        states: what the scraper knows, by address.
        rng: breaks ties.
        avoided: whether the pod at an address failed so lately that another one should be asked.
        doubted: the addresses for which that can be so now, always the same object; None: any.
        fresher: what the engine at an address last said, in an answer or in the scrape that is given.
        reports: what that goes by, by address, likewise; None: nothing that could be told.
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
        counts: Mapping[str, int] | None = None,
        avoided: Callable[[str, float], bool] | None = None,
        doubted: Collection[str] | None = None,
        fresher: Callable[[str, EngineStats | None], EngineStats | None] | None = None,
        reports: Mapping[str, object] | None = None,
        chosen: Callable[[str], None] = lambda _address: None,
        fairness: Fairness | None = None,
        prompts: Prompts | None = None,
        remember: int = 100,
    ) -> None:
        self.snapshot = Snapshot()
        self.decisions: deque[tuple[float, SchedulingRequest, Decision]] = deque(maxlen=remember)
        self._profiles, self._rules, self._states = profiles, rules, states
        self._sources = Sources(
            in_flight=in_flight,
            counts=counts,
            states=states,
            max_age=rules.max_stats_age,
            avoided=avoided,
            doubted=doubted,
            fresher=fresher,
            reports=reports,
        )
        self._candidates = Candidates(self._sources)
        self._rng = rng
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
        self._candidates.forget()
        self._configs.update(snapshot)
        self._named = self._names()
        self._profiles.keep_models(snapshot.by_model.keys())
        self._prompts.keep(snapshot.by_address)

    def look(self, now: float) -> None:
        """Looks at all engines, for adapters and for what they say of their caches.

        A decision does so by itself where nobody has for 2 seconds; in a large fleet that takes as long as the decision.
        """
        self._look_again = now + _LOOK_SECONDS
        self._adapters = lora.adapters(self._states.values())
        self._prompts.look(self._states)

    def lookup(self, address: str) -> Endpoint | None:
        """The endpoint of an address; None if discovery does not know it."""
        return self.snapshot.by_address.get(address)

    def is_ready(self, address: str, now: float) -> bool:
        """Whether the pod at an address is reachable and did not fail lately, at `now`."""
        state = self._states.get(address, UNKNOWN)
        return state.reachable and not self._sources.is_avoided(address, now)

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
        if decision.prefill is not None:
            self._chosen(decision.prefill.endpoint.address)
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
        return self._candidates.of(endpoints, now)

    def observed(self, now: float) -> list[tuple[Candidate, EngineState, bool]]:
        """Every endpoint, what the scraper knows of it, and whether requests to it failed lately."""
        endpoints = self.snapshot.endpoints
        return [
            (
                candidate,
                self._states.get(endpoint.address, UNKNOWN),
                self._sources.is_avoided(endpoint.address, now),
            )
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
        share = index.match(blocks).get(decision.chosen.endpoint.address, 0) / len(blocks)
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

    def _join(self, request: SchedulingRequest, now: float) -> tuple[SchedulingRequest, Sequence[Candidate]]:
        endpoints = pool(self.snapshot, request, allow_pinning=self._rules.allow_pinning)
        if now >= self._look_again:
            self.look(now)
        if request.model in self._adapters:
            request = msgspec.structs.replace(request, adapter=True)
        if request.user is not None and self._fairness is not None:
            standing = self._fairness.standing(request.user, now)
            request = msgspec.structs.replace(request, standing=standing)
        return request, self._joined(endpoints, request.model, now)

    def _joined(self, endpoints: Sequence[Endpoint], model: str | None, now: float) -> Sequence[Candidate]:
        """`endpoints` as they are now: a few by themselves, most of the model's out of all of them."""
        snapshot = self.snapshot
        whole = snapshot.endpoints if model is None else snapshot.by_model[model]
        if _FEW * len(endpoints) < len(whole):
            return self._candidates.of(endpoints, now)
        roster = self._candidates.roster(whole, now)
        if endpoints is whole:
            return roster
        return roster.only([endpoint.address for endpoint in endpoints])
