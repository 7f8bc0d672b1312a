"""Who can serve a request and what they last said of themselves: frozen values that every layer shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One address that answers for one or more models: a pod and a port of it.

    Attributes:
        name: what people call it (the pod's name); unique in a snapshot.
        address: ``ip:port``, IPv6 in brackets, exactly as Envoy's ``override_host`` reads it.
        models: the names of the models it serves, LoRA adapters included.
        engine: the dialect its metrics are in, a key of ``engines.dialects``.
        labels: the pod's labels, for selectors.
    """

    name: str
    address: str
    models: tuple[str, ...]
    engine: str = "vllm"
    labels: Mapping[str, str] = _NOTHING


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said of itself in one scrape. A field is None where the engine does not tell it.

    Attributes:
        at: monotonic seconds at which the answer was read.
        running: requests in the running batch.
        waiting: requests queued in the engine.
        kv_cache_usage: share of KV-cache blocks in use, 0 to 1.
        prefix_cache_hit_rate: hits / queries over the engine's life, 0 to 1.
        generation_tokens_per_second: tokens generated per second between the last two scrapes.
        requests_per_second: requests finished per second between the last two scrapes.
        mem_utilization: share of accelerator memory in use, 0 to 1.
    """

    at: float
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    prefix_cache_hit_rate: float | None = None
    generation_tokens_per_second: float | None = None
    requests_per_second: float | None = None
    mem_utilization: float | None = None


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as the scraper knows it.

    Attributes:
        stats: the last good scrape, however old; None before the first.
        failures: scrapes that failed in a row since then.
        error: why the last scrape failed, None when it did not.
        reachable: False while connections to the endpoint are refused or time out.
    """

    stats: EngineStats | None = None
    failures: int = 0
    error: str | None = None
    reachable: bool = True


class Snapshot:
    """Everyone who may be chosen at one moment; never changed, only replaced."""

    __slots__ = ("by_address", "by_model", "endpoints", "models")

    def __init__(self, endpoints: Iterable[Endpoint] = ()) -> None:
        self.endpoints: tuple[Endpoint, ...] = tuple(sorted(endpoints, key=lambda endpoint: endpoint.address))
        self.by_address: Mapping[str, Endpoint] = {endpoint.address: endpoint for endpoint in self.endpoints}
        by_model: dict[str, list[Endpoint]] = {}
        for endpoint in self.endpoints:
            for model in endpoint.models:
                by_model.setdefault(model, []).append(endpoint)
        self.by_model: Mapping[str, tuple[Endpoint, ...]] = {
            model: tuple(served_by) for model, served_by in sorted(by_model.items())
        }
        self.models: tuple[str, ...] = tuple(self.by_model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and other.endpoints == self.endpoints

    def __hash__(self) -> int:
        return hash(self.endpoints)
