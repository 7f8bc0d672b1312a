"""What each part of the server is given of the settings."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec

from envoy_extproc.engines.scraper import ScrapeSettings
from envoy_extproc.exchange.exchange import ExchangeSettings
from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.configs import ModelConfig
from envoy_extproc.scheduling.fairness import FairnessRules
from envoy_extproc.scheduling.registry import Tuning
from envoy_extproc.server.director import RoutingRules
from envoy_extproc.settings import Settings


def exchange(settings: Settings) -> ExchangeSettings:
    """What every exchange goes by."""
    return ExchangeSettings(
        max_body_bytes=settings.server.max_body_bytes,
        accounting=settings.responses.accounting != "none",
        max_event_bytes=settings.responses.max_event_bytes,
        max_json_bytes=settings.responses.max_json_bytes,
        clear_route_cache=settings.routing.clear_route_cache,
        trust_user=settings.auth.mode == "header",
        load_report=settings.responses.load_report,
    )


def rules(settings: Settings) -> RoutingRules:
    """What the operator says of routing."""
    policies: Mapping[str, str] = {
        name: model.policy for name, model in settings.models.items() if model.policy is not None
    }
    return RoutingRules(
        policy=settings.routing.policy,
        model_policies=policies,
        locked=frozenset(name for name, model in settings.models.items() if model.locked),
        configs={
            name: msgspec.convert(model.config.model_dump(by_alias=True, exclude_none=True), ModelConfig)
            for name, model in settings.models.items()
            if model.config is not None
        },
        allow_strategy_header=settings.routing.allow_strategy_header,
        tries=settings.routing.tries,
        allow_pinning=settings.routing.allow_pinning,
        max_stats_age=settings.engines.max_stats_age_ms / 1000,
    )


def tuning(settings: Settings) -> Tuning:
    """What the operator says of single policies."""
    prefix = settings.routing.prefix_cache
    seed = random.SystemRandom().getrandbits(64) if prefix.seed is None else prefix.seed
    return Tuning(
        load_bound=settings.routing.load_bound,
        fairness=fairness(settings),
        prefix_rule=BlockRule(tokens=prefix.block_tokens, most=prefix.max_prompt_blocks, seed=seed),
        prefix_blocks_per_endpoint=prefix.blocks_per_endpoint,
        prefix_blocks=prefix.max_blocks,
    )


def fairness(settings: Settings) -> FairnessRules:
    """How users are counted."""
    return FairnessRules(**settings.routing.fairness.model_dump())


def scraping(settings: Settings) -> ScrapeSettings:
    """How engines are asked."""
    engines = settings.engines
    return ScrapeSettings(
        interval=engines.scrape_interval_ms / 1000,
        idle_interval=engines.idle_interval_ms / 1000,
        models_interval=engines.models_interval_ms / 1000,
        timeout=engines.scrape_timeout_ms / 1000,
        max_bytes=engines.max_scrape_bytes,
    )
