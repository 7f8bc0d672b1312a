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
        metrics_port: where its metrics page is served; None where the dialect knows.
        config: what it says of how its models are to be routed, JSON in AIBrix's shape as it was written; None where it
            says nothing.
    """

    name: str
    address: str
    models: tuple[str, ...]
    engine: str = "vllm"
    labels: Mapping[str, str] = _NOTHING
    metrics_port: int | None = None
    config: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said of itself in one scrape. A field is None where the engine does not tell it.

    Attributes:
        at: monotonic seconds at which the answer was read.
        running: requests in the running batch.
        waiting: requests queued in the engine.
        kv_cache_usage: share of KV-cache blocks in use, 0 to 1.
        prefix_cache_hit_rate: hits / queries over the engine's life, 0 to 1.
        generation_tokens_per_second: tokens generated per second between the last two scrapes.
        prompt_tokens_per_second: prompt tokens processed per second between the last two scrapes.
        requests_per_second: requests finished per second between the last two scrapes.
        mem_utilization: share of accelerator memory in use, 0 to 1.
        utilization: the engine's own word for how busy it is, 0 to 1.
        queue_seconds: how long a request waits in the engine's queue, the mean over the requests finished lately.
        prefill_seconds: how long its prompt takes, likewise.
        decode_seconds: how long its answer takes from the first token on, likewise.
        time_to_first_token: seconds from the request to its first token, likewise.
        time_per_output_token: seconds between two tokens, likewise.
        prompt_tokens_per_request: how long prompts are, likewise.
        generation_tokens_per_request: how long answers are, likewise.
        loras: adapters with requests in the running batch.
        waiting_loras: adapters with requests in the queue.
        max_loras: how many adapters can be in one batch.
        kv_cache_tokens: tokens that its KV cache has room for.
        prefix_cache_hits: prompt tokens that it found in its cache since it began.
        started: when its process began, in seconds since 1970.
        life: how often it was seen to begin anew, by any of its figures: with another number it is empty and knows nothing.
    """

    at: float
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    prefix_cache_hit_rate: float | None = None
    generation_tokens_per_second: float | None = None
    prompt_tokens_per_second: float | None = None
    requests_per_second: float | None = None
    mem_utilization: float | None = None
    utilization: float | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None
    prompt_tokens_per_request: float | None = None
    generation_tokens_per_request: float | None = None
    loras: frozenset[str] | None = None
    waiting_loras: frozenset[str] | None = None
    max_loras: int | None = None
    kv_cache_tokens: float | None = None
    prefix_cache_hits: float | None = None
    started: float | None = None
    life: int = 0


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as an engine lists it under ``/v1/models``.

    Attributes:
        id: its name.
        parent: the base model of a LoRA adapter; None for a model of its own.
        entry: the element of the list as the engine wrote it, JSON.
    """

    id: str
    parent: str | None = None
    entry: bytes = b"{}"


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as the scraper knows it.

    Attributes:
        stats: the last good scrape, however old; None before the first.
        failures: scrapes that failed in a row since then.
        error: why the last scrape failed, None when it did not.
        reachable: False while connections to the endpoint are refused or time out.
        interval: seconds from the last good scrape to the one meant to follow it; what is older than a few of these
            is old.
        served: the models it lists; None until it has been asked, or where it has no such list.
    """

    stats: EngineStats | None = None
    failures: int = 0
    error: str | None = None
    reachable: bool = True
    interval: float = 0.0
    served: tuple[ServedModel, ...] | None = None


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
