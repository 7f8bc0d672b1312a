"""Whether Envoy has a route for a model, by the status of HTTPRoutes: pure.

Gateway API: the controller of each parent, a Gateway, writes a status of its own. `Accepted` means that the Gateway takes the
route, `ResolvedRefs` that what the route refers to is there and may be referred to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from envoy_extproc.discovery.pods import Meta

_ROUTER = "-router"
"""What AIBrix appends to a model's name to name its route."""

_HEADERS = frozenset({"model", "x-gateway-model-name"})
"""The headers that carry the model: routes per model match them."""

_NEEDED = ("Accepted", "ResolvedRefs")

State = Literal["accepted", "refused", "missing"]


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class _Reference(msgspec.Struct):
    name: str = ""


class _Parent(msgspec.Struct, rename="camel"):
    parent_ref: _Reference = msgspec.field(default_factory=_Reference)
    conditions: list[_Condition] | None = None


class _Status(msgspec.Struct):
    parents: list[_Parent] | None = None


class _Header(msgspec.Struct):
    name: str = ""
    value: str = ""
    type: str | None = None


class _Match(msgspec.Struct):
    headers: list[_Header] | None = None


class _Rule(msgspec.Struct):
    matches: list[_Match] | None = None


class _Spec(msgspec.Struct):
    rules: list[_Rule] | None = None


class Route(msgspec.Struct):
    """An HTTPRoute, the part that counts."""

    metadata: Meta = msgspec.field(default_factory=Meta)
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class Found(msgspec.Struct, frozen=True):
    """A route that is a model's.

    Attributes:
        name: with its namespace.
        wrong: what its parents say against it; empty where they all take it.
    """

    name: str
    wrong: tuple[str, ...]


class RouteState(msgspec.Struct, frozen=True):
    """How a model is routed.

    Attributes:
        model: its name.
        state: ``accepted`` while one of its routes is taken by all of its parents.
        routes: all that are the model's.
    """

    model: str
    state: State
    routes: tuple[Found, ...]


decode = msgspec.json.Decoder(Route).decode
"""A route of the API's JSON; `watch.UNREADABLE` if it is none."""


def states(models: Iterable[str], routes: Iterable[Route]) -> tuple[RouteState, ...]:
    """How each model is routed, in the order of `models`."""
    by_model: dict[str, list[Found]] = {}
    for route in routes:
        found = Found(f"{route.metadata.namespace}/{route.metadata.name}", tuple(_wrong(route)))
        for model in set(_models(route)):
            by_model.setdefault(model, []).append(found)
    return tuple(_state(model, by_model.get(model, ())) for model in models)


def _state(model: str, found: Iterable[Found]) -> RouteState:
    routes = tuple(sorted(found, key=lambda each: each.name))
    taken = any(not each.wrong for each in routes)
    return RouteState(model, "accepted" if taken else "refused" if routes else "missing", routes)


def _models(route: Route) -> Iterator[str]:
    """By an exact match on the model's header, which is Gateway API's default, or by AIBrix's name for it."""
    if route.metadata.name.endswith(_ROUTER):
        yield route.metadata.name.removesuffix(_ROUTER)
    for rule in route.spec.rules or ():
        for match in rule.matches or ():
            for header in match.headers or ():
                if header.name.lower() in _HEADERS and header.type in (None, "Exact"):
                    yield header.value


def _wrong(route: Route) -> Iterator[str]:
    parents = route.status.parents or ()
    if not parents:
        yield "no Gateway has taken it up"
    for parent in parents:
        told = {each.type: each for each in parent.conditions or ()}
        for kind in _NEEDED:
            condition = told.get(kind)
            if condition is None:
                yield f"{parent.parent_ref.name}: {kind} is not told"
            elif condition.status != "True":
                text = f" ({condition.message})" if condition.message else ""
                yield f"{parent.parent_ref.name}: not {kind}: {condition.reason or 'no reason'}{text}"
