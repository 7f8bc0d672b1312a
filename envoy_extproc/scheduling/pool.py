"""Who may be chosen at all: the endpoints of the model, within what subset hints, label selectors and pins allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.errors import BadPin, ModelNotFound, NoReadyEndpoint
from envoy_extproc.scheduling import selectors
from envoy_extproc.scheduling.interfaces import SchedulingRequest


def pool(
    snapshot: Snapshot, request: SchedulingRequest, *, allow_pinning: bool = False
) -> Sequence[Endpoint]:
    """The endpoints `request` may go to, at least one.

    A request that names no model goes to the only model's endpoints where there is only one, else to any.

    Raises:
        ModelNotFound: nobody serves a model of that name.
        NoReadyEndpoint: nobody is there, or nobody whom the subset hint and the selector allow.
        BadPin: the pin names no endpoint that is left, or pinning is off.
        BadSelector: the selector cannot be read.
    """
    selector = None if request.selector is None else selectors.parse(request.selector)
    served_by = _of_model(snapshot, request.model)
    if request.subset is not None:
        served_by = [endpoint for endpoint in served_by if _allowed(endpoint.address, request.subset)]
        if not served_by:
            raise NoReadyEndpoint("No endpoint that the gateway allows for this request is ready.")
    if selector is not None:
        served_by = [endpoint for endpoint in served_by if selector.matches(endpoint.labels)]
        if not served_by:
            raise NoReadyEndpoint("No endpoint that the header external-filter selects is ready.")
    if request.pin is not None:
        served_by = [_pinned(served_by, request.pin, allow_pinning=allow_pinning)]
    return served_by


def left_out(
    snapshot: Snapshot, request: SchedulingRequest, *, allow_pinning: bool = False
) -> Mapping[str, str]:
    """Why endpoints of the model are not in `pool(request)`, by address: `subset`, `external-filter` or `pin`.

    Raises:
        GatewayError: see `pool`.
    """
    steps = {
        "subset": msgspec.structs.replace(request, selector=None, pin=None),
        "external-filter": msgspec.structs.replace(request, pin=None),
        "pin": request,
    }
    before = _of_model(snapshot, request.model)
    reasons: dict[str, str] = {}
    for step, wanted in steps.items():
        stay = {endpoint.address for endpoint in pool(snapshot, wanted, allow_pinning=allow_pinning)}
        for endpoint in before:
            if endpoint.address not in stay:
                reasons.setdefault(endpoint.address, step)
    return reasons


def _of_model(snapshot: Snapshot, model: str | None) -> Sequence[Endpoint]:
    if not snapshot.endpoints:
        raise NoReadyEndpoint("No endpoint is ready.")
    if model is None:
        return snapshot.endpoints  # of the only model where there is only one: every endpoint serves it
    served_by = snapshot.by_model.get(model)
    if served_by is None:
        raise ModelNotFound(f"The model `{model[:256]}` does not exist.", param="model")
    return served_by


def _allowed(address: str, subset: Sequence[str]) -> bool:
    return address in subset or address.rpartition(":")[0].strip("[]") in subset


def _pinned(served_by: Sequence[Endpoint], pin: str, *, allow_pinning: bool) -> Endpoint:
    if not allow_pinning:
        raise BadPin("The header target-pod-ip is not allowed here.", param="target-pod-ip")
    for endpoint in served_by:
        if pin in (endpoint.address, endpoint.address.rpartition(":")[0].strip("[]")):
            return endpoint
    raise BadPin("The header target-pod-ip names no ready endpoint of this model.", param="target-pod-ip")
