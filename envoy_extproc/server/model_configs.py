"""The configuration of each model: the operator's own, else what one of its pods says by its annotation or label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import structlog

from envoy_extproc.endpoints import Snapshot
from envoy_extproc.errors import UnknownStrategy
from envoy_extproc.scheduling import configs
from envoy_extproc.scheduling.configs import ConfigError, ModelConfig

log = structlog.get_logger()


class ModelConfigs:
    """What counts for each model now.

    Args:
        written: in the configuration, by model; these win.
        check: raises `UnknownStrategy` for what is no policy.

    Raises:
        UnknownStrategy: a policy in `written` is none.
    """

    def __init__(self, written: Mapping[str, ModelConfig], check: Callable[[str], object]) -> None:
        self._written = written
        self._check = check
        self._annotated: dict[str, ModelConfig] = {}
        self._read: dict[str, ModelConfig | None] = {}
        for config in written.values():
            self._check_all(config)

    def get(self, model: str) -> ModelConfig | None:
        """The configuration of `model`; None where it has none."""
        return self._written.get(model) or self._annotated.get(model)

    def update(self, snapshot: Snapshot) -> None:
        """These are the endpoints from now on. Of several that say something, the first by address counts."""
        self._annotated = {}
        before, self._read = self._read, {}
        for endpoint in snapshot.endpoints:
            text = endpoint.config or endpoint.labels.get(configs.LABEL)
            if text is None:
                continue
            if text not in self._read:
                self._read[text] = before[text] if text in before else self._parsed(text, endpoint.name)
            config = self._read[text]
            if config is not None:
                for model in endpoint.models:
                    self._annotated.setdefault(model, config)

    @property
    def policies(self) -> Iterator[str]:
        """Every policy that is named in them."""
        for config in (*self._written.values(), *self._annotated.values()):
            yield from config.policies

    def _parsed(self, text: str, endpoint: str) -> ModelConfig | None:
        try:
            config = configs.parse(text)
            self._check_all(config)
        except (ConfigError, UnknownStrategy) as error:
            log.warning("model_config_ignored", endpoint=endpoint, reason=str(error))
            return None
        if any(profile.requests_per_second is not None for profile in config.profiles.values()):
            log.warning("requests_per_second_ignored", endpoint=endpoint)
        return config

    def _check_all(self, config: ModelConfig) -> None:
        for policy in config.policies:
            self._check(policy)
