"""The settings of how an endpoint is chosen, for all models and for one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from envoy_extproc.settings.base import Section
from envoy_extproc.settings.tokens import EncodingName, TokensMode


class Breaker(Section):
    """When a pod that fails is left alone, as the answers to requests themselves tell."""

    enabled: bool = True
    """A pod can fail every request and look healthy: vLLM that is told to stop answers 500, and `/health` 200."""
    consecutive_errors: int = Field(default=3, ge=1, le=1000)
    """One error can be the request's own doing, two a coincidence; a pod that fails everything is known after three.
    A connection refused or broken before an answer is nobody else's doing and needs no second one."""
    silent_seconds: float = Field(default=5, gt=0, le=86_400)
    """Clients that leave earlier have changed their mind; a pod that gave no answer to anybody for so long hangs, or its
    queue is such that others are better. Less than clients wait, or nothing is learnt of it."""
    first_seconds: float = Field(default=1, gt=0, le=86_400)
    """A moment of overload is over by then, and a probe a second costs little."""
    longest_seconds: float = Field(default=30, gt=0, le=86_400)
    """A pod that stays broken costs two requests a minute, and one that is well again waits half a minute at most."""

    @model_validator(mode="after")
    def _longest_is_no_less(self) -> Self:
        if self.longest_seconds < self.first_seconds:
            raise ValueError("longest_seconds must not be less than first_seconds")
        return self


class Fairness(Section):
    """How `vtc-basic` counts what users are served, and what it makes of it."""

    window_seconds: float = Field(default=300, ge=1, le=86_400)
    """AIBrix's: who was busy five minutes ago is like anybody else now."""
    input_weight: float = Field(default=1, ge=0, le=1000)
    """Of a prompt token."""
    output_weight: float = Field(default=2, ge=0, le=1000)
    """Of a token of the answer: it costs a pass of its own, so the field counts it twice."""
    apart_tokens: float = Field(default=8000, gt=0, le=1e12)
    """Weighted tokens between the least and the most served user from which on they are kept apart altogether: AIBrix's
    largest bucket. Some requests of a few hundred tokens are no reason."""
    fairness_weight: float = Field(default=1, ge=0, le=1000)
    """How much keeping users apart counts beside load."""
    load_weight: float = Field(default=1, gt=0, le=1000)
    """How much load does."""
    max_users: int = Field(default=4096, ge=1, le=1_000_000)
    """Counted by themselves, in 4 KB each at most. Of more than that, idle ones are forgotten, and those beyond share one."""


class PrefixCache(Section):
    """What `prefix-cache` remembers of prompts, to send each where its beginning is in the KV cache."""

    block_tokens: int = Field(default=64, ge=16, le=4096)
    """Tokens that are told apart as one, at 4 bytes each. vLLM's block has 16; four of them cost a quarter, and a match is
    seen 24 tokens too short on average."""
    max_prompt_blocks: int = Field(default=2048, ge=1, le=65_536)
    """131,072 tokens; prompts that are alike for so long go to one endpoint whatever comes then."""
    blocks_per_endpoint: int = Field(default=31_250, ge=1, le=100_000_000)
    """2 million tokens: the endpoint picker's bound too. Of an engine that tells how many tokens its KV cache has room for, most
    often some hundred thousand, twice as many are remembered: far beyond, matches are none."""
    max_blocks: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    """For all endpoints together, in equal shares, and what one has no room for is the others': 86 MB where no two hold the same, 111 MB where four do."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Of all hashes. null: another one in every process, so that nobody can make up prompts that look alike."""


class Routing(Section):
    """How an endpoint is chosen."""

    policy: str = "least-request"
    """Needs no data but our own, and no workload is bad for it. Several with weights decide together:
    `least-kv-cache:2,least-request:1`."""
    allow_strategy_header: bool = True
    """A client knows best what its request is like. false: `routing-strategy` is not looked at, where tenants are not
    to choose for each other."""
    tries: int = Field(default=3, ge=1, le=10)
    """Endpoints named to Envoy, the first choice and fallbacks for retries: two dead pods lose no request."""
    allow_pinning: bool = False
    """`target-pod-ip` lets clients choose, so it must be wanted."""
    clear_route_cache: bool = False
    """Let Envoy choose its route again by the `model` header: for one route per model; one route for all needs none."""
    load_bound: float = Field(default=1.25, gt=1, le=1000)
    """With `bounded-load` no endpoint gets more than so many times the mean load. A quarter above it is little to wait for;
    nearer to 1, keys leave their home more often."""
    fairness: Fairness = Fairness()
    """See `vtc-basic` in docs/routing.md."""
    prefix_cache: PrefixCache = PrefixCache()
    breaker: Breaker = Breaker()


class AIBrixSection(Section):
    """Its keys are written as AIBrix writes them."""

    model_config = ConfigDict(alias_generator=to_camel)


class ProfileHints(AIBrixSection):
    """What requests a profile is meant for."""

    prompt_tokens_gte: int | None = Field(default=None, ge=0)
    """The prompt has at least so many tokens."""
    prompt_tokens_lt: int | None = Field(default=None, ge=0)
    """It has fewer."""
    max_tokens_gte: int | None = Field(default=None, ge=0)
    """The request allows at least so many for its answer."""
    max_tokens_lt: int | None = Field(default=None, ge=0)
    """It allows fewer."""


class ModelProfile(AIBrixSection):
    """One profile of a model."""

    routing_strategy: str | None = None
    """A name or a mixture, as in `routing.policy`."""
    routing_config: ProfileHints = ProfileHints()
    """For `config-profile: auto`."""
    requests_per_second: None = None
    """Reserved: limits are not there yet."""


_profile = re.compile(r"[ -~]{1,256}")  # what a header can tell


class ModelConfig(AIBrixSection):
    """AIBrix's `model.aibrix.ai/config`."""

    locked_routing_strategy: str | None = None
    """Decides, whatever clients ask for."""
    default_profile: str | None = None
    """For requests that ask for none; null: the one of the name `default`, if there is one."""
    profiles: Mapping[str, ModelProfile] = Field(default_factory=dict)
    """By the names that the header `config-profile` may have."""

    @model_validator(mode="after")
    def _default_is_there(self) -> Self:
        if self.default_profile and self.default_profile not in self.profiles:
            raise ValueError(f"defaultProfile: no profile {self.default_profile!r}")
        return self

    @model_validator(mode="after")
    def _names_can_be_told(self) -> Self:
        for name in self.profiles:
            if not _profile.fullmatch(name):
                raise ValueError(
                    f"profiles: {name[:64]!r} has other than 1 to 256 printable ASCII characters"
                )
        return self

    def named(self) -> Mapping[str, str]:
        """Every policy that is named in it, by key."""
        named = {
            f"profiles.{name}.routingStrategy": profile.routing_strategy
            for name, profile in self.profiles.items()
        } | {"lockedRoutingStrategy": self.locked_routing_strategy}
        return {key: policy for key, policy in named.items() if policy}


class Model(Section):
    """What is different for one model, under its name."""

    policy: str | None = None
    """Instead of `routing.policy`; a client's `routing-strategy` still wins, unless `locked`."""
    locked: bool = False
    """true: `policy` decides, whatever clients ask for by `routing-strategy`."""
    config: ModelConfig | None = None
    """`{lockedRoutingStrategy, defaultProfile, profiles: {name: {routingStrategy, routingConfig}}}` in AIBrix's shape, instead of
    the annotation `model.aibrix.ai/config` of the model's pods; docs/routing.md has what it means."""
    tokens: TokensMode | None = None
    """Instead of `tokens.mode`."""
    encoding: EncodingName | None = None
    """Instead of `tokens.encoding`: models are cut into tokens by encodings of their own."""

    @model_validator(mode="after")
    def _locked_to_a_policy(self) -> Self:
        if self.locked and self.policy is None:
            raise ValueError("locked: true needs a policy")
        return self
