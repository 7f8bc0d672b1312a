"""The settings: one frozen model per concern, each default with its reason. The only reader of file and environment.

Every key can also come from the environment as ``ENVOY_EXTPROC_<SECTION>__<KEY>``, which wins over the file. An
unknown key, in file or environment, is an error that names it. Variables of other shapes are somebody else's: for a
Service called envoy-extproc Kubernetes puts ``ENVOY_EXTPROC_SERVICE_HOST`` and the like into every pod.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from envoy_extproc import mixes
from envoy_extproc.settings.endpoints import Discovery as Discovery
from envoy_extproc.settings.endpoints import Engines as Engines
from envoy_extproc.settings.endpoints import KubernetesSource as KubernetesSource
from envoy_extproc.settings.endpoints import StaticSource as StaticSource
from envoy_extproc.settings.routing import Breaker as Breaker
from envoy_extproc.settings.routing import Fairness as Fairness
from envoy_extproc.settings.routing import Model as Model
from envoy_extproc.settings.routing import ModelConfig as ModelConfig
from envoy_extproc.settings.routing import ModelProfile as ModelProfile
from envoy_extproc.settings.routing import PrefixCache as PrefixCache
from envoy_extproc.settings.routing import ProfileHints as ProfileHints
from envoy_extproc.settings.routing import Routing as Routing
from envoy_extproc.settings.serving import Auth as Auth
from envoy_extproc.settings.serving import EnvoySettings as EnvoySettings
from envoy_extproc.settings.serving import Limits as Limits
from envoy_extproc.settings.serving import Responses as Responses
from envoy_extproc.settings.serving import Server as Server
from envoy_extproc.settings.serving import State as State
from envoy_extproc.settings.serving import Tls as Tls
from envoy_extproc.settings.tokens import Tokens as Tokens

ENV_PREFIX = "ENVOY_EXTPROC_"


class SettingsError(ValueError):
    """The configuration is wrong; the message says which key and why, a line each."""


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    server: Server = Server()
    discovery: Discovery
    routing: Routing = Routing()
    engines: Engines = Engines()
    responses: Responses = Responses()
    envoy: EnvoySettings = EnvoySettings()
    state: State = State()
    limits: Limits = Limits()
    auth: Auth = Auth()
    tokens: Tokens = Tokens()
    models: Mapping[str, Model] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_server_frees_what_it_counts(self) -> Self:
        if not self.responses.hold_streams and self.envoy.servers:
            raise ValueError(
                "responses.hold_streams: false needs the access log of every request at this server, so no envoy.servers"
            )
        return self

    @model_validator(mode="after")
    def _encodings_are_used(self) -> Self:
        for name, model in self.models.items():
            if model.encoding is not None and (model.tokens or self.tokens.mode) != "tiktoken":
                raise ValueError(f"models.{name}.encoding: is for tiktoken; give `tokens: tiktoken` too")
        return self

    @model_validator(mode="after")
    def _counts_are_in_time(self) -> Self:
        modes = {self.tokens.mode, *(model.tokens for model in self.models.values())}
        if (
            modes & {"tiktoken", "remote"}
            and self.tokens.timeout_ms >= self.envoy.message_timeout_seconds * 1000
        ):
            raise ValueError(
                "tokens.timeout_ms: must be less than Envoy waits, envoy.message_timeout_seconds"
            )
        return self

    @property
    def fail_open(self) -> bool:
        """`envoy.fail_open` with `auto` decided."""
        return self.auth.mode == "none" if self.envoy.fail_open == "auto" else self.envoy.fail_open

    @property
    def policies(self) -> Mapping[str, str]:
        """Every policy that is named, a name or a mixture, by the key it stands under."""
        named = {"routing.policy": self.routing.policy}
        for name, model in self.models.items():
            if model.policy is not None:
                named[f"models.{name}.policy"] = model.policy
            if model.config is not None:
                own = model.config.named().items()
                named |= {f"models.{name}.config.{key}": policy for key, policy in own}
        return named

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  pydantic-settings passes all by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; no .env file and no secrets directory is read."""
        return env_settings, init_settings


def load(path: Path | None, *, policies: tuple[str, ...]) -> Settings:
    """The settings of the file at `path`, with what the environment says instead.

    Args:
        path: a YAML file; None for the environment alone.
        policies: the names a policy may have.

    Raises:
        SettingsError: something in it is wrong.
    """
    return parse({} if path is None else _read(path), policies=policies, source=str(path or "environment"))


def parse(data: Mapping[str, Any], *, policies: tuple[str, ...], source: str = "configuration") -> Settings:
    """The settings in `data`; see `load`."""
    _check_environment(os.environ)
    private = [key for key in data if key.startswith("_")]  # pydantic-settings has arguments of such names
    if private:
        raise SettingsError("\n".join(f"{source}: {key}: unknown key" for key in private))
    try:
        settings = Settings(**data)
    except UnreadableVariable as error:
        raise SettingsError(f"environment: {error}: lists and whole sections are written in JSON") from None
    except ValidationError as error:
        raise SettingsError("\n".join(_sentences(source, error))) from None
    _check_policies(settings, policies, source)
    return settings


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise SettingsError(f"{path}: the file must hold sections: server, discovery, routing, ...")
    return data


def _sentences(source: str, error: ValidationError) -> list[str]:
    lines = []
    for each in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in each["loc"])
        message = (
            "unknown key" if each["type"] == "extra_forbidden" else each["msg"].removeprefix("Value error, ")
        )
        lines.append(f"{source}: {key}: {message}")
    return lines


def _check_policies(settings: Settings, policies: tuple[str, ...], source: str) -> None:
    wrong = []
    for key, policy in settings.policies.items():
        try:
            mixes.parse(policy, policies)
        except mixes.MixError as error:
            wrong.append(f"{source}: {key}: {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))


def _check_environment(environment: Mapping[str, str]) -> None:
    """pydantic-settings passes over variables whose section it does not know; those that are ours must not be.

    Ours has ``__`` behind the prefix. A whole section, which has none, is known by its name alone, and any other name
    without it is no mistake: it may be one of Kubernetes' service links.
    """
    sections = {name.upper() for name in Settings.model_fields}
    for name in environment:
        if name.upper().startswith(ENV_PREFIX):
            section, delimiter, _ = name.upper().removeprefix(ENV_PREFIX).partition("__")
            if delimiter and section not in sections:
                raise SettingsError(f"environment: {name}: unknown key")
