"""Watches HTTPRoutes and says when a model's route is not taken by its Gateways. Nothing is asked per request."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from envoy_extproc.discovery import routes
from envoy_extproc.discovery.kubernetes import called, cancelled, path, raise_what_ended, scopes_of
from envoy_extproc.discovery.kubernetes_api import KubernetesApi
from envoy_extproc.discovery.routes import Route, RouteState
from envoy_extproc.discovery.watch import Health, Pace, Watch
from envoy_extproc.settings import KubernetesSource

log = structlog.get_logger()

_GROUP = "/apis/gateway.networking.k8s.io/v1"
_LOOK_SECONDS = 1.0
"""Between two looks at which models there are: a route that is late by a second is no news."""


class RouteWatcher:
    """The routes of the models.

    Args:
        source: where they are.
        models: the models there are now.
        pace: how long things take.

    Attributes:
        healths: how the watches do, one for each namespace.

    Raises:
        SettingsError: the Kubernetes client is not installed.
    """

    def __init__(
        self, source: KubernetesSource, *, models: Callable[[], Sequence[str]], pace: Pace | None = None
    ) -> None:
        self._source = source
        self._models = models
        self._pace = pace or Pace(page=source.page_size)
        self._rng = random.Random()  # noqa: S311  sets servers apart
        self._api = KubernetesApi(source.kubeconfig, source.context)
        self._routes: dict[tuple[str, str], Route] = {}
        self._changed = asyncio.Event()
        self._told: dict[str, RouteState] = {}
        self.healths: tuple[Health, ...] = ()

    @property
    def states(self) -> tuple[RouteState, ...]:
        """How each model is routed; empty before the first complete list."""
        return tuple(self._told.values())

    def described(self) -> object:
        """The same as /debug/routes shows it."""
        return self.states

    async def run(self) -> None:
        """Follows until it is cancelled.

        Raises:
            SettingsError: the cluster's configuration cannot be used.
        """
        async with AsyncExitStack() as stack:
            api = await stack.enter_async_context(self._api)
            scopes = scopes_of(self._source.route_namespaces or self._source.namespaces, api.namespace)
            self.healths = tuple(Health(called("routes", scope)) for scope in scopes)
            pairs = zip(scopes, self.healths, strict=True)
            tasks = [asyncio.ensure_future(self._watch(api, *pair).run()) for pair in pairs]
            stack.push_async_callback(cancelled, tasks)
            await self._follow(tasks)

    async def _follow(self, tasks: Sequence[asyncio.Future[Any]]) -> None:
        models: Sequence[str] = ()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _LOOK_SECONDS)
            raise_what_ended(tasks)
            if self._changed.is_set() or models != self._models():
                self._changed.clear()
                models = self._models()
                self._tell(models)

    def _watch(self, api: KubernetesApi, scope: str, health: Health) -> Watch[Route]:
        return Watch(
            api,
            path(_GROUP, scope, "httproutes"),
            decode=routes.decode,
            receiver=_Scope(self._routes, scope, self._changed),
            health=health,
            pace=self._pace,
            rng=self._rng,
        )

    def _tell(self, models: Sequence[str]) -> None:
        if not all(health.listed for health in self.healths):
            return
        now = {each.model: each for each in routes.states(models, self._routes.values())}
        for model, each in now.items():
            before = self._told.get(model)
            if each != before and (before is not None or each.state != "accepted"):
                _log(each)
        self._told = now


class _Scope:
    """Keeps what one watch is told."""

    def __init__(self, known: dict[tuple[str, str], Route], scope: str, changed: asyncio.Event) -> None:
        self._known = known
        self._scope = scope
        self._changed = changed

    def listed(self, objects: Iterable[Route]) -> None:
        for key in [key for key in self._known if self._scope in ("", key[0])]:
            del self._known[key]
        self._known.update((_key(each), each) for each in objects)
        self._changed.set()

    def changed(self, each: Route) -> None:
        self._known[_key(each)] = each
        self._changed.set()

    def deleted(self, each: Route) -> None:
        self._known.pop(_key(each), None)
        self._changed.set()


def _key(route: Route) -> tuple[str, str]:
    return route.metadata.namespace, route.metadata.name


def _log(each: RouteState) -> None:
    wrong = {route.name: list(route.wrong) for route in each.routes if route.wrong}
    tell = log.info if each.state == "accepted" else log.warning
    tell("route", model=each.model, state=each.state, wrong=wrong)
