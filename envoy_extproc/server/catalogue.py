"""Which models there are, by what discovery says and what the engines themselves list.

Discovery knows a pod's base models. LoRA adapters come and go while a pod runs: what an engine lists under ``/v1/models`` with a parent that
the pod serves, it serves too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState, Snapshot
from envoy_extproc.openai import models

_UNKNOWN = EngineState()


class Catalogue:
    """The models of the present.

    Args:
        states: what the scraper knows, by address.
        avoided: whether the pod at an address failed lately, so that it is not ready at that monotonic second.
        created: seconds since 1970 that stand in entries no engine wrote.
    """

    def __init__(
        self,
        states: Mapping[str, EngineState],
        *,
        avoided: Callable[[str, float], bool] = lambda _address, _now: False,
        created: int = 0,
    ) -> None:
        self._states = states
        self._avoided = avoided
        self._created = created

    def with_adapters(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` with the adapters its engines list; the same one where they list none."""
        endpoints = [self._with_adapters(endpoint) for endpoint in snapshot.endpoints]
        if all(one is other for one, other in zip(endpoints, snapshot.endpoints, strict=True)):
            return snapshot
        return Snapshot(endpoints)

    def _with_adapters(self, endpoint: Endpoint) -> Endpoint:
        served = self._states.get(endpoint.address, _UNKNOWN).served or ()
        adapters = [
            model.id
            for model in served
            if model.parent in endpoint.models and model.id not in endpoint.models
        ]
        if not adapters:
            return endpoint
        return msgspec.structs.replace(endpoint, models=(*endpoint.models, *dict.fromkeys(adapters)))

    def answer(self, snapshot: Snapshot, name: str, now: float) -> bytes | None:
        """What ``GET /v1/models`` says at `now`, or ``/v1/models/{name}``; None where no ready pod serves it."""
        return models.answer(self._entries(snapshot, now), name)

    def _entries(self, snapshot: Snapshot, now: float) -> Mapping[str, bytes]:
        """By name, sorted: the engine's own entry of the first ready pod that has one."""
        found: dict[str, bytes | None] = {}
        for endpoint in snapshot.endpoints:
            state = self._states.get(endpoint.address, _UNKNOWN)
            if not state.reachable or self._avoided(endpoint.address, now):
                continue
            own = {model.id: model.entry for model in state.served or ()}
            for model in endpoint.models:
                found[model] = found.get(model) or own.get(model)
        return {model: found[model] or models.entry(model, self._created) for model in sorted(found)}
