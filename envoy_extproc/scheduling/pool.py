"""Who may be chosen at all: the endpoints of the model, within what pins and subset hints allow."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.errors import BadPin, ModelNotFound, NoReadyEndpoint
from envoy_extproc.scheduling.interfaces import SchedulingRequest


def pool(
    snapshot: Snapshot, request: SchedulingRequest, *, allow_pinning: bool = False
) -> Sequence[Endpoint]:
    """The endpoints `request` may go to, at least one.

    A request that names no model goes to the only model's endpoints where there is only one, else to any.

    Raises:
        ModelNotFound: nobody serves a model of that name.
        NoReadyEndpoint: nobody is there, or nobody whom the subset hint allows.
        BadPin: the pin names no endpoint of the model, or pinning is off.
    """
    served_by = _of_model(snapshot, request.model)
    if request.subset is not None:
        served_by = [endpoint for endpoint in served_by if _allowed(endpoint.address, request.subset)]
        if not served_by:
            raise NoReadyEndpoint("No endpoint that the gateway allows for this request is ready.")
    if request.pin is not None:
        served_by = [_pinned(served_by, request.pin, allow_pinning=allow_pinning)]
    return served_by


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
