"""A model's own configuration: a policy nobody may change, and profiles that a request can ask for. The shape is AIBrix's.

    {"lockedRoutingStrategy": ..., "defaultProfile": ...,
     "profiles": {name: {"routingStrategy": ..., "routingConfig": {hints}, "requestsPerSecond": ...}}}

The header `config-profile` names a profile. ``auto`` stands for the one whose hints a request meets: of those the one with the
most hints, of equals the narrowest, as AIBrix has it (see `Hints.narrowness`). What is null is as if it were not written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from envoy_extproc.errors import UnknownProfile
from envoy_extproc.scheduling.interfaces import SchedulingRequest

LABEL = "model.aibrix.ai/config"
"""The annotation of a pod that holds it in JSON, or the label of an endpoint that is written down."""

AUTO = "auto"
_DEFAULT = "default"
"""The profile for whoever asks for none, where `defaultProfile` does not say otherwise."""


class ConfigError(ValueError):
    """The text is no configuration of a model; the message says why."""


class Hints(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What requests a profile is meant for: tokens of the prompt, and what the answer may have at most."""

    prompt_tokens_gte: int | None = None
    prompt_tokens_lt: int | None = None
    max_tokens_gte: int | None = None
    max_tokens_lt: int | None = None

    def met_by(self, request: SchedulingRequest) -> bool:
        """Whether `request` meets them all; False where there are none, or it does not tell what they ask."""
        prompt = request.prompt_tokens or None
        met = [
            *_met(prompt, self.prompt_tokens_gte, self.prompt_tokens_lt),
            *_met(request.max_output_tokens, self.max_tokens_gte, self.max_tokens_lt),
        ]
        return bool(met) and all(met)

    @property
    def narrowness(self) -> tuple[float, ...]:
        """By which the narrowest is the greatest: how many there are, then each bound in turn, the prompt's lower one first."""
        hints = (self.prompt_tokens_gte, self.prompt_tokens_lt, self.max_tokens_gte, self.max_tokens_lt)
        bounds = (_or(hints[0], 0), -_or(hints[1], math.inf), _or(hints[2], 0), -_or(hints[3], math.inf))
        return sum(hint is not None for hint in hints), *bounds


class ConfigProfile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One profile; `requests_per_second` is read, and nobody holds to it yet."""

    routing_strategy: str | None = None
    routing_config: Hints = Hints()
    requests_per_second: float | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """All of it."""

    locked_routing_strategy: str | None = None
    default_profile: str | None = None
    profiles: Mapping[str, ConfigProfile] = msgspec.field(default_factory=dict)

    @property
    def policies(self) -> Iterator[str]:
        """Every policy that is named in it."""
        if self.locked_routing_strategy:
            yield self.locked_routing_strategy
        for profile in self.profiles.values():
            if profile.routing_strategy:
                yield profile.routing_strategy


_NOTHING = ModelConfig()
_name = re.compile(r"[ -~]{1,256}")  # of a profile: an answer's header tells it


def parse(text: str) -> ModelConfig:
    """The configuration that `text`, JSON, writes. Members of other names are passed over.

    Raises:
        ConfigError: it writes none.
    """
    try:
        config = msgspec.convert(_written(msgspec.json.decode(text)), ModelConfig)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("JSON is nested too deeply") from None
    for name in config.profiles:
        if not _name.fullmatch(name):
            raise ConfigError(f"profiles: {name[:64]!r} has other than 1 to 256 printable ASCII characters")
    if config.default_profile and config.default_profile not in config.profiles:
        raise ConfigError(f"defaultProfile: no profile {config.default_profile[:64]!r}")
    return config


def choose(config: ModelConfig | None, request: SchedulingRequest) -> tuple[str, ConfigProfile] | None:
    """The profile that counts for `request`, by its name; None where there is none for it.

    Raises:
        UnknownProfile: it asks for one there is not.
    """
    config, asked = config or _NOTHING, request.profile
    if asked == AUTO:
        found = _by_hints(config, request)
        if found is not None:
            return found
    elif asked is not None:
        if asked not in config.profiles:
            raise UnknownProfile(
                "The header config-profile names no profile of this model.", param="config-profile"
            )
        return asked, config.profiles[asked]
    name = config.default_profile or _DEFAULT
    return (name, config.profiles[name]) if name in config.profiles else None


def _by_hints(config: ModelConfig, request: SchedulingRequest) -> tuple[str, ConfigProfile] | None:
    """Of equals in everything the first by name, as in AIBrix: members of a JSON object have no order."""
    meant = [each for each in sorted(config.profiles.items()) if each[1].routing_config.met_by(request)]
    return max(meant, key=lambda each: each[1].routing_config.narrowness, default=None)


def _written(value: Any) -> Any:
    """`value` without members that are null, which are as good as absent; a profile that is null has nothing in it."""
    if not isinstance(value, dict):
        return value
    profiles = value.get("profiles")
    known = {name: _written(each) for name, each in value.items() if each is not None}
    if isinstance(profiles, dict):
        known["profiles"] = {name: _written({} if each is None else each) for name, each in profiles.items()}
    return known


def _or(bound: int | None, otherwise: float) -> float:
    return otherwise if bound is None else bound


def _met(value: int | None, at_least: int | None, below: int | None) -> Iterator[bool]:
    if at_least is not None:
        yield value is not None and value >= at_least
    if below is not None:
        yield value is not None and value < below
